package caddysse_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const lostEventData = `{"status":410,"message":"the stream is over, and what it had for its client is gone; ask again without Last-Event-ID",` +
	`"error":{"type":"stream_lost","code":410,"message":"the stream is over, and what it had for its client is gone; ask again without Last-Event-ID"}}`

// post begins a POST with a body and waits until it has reached the upstream.
func post(t testing.TB, cl *testClient, up *testUpstream, path, body string, header ...string) (*exchange, *upstreamCall) {
	t.Helper()
	e := cl.begin(cl.request(t, "POST", path, strings.NewReader(body), header...))
	return e, up.accept(t)
}

// firstID waits for the first id in a body and returns its token.
func (f *follower) firstID(t testing.TB) string {
	t.Helper()
	got, err := f.wait(func(unread string) bool { return strings.Contains(unread, "id: ") && strings.HasSuffix(unread, "\n\n") })
	id := runIDPattern.FindString(got)
	if id == "" {
		t.Fatalf("no id in %q (%v)", got, err)
	}
	token, _, _ := strings.Cut(id, ".")
	return token
}

// fetch-event-source repeats the same POST with the last id that it has
// received.
func TestAnAnswerToPOSTIsResumedAndNotAskedForAgain(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m any", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		header := []string{"Accept: text/event-stream", "Content-Type: application/json"}
		body := `{"prompt":"` + strings.Repeat("x", 100<<10) + `"}`
		e, call := post(t, cl, up, path, body, header...)
		if call.body != body {
			t.Errorf("the upstream gets %d bytes", len(call.body))
		}
		call.start("text/event-stream")
		res := e.headers(t)
		one := res.follow()
		call.send(plainEvent(1))
		token := one.firstID(t)
		one.expect(t, eventOf(token, 1)) // no event sse, because it is not an EventSource
		res.leave()
		c.waitForRun("open", 0)
		call.send(plainEvent(2))

		again := cl.do(t, cl.request(t, "POST", path, strings.NewReader(body), comingBack(header, token+".1")...))
		two := again.follow()
		two.expect(t, eventOf(token, 2))
		call.send(plainEvent(3))
		two.expect(t, eventOf(token, 3))
		// A GET may resume a run that a POST began.
		three := cl.get(t, path+"?lastEventId="+token+".2", header...).follow()
		two.expectAbort(t)
		three.expect(t, eventOf(token, 3))
		call.end()
		three.expectEnd(t)
		up.expectNoCall(t)
		res = cl.do(t, cl.request(t, "DELETE", path, nil, comingBack(nil, token+".3")...))
		res.leave()
		if res.StatusCode != http.StatusNoContent {
			t.Errorf("%s", res.Status)
		}

		res = cl.do(t, cl.request(t, "POST", path, strings.NewReader(body), comingBack(header, token+".3")...))
		text, err := res.text()
		if want := "id:\nevent: error\ndata: " + lostEventData + "\n\n"; res.StatusCode != 200 || text != want || err != nil ||
			res.Header.Get("Content-Type") != "text/event-stream" {
			t.Errorf("%s %v %q, %v", res.Status, res.Header, text, err)
		}
		res = cl.do(t, cl.request(t, "PUT", path, strings.NewReader(body), comingBack([]string{"Accept: */*"}, token+".3")...))
		text, err = res.text()
		if res.StatusCode != http.StatusGone || text != lostEventData+"\n" || err != nil || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %v %q, %v", res.Status, res.Header, text, err)
		}
		up.expectNoCall(t)
	})
	if list := c.runs(""); list.Total != 0 {
		t.Errorf("%+v", list)
	}
	_, text := c.admin("GET", "/metrics")
	for _, want := range []string{
		`caddy_sse_resumes_total{name="sse",result="refused"} `,
		`caddy_sse_resumes_total{name="sse",result="resumed"} `,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
}

func TestWithoutAnyAPOSTEndsWithItsClient(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""))
	e, call := post(t, c.client("h1"), up, "/", "x", "Accept: text/event-stream")
	call.start("text/event-stream")
	res := e.headers(t)
	f := res.follow()
	call.send(plainEvent(1))
	f.expect(t, plainEvent(1))
	res.leave()
	call.expectGone()
}

// The rest of a body that has not been read is lost with the connection.
func TestAHalfReadBodyEndsItsRunWithItsClient(t *testing.T) {
	checkLeaks(t)
	gone := make(chan struct{}, 1)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		io.ReadFull(r.Body, make([]byte, 1))
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, plainEvent(1))
		rc.Flush()
		io.Copy(io.Discard, r.Body) // until Caddy aborts it
		gone <- struct{}{}
	})
	c := startCaddy(t, resumeSite(up, "1m any", ""), withAdmin())
	cl := c.client("h2")
	body, send := io.Pipe()
	e := cl.begin(cl.request(t, "POST", "/", body, "Accept: text/event-stream", "Content-Length: 10"))
	io.WriteString(send, "x")
	res := e.headers(t)
	f := res.follow()
	f.firstID(t)
	send.CloseWithError(io.ErrUnexpectedEOF) // the client cancels its request
	select {
	case <-gone:
	case <-time.After(patience):
		t.Fatal("the run goes on without the rest of the request")
	}
}

func TestTheFirstClientGetsTrailersAndInformationalResponses(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "X-Declared")
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, plainEvent(1))
		http.NewResponseController(w).Flush()
		w.Header().Set("X-Declared", "1")
	})
	c := startCaddy(t, resumeSite(up, "1m any", ""))
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		res := cl.get(t, "/", "Accept: text/event-stream", notEventSource)
		text, err := res.text()
		token, _, _ := strings.Cut(runIDPattern.FindString(text), ".")
		if text != eventOf(token, 1) || err != nil || res.Trailer.Get("X-Declared") != "1" {
			t.Errorf("%q, %v, trailers %v", text, err, res.Trailer)
		}
		back := cl.get(t, "/", "Accept: text/event-stream", notEventSource, "Last-Event-ID: "+token+".0")
		text, err = back.text()
		if text != eventOf(token, 1) || err != nil || len(back.Trailer) > 0 {
			t.Errorf("%q, %v, trailers %v", text, err, back.Trailer)
		}
	})
}

func TestAnInnerHandlerOwnsTheStreamBesideResume(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		route {
			sse {
				heartbeat off
				resume 1m any
			}
			sse {
				name inner
				heartbeat off
			}
			reverse_proxy `+up.addr+`
		}`, withAdmin())
	e, call := open(t, c.client("h1"), up, "/", asEventSource...)
	call.start("text/event-stream")
	res := e.headers(t)
	f := res.follow()
	call.send(plainEvent(1))
	f.expect(t, plainEvent(1))
	if list := c.runs(""); list.Total != 0 {
		t.Errorf("%+v", list)
	}
	res.leave()
	call.expectGone()
}

func TestAnInnerHandlerSeesTheIDThatAnOuterOneHasTakenOut(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		route {
			sse {
				name outer
				resume 1m
			}
			sse {
				name inner
				heartbeat off
				resume 1m
			}
			reverse_proxy `+up.addr+`
		}`, withAdmin())
	cl := c.client("h1")
	res, one, call, token := beginKept(t, cl, up, "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	c.waitForRun("open", 0)
	two := cl.get(t, "/", comingBack(asEventSource, token+".0")...).follow()
	two.expect(t, eventOf(token, 1))
	call.end()
	two.expectEnd(t)
}

func TestTheRequestsIDIsOneAroundResume(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: %s\n\n", r.Header.Get("X-Request"))
	})
	c := startCaddy(t, `
		route {
			sse {
				heartbeat off
				resume 1m any
			}
			header >X-Request {http.request.uuid}
			reverse_proxy `+up.addr+` {
				header_up X-Request {http.request.uuid}
			}
		}`)
	res := c.client("h1").get(t, "/", "Accept: text/event-stream", notEventSource)
	text, _ := res.text()
	id := res.Header.Get("X-Request")
	if id == "" || !strings.Contains(text, "data: "+id+"\n") || c.waitForLog("stream closed", 0)["id"] != id {
		t.Errorf("X-Request %q, %q", id, text)
	}
}

// If a page of another origin sends Last-Event-ID with fetch, the browser sends
// an OPTIONS first (Fetch, section 4.8), and its query may contain the id.
func TestAPreflightIsTheUpstreamsToAnswer(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m any", ""), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		const origin = "Access-Control-Allow-Origin: https://app.example"
		header := []string{"Accept: text/event-stream", "Origin: https://app.example"}
		e, call := post(t, cl, up, path, "{}", header...)
		call.start(eventStream, origin)
		res := e.headers(t)
		one := res.follow()
		call.send(plainEvent(1))
		token := one.firstID(t)
		one.expect(t, eventOf(token, 1))

		for _, query := range []string{"", "?lastEventId=" + token + ".1", "?lastEventId=sse1-nobodys"} {
			asks := cl.begin(cl.request(t, "OPTIONS", path+query, nil, "Origin: https://app.example",
				"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: last-event-id"))
			preflight := up.accept(t)
			if preflight.Method != "OPTIONS" || preflight.Header.Get("Access-Control-Request-Headers") != "last-event-id" ||
				preflight.URL.RawQuery != "" {
				t.Errorf("the upstream gets %s %s %v", preflight.Method, preflight.RequestURI, preflight.Header)
			}
			preflight.startWith(http.StatusNoContent, origin, "Access-Control-Allow-Headers: Last-Event-ID")
			preflight.end()
			answer := asks.headers(t)
			text, err := answer.text()
			if answer.StatusCode != http.StatusNoContent || answer.Header.Get("Access-Control-Allow-Headers") != "Last-Event-ID" || text != "" || err != nil {
				t.Errorf("%s: %s %v %q, %v", query, answer.Status, answer.Header, text, err)
			}
		}
		call.send(plainEvent(2))
		one.expect(t, eventOf(token, 2)) // no other client has taken it over
		res.leave()

		// The upstream is not asked, so the run's answer must have the headers
		// that let the page read it.
		again := cl.do(t, cl.request(t, "POST", path, strings.NewReader("{}"), comingBack(header, token+".1")...))
		if got := again.Header.Get("Access-Control-Allow-Origin"); got != "https://app.example" {
			t.Errorf("who comes back gets %v", again.Header)
		}
		two := again.follow()
		two.expect(t, eventOf(token, 2))
		call.end()
		two.expectEnd(t)
		up.expectNoCall(t)
	})
}

// Google's SDKs fail on an id as they do on a comment (docs/clients.md).
func TestAClientThatFailsOnIDsGetsNone(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m any", ""))
	for _, agent := range []string{"User-Agent: google-genai-sdk/3.6.1 gl-python/3.11.7", "X-Goog-Api-Client: google-genai-sdk/1.77.0 gl-go/go1.26"} {
		e, call := post(t, c.client("h1"), up, "/", "{}", agent)
		call.start(eventStream)
		res := e.headers(t)
		f := res.follow()
		call.send(plainEvent(1))
		f.expect(t, plainEvent(1))
		res.leave()
		call.expectGone()
	}
}
