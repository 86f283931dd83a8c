package caddysse_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// earlySite answers early after a tenth of a second, and has its own CORS
// header.
func earlySite(upstream string, more ...string) string {
	return `
		header Access-Control-Allow-Origin https://site.example
		sse 1h {
			name early
			prelude 50ms
			early_start 100ms
			` + strings.Join(more, "\n") + `
		}
		reverse_proxy ` + upstream
}

func TestASilentUpstreamsStreamStartsWithoutIt(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, earlySite(up.addr), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		began := time.Now()
		e := cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream"))
		call := up.accept(t)
		res := e.headers(t)
		if waited := time.Since(began); waited < 100*time.Millisecond {
			t.Errorf("the headers came after %v", waited)
		}
		for field, want := range map[string]string{
			"Content-Type":                "text/event-stream",
			"Access-Control-Allow-Origin": "https://site.example",
			"Cache-Control":               "no-cache, no-store, no-transform",
			"X-Accel-Buffering":           "no",
			"Incremental":                 "?1",
		} {
			if got := res.Header.Get(field); got != want || res.StatusCode != 200 {
				t.Errorf("%s: got %s and %q, want %q", field, res.Status, got, want)
			}
		}
		body := res.follow()
		body.expect(t, ":heartbeat\n\n")
		if s := c.listed(t, path); s["state"] != "waiting" {
			t.Errorf("the stream is listed as %v", s)
		}
		call.start(eventStream, "Access-Control-Allow-Origin: https://upstream.example", "Set-Cookie: a=b")
		c.waitForStream(t, path, func(s map[string]any) bool { return s["state"] == "open" && s["upstream"] == up.addr })
		// After a frame, a byte order mark would become part of the first
		// field.
		call.send("\xef\xbb")
		call.send("\xbfdata: 1\n\n")
		body.expect(t, "data: 1\n\n")
		call.send("data: 2\r\n\r\n")
		body.expect(t, "data: 2\r\n\r\n")
		call.end()
		body.expectEnd(t)
		line := c.closedLine(t, path)
		expectEnd(t, line, "upstream_closed", "info")
		if _, differs := line["upstream_status"]; differs || line["status"] != 200.0 || line["bytes"] != 23.0 {
			t.Errorf("told: %v", line)
		}
	})
}

// errorEvent is what a client gets if an upstream answers too late with
// something that is not a stream.
func errorEvent(message string) string {
	return `event: error` + "\n" + `data: {"status":502,"message":"` + message +
		`","error":{"type":"upstream_error","code":502,"message":"` + message + `"}}` + "\n\n"
}

func TestALateAnswerThatIsNoStreamBecomesAnErrorEvent(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, earlySite(up.addr), withAdmin())
	failures := func(status float64) float64 {
		return c.scrape(t).sum("early_start_failures_total", "early", fmt.Sprintf("status=%q", fmt.Sprint(status)))
	}
	before, failed := make(map[float64]float64), make(map[float64]float64)
	tests := []struct {
		name    string
		answer  func(call *upstreamCall)
		status  float64
		message string
	}{
		{"500", func(call *upstreamCall) { call.startWith(500, "Content-Type: text/plain"); call.end() }, 500,
			"the upstream answered 500 Internal Server Error, text/plain"},
		{"stream500", func(call *upstreamCall) { call.startWith(500, "Content-Type: text/event-stream"); call.end() }, 500,
			"the upstream answered 500 Internal Server Error, text/event-stream"},
		{"json", func(call *upstreamCall) { call.start("application/json"); call.end() }, 200,
			"the upstream answered 200 OK, application/json"},
		{"untyped", func(call *upstreamCall) { call.startWith(302, "Location: /"); call.end() }, 302,
			"the upstream answered 302 Found, no type"},
		{"204", func(call *upstreamCall) { call.startWith(204); call.end() }, 204,
			"the upstream answered 204 No Content, no type"},
		{"401", func(call *upstreamCall) {
			call.startWith(401, "WWW-Authenticate: Basic", "Content-Type: a/\u0000b\u202e")
			call.end()
		}, 502,
			"the upstream did not answer"},
		{"encoded", func(call *upstreamCall) { call.start(eventStream, "Content-Encoding: gzip"); call.end() }, 200,
			"the upstream answered with an encoded body"},
		{"dies", func(call *upstreamCall) { call.abort() }, 502,
			"the upstream did not answer"},
	}
	for _, test := range tests {
		before[test.status] = failures(test.status)
		failed[test.status] += float64(len(clientProtocols))
	}
	t.Run("over", func(t *testing.T) {
		atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
			for _, test := range tests {
				path := "/" + test.name + cl.proto
				call, body := openWaiting(t, cl, up, path)
				test.answer(call)
				body.expect(t, errorEvent(test.message))
				body.expectEnd(t)
				line := c.closedLine(t, path)
				expectEnd(t, line, "upstream_error", "warn")
				if upstreamStatus, differs := line["upstream_status"]; line["status"] != 200.0 ||
					differs != (test.status != 200) || (differs && upstreamStatus != test.status) {
					t.Errorf("%s: told: %v", path, line)
				}
				if line["events"] != 0.0 || line["bytes"] != 0.0 {
					t.Errorf("%s: our event counts as the upstream's: %v", path, line)
				}
			}
		})
	})
	for status, n := range failed {
		if after := failures(status); after != before[status]+n {
			t.Errorf("the failures with %v went from %v to %v, want %v more", status, before[status], after, n)
		}
	}
}

func TestAnUpstreamThatCannotBeReachedIsAnErrorEventToo(t *testing.T) {
	checkLeaks(t)
	// Nothing listens there, and reverse_proxy tries again for a while.
	c := startCaddy(t, `
		sse {
			name early
			prelude off
			early_start 50ms
			retry 2s
			reconnect_on 502
		}
		reverse_proxy 127.0.0.1:1 {
			lb_try_duration 200ms
			lb_try_interval 50ms
		}`, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		res := cl.get(t, "/"+cl.proto, "Accept: text/event-stream")
		text, err := res.text()
		if want := "retry: 2000\n\n" + errorEvent("the upstream did not answer"); text != want || err != nil || res.StatusCode != 200 {
			t.Errorf("got %s %q, %v, want %q", res.Status, text, err, want)
		}
		line := c.closedLine(t, "/"+cl.proto)
		expectEnd(t, line, "upstream_error", "warn")
		if line["upstream_status"] != 502.0 || line["upstream"] != "127.0.0.1:1" || !strings.Contains(fmt.Sprint(line["error"]), "refused") {
			t.Errorf("told: %v", line)
		}
	})
}

func TestAnUpstreamInTimeKeepsItsAnswerToTheLetter(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h["Date"] = []string{"Thu, 01 Jan 1970 00:00:00 GMT"}
		h.Set("Access-Control-Allow-Origin", "https://upstream.example")
		h.Set("Link", "</a>; rel=preload")
		switch r.URL.Path {
		case "/hints":
			w.WriteHeader(http.StatusEarlyHints)
			h.Set("Content-Type", "text/html")
			w.WriteHeader(200)
			io.WriteString(w, "<p>")
		case "/trailers":
			h.Set("Trailer", "X-Declared")
			h.Set("Content-Type", "application/json")
			io.WriteString(w, "{}")
			h.Set("X-Declared", "1")
			h.Set(http.TrailerPrefix+"X-Late", "2")
		case "/empty":
			w.WriteHeader(204)
		case "/error":
			http.Error(w, "no", 503)
		case "/redirect":
			http.Redirect(w, r, "/elsewhere", 302)
		case "/dies":
			panic(http.ErrAbortHandler)
		case "/broken":
			h.Set("Content-Length", "10")
			io.WriteString(w, "half")
		case "/file":
			http.ServeContent(w, r, "a.txt", time.Unix(1, 0), strings.NewReader("a file"))
		}
	})
	const errors = `
		handle_errors {
			header X-Rendered yes
			respond "error {err.status_code}"
		}`
	site := func(sse string) string {
		return sse + `
		header X-Site 1
		header >X-Deferred 2
		reverse_proxy ` + up.addr + errors
	}
	answers := make(map[string]string)
	c := startCaddy(t, site(""))
	ask := func(cl *testClient, path string) string {
		var hints []string
		res, err := cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream", "X-Test: 1")).outcome()
		for range 3 {
			if err == nil {
				break
			}
			// A connection that arrives while a reload closes the listener is
			// lost, also with plain Caddy.
			res, err = cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream", "X-Test: 1")).outcome()
		}
		if err != nil {
			return "no response"
		}
		text, err := res.text()
		res.Header.Del("Date")
		return fmt.Sprintf("%s %v %v %q %v %v", res.Status, res.Header, hints, text, err != nil, res.Trailer)
	}
	paths := []string{"/hints", "/trailers", "/empty", "/error", "/redirect", "/dies", "/broken", "/file"}
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		for _, path := range paths {
			answers[proto+path] = ask(cl, path)
		}
	}
	for _, setting := range []string{"early_start 1h", "resume 1m any"} {
		c.reload(site("sse {\n" + setting + "\n}"))
		for _, proto := range clientProtocols {
			cl := c.client(proto)
			for _, path := range paths {
				if proto == "h3" && path == "/broken" {
					continue // the reset may overtake the headers
				}
				got, want := ask(cl, path), answers[proto+path]
				got, want = withoutAltSvc(got), withoutAltSvc(want)
				if got != want {
					t.Errorf("%s: %s %s:\ngot  %s\nwant %s", setting, proto, path, got, want)
				}
			}
		}
	}
}

// withoutAltSvc removes the field whose port changes.
func withoutAltSvc(answer string) string {
	before, rest, found := strings.Cut(answer, "Alt-Svc:[")
	if !found {
		return answer
	}
	_, after, _ := strings.Cut(rest, "]")
	return before + after
}

func TestInterimResponsesPassUntilTheStreamHasStarted(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a>")
		w.WriteHeader(http.StatusEarlyHints)
		if r.URL.Path == "/late" {
			time.Sleep(300 * time.Millisecond) // three times the delay
			w.Header().Set("Link", "</b>")
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Set("Content-Type", eventStream)
		w.Header().Set("X-Up", "1")
		io.WriteString(w, "data: 1\n\n")
	})
	c := startCaddy(t, strings.Replace(earlySite(up.addr), "prelude 50ms", "prelude off", 1))
	for path, want := range map[string]string{
		"/in-time": "103 </a>, 200 up 1 data: 1\n\n",
		"/late":    "103 </a>, 200 up  data: 1\n\n",
	} {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		req := c.client("h1").request(t, "GET", path, nil, "Accept: text/event-stream")
		if err := req.Write(conn); err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		for in := bufio.NewReader(conn); ; {
			res, err := http.ReadResponse(in, req)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode == 103 {
				fmt.Fprintf(&got, "103 %s, ", strings.Join(res.Header["Link"], "+"))
				continue
			}
			body, err := io.ReadAll(res.Body)
			fmt.Fprintf(&got, "%d up %s %s", res.StatusCode, res.Header.Get("X-Up"), body)
			if err != nil {
				t.Error(err)
			}
			break
		}
		if got.String() != want {
			t.Errorf("%s: got %q, want %q", path, got.String(), want)
		}
	}
}

func TestAClientThatLeavesWhileWaitingCancelsTheUpstream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, earlySite(up.addr, "drain off"), withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		e := cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream"))
		call := up.accept(t)
		e.headers(t).follow().expect(t, ":heartbeat\n\n")
		before := c.scrape(t).sum("early_start_failures_total", "early")
		e.leave()
		call.expectGone()
		line := c.closedLine(t, path)
		expectEnd(t, line, "client_closed", "info")
		if _, said := line["upstream_status"]; said {
			t.Errorf("the upstream has not answered: %v", line)
		}
		if after := c.scrape(t).sum("early_start_failures_total", "early"); after != before {
			t.Error("it counts as a failure")
		}
	})
}

// openWaiting opens a stream that starts without its upstream, and waits for
// its prelude.
func openWaiting(t *testing.T, cl *testClient, up *testUpstream, path string) (*upstreamCall, *follower) {
	t.Helper()
	e, call := open(t, cl, up, path, acceptStream)
	res := e.headers(t)
	if res.StatusCode != 200 {
		t.Fatalf("%s: %s", path, res.Status)
	}
	body := res.follow()
	body.expect(t, ":heartbeat\n\n")
	return call, body
}

func TestAWaitingStreamCanBeEndedByTheAdminAPIAndByADrain(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, earlySite(up.addr, "drain 50ms"), withAdmin())
	for _, proto := range clientProtocols {
		for _, way := range []string{"admin", "drained"} {
			t.Run(proto+" "+way, func(t *testing.T) {
				cl, path := c.client(proto), "/"+proto+way
				call, body := openWaiting(t, cl, up, path)
				if way == "admin" {
					c.adminJSON(t, "DELETE", "/sse/streams/"+c.listed(t, path)["id"].(string), 202)
				} else {
					c.reload(earlySite(up.addr, "drain 50ms", "retry 1s"))
					defer c.reload(earlySite(up.addr, "drain 50ms"))
				}
				body.expectEnd(t)
				call.expectGone()
				line := c.closedLine(t, path)
				expectEnd(t, line, way, "info")
				if _, said := line["upstream_status"]; said {
					t.Errorf("the upstream has not answered: %v", line)
				}
			})
		}
	}
}

// reverse_proxy stops using an upstream that has failed too often.
func TestTheEndOfAWaitingStreamIsNoFailureOfItsUpstream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	for _, end := range []string{"admin", "max_duration", "upstream_timeout"} {
		var more []string
		if end != "admin" {
			more = append(more, end+" 500ms") // for its start and its prelude, and some more
		}
		site := strings.Replace(earlySite(up.addr, more...), "reverse_proxy "+up.addr, `
			reverse_proxy `+up.addr+` {
				fail_duration 1m
				lb_try_duration 10s
			}`, 1)
		t.Run(end, func(t *testing.T) {
			c := startCaddy(t, site, withAdmin())
			atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				path := "/" + cl.proto
				for range 2 {
					call, body := openWaiting(t, cl, up, path)
					if end == "admin" {
						c.adminJSON(t, "DELETE", "/sse/streams/"+c.listed(t, path)["id"].(string), 202)
					}
					body.expectEnd(t)
					call.expectGone()
					line := c.closedLine(t, path)
					expectEnd(t, line, end, "info")
					path += "/again"
				}
			})
		})
	}
}

func TestWhichRequestsStartEarly(t *testing.T) {
	for _, test := range []struct {
		method, accept string
		header         string
		plain, any     bool
	}{
		{"GET", "text/event-stream", "", true, true},
		{"GET", "Text/Event-Stream; charset=utf-8", "", true, true},
		{"POST", "text/event-stream", "", true, true},
		{"GET", "application/json, text/event-stream", "", false, true},
		{"GET", "text/event-stream, */*;q=0.1", "", false, true},
		{"GET", "text/event-stream;q=0", "", false, true},
		{"GET", "*/*", "", false, true},
		{"GET", "", "", false, true},
		{"POST", "application/json", "", false, true},
		{"HEAD", "text/event-stream", "", false, false},
		{"CONNECT", "text/event-stream", "", false, false},
		{"GET", "text/event-stream", "websocket", false, false},
		{"GET", "text/event-stream", "h2c", true, true},
		{"GET", "text/event-stream", "H2C", true, true},
		{"GET", "text/event-stream", " , h2c ,", true, true},
		{"GET", "text/event-stream", "h2c, websocket", false, false},
		{"GET", "text/event-stream", "h2c/1, IRC/6.9", false, false},
	} {
		for _, anyRequest := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				config := silent()
				config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second), Any: anyRequest}
				h := provision(t, config)
				c := newClient(t)
				r := httptest.NewRequest(test.method, "http://example.com/", nil)
				if test.accept != "" {
					r.Header.Set("Accept", test.accept)
				}
				if test.header != "" {
					r.Header.Set("Upgrade", test.header)
				}
				_ = serve(h, c, r, func(w http.ResponseWriter, _ *http.Request) error {
					time.Sleep(2 * time.Second)
					w.WriteHeader(418)
					return nil
				})
				if want := anyRequest && test.any || test.plain; isStream(c) != want {
					t.Errorf("%+v, any %v: the client got %d %v", test, anyRequest, c.status, c.sent)
				}
			})
		}
	}
}

func TestAnUpstreamThatAnswersAtTheInstantOfTheDelay(t *testing.T) {
	config := heartbeat(time.Hour, -1)
	config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second)}
	config.MaxStreams = 10
	early := 0
	for i := range 300 {
		synctest.Test(t, func(t *testing.T) {
			h := provision(t, config)
			c := newClient(t)
			c.header.Set("X-Site", "1")
			_, err := serveRecovering(h, c, get("text/event-stream"), func(w http.ResponseWriter, r *http.Request) error {
				w.Header().Set("X-Up", "1")
				w.Header().Del("X-Site")
				time.Sleep(time.Second)
				switch i % 4 {
				case 0:
					w.Header().Set("Content-Type", "text/event-stream")
					w.WriteHeader(200)
					write(t, w, "data: 1\n\n")
				case 1:
					w.WriteHeader(103)
					w.WriteHeader(500)
				case 2:
					return caddyhttp.Error(502, errors.New("it failed"))
				case 3:
					panic(http.ErrAbortHandler)
				}
				return nil
			})
			late := c.sent.Get("X-Up") == ""
			if late && c.status == 200 {
				early++
			}
			text, stream := c.body.String(), isStream(c)
			switch {
			case stream && late && i%4 == 1:
				if text != errorEvent("the upstream answered 500 Internal Server Error, no type") || err != nil {
					t.Errorf("%d: got %q, %v", i, text, err)
				}
			case stream && late && i%4 > 1:
				if text != errorEvent("the upstream did not answer") || err != nil {
					t.Errorf("%d: got %q, %v", i, text, err)
				}
			case i%4 == 0:
				if !stream || text != "data: 1\n\n" || (c.sent.Get("X-Site") == "1") != late {
					t.Errorf("%d: got %d %v %q", i, c.status, c.sent, text)
				}
			case i%4 == 1:
				if stream || c.status != 500 || c.sent.Get("X-Site") != "" {
					t.Errorf("%d: got %d %v", i, c.status, c.sent)
				}
			case i%4 == 2:
				if stream || c.status != 0 || err == nil {
					t.Errorf("%d: got %d %v, %v", i, c.status, c.sent, err)
				}
			}
		})
	}
	t.Logf("%d of 300 started early", early)
}

// serveRecovering serves a request and recovers from a panic, as the server
// would.
func serveRecovering(h caddyhttp.MiddlewareHandler, c *client, r *http.Request, next caddyhttp.HandlerFunc) (panicked any, err error) {
	defer func() { panicked = recover() }()
	return nil, serve(h, c, r, next)
}

func TestAnEarlyStartTakesNothingOfTheRequestsBody(t *testing.T) {
	checkLeaks(t)
	got := make(chan string, 1)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		got <- fmt.Sprint(len(body), err)
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
	})
	c := startCaddy(t, earlySite(up.addr, "retry 1s"))
	for _, proto := range clientProtocols {
		in, out := io.Pipe()
		cl := c.client(proto)
		req := cl.request(t, "POST", "/"+proto, in, "Accept: text/event-stream")
		req.ContentLength = 100_000
		e := cl.begin(req)
		out.Write(bytes.Repeat([]byte("x"), 1000))
		time.Sleep(250 * time.Millisecond) // longer than the delay
		out.Write(bytes.Repeat([]byte("x"), 99_000))
		out.Close()
		select {
		case body := <-got:
			if body != "100000 <nil>" {
				t.Errorf("%s: the upstream got %s", proto, body)
			}
		case <-time.After(patience):
			t.Fatalf("%s: the upstream waits for the request's body", proto)
		}
		if text, err := e.headers(t).text(); !strings.HasSuffix(text, "data: 1\n\n") || err != nil {
			t.Errorf("%s: got %q, %v", proto, text, err)
		}
	}
}

// A body that is not read to its end must not harm the connection: net/http
// panics on the next request of a connection that is full duplex.
func TestARequestBodyThatIsNotReadDoesNotHarmItsConnection(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	answer := make(chan struct{})
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-answer
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
	})
	for name, test := range map[string]struct {
		directives, want string
		closes           bool
	}{
		"an answer in time": {"respond in_time 200", "in_time", false},
		// Nothing listens there, and reverse_proxy tries again for a while.
		"an early start": {"reverse_proxy 127.0.0.1:1 {\nlb_try_duration 1s\nlb_try_interval 10ms\n}",
			errorEvent("the upstream did not answer"), true},
		"an early start after the body": {"reverse_proxy " + up.addr, "data: 1\n\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			c := startCaddy(t, "sse {\nearly_start 30ms\n}\n"+test.directives, withAdmin())
			conn, err := net.Dial("tcp", c.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			in := bufio.NewReader(conn)
			for range 3 {
				io.WriteString(conn, "POST / HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
				if strings.HasSuffix(test.directives, up.addr) {
					c.waitForStream(t, "/", func(s map[string]any) bool { return s["state"] == "waiting" })
					answer <- struct{}{}
				}
				res, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(res.Body)
				if err != nil || res.StatusCode != 200 || !strings.HasSuffix(string(body), test.want) {
					t.Errorf("got %d %q, %v", res.StatusCode, body, err)
				}
				if res.Close != test.closes {
					t.Errorf("the connection closes: %v", res.Close)
				}
				if res.Close {
					break
				}
			}
			if test.closes {
				if _, err := in.Peek(1); err != io.EOF {
					t.Errorf("the connection: %v", err)
				}
			}
			for _, entry := range c.logs() {
				if entry["logger"] == "http.stdlib" || strings.Contains(entry.message(), "panic") {
					t.Errorf("logged: %v", entry)
				}
			}
		})
	}
}

func TestABodyThatAsksForAStreamStartsEarly(t *testing.T) {
	for _, test := range []struct {
		name, contentType string
		pieces            []string      // of the body, one second apart
		started           time.Duration // 0: only when the upstream answers, after ten seconds
	}{
		{"true", "application/json", []string{`{"model":"m","stream":true}`}, 5 * time.Second},
		{"false", "application/json", []string{`{"model":"m","stream":false}`}, 0},
		{"nested", "application/json", []string{`{"options":{"stream":true}}`}, 0},
		{"another JSON type", "application/vnd.api+json; charset=utf-8", []string{`{"stream": true}`}, 5 * time.Second},
		{"no JSON type", "text/plain", []string{`{"stream":true}`}, 0},
		{"no type", "", []string{`{"stream":true}`}, 0},
		{"in pieces", "application/json", []string{`{"messages":[`, `"x"],"str`, `eam":tr`, `ue}`}, 5 * time.Second},
		{"after the delay", "application/json", []string{`{"a":"`, "b", "c", "d", "e", "f", "g", `","stream":true}`}, 7 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			config := silent()
			config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(5 * time.Second)}
			h := provision(t, config)
			body, sending := io.Pipe()
			defer body.Close()
			go func() {
				for i, piece := range test.pieces {
					if i > 0 {
						time.Sleep(time.Second)
					}
					_, _ = io.WriteString(sending, piece)
				}
				sending.Close()
			}()
			r := get()
			r.Method, r.Body, r.ContentLength = http.MethodPost, body, -1
			if test.contentType != "" {
				r.Header.Set("Content-Type", test.contentType)
			}
			c := newClient(t)
			got := ""
			began := time.Now()
			err := serve(h, c, r, func(w http.ResponseWriter, r *http.Request) error {
				text, err := io.ReadAll(r.Body)
				got = string(text)
				time.Sleep(10*time.Second - time.Since(began))
				w.Header().Set("Content-Type", eventStream)
				w.WriteHeader(200)
				return err
			})
			if err != nil || got != strings.Join(test.pieces, "") {
				t.Errorf("%s: the upstream got %q, %v", test.name, got, err)
			}
			want := test.started
			if want == 0 {
				want = 10 * time.Second
			}
			if at := c.log[0].at; at != want {
				t.Errorf("%s: the headers came after %v, want %v", test.name, at, want)
			}
		})
	}
}

func TestOPTIONSNeverStartsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second), Any: true}
		r := get(eventStream)
		r.Method = http.MethodOptions
		c := newClient(t)
		_ = serve(provision(t, config), c, r, func(w http.ResponseWriter, _ *http.Request) error {
			quiet(5 * time.Second)
			w.WriteHeader(204)
			return nil
		})
		if c.status != 204 {
			t.Errorf("the status is %d", c.status)
		}
	})
}
