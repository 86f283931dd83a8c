package caddysse_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// asEventSource are the headers of an EventSource.
var asEventSource = []string{"Accept: text/event-stream", "Cache-Control: no-cache"}

// sharedSite is a site that shares its streams, with more settings of the block.
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

// expectFirst waits for the first event of an EventSource's stream, and returns
// the token of its run. n is the number in its id.
func (f *follower) expectFirst(t testing.TB, n int) (token string) {
	t.Helper()
	got, _ := f.wait(func(unread string) bool { return strings.Contains(unread, "\n\n") })
	id := runIDPattern.FindString(got)
	token, _, _ = strings.Cut(id, ".")
	f.expect(t, fmt.Sprintf("event: sse\ndata:\nid: %s.%d\n\n", token, n))
	return token
}

func eventOf(token string, n int) string {
	return fmt.Sprintf("data: %d\nid: %s.%d\n\n", n, token, n)
}

func plainEvent(n int) string { return fmt.Sprintf("data: %d\n\n", n) }

// runsOf asks the admin API for the runs.
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
	// Nothing is remembered.
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
	// The next one does not even try.
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
	got, _ := one.wait(func(unread string) bool { return strings.Contains(unread, "\n\n") })
	token, _, _ := strings.Cut(runIDPattern.FindString(got), ".")
	one.expect(t, "event: lost\ndata: {\"reason\":\"unknown\"}\nid: "+token+".0\n\n")
	call.abort()
	one.expectAbort(t)
}

func TestHalfAnEventIsNobodys(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	first, call := open(t, c.client("h1"), up, "/", "Accept: text/event-stream")
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
