package caddysse_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// The server's timeouts

// serverTimeouts are short timeouts, which apply to everything that is not a
// stream.
const serverTimeouts = `servers {
	timeouts {
		read_body 450ms
		write 450ms
		idle 2s
		read_body_idle 150ms 1000
		write_idle 150ms 1000
	}
}`

func TestServerWideTimeoutsSpareStreamsAndNothingElse(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/slow") {
			w.Header().Set("Content-Type", "text/plain")
			for range 6 {
				if _, err := io.WriteString(w, "tick "); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				time.Sleep(120 * time.Millisecond)
			}
			return
		}
		w.Header().Set("Content-Type", eventStream)
		for range 4 {
			io.WriteString(w, "data: 1\n\n")
			w.(http.Flusher).Flush()
			time.Sleep(200 * time.Millisecond)
		}
		io.WriteString(w, "data: end\n\n")
	})
	for name, global := range map[string]string{
		"timeouts and rates": serverTimeouts,
		"no idle timeouts":   "servers {\ntimeouts {\nread_body 450ms\nwrite 450ms\nidle 2s\nread_body_idle -1s\nwrite_idle -1s\n}\n}",
	} {
		t.Run(name, func(t *testing.T) {
			c := startCaddy(t, `
				sse 1h {
					prelude off
				}
				reverse_proxy `+up.addr, withGlobal(global))
			for _, proto := range clientProtocols {
				for _, method := range []string{"GET", "POST"} {
					t.Run(proto+" "+method, func(t *testing.T) {
						t.Parallel()
						cl := c.client(proto)
						var body io.Reader
						if method == "POST" {
							body = strings.NewReader("{}")
						}
						res := cl.do(t, cl.request(t, method, "/stream", body, acceptStream))
						text, err := res.text()
						if want := strings.Repeat("data: 1\n\n", 4) + "data: end\n\n"; text != want || err != nil {
							t.Errorf("got %q, %v", text, err)
						}
						if proto == "h3" {
							return // quic-go's server has no write timeout
						}
						res, err = cl.begin(cl.request(t, "GET", "/slow", nil)).outcome() // on the same connection
						if err != nil {
							return // cut off before its headers
						}
						if text, err := res.text(); err == nil {
							t.Errorf("a slow answer was not cut: %q", text)
						}
					})
				}
			}
		})
	}
}

func TestTheNextRequestOnTheConnectionHasNoDeadlineOfTheStreams(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			w.Header().Set("Content-Type", eventStream)
			io.WriteString(w, "data: 1\n\n")
			return
		}
		time.Sleep(500 * time.Millisecond)
		io.WriteString(w, "slow")
	})
	c := startCaddy(t, `
		sse 1h {
			write_timeout 200ms
		}
		reverse_proxy `+up.addr, withGlobal("servers {\ntimeouts {\nwrite_idle -1s\n}\n}"))
	atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, path := range []string{"/stream", "/slow", "/stream", "/slow"} {
			text, err := cl.get(t, path, acceptStream).text()
			if err != nil || text == "" {
				t.Errorf("%s: got %q, %v", path, text, err)
			}
		}
	})
}

// On HTTP/1.1 the deadline of the last write remains set on the connection.
func TestAQuietStreamEndsCleanlyLongAfterItsLastWrite(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		select {
		case <-time.After(300 * time.Millisecond):
		case <-r.Context().Done():
		}
	})
	site := func(path, age string) string {
		return `
		handle ` + path + ` {
			sse {
				heartbeat off
				write_timeout 100ms
				` + age + `
			}
			reverse_proxy ` + up.addr + `
		}`
	}
	for _, idle := range []string{"", "write_idle -1s", "write_idle 100ms"} {
		t.Run(idle, func(t *testing.T) {
			c := startCaddy(t, site("/upstream", "")+site("/age", "max_duration 200ms"),
				withGlobal("servers {\ntimeouts {\n"+idle+"\n}\n}"))
			for _, path := range []string{"/upstream", "/age"} {
				t.Run("ended by the "+path[1:], func(t *testing.T) {
					t.Parallel()
					atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
						for range 2 { // on the same connection if it was kept open
							text, err := cl.get(t, path, acceptStream).text()
							if text != "data: 1\n\n" || err != nil {
								t.Errorf("got %q, %v", text, err)
							}
						}
					})
				})
			}
		})
	}
}

// writeWithDeadline does what Go's SSE servers usually do: it sets a deadline
// before each write, and never clears it.
func writeWithDeadline(t testing.TB, w http.ResponseWriter, text string, within time.Duration) {
	t.Helper()
	control := http.NewResponseController(w)
	if err := control.SetWriteDeadline(time.Now().Add(within)); err != nil {
		t.Errorf("setting a deadline: %v", err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Errorf("writing %q: %v", text, err)
	}
	if err := control.Flush(); err != nil {
		t.Errorf("flushing %q: %v", text, err)
	}
}

// A stream outlives any write deadline that a handler sets: with heartbeats, in
// a silence, and at the next write.
func TestDeadlinesOfHandlersDoNotEndAStream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	const within = 50 * time.Millisecond
	h := newTestHandler(t)
	for name, site := range map[string]string{
		"the handler's":                "sse 40ms {\nprelude off\n}\n" + h.directive,
		"the handler's, started early": "sse 40ms {\nprelude off\nearly_start 10ms\n}\n" + h.directive,
		"timeouts after sse":           "route {\nsse 40ms {\nprelude off\n}\ntimeouts {\nwrite_timeout 50ms\n}\n" + h.directive + "\n}",
		"timeouts before sse":          "route {\ntimeouts {\nwrite_timeout 50ms\n}\nsse 40ms {\nprelude off\n}\n" + h.directive + "\n}",
		"timeouts with a rate":         "route {\nsse 40ms {\nprelude off\n}\ntimeouts {\nwrite_timeout 50ms 100000\n}\n" + h.directive + "\n}",
	} {
		for _, idle := range []string{"", "write_idle -1s", "write_idle 50ms"} {
			t.Run(name+" "+idle, func(t *testing.T) {
				c := startCaddy(t, site, withGlobal("servers {\ntimeouts {\n"+idle+"\n}\n}"))
				atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
					path := "/" + cl.proto
					e, call := open(t, cl, h.testUpstream, path, acceptStream)
					if strings.Contains(name, "early") {
						e.headers(t) // the stream has started
					}
					call.do(func(w http.ResponseWriter) {
						if strings.Contains(name, "handler's") {
							// The same before there is a stream.
							_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(within))
						}
						w.Header().Set("Content-Type", eventStream)
						w.WriteHeader(200)
					})
					send := call.send
					if strings.Contains(name, "handler's") {
						send = func(text string) {
							call.do(func(w http.ResponseWriter) { writeWithDeadline(t, w, text, within) })
						}
					}
					body := e.headers(t).follow()
					send("data: 1\n\n")
					// Heartbeats continue after the deadline.
					if got, err := body.wait(func(unread string) bool { return strings.Count(unread, ":heartbeat") >= 4 }); err != nil {
						t.Fatalf("after %q: %v", got, err)
					}
					send("data: 2\n\n")
					call.end()
					got, err := body.rest()
					if text := strings.ReplaceAll(got, ":heartbeat\n\n", ""); text != "data: 1\n\ndata: 2\n\n" || err != io.EOF {
						t.Errorf("got %q, %v", got, err)
					}
					expectEnd(t, c.closedLine(t, path), "upstream_closed", "info")
				})
			})
		}
	}
}

// Conversely, answers that are not streams keep their deadlines.
func TestDeadlinesOfHandlersHoldForWhatIsNoStream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	given := make(chan bool, 1) // up
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		defer func() { given <- true }()
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	for _, early := range []string{"", "early_start 1h any"} {
		for _, idle := range []string{"", "write_idle -1s"} {
			t.Run(early+" "+idle, func(t *testing.T) {
				c := startCaddy(t, `route {
					sse {
						prelude off
						`+early+`
					}
					timeouts {
						write_timeout 100ms
					}
					reverse_proxy `+up.addr+`
				}`, withGlobal("servers {\ntimeouts {\n"+idle+"\n}\n}"))
				for _, proto := range []string{"h1", "h2"} { // quic-go's server has no write timeout
					res := c.client(proto).get(t, "/", acceptStream)
					<-given // the client reads nothing until then
					if n, err := io.CopyN(io.Discard, res.Body, 64<<20); err == nil {
						t.Errorf("%s: %d bytes have come, and no end", proto, n)
					}
					res.leave()
				}
			})
		}
	}
}

// A minimum rate of the server counts the bytes that the server has sent. When
// sse queries the timeouts, that count must not start again.
func TestARateOfTheServerRemembersWhatItHasCounted(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		for range 12 {
			w.Write([]byte(strings.Repeat("x", 20_000)))
			w.(http.Flusher).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	})
	for name, inside := range map[string]string{
		"early start": "sse {\nearly_start 1h any\n}",
		"timeouts":    "sse\ntimeouts {\nread_timeout 1m\n}",
	} {
		t.Run(name, func(t *testing.T) {
			// An encoder writes its last bytes when all handlers after it have
			// returned.
			c := startCaddy(t, `route {
				encode gzip
				`+inside+`
				reverse_proxy `+up.addr+`
			}`, withGlobal("servers {\ntimeouts {\nwrite_idle 300ms 100\n}\n}"))
			for _, proto := range []string{"h1", "h2"} {
				for _, encoding := range []string{"gzip", "identity"} {
					t.Run(proto+" "+encoding, func(t *testing.T) {
						t.Parallel()
						cl := c.client(proto)
						res := cl.do(t, cl.request(t, "GET", "/", nil, "Accept-Encoding: "+encoding))
						if text, err := res.text(); err != nil || encoding == "identity" && len(text) != 240_000 {
							t.Errorf("got %d bytes, %v", len(text), err)
						}
					})
				}
			}
		})
	}
}

// When timeouts after sse returns, it restores the timeouts that it has
// overridden, while heartbeats are sent on another goroutine.
func TestTimeoutsAfterSSEDoNotMeetAFrame(t *testing.T) {
	checkLeaks(t)
	h := newTestHandler(t)
	c := startCaddy(t, `route {
		sse 1ms {
			prelude 1ms
		}
		timeouts {
			read_timeout 5s
			write_timeout 5s
			max_write_chunk 1KiB
		}
		`+h.directive+`
	}`)
	for i := range 15 {
		cl := c.client(clientProtocols[i%3])
		e := cl.begin(cl.request(t, "GET", "/", nil, acceptStream))
		call := h.accept(t)
		call.start(eventStream)
		body := e.headers(t).follow()
		if _, err := body.wait(func(unread string) bool { return strings.Count(unread, "heartbeat") > 3 }); err != nil {
			t.Fatal(err)
		}
		call.end()
		if _, err := body.rest(); err != io.EOF {
			t.Error(err)
		}
	}
}

// Writers that can't be unwrapped

// opaque is the handler `test_opaque`. Like many, its writer can flush but
// can't be unwrapped.
type opaque struct{}

func init() {
	caddy.RegisterModule(opaque{})
	httpcaddyfile.RegisterHandlerDirective("test_opaque", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return opaque{}, nil
	})
}

func (opaque) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_opaque", New: func() caddy.Module { return new(opaque) }}
}

func (opaque) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(opaqueWriter{w}, r)
}

type opaqueWriter struct{ http.ResponseWriter }

func (w opaqueWriter) Flush() { _ = http.NewResponseController(w.ResponseWriter).Flush() }

// sse turns some of the server's own protection off, so it must be able to
// replace it, whatever writer is in between.
func TestAClientThatTakesNothingIsEndedThroughAnOpaqueWriterToo(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	for _, idle := range []string{"", "write_idle -1s", "write_idle 200ms", "write_idle -1s\nread_body_idle -1s"} {
		t.Run("with "+idle, func(t *testing.T) {
			c := startCaddy(t, `route {
				test_opaque
				sse 1h {
					write_timeout 500ms
				}
				reverse_proxy `+up.addr+`
			}`, withAdmin(), withGlobal("servers {\ntimeouts {\n"+idle+"\n}\n}"))
			atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				if cl.proto != "h1" && strings.Contains(idle, "read_body_idle") {
					return // through such a writer, sse can't end one stream of a connection
				}
				path, method := "/"+cl.proto, map[string]string{"h1": "GET", "h2": "POST", "h3": "GET"}[cl.proto]
				body := "{}"
				if strings.Contains(idle, "read_body_idle") {
					// Without Caddy's reader around a body, net/http may close
					// it while the transport is still looking for its end, and
					// then breaks the answer off. Plain Caddy does the same.
					body = ""
				}
				e := cl.begin(cl.request(t, method, path, strings.NewReader(body), acceptStream))
				call := up.acceptAt(t, path)
				call.start(eventStream)
				res := e.headers(t) // and the client reads no more
				call.floodUntilStuck()
				call.expectGone()
				line := c.closedLine(t, path)
				expectEnd(t, line, "write_timeout", "info")
				if took := seconds(line["duration"]); took < 500*time.Millisecond {
					t.Errorf("it took %v", took)
				}
				if n, err := io.Copy(io.Discard, res.Body); err == nil {
					t.Errorf("after %d bytes the stream looks whole", n)
				}
				res.leave()
				c.waitForStreams(t, 0)
			})
		})
	}
}

func TestAStreamThroughAnOpaqueWriterIsAsAnyOther(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `route {
		test_opaque
		sse 20ms {
			prelude off
			write_timeout 200ms
		}
		reverse_proxy `+up.addr+`
	}`, withAdmin(), withGlobal("servers {\ntimeouts {\nwrite_idle 100ms\n}\n}"))
	atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for range 2 { // on one connection if it was kept open
			e, call := open(t, cl, up, "/"+cl.proto, acceptStream)
			call.start(eventStream)
			body := e.headers(t).follow()
			if _, err := body.wait(func(unread string) bool { return strings.Count(unread, ":heartbeat\n\n") > 20 }); err != nil {
				t.Fatal(err)
			}
			call.send("data: 1\n\n")
			call.end()
			text, err := body.rest()
			if strings.ReplaceAll(text, ":heartbeat\n\n", "") != "data: 1\n\n" || err != io.EOF {
				t.Errorf("got %q, %v", text, err)
			}
		}
	})
}

// duplex answers with an event for each line of the request, as the lines come.
func duplex(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).EnableFullDuplex()
	w.Header().Set("Content-Type", r.URL.Query().Get("type"))
	w.(http.Flusher).Flush()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		fmt.Fprintf(w, "data: %s\n\n", lines.Text())
		w.(http.Flusher).Flush()
	}
}

func TestTheRequestOfAStreamMayBeAsSlowAsTheStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, duplex)
	site := func(path, early string) string {
		return `
		handle ` + path + ` {
			sse 1h {
				prelude off
				` + early + `
			}
			reverse_proxy ` + up.addr + `
		}`
	}
	c := startCaddy(t, site("/in-time", "")+site("/early", "early_start 50ms any"),
		withGlobal(strings.Replace(serverTimeouts, "servers {", "servers {\nenable_full_duplex", 1)))
	for _, path := range []string{"/in-time", "/early"} {
		for _, kind := range []string{eventStream, "text/plain"} {
			t.Run(path[1:]+" "+kind, func(t *testing.T) {
				t.Parallel()
				atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
					in, out := io.Pipe()
					body := cl.do(t, cl.request(t, "POST", path+"?type="+kind, in, acceptStream)).follow()
					for range 4 {
						if _, err := io.WriteString(out, "a\n"); err != nil {
							break
						}
						time.Sleep(200 * time.Millisecond)
					}
					out.Close()
					text, err := body.rest()
					if whole := strings.Repeat("data: a\n\n", 4); kind == eventStream && (text != whole || err != io.EOF) {
						t.Errorf("got %q, %v", text, err)
					} else if kind != eventStream && err == io.EOF && text == whole {
						t.Errorf("what is no stream was not cut")
					}
				})
			})
		}
	}
}

// On HTTP/1.1 the server reads the rest of a request before it answers.
func TestARequestThatStopsComingDoesNotHoldItsStream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, duplex)
	for name, test := range map[string]struct{ directive, global string }{
		"the server's timeout": {"write_timeout off", "read_body_idle 300ms"},
		"the stream's":         {"write_timeout 300ms", "read_body_idle -1s"},
	} {
		t.Run(name, func(t *testing.T) {
			c := startCaddy(t, `
				sse {
					prelude off
					`+test.directive+`
				}
				reverse_proxy `+up.addr, withAdmin(), withGlobal("servers {\ntimeouts {\n"+test.global+"\n}\n}"))
			for _, addr := range []string{c.addr, c.tlsAddr} {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				path := "/plain"
				if addr == c.tlsAddr {
					path = "/tls"
					conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: []string{"http/1.1"}})
				}
				fmt.Fprintf(conn, "GET %s?type=%s HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nContent-Length: 100000\r\n\r\n%s", path, eventStream, strings.Repeat("a\n", 4000))
				if line := c.closedLine(t, path); seconds(line["duration"]) > 15*time.Second {
					t.Errorf("it ended late: %v", line)
				}
			}
		})
	}
}

// The client's side

// flood sends events until the client's side takes no more.
func flood(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", eventStream)
	piece := "data: " + strings.Repeat("x", 16<<10) + "\n\n"
	for r.Context().Err() == nil {
		if _, err := io.WriteString(w, piece); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		if r.URL.Query().Has("slow") {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// stoppable is a client's end of a connection that can stop reading.
type stoppable struct {
	net.Conn
	stop, closed chan struct{}
}

func (c *stoppable) Read(p []byte) (int, error) {
	select {
	case <-c.stop:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return c.Conn.Read(p)
	}
}

// A reset of an HTTP/2 stream can't be sent if the connection takes no more
// bytes.
func TestAStreamOfAnHTTP2ConnectionThatIsStuckIsEnded(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	for _, test := range []struct{ writeTimeout, reason string }{
		{"700ms", "write_timeout"},
		{"off", "admin"},
	} {
		t.Run("write_timeout "+test.writeTimeout, func(t *testing.T) {
			up := newUpstream(t)
			c := startCaddy(t, `
				sse 1h {
					prelude off
					write_timeout `+test.writeTimeout+`
				}
				reverse_proxy `+up.addr, withAdmin())
			cl := c.client("h2")
			stop, closed := make(chan struct{}), make(chan struct{})
			defer close(closed)
			transport := cl.Transport.(*http.Transport)
			transport.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := new(net.Dialer).DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				config := transport.TLSClientConfig.Clone()
				config.NextProtos = []string{"h2"}
				secured := tls.Client(&stoppable{conn, stop, closed}, config)
				return secured, secured.HandshakeContext(ctx)
			}
			var calls []*upstreamCall
			for _, path := range []string{"/1", "/2"} {
				exchange, call := open(t, cl, up, path)
				call.start(eventStream)
				body := exchange.headers(t).Body
				go io.Copy(io.Discard, body)
				calls = append(calls, call)
			}
			close(stop)
			for _, call := range calls {
				call.floodUntilStuck()
			}
			if test.writeTimeout == "off" {
				c.admin("DELETE", "/sse/streams?all=true")
			}
			reasons := make(map[string]int)
			for _, path := range []string{"/1", "/2"} {
				line := c.closedLine(t, path)
				reasons[line["reason"].(string)]++
				if took := seconds(line["duration"]); took > 15*time.Second {
					t.Errorf("it took %v", took)
				}
			}
			if reasons[test.reason] == 0 || reasons[test.reason]+reasons["client_closed"] != 2 {
				t.Errorf("the streams ended as %v", reasons)
			}
		})
	}
}

// A connection can be cut inside a TLS record. Whatever TLS sends after that,
// such as the alert close_notify, looks like the rest of the record to the
// client.
func TestNothingFollowsATLSRecordThatIsCut(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	var isCutting atomic.Bool
	isCut := make(chan struct{})
	around := func(conn net.Conn) net.Conn { return &cutting{conn, &isCutting, isCut} }
	aroundAccepted.Store(&around)
	defer aroundAccepted.Store(nil)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			prelude off
			write_timeout 300ms
		}
		reverse_proxy `+up.addr, withAdmin())
	for path, client := range map[string]*testClient{"/h1": c.client("h2").overTLS(), "/h2": c.client("h2")} {
		exchange, call := open(t, client, up, path)
		call.start(eventStream)
		stream := exchange.headers(t).follow()
		call.send("data: 1\n\n")
		stream.expect(t, "data: 1\n\n")
		isCutting.Store(true)
		call.send("data: 2\n\n")
		<-isCut
		call.send("data: 3\n\n") // over HTTP/2, a write may return before its bytes are sent
		if line := c.closedLine(t, path); line["reason"] != "write_timeout" {
			t.Errorf("%s: %v", path, line)
		}
		if _, err := stream.rest(); err == nil || strings.Contains(err.Error(), "tls: ") {
			t.Errorf("%s: the stream ends with %v", path, err)
		}
	}
}

// cutting is a connection that takes the next record except for its last bytes,
// and nothing more until it is told to break off.
type cutting struct {
	net.Conn
	next  *atomic.Bool
	isCut chan struct{}
}

func (c *cutting) Write(p []byte) (int, error) {
	if !c.next.CompareAndSwap(true, false) {
		return c.Conn.Write(p)
	}
	n, err := c.Conn.Write(p[:len(p)-10])
	for c.isCut <- struct{}{}; err == nil; time.Sleep(time.Millisecond) {
		_, err = c.Conn.Write(nil)
	}
	return n, err
}

// NetConn returns the inner connection.
func (c *cutting) NetConn() net.Conn { return c.Conn }

// A write that fails by itself is not broken off by the module, but its connection is
// closed at once.
func TestNothingFollowsATLSRecordWhoseWriteFails(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	var fails atomic.Bool
	around := func(conn net.Conn) net.Conn { return &failing{conn, &fails} }
	aroundAccepted.Store(&around)
	defer aroundAccepted.Store(nil)
	up := newUpstream(t)
	c := startCaddy(t, "sse 1h {\nprelude off\n}\nreverse_proxy "+up.addr)
	exchange, call := open(t, c.client("h2").overTLS(), up, "/")
	call.start(eventStream)
	stream := exchange.headers(t).follow()
	call.send("data: 1\n\n")
	stream.expect(t, "data: 1\n\n")
	fails.Store(true)
	call.send("data: 2\n\n")
	if _, err := stream.rest(); err == nil || strings.Contains(err.Error(), "tls: ") {
		t.Errorf("the stream ends with %v", err)
	}
}

// failing is a connection on which the next write takes all but the last bytes, and
// fails.
type failing struct {
	net.Conn
	next *atomic.Bool
}

func (c *failing) Write(p []byte) (int, error) {
	if !c.next.CompareAndSwap(true, false) {
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:len(p)-10])
	return n, os.ErrDeadlineExceeded
}

// NetConn returns the inner connection.
func (c *failing) NetConn() net.Conn { return c.Conn }

// startFlooded runs a site with a write timeout and an upstream that floods.
func startFlooded(t testing.TB, writeTimeout string, options ...siteOption) *testCaddy {
	t.Helper()
	up := newUpstreamFunc(t, flood)
	return startCaddy(t, `
		sse 1h {
			prelude off
			write_timeout `+writeTimeout+`
		}
		reverse_proxy `+up.addr, options...)
}

// slowClient takes a while for each write, unless a deadline interrupts it.
type slowClient struct {
	*client
	takes   time.Duration
	writing atomic.Bool
	broken  chan struct{}
}

func (c *slowClient) Write(p []byte) (int, error) {
	c.writing.Store(true)
	defer c.writing.Store(false)
	select {
	case <-time.After(c.takes):
		return c.client.Write(p)
	case <-c.broken:
		return 0, os.ErrDeadlineExceeded
	}
}

func (c *slowClient) SetWriteDeadline(deadline time.Time) error {
	if !deadline.IsZero() && deadline.Before(time.Now()) {
		close(c.broken)
	}
	return nil
}

func TestAWriteTimesOutWhenItGetsNoFurther(t *testing.T) {
	const timeout = 30 * time.Second
	small, large := "data: 1\n\n", "data: "+strings.Repeat("x", 32<<10)+"\n\n"
	for name, test := range map[string]struct {
		quiet, takes time.Duration
		text         string // "": a heartbeat
		beats        time.Duration
		ends         bool
	}{
		"at once":               {0, timeout + time.Second, small, -1, true},
		"after a silence":       {time.Hour + 7*time.Second, timeout + time.Second, small, -1, true},
		"in a large write":      {time.Minute, timeout + time.Second, large, -1, true},
		"with heartbeats":       {7 * time.Second, timeout + time.Second, small, 20 * time.Second, true},
		"in a frame":            {0, timeout + time.Second, "", 20 * time.Second, true},
		"in a rare frame":       {0, timeout + time.Second, "", time.Hour, true},
		"slow":                  {time.Hour, timeout - time.Second, small, -1, false},
		"slow in a large write": {0, timeout - time.Second, large, 20 * time.Second, false},
		"slow in a frame":       {0, timeout - time.Second, "", time.Minute, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := provision(t, &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(test.beats), Prelude: -1}})
				c := &slowClient{client: newClient(t), takes: test.takes, broken: make(chan struct{})}
				r := caddyhttp.PrepareRequest(get(), caddy.NewReplacer(), c, new(caddyhttp.Server))
				var began, ended time.Time
				panicked := func() (panicked any) {
					defer func() { panicked = recover() }()
					_ = h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
						w.Header().Set("Content-Type", "text/event-stream")
						w.WriteHeader(http.StatusOK)
						time.Sleep(test.quiet)
						began = time.Now()
						if test.text != "" {
							_, _ = io.WriteString(w, test.text)
							ended = time.Now()
							return nil
						}
						select {
						case <-r.Context().Done():
						case <-time.After(3 * time.Hour):
						}
						ended = time.Now()
						for c.writing.Load() {
							time.Sleep(time.Second) // a bubble's time stands still while a goroutine waits for a lock
						}
						return nil
					}))
					return nil
				}()
				if aborted := panicked != nil; aborted != test.ends {
					t.Fatalf("aborted: %v, after %v", panicked, ended.Sub(began))
				}
				wait := timeout
				if test.text == "" {
					wait += test.beats // the heartbeat's, at the latest
				}
				if took := ended.Sub(began); test.ends && (took < timeout || took > wait+time.Millisecond) {
					t.Errorf("it took %v, want %v", took, wait)
				}
			})
		})
	}
}

// panickyClient panics in its first write.
type panickyClient struct {
	*client
	panicked bool
}

func (c *panickyClient) Write(p []byte) (int, error) {
	if !c.panicked {
		c.panicked = true
		panic("a writer's bug")
	}
	return c.client.Write(p)
}

func TestAWriteThatPanickedIsNotOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := provision(t, silent())
		c := &panickyClient{client: newClient(t)}
		r := caddyhttp.PrepareRequest(get(), caddy.NewReplacer(), c, new(caddyhttp.Server))
		err := h.ServeHTTP(c, r, stream(func(w http.ResponseWriter) {
			func() {
				defer func() { _ = recover() }()
				write(t, w, "data: 1\n\n")
			}()
			time.Sleep(time.Hour)
			write(t, w, "data: 2\n\n")
		}))
		if err != nil || c.body.String() != "data: 2\n\n" {
			t.Errorf("got %q, %v", c.body.String(), err)
		}
	})
}

func TestAClientThatTakesNothingIsEndedAfterTheWriteTimeout(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	for _, idle := range []string{"", "write_idle -1s", "write_idle 200ms", "write_idle 100ms 100000000"} {
		t.Run("with "+idle, func(t *testing.T) {
			c := startFlooded(t, "700ms", withGlobal("servers {\ntimeouts {\n"+idle+"\n}\n}"))
			atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				path := "/" + cl.proto
				// Another stream, on the same connection where the protocol
				// allows it, is not affected.
				other := cl.get(t, path+"/other?slow", acceptStream).follow()
				res := cl.get(t, path, acceptStream)
				line := c.closedLine(t, path)
				expectEnd(t, line, "write_timeout", "info")
				if took := seconds(line["duration"]); took < 700*time.Millisecond {
					t.Errorf("it took %v", took)
				}
				if n, err := io.Copy(io.Discard, res.Body); err == nil {
					t.Errorf("after %d bytes the stream looks whole", n)
				}
				res.leave()
				before := len(other.all())
				other.wait(func(string) bool { return len(other.all()) > before+3 })
				if _, err := other.wait(func(string) bool { return true }); err != nil {
					t.Errorf("the other stream ended with %v", err)
				}
			})
		})
	}
}

// A client that reads slowly is not a client that reads nothing, however much
// the kernel could buffer for it.
func TestAClientOfFewBytesASecondLives(t *testing.T) {
	if apart(t) {
		return
	}
	if runtime.GOOS != "linux" && runtime.GOOS != "darwin" {
		t.Skip("the kernel takes megabytes at a time here, without a limit")
	}
	checkLeaks(t)
	c := startFlooded(t, "1s", withAdmin())
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /few HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n", acceptStream)
	// On loopback, segments are 64 KiB, and a window never opens by less.
	piece := make([]byte, 16<<10)
	for began := time.Now(); time.Since(began) < 2500*time.Millisecond; time.Sleep(40 * time.Millisecond) {
		if _, err := io.ReadFull(conn, piece); err != nil {
			t.Fatalf("after %v: %v", time.Since(began), err)
		}
	}
	if passed := c.listed(t, "/few")["bytes"].(float64); passed > 4<<20 {
		t.Errorf("%v bytes have been passed on to a client that has taken few", passed)
	}
	conn.Close()
	expectEnd(t, c.closedLine(t, "/few"), "client_closed", "info")
}

func TestAClientThatReadsSlowlyLivesAndLeavesAsAClient(t *testing.T) {
	checkLeaks(t)
	c := startFlooded(t, "700ms")
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			t.Parallel()
			cl := c.client(proto)
			path := "/slow" + proto
			res := cl.get(t, path, acceptStream)
			// Windows open in large steps, above all those of HTTP/3.
			piece := make([]byte, 512<<10)
			for began := time.Now(); time.Since(began) < 2*time.Second; time.Sleep(100 * time.Millisecond) {
				if _, err := io.ReadFull(res.Body, piece); err != nil {
					t.Fatalf("after %v: %v", time.Since(began), err)
				}
			}
			res.leave()
			expectEnd(t, c.closedLine(t, path), "client_closed", "info")
		})
	}
}

func TestAWriteTimeoutThatIsOffEndsNobody(t *testing.T) {
	checkLeaks(t)
	c := startFlooded(t, "off", withAdmin(), withGlobal("servers {\ntimeouts {\nwrite_idle 200ms\nwrite 200ms\n}\n}"))
	atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		res := cl.get(t, path, acceptStream)
		// For longer than the server would allow, no byte gets through.
		c.waitForStream(t, path, func(s map[string]any) bool { return s["state"] != "open" || s["idle_seconds"].(float64) > 0.7 })
		if s := c.listed(t, path); s["state"] != "open" {
			t.Errorf("%v", s)
		}
		if n, err := io.CopyN(io.Discard, res.Body, 4<<20); err != nil {
			t.Errorf("after %d bytes: %v", n, err)
		}
		res.leave()
		expectEnd(t, c.closedLine(t, path), "client_closed", "info")
	})
}

// The upstream's side

func TestAnUpstreamTimeoutCountsNoHeartbeats(t *testing.T) {
	checkLeaks(t)
	gone := make(chan string, 100)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, r.Header.Get("X-Send"))
		if strings.HasPrefix(r.Header.Get("X-Send"), "data: 1") {
			io.WriteString(w, "\n\n")
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		gone <- r.URL.Path
	})
	c := startCaddy(t, `
		sse 100ms {
			prelude off
			upstream_timeout 500ms
		}
		reverse_proxy `+up.addr)
	for _, proto := range clientProtocols {
		for _, r := range []struct{ method, sent, want string }{
			{"GET", "data: 1", "end"},
			{"GET", "data: ha", "end"},
			{"POST", "data: 1", "abort"},
			{"GET", "{", "abort"},
		} {
			t.Run(fmt.Sprintf("%s %s %q", proto, r.method, r.sent), func(t *testing.T) {
				t.Parallel()
				cl, path := c.client(proto), fmt.Sprintf("/%s%s%x", proto, r.method, r.sent)
				last := time.Now()
				body := cl.do(t, cl.request(t, r.method, path, nil, acceptStream, "X-Send: "+r.sent)).follow()
				text, err := body.rest()
				if (err == io.EOF) != (r.want == "end") || err == errNothingMore {
					t.Errorf("got %q, %v, want an %s", text, err, r.want)
				}
				if took := time.Since(last); took < 500*time.Millisecond {
					t.Errorf("it ended after %v", took)
				}
				line := c.closedLine(t, path)
				expectEnd(t, line, "upstream_timeout", "info")
				if r.sent == "data: 1" && line["heartbeats"].(float64) < 3 {
					t.Errorf("the client heard nothing meanwhile: %v", line)
				}
				<-gone
			})
		}
	}
}

func TestAnUpstreamIsNotSilentWhileItsBytesWaitForTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.UpstreamTimeout = caddy.Duration(10 * time.Second)
		config.WriteTimeout = -1
		h := provision(t, config)
		c := newClient(t)
		c.stall = make(chan struct{})
		var ended time.Duration
		began := time.Now()
		time.AfterFunc(15*time.Second, func() { close(c.stall) })
		err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(200)
			write(t, w, "data: 1\n\n") // takes 15 seconds
			<-r.Context().Done()
			ended = time.Since(began)
			return r.Context().Err()
		})
		if err != nil || ended < 25*time.Second || ended > 26*time.Second {
			t.Errorf("it ended after %v with %v, want 25s", ended, err)
		}
	})
}

// A client over raw HTTP/1.1, with or without TLS, sees an abort as a missing
// last chunk.
func TestAnEndThatAbortsHasNoLastChunk(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			prelude off
			upstream_timeout 200ms
		}
		reverse_proxy `+up.addr)
	for _, method := range []string{"GET", "POST"} {
		for _, secure := range []bool{false, true} {
			addr := c.addr
			if secure {
				addr = c.tlsAddr
			}
			var conn net.Conn
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if secure {
				conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: []string{"http/1.1"}})
			}
			conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(conn, "%s /%v HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", method, secure)
			call := up.accept(t)
			call.start(eventStream)
			text, err := io.ReadAll(bufio.NewReader(conn))
			if clean := strings.HasSuffix(string(text), "0\r\n\r\n"); clean != (method == "GET") || (clean && err != nil) {
				t.Errorf("%s, TLS %v: got %q, %v", method, secure, text, err)
			}
		}
	}
}

// Ages

func TestAResumableStreamEndsAtItsAge(t *testing.T) {
	ages := make(map[time.Duration]bool)
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			config := heartbeat(20*time.Second, -1)
			config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(time.Hour), Jitter: caddy.Duration(10 * time.Minute)}
			h := provision(t, config)
			began := time.Now()
			c := play(t, h, func(w http.ResponseWriter) {
				for {
					if _, err := io.WriteString(w, "data: 1\n\n"); err != nil {
						return
					}
					time.Sleep(2 * time.Second)
					if time.Since(began) > 2*time.Hour {
						t.Fatal("it goes on")
					}
				}
			})
			last := c.log[len(c.log)-1].at
			ages[last] = true
			if last < time.Hour-2*time.Second || last > 70*time.Minute {
				t.Errorf("its last write was at %v", last)
			}
		})
	}
	if len(ages) < 10 {
		t.Errorf("fifty streams have %d ages", len(ages))
	}
}

func TestOnlyAResumableStreamHasAMaximalAge(t *testing.T) {
	for _, test := range []struct {
		method, accept, body string
		event                string // what is incomplete when the age is reached
		want                 time.Duration
	}{
		{"GET", "text/event-stream", "data: 1\n\n", "", time.Hour},
		{"GET", "text/event-stream", "data: 1\n\n", "data: ha", time.Hour + time.Second},
		{"GET", "*/*", "data: 1\n\n", "", 2 * time.Hour},
		{"POST", "text/event-stream", "data: 1\n\n", "", 2 * time.Hour},
		{"GET", "text/event-stream", "{", "", 2 * time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			config := silent()
			config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(time.Hour)}
			h := provision(t, config)
			c := newClient(t)
			r := get(test.accept)
			r.Method = test.method
			began := time.Now()
			var ended time.Duration
			err := serve(h, c, r, func(w http.ResponseWriter, r *http.Request) error {
				w.Header().Set("Content-Type", "text/event-stream")
				write(t, w, test.body+test.event)
				select {
				case <-r.Context().Done():
				case <-time.After(2 * time.Hour):
				}
				ended = time.Since(began)
				return nil
			})
			if err != nil || ended != test.want || c.body.String() != test.body+test.event {
				t.Errorf("%+v: it ended at %v with %v and %q", test, ended, err, c.body.String())
			}
		})
	}
}

// A limit beyond what a clock can reach ends no stream, and does not make the
// agenda run again and again.
func TestLimitsBeyondAllTimeEndNobody(t *testing.T) {
	const longest = caddy.Duration(1<<63 - 1)
	for _, limit := range []caddy.Duration{caddy.Duration(1752000 * time.Hour), longest - 1, longest} {
		for drain, beat := range map[bool]caddy.Duration{false: -1, true: limit} {
			synctest.Test(t, func(t *testing.T) {
				// A bubble's clock starts earlier than that of the process.
				time.Sleep(40 * 365 * 24 * time.Hour)
				config := &caddysse.Handler{
					Heartbeat:       &caddysse.Heartbeat{Interval: beat, Prelude: -1},
					Retry:           &caddysse.Retry{Min: 1e6, Max: limit},
					UpstreamTimeout: limit,
					WriteTimeout:    limit,
					MaxDuration:     &caddysse.MaxDuration{Duration: limit, Jitter: limit},
					Drain:           &caddysse.Drain{Reload: limit, Exit: limit},
				}
				h := provision(t, config)
				lives := func() *client {
					return play(t, h, func(w http.ResponseWriter) {
						for range 100 {
							write(t, w, "data: 1\n\n")
							time.Sleep(time.Minute)
						}
					})
				}
				if drain {
					// One stream that starts a run, and one that joins it.
					go lives()
					synctest.Wait()
					stop := make(chan struct{})
					defer close(stop)
					go h.DrainOver(time.Duration(limit), stop)
					synctest.Wait()
				}
				text := lives().body.String()
				if _, events, _ := strings.Cut(text, "\n\n"); events != strings.Repeat("data: 1\n\n", 100) {
					t.Errorf("limit %v, drain %v: got %d bytes, %.100q", time.Duration(limit), drain, len(text), text)
				}
			})
		}
	}
}
