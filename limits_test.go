package caddysse_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// expectRefusal waits for the answer to a request that exceeds a limit.
func expectRefusal(t testing.TB, e *exchange, status int) {
	t.Helper()
	res := e.headers(t)
	text, err := res.text()
	if res.StatusCode != status || res.Header.Get("Retry-After") != "5" || text != "" || err != nil {
		t.Errorf("got %s %v %q, %v, want a %d", res.Status, res.Header, text, err, status)
	}
	for _, field := range []string{"Content-Type", "Incremental", "Set-Cookie", "Access-Control-Allow-Origin"} {
		if value := res.Header.Get(field); value != "" {
			t.Errorf("the refusal has %s: %s", field, value)
		}
	}
}

func TestStreamsBeyondALimitAreRefused(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	for _, test := range []struct {
		limit  string
		status int
	}{
		{"max_streams", 503},
		{"max_streams_per_client", 429},
	} {
		for _, proto := range clientProtocols {
			t.Run(test.limit+" "+proto, func(t *testing.T) {
				name := uniqueName(test.limit + proto)
				c := startCaddy(t, `
					header X-Site 1
					sse {
						prelude off
						name `+name+`
						`+test.limit+` 2
						drain off
					}
					reverse_proxy `+up.addr, withAdmin())
				cl := c.client(proto)
				refused := func() float64 {
					return c.scrape(t).sum("streams_refused_total", name, fmt.Sprintf("limit=%q", test.limit))
				}
				first := c.open(t, cl, up, "/1", acceptStream)
				c.open(t, cl, up, "/2", acceptStream)

				// A resumable request is refused before it reaches the
				// upstream.
				expectRefusal(t, cl.begin(cl.request(t, "GET", "/3", nil, acceptStream)), test.status)
				if n := refused(); n != 1 {
					t.Errorf("%v refusals are counted, want 1", n)
				}
				// For other requests, only the answer shows whether they are
				// streams.
				e := cl.begin(cl.request(t, "POST", "/4", nil, acceptStream))
				call := up.accept(t)
				call.start(eventStream, "Set-Cookie: secret", "Access-Control-Allow-Origin: *")
				expectRefusal(t, e, test.status)
				call.expectGone()
				if n := refused(); n != 2 {
					t.Errorf("%v refusals are counted, want 2", n)
				}
				// An answer that is not a stream is not limited.
				e = cl.begin(cl.request(t, "POST", "/5", nil, acceptStream))
				call = up.accept(t)
				call.start("application/json", "Set-Cookie: theirs")
				call.send("{}")
				call.end()
				res := e.headers(t)
				if text, err := res.text(); text != "{}" || err != nil || res.StatusCode != 200 || res.Header.Get("Set-Cookie") == "" {
					t.Errorf("got %s %q, %v", res.Status, text, err)
				}
				// A place that was released can be used again.
				first.call.end()
				first.body.expectEnd(t)
				c.closedLine(t, "/1")
				c.open(t, cl, up, "/6", acceptStream)
				s := c.scrape(t)
				if live := s.expectAccounted(t, name); live != 2 {
					t.Errorf("%v streams are live", live)
				}
				if opened := s.sum("streams_opened_total", name); opened != 3 {
					t.Errorf("%v streams have been opened, want 3", opened)
				}
				for _, entry := range c.ourLines() {
					if entry.message() == "stream closed" && entry["path"] != "/1" {
						t.Errorf("a refused stream was told: %v", entry)
					}
				}
			})
		}
	}
}

func TestARefusalGoesThroughTheSitesErrorHandlers(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
			max_streams 1
		}
		reverse_proxy `+up.addr+`
		handle_errors 503 {
			header X-Rendered yes
			respond "full: {err.message}" 503
		}`, withAdmin())
	cl := c.client("h1")
	defer c.open(t, cl, up, "/1", acceptStream).exchange.leave()
	for _, method := range []string{"GET", "POST"} {
		e := cl.begin(cl.request(t, method, "/2", nil, acceptStream))
		if method == "POST" {
			up.accept(t).start(eventStream, "X-Up: 1")
		}
		res := e.headers(t)
		text, err := res.text()
		want := `full: sse: max_streams: 1 streams are open under the name "sse"`
		if res.StatusCode != 503 || res.Header.Get("X-Rendered") != "yes" || res.Header.Get("Retry-After") != "5" ||
			res.Header.Get("X-Up") != "" || text != want || err != nil {
			t.Errorf("%s: got %s %v %q, %v", method, res.Status, res.Header, text, err)
		}
	}
}

func TestALimitCountsByNameAcrossHandlersAndReloads(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	site := func(more string) string {
		return `
		handle /a/* {
			sse {
				prelude off
				name shared
				max_streams 2
				drain off
				` + more + `
			}
			reverse_proxy ` + up.addr + `
		}
		handle /b/* {
			sse {
				prelude off
				name shared
				drain off
			}
			reverse_proxy ` + up.addr + `
		}
		handle {
			sse {
				prelude off
				name other
				max_streams 1
				drain off
			}
			reverse_proxy ` + up.addr + `
		}`
	}
	c := startCaddy(t, site(""), withAdmin())
	cl := c.client("h2")
	first := c.open(t, cl, up, "/a/1", acceptStream)
	c.open(t, cl, up, "/b/1", acceptStream)
	c.open(t, cl, up, "/b/2", acceptStream) // this handler has no limit
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/a/2", nil, acceptStream)), 503)
	c.open(t, cl, up, "/c/1", acceptStream)
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/c/2", nil, acceptStream)), 503)

	c.reload(site("retry 1s"))
	cl = c.client("h2")
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/a/3", nil, acceptStream)), 503)
	first.call.end()
	first.body.expectEnd(t)
	c.closedLine(t, "/a/1")
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/a/3", nil, acceptStream)), 503)

	// A limit per client that is set by a reload also counts streams that are
	// already open.
	c.reload(site("max_streams_per_client 2") + "\nheader X-A b")
	c.reload(strings.Replace(site("max_streams_per_client 2"), "max_streams 2", "", 1))
	cl = c.client("h2")
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/a/4", nil, acceptStream)), 429)
}

func TestAClientIsAnAddressOrA64Network(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
			max_streams_per_client 1
			drain off
		}
		reverse_proxy `+up.addr, withAdmin(), withGlobal("servers {\ntrusted_proxies static 127.0.0.1\n}"))
	n := 0
	for _, test := range []struct {
		client  string
		refused bool
	}{
		{"192.0.2.1", false},
		{"192.0.2.2", false},
		{"192.0.2.1", true},
		{"::ffff:192.0.2.1", true},
		{"2001:db8::1", false},
		{"2001:db8::2", true},
		{"2001:db8:0:0:ffff:ffff:ffff:ffff", true},
		{"2001:db8:0:1::1", false},
		{"", false}, // the proxy itself
		{"", true},
	} {
		n++
		cl := c.client(clientProtocols[n%3])
		path := fmt.Sprint("/", n)
		header := []string{acceptStream}
		if test.client != "" {
			header = append(header, "X-Forwarded-For: "+test.client)
		}
		if test.refused {
			expectRefusal(t, cl.begin(cl.request(t, "GET", path, nil, header...)), 429)
		} else {
			c.open(t, cl, up, path, header...)
		}
	}
}

func TestAForwardedAddressCountsOnlyFromATrustedProxy(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
			max_streams_per_client 1
			drain off
		}
		reverse_proxy `+up.addr, withAdmin())
	cl := c.client("h1")
	c.open(t, cl, up, "/1", acceptStream, "X-Forwarded-For: 192.0.2.1")
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/2", nil, acceptStream, "X-Forwarded-For: 192.0.2.2")), 429)
}

func TestAHundredSlowRequestsAtOnceDoNotPassALimitOfTen(t *testing.T) {
	checkLeaks(t)
	const limit, requests = 10, 100
	for _, method := range []string{"GET", "POST"} {
		t.Run(method, func(t *testing.T) {
			var inside, most atomic.Int64
			answer := make(chan struct{})
			up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
				n := inside.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				<-answer
				w.Header().Set("Content-Type", eventStream)
				io.WriteString(w, "data: 1\n\n")
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			})
			name := "hundred" + method
			c := startCaddy(t, `
				sse {
					prelude off
					name `+name+`
					max_streams 10
					drain off
				}
				reverse_proxy `+up.addr, withAdmin())
			statuses := make(chan int, requests)
			var bodies sync.WaitGroup
			for i := range requests {
				cl := c.client(clientProtocols[i%3])
				e := cl.begin(cl.request(t, method, fmt.Sprint("/", i), nil, acceptStream))
				bodies.Go(func() {
					res, err := e.outcome()
					if err != nil {
						t.Error(err)
						statuses <- 0
						return
					}
					statuses <- res.StatusCode
					res.follow().wait(func(string) bool { return false })
				})
			}
			if method == "GET" {
				for range requests - limit {
					if status := <-statuses; status != 503 {
						t.Errorf("got a %d", status)
					}
				}
			} else {
				for deadline := time.Now().Add(patience); inside.Load() < requests && time.Now().Before(deadline); {
					time.Sleep(time.Millisecond)
				}
			}
			close(answer)
			counts := make(map[int]int)
			for range requests - counted(method == "GET", requests-limit) {
				counts[<-statuses]++
			}
			if counts[200] != limit {
				t.Errorf("%v, want %d streams", counts, limit)
			}
			if method == "GET" && most.Load() > limit {
				t.Errorf("%d requests got to the upstream", most.Load())
			}
			c.waitForStreams(t, limit)
			c.adminJSON(t, "DELETE", "/sse/streams?all=true", 202)
			bodies.Wait()
			c.waitForStreams(t, 0)
		})
	}
}

func counted(is bool, n int) int {
	if is {
		return n
	}
	return 0
}

// Whatever happens to a request, its place becomes free again.
func TestAPlaceComesBackOnEveryPath(t *testing.T) {
	paths := map[string]caddyhttp.HandlerFunc{
		"a stream": stream(func(w http.ResponseWriter) { write(t, w, "data: 1\n\n") }),
		"no stream": func(w http.ResponseWriter, _ *http.Request) error {
			_, err := io.WriteString(w, "text")
			return err
		},
		"no answer": func(http.ResponseWriter, *http.Request) error { return nil },
		"an error":  func(http.ResponseWriter, *http.Request) error { return errors.New("it failed") },
		"an error with a status": func(http.ResponseWriter, *http.Request) error {
			return caddyhttp.Error(502, errors.New("it failed"))
		},
		"an error status": func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(502); return nil },
		"an upgrade":      func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(101); return nil },
		"a panic":         func(http.ResponseWriter, *http.Request) error { panic("a bug") },
		"an abort":        func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) },
		"a panic in a stream": func(w http.ResponseWriter, r *http.Request) error {
			return stream(func(http.ResponseWriter) { panic("a bug") })(w, r)
		},
		"an abort in a stream": func(w http.ResponseWriter, r *http.Request) error {
			return stream(func(http.ResponseWriter) { panic(http.ErrAbortHandler) })(w, r)
		},
		"a panic after another answer": func(w http.ResponseWriter, r *http.Request) error {
			w.WriteHeader(200)
			panic("a bug")
		},
		"late": func(w http.ResponseWriter, r *http.Request) error {
			time.Sleep(2 * time.Second)
			return stream(func(http.ResponseWriter) {})(w, r)
		},
		"late and no stream": func(w http.ResponseWriter, r *http.Request) error {
			time.Sleep(2 * time.Second)
			w.WriteHeader(500)
			return nil
		},
		"late panic": func(w http.ResponseWriter, r *http.Request) error {
			time.Sleep(2 * time.Second)
			panic("a bug")
		},
	}
	for name, next := range paths {
		for _, method := range []string{"GET", "POST"} {
			for _, early := range []bool{false, true} {
				for _, reconnect := range []bool{false, true} {
					synctest.Test(t, func(t *testing.T) {
						config := silent()
						config.Name = "places"
						config.MaxStreams, config.MaxStreamsPerClient = 1, 1
						if early {
							config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second)}
						}
						if reconnect {
							config.ReconnectOn = []int{500, 502}
						}
						h := provision(t, config)
						for range 2 {
							r := get("text/event-stream")
							r.Method, r.RemoteAddr = method, "192.0.2.1:1"
							_, _ = serveRecovering(h, newClient(t), r, next)
							synctest.Wait()
						}
						r := get("text/event-stream")
						r.RemoteAddr = "192.0.2.1:1"
						c := newClient(t)
						if _, err := serveRecovering(h, c, r, stream(func(http.ResponseWriter) {})); err != nil || !isStream(c) {
							t.Errorf("%s, %s, early %v, reconnect %v: the next request gets %v", name, method, early, reconnect, err)
						}
					})
				}
			}
		}
	}
}

func TestAPlaceIsFreeAsSoonAsTheAnswerIsNoStream(t *testing.T) {
	config := silent()
	config.Name = "free"
	config.MaxStreams = 1
	h := provision(t, config)
	c := newClient(t)
	if err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "application/json")
		write(t, w, "[") // the start of a long document
		inner := play(t, h, func(w http.ResponseWriter) { write(t, w, "data: 1\n\n") })
		if !isStream(inner) {
			t.Error("it holds on to its place")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestAClientCanBeWhatTheSiteSaysItIs(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name keyed
			prelude off
			max_streams_per_client 1 {header.X-User}
		}
		reverse_proxy `+up.addr, withAdmin())
	cl := c.client("h1")
	user := func(name string) []string { return []string{acceptStream, "X-User: " + name} }
	a := c.open(t, cl, up, "/a", user("a")...)
	c.open(t, cl, up, "/b", user("b")...)
	c.open(t, cl, up, "/nobody", acceptStream) // its address is its key
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/a2", nil, user("a")...)), 429)
	expectRefusal(t, cl.begin(cl.request(t, "GET", "/nobody2", nil, user(" ")...)), 429)
	for _, line := range c.ourLines() {
		if strings.Contains(fmt.Sprint(line), "X-User") {
			t.Errorf("told: %v", line)
		}
	}
	a.exchange.leave()
	c.waitForStreams(t, 2)
	c.open(t, cl, up, "/a3", user("a")...)
}

// A page that accepts fragments and streams alike reserves no place until it is
// known which of them it gets.
func TestARequestThatAcceptsMoreThanStreamsReservesNoPlace(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name htmx
			prelude off
			max_streams_per_client 1
		}
		reverse_proxy `+up.addr, withAdmin())
	cl := c.client("h1")
	const htmx = "Accept: text/html, text/event-stream"
	c.open(t, cl, up, "/stream", htmx)
	e := cl.begin(cl.request(t, "GET", "/fragment", nil, htmx))
	call := up.accept(t)
	call.start("text/html")
	call.send("<p>")
	call.end()
	if res := e.headers(t); res.StatusCode != 200 {
		t.Errorf("the fragment is %s", res.Status)
	}
}

// The key of a client is determined when the request arrives.
func TestWhoChangesTheClientsAddressInsideLeaksNoPlace(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	for _, early := range []string{"", "early_start 1h any"} {
		t.Run(early, func(t *testing.T) {
			c := startCaddy(t, `route {
				sse {
					prelude off
					name moved
					max_streams_per_client 2
					`+early+`
				}
				vars client_ip 192.0.2.1
				reverse_proxy `+up.addr+`
			}`, withAdmin())
			overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				for i := range 6 {
					method, path := []string{"GET", "POST"}[i%2], fmt.Sprint("/", cl.proto, i)
					e := cl.begin(cl.request(t, method, path, nil, acceptStream))
					call := up.accept(t)
					call.start(eventStream)
					res := e.headers(t)
					if res.StatusCode != 200 {
						t.Fatalf("request %d got %s", i, res.Status)
					}
					call.end()
					res.follow().expectEnd(t)
					if line := c.closedLine(t, path); line["client_ip"] != "127.0.0.1" {
						t.Errorf("told: %v", line)
					}
				}
			})
			c.waitForStreams(t, 0)
		})
	}
}

// hush is a handler that ignores its context, like FastCGI's while its script
// is silent. It answers with a stream after a first release, and returns after
// a second.
type hush struct{ called, answer, leave, left chan struct{} }

func newHush() *hush {
	return &hush{make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})}
}

func (h *hush) serve(w http.ResponseWriter, r *http.Request) error {
	defer close(h.left)
	close(h.called)
	<-h.answer
	w.Header().Set("Content-Type", eventStream)
	_, _ = io.WriteString(w, "data: 1\n\n")
	<-h.leave
	return nil
}

// A client that has left holds no place, whatever its handlers do.
func TestAPlaceDoesNotWaitForHandlersThatDoNotHeedTheirContext(t *testing.T) {
	for _, early := range []time.Duration{0, time.Second, time.Hour} {
		for _, phase := range []string{"reserved", "open"} {
			synctest.Test(t, func(t *testing.T) {
				config := silent()
				config.Name = "deaf"
				config.MaxStreams, config.MaxStreamsPerClient = 1, 1
				if early > 0 {
					config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(early)}
				}
				h := provision(t, config)
				deaf := newHush()
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				r := get("text/event-stream").WithContext(ctx)
				r.RemoteAddr = "192.0.2.1:1"
				over := make(chan struct{})
				go func() {
					defer close(over)
					_, _ = serveRecovering(h, newClient(t), r, deaf.serve)
				}()
				<-deaf.called
				time.Sleep(10 * time.Second)
				if phase == "open" {
					close(deaf.answer)
				}
				synctest.Wait()

				again := func() bool {
					r := get("text/event-stream")
					r.RemoteAddr = "192.0.2.1:2"
					c := newClient(t)
					_, err := serveRecovering(h, c, r, stream(func(http.ResponseWriter) {}))
					return err == nil && isStream(c)
				}
				if again() {
					t.Errorf("early %v, %s: it has held no place", early, phase)
				}
				leave()
				synctest.Wait()
				for range 3 {
					if !again() {
						t.Errorf("early %v, %s: its place is not free", early, phase)
					}
				}
				if list := callAdmin(t, "/sse/streams?name=deaf").Body.String(); !strings.Contains(list, `"total":0`) {
					t.Errorf("early %v, %s: still listed: %s", early, phase, list)
				}
				// What the handler does later changes nothing.
				if phase != "open" {
					close(deaf.answer)
				}
				close(deaf.leave)
				<-deaf.left
				<-over
				synctest.Wait()
				for range 2 {
					if !again() {
						t.Errorf("early %v, %s: a place is lost in the end", early, phase)
					}
				}
			})
		}
	}
}
