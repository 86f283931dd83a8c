package caddysse_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// resumeSite is a site whose streams outlive their clients, with more settings
// in the block.
func resumeSite(up *testUpstream, window, settings string) string {
	return `
		sse {
			heartbeat off
			resume ` + window + ` {
				` + settings + `
			}
		}
		reverse_proxy ` + up.addr
}

// comingBack returns the headers of a client that comes back.
func comingBack(header []string, id string) []string {
	return append(append([]string(nil), header...), "Last-Event-ID: "+id)
}

// beginKept opens an EventSource's stream and waits for its first event.
func beginKept(t testing.TB, cl *testClient, up *testUpstream, path string) (*reply, *follower, *upstreamCall, string) {
	t.Helper()
	e, call := open(t, cl, up, path, asEventSource...)
	call.start("text/event-stream")
	res := e.headers(t)
	f := res.follow()
	return res, f, call, f.expectFirst(t, 0)
}

// expectNoCall fails the test if a request reaches the upstream.
func (up *testUpstream) expectNoCall(t testing.TB) {
	t.Helper()
	select {
	case c := <-up.calls:
		c.t = t
		t.Cleanup(c.end)
		t.Fatalf("the upstream got %s %s", c.Method, c.RequestURI)
	default:
	}
}

// waitForRun waits until a run is in a state and has this many clients.
func (c *testCaddy) waitForRun(state string, clients int) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		list := c.runs("")
		for _, run := range list.Runs {
			if run.State == state && run.Clients == clients {
				return
			}
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("no run is %s with %d clients: %+v", state, clients, list)
		}
	}
}

func TestAStreamOutlivesItsClientsConnection(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		e, call := open(t, cl, up, path, asEventSource...)
		call.start("text/event-stream", "X-Of-Upstream: yes", "Set-Cookie: a=b", "Via: somebody")
		res := e.headers(t)
		if got := res.Header.Get("Set-Cookie"); got != "a=b" {
			t.Errorf("the first client gets Set-Cookie %q", got)
		}
		one := res.follow()
		token := one.expectFirst(t, 0)
		call.send(plainEvent(1) + "data: half")
		one.expect(t, eventOf(token, 1)+"data: half") // nothing is held back
		call.send("\n\n")
		one.expect(t, fmt.Sprintf("\nid: %s.2\n\n", token))
		res.leave()
		c.waitForRun("open", 0)
		call.send(plainEvent(3) + plainEvent(4) + "data: half")

		back := cl.get(t, path, comingBack(asEventSource, token+".1")...)
		if got := back.Header; got.Get("X-Of-Upstream") != "yes" || got.Get("Set-Cookie") != "" || strings.Contains(got.Get("Via"), "somebody") {
			t.Errorf("who comes back gets %v", got)
		}
		two := back.follow()
		two.expect(t, fmt.Sprintf("data: half\nid: %s.2\n\n", token)+eventOf(token, 3)+eventOf(token, 4)+"data: half")
		call.send("\n\n" + plainEvent(6))
		two.expect(t, fmt.Sprintf("\nid: %s.5\n\n", token)+eventOf(token, 6))
		call.end()
		two.expectEnd(t)
		up.expectNoCall(t)
		// It has everything, and asks for what follows.
		again, next := open(t, cl, up, path, comingBack(asEventSource, token+".6")...)
		if got := next.Header.Get("Last-Event-ID"); got != "" {
			t.Errorf("the upstream gets the id %q", got)
		}
		next.start("text/event-stream")
		fresh := again.headers(t)
		three := fresh.follow()
		if other := three.expectFirst(t, 0); other == token {
			t.Error("the new request has the old run")
		}
		next.send("id: own\ndata: x\n\n")
		three.expect(t, "id: own\ndata: x\n\n")
		fresh.leave()
		next.expectGone()
	})
}

func TestAnUpstreamThatHasEndedStaysForItsClient(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	cl := c.client("h1")
	for _, clean := range []bool{true, false} {
		e, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
		call.start("text/event-stream")
		res := e.headers(t)
		one := res.follow()
		call.send("data: 1\n\n")
		got, _ := one.wait(func(unread string) bool { return strings.HasSuffix(unread, "\n\n") })
		token, _, _ := strings.Cut(runIDPattern.FindString(got), ".")
		res.leave()
		c.waitForRun("open", 0)
		call.send(plainEvent(2))
		if clean {
			call.end()
		} else {
			call.abort()
		}
		c.waitForRun("ended", 0)
		for _, n := range []int{1, 2} {
			back := cl.get(t, "/", "Accept: text/event-stream", notEventSource, fmt.Sprintf("Last-Event-ID: %s.%d", token, n)).follow()
			if n == 1 {
				back.expect(t, eventOf(token, 2))
			}
			if clean {
				back.expectEnd(t)
			} else {
				back.expectAbort(t)
			}
		}
		up.expectNoCall(t)
		stop := cl.do(t, cl.request(t, "DELETE", "/", nil, "Last-Event-ID: "+token+".2"))
		stop.leave()
		if stop.StatusCode != http.StatusNoContent {
			t.Errorf("%s", stop.Status)
		}
		if list := c.runs(""); list.Total != 0 {
			t.Errorf("%+v", list)
		}
	}
}

func TestWhoComesBackTakesTheStreamOver(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		_, one, call, token := beginKept(t, cl, up, path)
		call.send(plainEvent(1))
		one.expect(t, eventOf(token, 1))
		other := c.client(cl.proto)
		two := other.get(t, path, comingBack(asEventSource, token+".0")...).follow()
		one.expectEnd(t)
		two.expect(t, eventOf(token, 1))
		three := other.get(t, path, "Accept: text/event-stream", notEventSource, "Last-Event-ID: "+token+".1").follow()
		two.expectEnd(t)
		four := other.get(t, path, comingBack(asEventSource, token+".1")...).follow()
		three.expectAbort(t) // it is not an EventSource
		call.send(plainEvent(2))
		four.expect(t, eventOf(token, 2))
		call.end()
		four.expectEnd(t)
	})
	for i := range 3 {
		if entry := c.waitForLog("stream closed", i); entry["reason"] != "taken_over" {
			t.Errorf("%v", entry)
		}
	}
}

func TestARunIsCancelledWhenItsWindowIsOver(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "300ms", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		res, _, call, token := beginKept(t, cl, up, path)
		left := time.Now()
		res.leave()
		call.expectGone()
		if stayed := time.Since(left); stayed < 300*time.Millisecond {
			t.Errorf("it stayed for %v", stayed)
		}
		// A client that comes back now is told that its events are lost.
		e, next := open(t, cl, up, path, comingBack(asEventSource, token+".0")...)
		if got := next.Header.Get("Last-Event-ID"); got != "" {
			t.Errorf("the upstream gets the id %q", got)
		}
		next.start("text/event-stream")
		res = e.headers(t)
		f := res.follow()
		got, _ := f.wait(func(unread string) bool { return strings.Contains(unread, "\n\n") })
		id := runIDPattern.FindString(got)
		if want := "event: lost\ndata: {\"reason\":\"unknown\"}\nid: " + id + "\n\n"; got != want || !strings.HasSuffix(id, ".0") {
			t.Errorf("got %q", got)
		}
		res.leave()
		next.expectGone()
	})
	for i := range 6 {
		if entry := c.waitForLog("run ended", i); entry["reason"] != "client_closed" {
			t.Errorf("%v", entry)
		}
	}
}

func TestAClientWithoutAnIDEndsItsRun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""))
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		e, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
		call.start("text/event-stream")
		res := e.headers(t)
		f := res.follow()
		call.send("data: half")
		f.expect(t, "data: half")
		res.leave()
		call.expectGone()
	})
}

func TestDELETEStopsARun(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		remove := func(path string, header ...string) int {
			res := cl.do(t, cl.request(t, "DELETE", path, nil, header...))
			res.text()
			return res.StatusCode
		}
		_, one, call, token := beginKept(t, cl, up, path)
		for _, other := range []struct{ path, id string }{
			{path + "/other", token + ".0"},
			{path, token + ".1"},
			{path, token + ".x"},
			{path, "sse1-"},
			{path, "sse1-AbCdEfGhIjKlMnOpQrStUg.0"},
		} {
			if got := remove(other.path, "Last-Event-ID: "+other.id); got != http.StatusNotFound {
				t.Errorf("DELETE %s of %q: %d", other.path, other.id, got)
			}
		}
		if got := remove(path + "?last_event_id=" + token + ".0"); got != http.StatusNoContent {
			t.Errorf("%d", got)
		}
		call.expectGone()
		one.expectEnd(t)
		if got := remove(path, "Last-Event-ID: "+token+".0"); got != http.StatusNotFound {
			t.Errorf("again: %d", got)
		}
		// A request without an id of ours is for the upstream.
		e, call := open(t, cl, up, path, "Last-Event-ID: 7")
		_ = e
		call.start("text/plain")
		call.end()
		e.headers(t).text()
	})
	if entry := c.waitForLog("stream closed", 0); entry["reason"] != "client_closed" {
		t.Errorf("%v", entry)
	}
}

func TestAnUpstreamWithIDsLooksAfterItself(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	cl := c.client("h1")
	res, f, call, token := beginKept(t, cl, up, "/")
	call.send(plainEvent(1) + "id: own\ndata: 2\n\n" + plainEvent(3))
	f.expect(t, eventOf(token, 1)+"id: own\ndata: 2\n\n"+plainEvent(3))
	res.leave()
	call.expectGone()

	// A client that is away gets what has been kept for it.
	res, _, call, token = beginKept(t, cl, up, "/")
	res.leave()
	c.waitForRun("open", 0)
	call.send(plainEvent(1) + "id: own\ndata: 2\n\n" + plainEvent(3))
	call.expectGone()
	back := cl.get(t, "/", comingBack(asEventSource, token+".0")...).follow()
	back.expect(t, eventOf(token, 1)+"id: own\ndata: 2\n\n")
	back.expectAbort(t)
}

// The upstream is another Caddy with this module. A client that comes back to
// it must keep its id until it gets another one from that Caddy.
func TestAClientOfAnUpstreamWithIDsLikeOursKeepsItsID(t *testing.T) {
	checkLeaks(t)
	const inner = "sse1-AbCdEfGhIjKlMnOpQrStUg"
	for _, where := range []string{"header", "query"} {
		for _, site := range []string{"resume 20s", "share"} {
			t.Run(site+", "+where, func(t *testing.T) {
				up := newUpstream(t)
				c := startCaddy(t, "sse {\n heartbeat off\n "+site+"\n}\nreverse_proxy "+up.addr)
				cl := c.client("h1")
				first, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
				call.start("text/event-stream")
				one := first.headers(t).follow()
				call.send("event: sse\ndata:\nid: " + inner + ".0\n\n" + eventOf(inner, 1))
				one.expect(t, "event: sse\ndata:\nid: "+inner+".0\n\n"+eventOf(inner, 1))
				call.end()
				one.expectEnd(t)

				path, headers := "/", comingBack(asEventSource, inner+".1")
				if where == "query" {
					path, headers = "/?lastEventId="+inner+".1", asEventSource
				}
				second, call := open(t, cl, up, path, headers...)
				if got := call.Header.Get("Last-Event-ID") + call.URL.Query().Get("lastEventId"); got != inner+".1" {
					t.Errorf("the upstream gets the id %q", got)
				}
				call.start("text/event-stream")
				two := second.headers(t).follow()
				call.send(eventOf(inner, 2))
				two.expect(t, eventOf(inner, 2)) // without anything before it
				call.end()
				two.expectEnd(t)
			})
		}
	}
}

func TestABodyThatIsNoEventStreamIsNotKept(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""))
	cl := c.client("h1")
	e, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource)
	call.start("text/event-stream")
	f := e.headers(t).follow()
	body := `{"data": "` + strings.Repeat("x\n\n", 200<<10) + `"}`
	call.send(body)
	f.expect(t, body)
	call.end()
	f.expectEnd(t)

	e, call = open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream", "Content-Encoding: gzip")
	call.send("zipped")
	res := e.headers(t)
	f = res.follow()
	f.expect(t, "zipped")
	res.leave()
	call.expectGone()
}

func TestWhatIsNeverResumedGoesToTheUpstreamWithoutAnID(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m any", ""))
	cl := c.client("h1")
	_, _, first, token := beginKept(t, cl, up, "/")
	defer first.end()
	for _, header := range []string{"Mcp-Session-Id: 1", "MCP-Protocol-Version: 2025-11-25", "Mcp-Method: tools/call"} {
		e, call := open(t, cl, up, "/", append(comingBack(asEventSource, token+".0"), header)...)
		if got := call.Header.Get("Last-Event-ID"); got != "" {
			t.Errorf("%s: the upstream gets the id %q", header, got)
		}
		call.start("text/event-stream")
		res := e.headers(t)
		f := res.follow()
		call.send(plainEvent(1))
		f.expect(t, plainEvent(1))
		res.leave()
		call.expectGone()
	}
	head := cl.begin(cl.request(t, "HEAD", "/", nil, "Accept: text/event-stream", "Last-Event-ID: "+token+".0"))
	call := up.accept(t)
	if got := call.Header.Get("Last-Event-ID"); call.Method != "HEAD" || got != "" {
		t.Errorf("%s with the id %q", call.Method, got)
	}
	call.end()
	head.headers(t).text()
}

// The upstream is another Caddy with this module, so an id that begins with
// sse1- may be its own.
func TestAnUpstreamsIDsOfOurFormAreItsOwn(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m any", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		c.reload(resumeSite(up, "1m any", "history "+map[string]string{"h1": "1MiB", "h2": "2MiB", "h3": "3MiB"}[cl.proto])) // nothing is known yet
		path, theirs := "/"+cl.proto, "sse1-AAAAAAAAAAAAAAAAAAAAAA."
		brings := func(header ...string) string {
			t.Helper()
			e, call := open(t, cl, up, path, header...)
			call.start(eventStream)
			e.headers(t)
			call.end()
			return call.Header.Get("Last-Event-ID")
		}
		if got := brings(comingBack(asEventSource, theirs+"7")...); got != "" {
			t.Errorf("before the upstream has sent any, it gets %q", got)
		}

		_, f, call, _ := beginKept(t, cl, up, path)
		call.send("id: " + theirs + "1\ndata: 1\n\n")
		f.expect(t, "id: "+theirs+"1\ndata: 1\n\n")
		if got := brings(comingBack(asEventSource, theirs+"1")...); got != theirs+"1" {
			t.Errorf("the upstream gets %q for its own id", got)
		}
		res := cl.begin(cl.request(t, "POST", path, strings.NewReader("{}"), comingBack(nil, theirs+"1")...))
		again := up.accept(t)
		if got := again.Header.Get("Last-Event-ID"); again.Method != "POST" || got != theirs+"1" {
			t.Errorf("the upstream gets %s with %q", again.Method, got)
		}
		again.end()
		res.headers(t).text()

		// The id of a run that is known here is still ours.
		_, kept, other, own := beginKept(t, cl, up, path+"/own")
		other.send(plainEvent(1))
		kept.expect(t, eventOf(own, 1))
		back := cl.get(t, path+"/own", comingBack(asEventSource, own+".0")...).follow()
		back.expect(t, eventOf(own, 1))
		up.expectNoCall(t)
		call.end()
		other.end()
	})
}
