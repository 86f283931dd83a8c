package caddysse_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// asEventSource is the headers of an EventSource.
var asEventSource = []string{"Accept: text/event-stream", "Cache-Control: no-cache"}

// sharedSite is a site that shares its streams, with more settings in the
// block.
func sharedSite(up *testUpstream, settings string) string {
	return `
		sse {
			heartbeat off
			share {
				linger 200ms
				` + settings + `
			}
		}
		reverse_proxy ` + up.addr
}

var runIDPattern = regexp.MustCompile(`sse1-[A-Za-z0-9_-]{22}\.\d+`)

// expectBlock waits for a block that contains an id of a run, and returns the
// token of the run. In want, %s stands for the token.
func (f *follower) expectBlock(t testing.TB, want string) (token string) {
	t.Helper()
	got, err := f.wait(func(unread string) bool { return strings.Contains(unread, "\n\n") })
	block, _, _ := strings.Cut(got, "\n\n")
	token, _, _ = strings.Cut(runIDPattern.FindString(block), ".")
	if block += "\n\n"; block != strings.ReplaceAll(want, "%s", token) {
		t.Fatalf("got %.200q (%v), want %.200q", got, err, want)
	}
	f.mu.Lock()
	f.unread = f.unread[len(block):]
	f.mu.Unlock()
	return token
}

// expectFirst waits for the first event of an EventSource's stream, and returns
// the token of its run. n is the number in its id.
func (f *follower) expectFirst(t testing.TB, n int) (token string) {
	t.Helper()
	return f.expectBlock(t, fmt.Sprintf("event: sse\ndata:\nid: %%s.%d\n\n", n))
}

// expectUnknown waits for the event that reports that the client's id is
// unknown.
func (f *follower) expectUnknown(t testing.TB, n int) (token string) {
	t.Helper()
	return f.expectBlock(t, fmt.Sprintf("event: lost\ndata: {\"reason\":\"unknown\"}\nid: %%s.%d\n\n", n))
}

func eventOf(token string, n int) string {
	return fmt.Sprintf("data: %d\nid: %s.%d\n\n", n, token, n)
}

func plainEvent(n int) string { return fmt.Sprintf("data: %d\n\n", n) }

// runs lists runs through the admin API.
func (c *testCaddy) runs(query string) (list struct {
	Runs []struct {
		ID, Run, Name, Use, State, Host, Path, Upstream string
		Clients                                         int
		ClientsTotal                                    int `json:"clients_total"`
		Events, Bytes                                   uint64
	}
	Total int
}) {
	c.t.Helper()
	res, body := c.admin("GET", "/sse/runs"+query)
	if res.StatusCode != http.StatusOK {
		c.t.Fatalf("%s: %s", res.Status, body)
	}
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		c.t.Fatal(err)
	}
	return list
}

// stopRuns asks for the end of every run.
func (c *testCaddy) stopRuns() {
	c.t.Helper()
	for _, run := range c.runs("").Runs {
		c.admin("DELETE", "/sse/runs/"+run.ID)
	}
}

// waitForNoRun waits until there is no run.
func (c *testCaddy) waitForNoRun() {
	c.t.Helper()
	for deadline := time.Now().Add(patience); c.runs("").Total > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("runs are left: %+v", c.runs(""))
		}
	}
}

func TestClientsOfOneKeyShareOneUpstreamStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		first, call := open(t, cl, up, "/"+cl.proto, asEventSource...)
		call.start("text/event-stream", "X-Of-Upstream: yes", "Set-Cookie: a=b")
		res := first.headers(t)
		one := res.follow()
		token := one.expectFirst(t, 0)
		call.send(plainEvent(1))
		one.expect(t, eventOf(token, 1))

		second := cl.get(t, "/"+cl.proto, asEventSource...)
		two := second.follow()
		if again := two.expectFirst(t, 1); again != token {
			t.Errorf("the second client is in run %s, the first in %s", again, token)
		}
		call.send(plainEvent(2) + "data: 3\n")
		one.expect(t, eventOf(token, 2))
		two.expect(t, eventOf(token, 2))
		call.send("\n")
		one.expect(t, eventOf(token, 3))
		two.expect(t, eventOf(token, 3))
		for _, r := range []*reply{res, second} {
			if got := r.Header.Get("X-Of-Upstream"); got != "yes" {
				t.Errorf("X-Of-Upstream: %q", got)
			}
			if got := r.Header.Get("Set-Cookie"); got != "" {
				t.Errorf("Set-Cookie: %q", got)
			}
		}
		call.end()
		one.expectEnd(t)
		two.expectEnd(t)
		entry := c.waitForLog("run ended", 0)
		if entry["reason"] != "upstream_closed" || entry["clients"] != 2.0 || entry["events"] != 3.0 {
			t.Errorf("%v", entry)
		}
	})
}

func TestAClientThatComesBackGetsWhatItHasMissed(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	res := first.headers(t)
	one := res.follow()
	token := one.expectFirst(t, 0)
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	c.waitForLog("stream closed", 0)
	call.send(plainEvent(2))

	back := cl.get(t, "/", append(asEventSource, "Last-Event-ID: "+token+".1")...)
	again := back.follow()
	again.expect(t, eventOf(token, 2))
	call.send(plainEvent(3))
	again.expect(t, eventOf(token, 3))
	call.end()
	again.expectEnd(t)
	entry := c.waitForLog("stream closed", 1)
	if entry["resumed"] != true || entry["missed"] != 0.0 || entry["last_event_id"] != token[:9]+"….3" || entry["run"] != token[:9]+"…" {
		t.Errorf("%v", entry)
	}
}

func TestTheRunStaysForAWhileWhenItsLastClientHasGone(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	client, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	res := client.headers(t)
	res.follow().expectFirst(t, 0)
	left := time.Now()
	res.leave()
	call.expectGone()
	if stayed := time.Since(left); stayed < 200*time.Millisecond {
		t.Errorf("it stayed for %v", stayed)
	}
	if entry := c.waitForLog("run ended", 0); entry["reason"] != "client_closed" {
		t.Errorf("%v", entry)
	}
}

func TestAFailureIsGivenToAllThatWait(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	const clients = 20
	first, call := open(t, cl, up, "/", asEventSource...)
	all := []*exchange{first}
	for range clients - 1 {
		all = append(all, cl.begin(cl.request(t, "GET", "/", nil, asEventSource...)))
	}
	for deadline := time.Now().Add(patience); c.runs("").Runs[0].Clients < clients; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not all wait")
		}
	}
	call.startWith(http.StatusServiceUnavailable, "Retry-After: 7", "Content-Type: text/plain")
	call.send("away")
	call.end()
	for _, e := range all {
		res := e.headers(t)
		body, err := res.text()
		if res.StatusCode != 503 || res.Header.Get("Retry-After") != "7" || body != "away" || err != nil {
			t.Fatalf("%s, Retry-After %q, %q, %v", res.Status, res.Header.Get("Retry-After"), body, err)
		}
	}
	// A failed run is not remembered.
	next, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	res := next.headers(t)
	res.follow().expectFirst(t, 0)
	res.leave()
	call.expectGone()
}

func TestAnAnswerThatIsNoStreamIsEachClientsOwn(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", append(asEventSource, "X-Client: 1")...)
	if got := call.Header.Get("X-Client"); got != "" {
		t.Fatalf("the run's request has a client's header: %q", got)
	}
	call.start("text/plain")
	call.end()
	own := up.accept(t)
	if got := own.Header.Get("X-Client"); got != "1" {
		t.Errorf("X-Client %q", got)
	}
	own.start("text/plain")
	own.send("mine")
	own.end()
	if body, err := first.headers(t).text(); body != "mine" || err != nil {
		t.Errorf("%q, %v", body, err)
	}
	// The next client does not even try to share.
	second, call := open(t, cl, up, "/", append(asEventSource, "X-Client: 2")...)
	if got := call.Header.Get("X-Client"); got != "2" {
		t.Errorf("X-Client %q", got)
	}
	call.start("text/event-stream")
	follower := second.headers(t).follow()
	call.send("data: x\n\n")
	follower.expect(t, "data: x\n\n")
	call.end()
	follower.expectEnd(t)
}

func TestARunThatIsLeftBeforeItsAnswerIsNoAnswerThatIsNoStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	ctx, leave := context.WithCancel(t.Context())
	cl.begin(cl.request(t, "GET", "/", nil, asEventSource...).WithContext(ctx))
	call := up.accept(t)
	leave()
	call.expectGone()
	eventually(t, "the run is gone", func() bool { return len(c.runs("").Runs) == 0 })
	first, call := open(t, cl, up, "/", append(asEventSource, "X-Client: 1")...)
	if call.Header.Get("X-Client") != "" {
		t.Error("the next client has a stream of its own")
	}
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	call.end()
	one.expectEnd(t)
}

func TestTheAdminAPIListsAndEndsRuns(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	client, call := open(t, cl, up, "/live", asEventSource...)
	call.start("text/event-stream")
	follower := client.headers(t).follow()
	token := follower.expectFirst(t, 0)
	call.send(plainEvent(1))
	follower.expect(t, eventOf(token, 1))
	list := c.runs("")
	if list.Total != 1 || len(list.Runs) != 1 {
		t.Fatalf("%+v", list)
	}
	run := list.Runs[0]
	if run.Run != token[:9]+"…" || run.Use != "share" || run.State != "open" || run.Clients != 1 || run.Events != 1 || run.Path != "/live" || run.Upstream != up.addr {
		t.Errorf("%+v", run)
	}
	if res, body := c.admin("GET", "/sse/runs/"+run.ID); res.StatusCode != 200 || strings.Contains(body, token) {
		t.Errorf("%s: %s", res.Status, body)
	}
	if res, _ := c.admin("GET", "/sse/runs/"+strings.Repeat("0", 8)); res.StatusCode != 404 {
		t.Error(res.Status)
	}
	if res, _ := c.admin("GET", "/sse/runs?nmae=x"); res.StatusCode != 400 {
		t.Error(res.Status)
	}
	if res, body := c.admin("DELETE", "/sse/runs/"+run.ID); res.StatusCode != 202 || strings.TrimSpace(body) != `{"ending":1}` {
		t.Errorf("%s: %s", res.Status, body)
	}
	follower.expectEnd(t)
	call.expectGone()
	if entry := c.waitForLog("run ended", 0); entry["reason"] != "admin" {
		t.Errorf("%v", entry)
	}
	if entry := c.waitForLog("stream closed", 0); entry["reason"] != "admin" {
		t.Errorf("%v", entry)
	}
}

func TestAnUpstreamsIDsAreKept(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", append(asEventSource, "Last-Event-ID: a7")...)
	if got := call.Header.Get("Last-Event-ID"); got != "a7" {
		t.Errorf("Last-Event-ID %q", got)
	}
	call.start("text/event-stream")
	one := first.headers(t).follow()
	call.send("id: a8\ndata: 8\n\n")
	one.expect(t, "id: a8\ndata: 8\n\n")
	call.send("id: a9\ndata: 9\n\n")
	one.expect(t, "id: a9\ndata: 9\n\n")
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: a8")...).follow()
	two.expect(t, "id: a9\ndata: 9\n\n")
	three := cl.get(t, "/", asEventSource...).follow()
	three.expect(t, "event: sse\ndata:\nid: a9\n\n")
	four := cl.get(t, "/", append(asEventSource, "Last-Event-ID: a7")...).follow()
	four.expect(t, "id: a8\ndata: 8\n\nid: a9\ndata: 9\n\n")
	call.send("id: a10\ndata: 10\n\n")
	call.end()
	for _, f := range []*follower{one, two, three, four} {
		f.expect(t, "id: a10\ndata: 10\n\n")
		f.expectEnd(t)
	}
}

func TestAnIDOfOursThatNobodyKnowsIsToldAsLost(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/?lastEventId=sse1-AbCdEfGhIjKlMnOpQrStUg.3&x=1", asEventSource...)
	if got := call.RequestURI; got != "/?x=1" {
		t.Errorf("the upstream sees %q", got)
	}
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectUnknown(t, 0)
	call.abort()
	one.expectAbort(t)
}

func TestHalfAnEventIsNobodys(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	first, call := open(t, c.client("h1"), up, "/", "Accept: text/event-stream", notEventSource)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	call.send("data: 1\n\ndata: half\n")
	call.end()
	got, err := one.rest()
	id := runIDPattern.FindString(got)
	if got != "data: 1\nid: "+id+"\n\n" || err != io.EOF {
		t.Errorf("%q, %v", got, err)
	}
}

func TestASharedRunsUpstreamIsAskedAgain(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			name `+t.Name()+`
			heartbeat off
			upstream_retry 20s
			share
		}
		reverse_proxy `+up.addr)
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	call.send("retry: 100\nid: 1\ndata: 1\n\nid: 2\ndata: half")
	one.expect(t, "retry: 100\nid: 1\ndata: 1\n\n")
	call.abort()

	call = up.accept(t)
	if got := call.Header.Get("Last-Event-ID"); got != "1" {
		t.Errorf("Last-Event-ID %q", got)
	}
	call.startWith(503)
	call.end()
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: 1")...).follow()
	call = up.accept(t)
	call.start("text/event-stream")
	call.send("\uFEFFid: 2\ndata: 2\n\n")
	one.expect(t, "id: 2\ndata: 2\n\n")
	two.expect(t, "retry: 100\n\nid: 2\ndata: 2\n\n")
	call.abort()
	call = up.accept(t)
	call.startWith(404)
	call.end()
	one.expectEnd(t)
	two.expectEnd(t)
	entry := c.waitForLog("stream closed", 0)
	if entry["reason"] != "upstream_error" || entry["retries"] != 3.0 && entry["retries"] != 2.0 {
		t.Errorf("%v", entry)
	}
}

func TestNothingOfAClientReachesTheUpstreamOfASharedRun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	auth := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Auth-User", "user of "+r.Header.Get("X-Secret"))
	})
	c := startCaddy(t, `
		request_header X-By-Site {http.request.header.X-Secret}
		vars secret {http.request.header.X-Secret}
		map {http.request.header.X-Secret} {mapped} {
			default "{http.request.header.X-Secret}"
		}
		route {
			forward_auth `+auth.addr+` {
				uri /
				copy_headers X-Auth-User
			}
			header >X-Edited (.*) "$1 {http.request.header.X-Secret}"
			sse {
				share X-Tenant
			}
			reverse_proxy `+up.addr+` {
				header_up X-Header {http.request.header.X-Secret}
				header_up X-IP {client_ip}
				header_up X-Remote {http.request.remote.host}
				header_up X-Var {http.vars.secret}
				header_up X-Mapped {mapped}
				header_up X-User {http.auth.user.id}
				header_up X-UUID {http.request.uuid}
				header_up X-TLS "{http.request.tls.client.subject} {http.request.tls.cipher_suite}"
				header_up X-Cookie {http.request.cookie.session}
				header_up X-Tenant-Is {http.request.header.X-Tenant}
			}
		}`)
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		secret := "secret-" + proto
		headers := append(asEventSource, "X-Secret: "+secret, "Cookie: session="+secret, "Authorization: Bearer "+secret,
			"X-Forwarded-For: 198.51.100.7", "X-Forwarded-Host: "+secret, "Forwarded: for="+secret, "Via: 1.1 "+secret,
			"User-Agent: "+secret, "Referer: https://"+secret, "X-Tenant: blue", "Last-Event-ID: ")
		first, call := open(t, cl, up, "/"+proto+"?token=shared", headers...)
		for field, values := range call.Header {
			for _, value := range values {
				if strings.Contains(value, secret) || strings.Contains(value, "198.51.100.7") ||
					field != "X-Forwarded-Host" && strings.Contains(value, "127.0.0.1") {
					t.Errorf("%s: the upstream sees %s: %q", proto, field, value)
				}
			}
		}
		if got := call.Header.Get("X-Tenant-Is"); got != "blue" {
			t.Errorf("%s: what the key names is %q", proto, got)
		}
		if got := call.Header.Get("X-Ip"); got != "192.0.2.1" {
			t.Errorf("%s: client_ip is %q", proto, got)
		}
		if got := call.RequestURI; got != "/"+proto+"?token=shared" {
			t.Errorf("%s: URI %q", proto, got)
		}
		call.start("text/event-stream", "X-Edited: of upstream", "Set-Cookie: a="+secret, "Trailer: X-T", "Date: then", "Alt-Svc: h3", "Via: 1.1 x")
		one := first.headers(t)
		one.follow().expectFirst(t, 0)
		headers[2] = "X-Secret: other"
		second := cl.get(t, "/"+proto+"?token=shared", headers...)
		second.follow().expectFirst(t, 0)
		if a, b := one.Header.Get("X-Edited"), second.Header.Get("X-Edited"); a != "of upstream "+secret || b != "of upstream other" {
			t.Errorf("%s: X-Edited is %q and %q", proto, a, b)
		}
		for _, field := range []string{"Set-Cookie", "Trailer"} {
			if got := second.Header.Get(field); got != "" {
				t.Errorf("%s: %s: %q", proto, field, got)
			}
		}
		call.end()
	}
}

func TestClientsOfDifferentKeysShareNothing(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			heartbeat off
			share Authorization {http.request.cookie.session} {
				linger 100ms
			}
		}
		reverse_proxy `+up.addr)
	cl := c.client("h1")
	requests := map[string][]string{
		"/a":      {},
		"/b":      {},
		"/a?x=1":  {},
		"/a?x=2":  {},
		"/a#auth": {"Authorization: Bearer 1"},
		"/a#2":    {"Authorization: Bearer 2"},
		"/a#3":    {"Cookie: session=1"},
		"/a#4":    {"Cookie: session=2"},
		"/a#5":    {"Origin: https://one.example"},
		"/a#6":    {"Origin: https://two.example"},
	}
	for path, headers := range requests {
		client, call := open(t, cl, up, path, append(asEventSource, headers...)...)
		call.start("text/event-stream")
		client.headers(t).follow().expectFirst(t, 0)
	}
	other := cl.request(t, "GET", "/a", nil, asEventSource...)
	other.Host = "other.example"
	client := cl.begin(other)
	call := up.accept(t)
	call.start("text/event-stream")
	client.headers(t).follow().expectFirst(t, 0)
}

func TestRequestsOfOtherKindsShareNothing(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	for _, r := range []*http.Request{
		cl.request(t, "POST", "/", nil, asEventSource...),
		cl.request(t, "GET", "/", strings.NewReader("body"), asEventSource...),
		cl.request(t, "GET", "/", nil, "Accept: text/html, text/event-stream"),
		cl.request(t, "GET", "/", nil, append(asEventSource, "Mcp-Session-Id: 1")...),
		cl.request(t, "GET", "/", nil, append(asEventSource, "X-Client: 1", "Connection: Upgrade", "Upgrade: x")...),
	} {
		r.Header.Set("X-Client", "1")
		client := cl.begin(r)
		call := up.accept(t)
		if call.Header.Get("X-Client") != "1" {
			t.Errorf("%s %v is shared", r.Method, r.Header)
		}
		call.start("text/event-stream")
		call.send(plainEvent(1))
		call.end()
		if body, err := client.headers(t).text(); body != plainEvent(1) || err != nil {
			t.Errorf("%q, %v", body, err)
		}
	}
}

func TestATrustedProxySaysSchemeAndHost(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withGlobal("servers {\n trusted_proxies static private_ranges \n}"))
	cl := c.client("h1")
	forwarded := append(asEventSource, "X-Forwarded-For: 198.51.100.7", "X-Forwarded-Proto: https", "X-Forwarded-Host: site.example")
	first, call := open(t, cl, up, "/", forwarded...)
	for field, want := range map[string]string{"X-Forwarded-Proto": "https", "X-Forwarded-Host": "site.example"} {
		if got := call.Header.Get(field); got != want {
			t.Errorf("%s is %q, want %q", field, got, want)
		}
	}
	if got := call.Header.Get("X-Forwarded-For"); strings.Contains(got, "198.51.100.7") || strings.Contains(got, "127.0.0.1") {
		t.Errorf("X-Forwarded-For %q", got)
	}
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	forwarded[2] = "X-Forwarded-For: 198.51.100.8" // this must make no difference
	two := cl.get(t, "/", forwarded...).follow()
	two.expectFirst(t, 0)
	forwarded[4] = "X-Forwarded-Host: other.example"
	three, another := open(t, cl, up, "/", forwarded...)
	another.start("text/event-stream")
	three.headers(t).follow().expectFirst(t, 0)
}

func TestAnIDLikeOursFromTheUpstreamIsTheUpstreams(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	const inner = "sse1-AbCdEfGhIjKlMnOpQrStUg"
	first, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	call.send("event: sse\ndata:\nid: " + inner + ".0\n\n" + eventOf(inner, 1))
	one.expect(t, "event: sse\ndata:\nid: "+inner+".0\n\n"+eventOf(inner, 1))
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: "+inner+".0")...).follow()
	two.expect(t, eventOf(inner, 1))
	// A client whose id the journal does not have gets its own upstream stream.
	three := cl.get(t, "/", append(asEventSource, "Last-Event-ID: sse1-BbCdEfGhIjKlMnOpQrStUg.7")...).follow()
	own := up.accept(t)
	if got := own.Header.Get("Last-Event-ID"); got != "sse1-BbCdEfGhIjKlMnOpQrStUg.7" {
		t.Errorf("Last-Event-ID %q", got)
	}
	own.start("text/event-stream")
	own.send(eventOf(inner, 1))
	three.expect(t, eventOf(inner, 1))
	call.end()
	for _, f := range []*follower{one, two, three} {
		f.expectEnd(t)
	}
}

func TestALingeringRunGivesItsPlaceToANewStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			name `+t.Name()+`
			heartbeat off
			max_streams 1
			share {
				linger 1h
			}
		}
		reverse_proxy `+up.addr, withAdmin())
	cl := c.client("h1")
	first, call := open(t, cl, up, "/a", asEventSource...)
	call.start("text/event-stream")
	res := first.headers(t)
	token := res.follow().expectFirst(t, 0)
	res.leave()
	c.waitForLog("stream closed", 0)

	// A client that comes back to a run does not make it end.
	back := cl.get(t, "/a", append(asEventSource, "Last-Event-ID: "+token+".0")...)
	follower := back.follow()
	call.send(plainEvent(1))
	follower.expect(t, eventOf(token, 1))
	if res := cl.get(t, "/b", asEventSource...); res.StatusCode != 503 {
		t.Errorf("%s, while the only place is taken", res.Status)
	} else {
		res.text()
	}
	back.leave()
	c.waitForLog("stream closed", 1)
	other, call2 := open(t, cl, up, "/b", asEventSource...)
	call2.start("text/event-stream")
	last := other.headers(t)
	last.follow().expectFirst(t, 0)
	call.expectGone()
	for _, run := range c.runs("").Runs {
		if run.Path == "/b" { // the other run may still be listed
			c.admin("DELETE", "/sse/runs/"+run.ID)
		}
	}
	call2.expectGone()
}

func TestAClientThatALimitRefusesIsNoneOfTheRun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, strings.Replace(sharedSite(up, ""), "heartbeat off", "heartbeat off\nmax_streams_per_client 1", 1))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	if res := cl.get(t, "/", asEventSource...); res.StatusCode != http.StatusTooManyRequests {
		t.Errorf("%s, while the only place is taken", res.Status)
	} else {
		res.text()
	}
	call.end()
	one.expectEnd(t)
	if entry := c.waitForLog("run ended", 0); entry["clients"] != 1.0 {
		t.Errorf("%v", entry)
	}
}

func TestAfterAReloadClientsBeginANewRun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := `
		sse {
			heartbeat off
			drain off
			share {
				linger 1h
			}
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, site)
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	call.start("text/event-stream")
	res := first.headers(t)
	one := res.follow()
	token := one.expectFirst(t, 0)
	idle, unused := open(t, c.client("h1"), up, "/idle", asEventSource...)
	unused.start("text/event-stream")
	idleRes := idle.headers(t)
	idleRes.follow().expectFirst(t, 0)
	idleRes.leave()
	c.waitForLog("stream closed", 0)

	c.reload(site)
	unused.expectGone() // a replaced configuration keeps no run without a client
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	second, again := open(t, c.client("h1"), up, "/", append(asEventSource, "Last-Event-ID: "+token+".1")...)
	again.start("text/event-stream")
	two := second.headers(t).follow()
	two.expectUnknown(t, 0)
	res.leave()
	call.expectGone() // it does not linger either
	again.end()
	two.expectEnd(t)
}

func TestARunEndsWhenItsTimeIsOver(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, "run_for 300ms"))
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	call.send("data: half") // no client gets this
	one.expectEnd(t)
	call.expectGone()
	for _, message := range []string{"stream closed", "run ended"} {
		if entry := c.waitForLog(message, 0); entry["reason"] != "max_duration" {
			t.Errorf("%v", entry)
		}
	}
}

func TestASilentUpstreamEndsTheRun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 100ms {
			upstream_timeout 400ms
			share
		}
		reverse_proxy `+up.addr)
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	call.expectGone()
	if got, err := one.rest(); err != io.EOF || !strings.Contains(got, ":heartbeat") {
		t.Errorf("%q, %v", got, err)
	}
	for _, message := range []string{"stream closed", "run ended"} {
		if entry := c.waitForLog(message, 0); entry["reason"] != "upstream_timeout" {
			t.Errorf("%v", entry)
		}
	}
}

func TestASharedStreamMayStartEarly(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			heartbeat off
			early_start 50ms
			share
		}
		reverse_proxy `+up.addr)
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	one := first.headers(t).follow()
	call.start("text/event-stream")
	token := one.expectFirst(t, 0)
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	call.end()
	one.expectEnd(t)

	second, call := open(t, cl, up, "/failure", asEventSource...)
	two := second.headers(t).follow()
	call.startWith(503)
	call.end()
	if got, err := two.rest(); !strings.Contains(got, "event: error") || err != io.EOF {
		t.Errorf("%q, %v", got, err)
	}

	third, call := open(t, cl, up, "/other", append(asEventSource, "X-Client: 3")...)
	three := third.headers(t).follow()
	call.start("text/plain")
	call.end()
	own := up.accept(t)
	if own.Header.Get("X-Client") != "3" {
		t.Error("it has not asked by itself")
	}
	own.start("text/event-stream")
	own.send(plainEvent(1))
	three.expect(t, plainEvent(1))
	own.end()
	three.expectEnd(t)
}

// Its stream has started, and its heartbeats continue while it asks the
// upstream by itself.
func TestAStreamThatHasStartedEarlyGetsHeartbeatsWhateverItsRunAnswers(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 2ms {
			early_start 10ms
			share
		}
		reverse_proxy `+up.addr)
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	one := first.headers(t).follow()
	call.start("text/plain")
	call.end()
	own := up.accept(t)
	heartbeats := func(unread string) int { return strings.Count(unread, beat) }
	before, _ := one.wait(func(unread string) bool { return unread != "" })
	if got, err := one.wait(func(unread string) bool { return heartbeats(unread) > heartbeats(before)+20 }); err != nil {
		t.Errorf("got %q and %v", got, err)
	}
	own.start("text/event-stream")
	own.send(plainEvent(1))
	own.end()
	if got, err := one.rest(); strings.ReplaceAll(got, beat, "") != plainEvent(1) || err != io.EOF {
		t.Errorf("got %q and %v", got, err)
	}
}

func TestAnAnswerWithoutATypeIsNoStreamAfterASharedEarlyStart(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		header X-Site yes
		sse {
			heartbeat off
			early_start 50ms
			share
		}
		reverse_proxy `+up.addr)
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	one := first.headers(t).follow()
	call.startWith(200)
	call.end()
	own := up.accept(t)
	own.startWith(200)
	own.end()
	want := `event: error
data: {"status":502,"message":"the upstream answered 200 OK, no type","error":{"type":"upstream_error","code":502,"message":"the upstream answered 200 OK, no type"}}

`
	if got, err := one.rest(); got != want || err != io.EOF {
		t.Errorf("got %q and %v", got, err)
	}
}

func TestAClientStartsWithTheLastEvents(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, "join last 2"))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	token := one.expectFirst(t, 0)
	for n := 1; n <= 5; n++ {
		call.send(plainEvent(n))
		one.expect(t, eventOf(token, n))
	}
	two := cl.get(t, "/", asEventSource...).follow()
	two.expectFirst(t, 3)
	two.expect(t, eventOf(token, 4)+eventOf(token, 5))
	call.end()
	two.expectEnd(t)
}

func TestHeartbeatsAfterAnAddedIDAreLinesButToAnEventSource(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 100ms {
			share
		}
		reverse_proxy `+up.addr)
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	two := cl.get(t, "/", asEventSource...).follow()
	call.send(plainEvent(1))
	beats := func(f *follower, frame string) {
		t.Helper()
		got, _ := f.wait(func(unread string) bool {
			_, after, found := strings.Cut(unread, ".1\n\n")
			return found && strings.Count(after, ":heartbeat\n") >= 2
		})
		if _, after, _ := strings.Cut(got, ".1\n\n"); strings.Trim(strings.ReplaceAll(after, frame, "*"), "*") != "" {
			t.Errorf("%q", after)
		}
	}
	beats(one, ":heartbeat\n")
	beats(two, ":heartbeat\n\n")
	call.end()
}

func TestARunTakesTheRoutesThatItsClientsWouldTake(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		route {
			@seen header X-Seen *
			handle @seen {
				header X-Handled yes
			}
			sse {
				heartbeat off
				share
			}
			handle {
				reverse_proxy `+up.addr+`
			}
			respond "nobody else" 404
		}`)
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	// This request has already been handled by the group, so its next handler
	// is the last one.
	second := cl.get(t, "/", append(asEventSource, "X-Seen: 1")...)
	if body, err := second.text(); second.StatusCode != 404 || body != "nobody else" || err != nil {
		t.Errorf("%s: %q, %v", second.Status, body, err)
	}
	call.end()
	one.expectEnd(t)
}
