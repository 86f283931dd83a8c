package caddysse_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// lateDial stands for what net/http.Transport leaves running for a request that
// was given up: a dial for which nothing waits, which reads the request's
// header, its fields and its placeholders without a lock.
type lateDial struct {
	running sync.WaitGroup
	stop    chan struct{}
}

// begin returns after the request has been read once. It is then read again and
// again until end is called.
func (b *lateDial) begin(r *http.Request) {
	b.stop = make(chan struct{})
	looked := make(chan struct{})
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	b.running.Go(func() {
		for first := true; ; first = false {
			for _, placeholder := range []string{
				"{http.request.header.X-Name}", "{http.request.header.Accept-Encoding}", "{http.request.host}",
				"{http.request.uri}", "{outside}", "{unknown}", "{http.sse.reason}", "{mapped}",
			} {
				repl.ReplaceAll(placeholder, "")
			}
			_ = r.Context().Value(caddyhttp.ServerCtxKey)
			_ = r.Header.Get("X-Name")
			if first {
				close(looked)
			}
			select {
			case <-b.stop:
				return
			default:
			}
		}
	})
	<-looked
}

func (b *lateDial) end() {
	close(b.stop)
	b.running.Wait()
}

// Whatever happens to a request, nothing that its handlers have been given may
// be written to: the process could crash, and the race detector reports it.
func TestADialThatNobodyWaitsForMayReadTheRequestForEver(t *testing.T) {
	late := make(chan struct{}) // closed when a stream has started early
	ends := map[string]func(w http.ResponseWriter, r *http.Request) error{
		"an error":  func(http.ResponseWriter, *http.Request) error { return caddyhttp.Error(502, errors.New("it failed")) },
		"a panic":   func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) },
		"no answer": func(http.ResponseWriter, *http.Request) error { return nil },
		"another answer": func(w http.ResponseWriter, _ *http.Request) error {
			_, err := io.WriteString(w, "text")
			return err
		},
		"an error that is answered": func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(503)
			return nil
		},
		"a stream":                 stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "data: 1\n\n") }),
		"a stream that breaks off": stream(func(w http.ResponseWriter) { panic(http.ErrAbortHandler) }),
		"a stream that is late": func(w http.ResponseWriter, r *http.Request) error {
			<-late
			return stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "data: 1\n\n") })(w, r)
		},
		"an error that is late": func(w http.ResponseWriter, r *http.Request) error {
			<-late
			return caddyhttp.Error(502, errors.New("it failed"))
		},
	}
	for _, name := range slices.Sorted(maps.Keys(ends)) {
		for _, delay := range []time.Duration{0, time.Millisecond} {
			t.Run(fmt.Sprintf("%s, early start %v", name, delay > 0), func(t *testing.T) {
				config := &caddysse.Handler{ReconnectOn: []int{503}}
				if delay > 0 {
					config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(delay)}
				}
				late = make(chan struct{})
				told := sync.OnceFunc(func() { close(late) })
				if delay == 0 {
					told() // there is no early start to wait for
				}
				h := provision(t, config)
				c := headed{newClient(t), told}
				r := get("text/event-stream")
				r.Header.Set("X-Name", "example.com")
				r.Header.Set("Accept-Encoding", "gzip")
				repl := caddy.NewReplacer()
				r = caddyhttp.PrepareRequest(r, repl, c, new(caddyhttp.Server))
				repl.Map(func(key string) (any, bool) { // as the handler map does
					if key != "mapped" {
						return nil, false
					}
					return repl.ReplaceAll("{unknown}", ""), true
				})
				var dial lateDial
				defer dial.end()
				func() {
					defer func() { _ = recover() }()
					_ = h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
						dial.begin(r)
						return ends[name](w, r)
					}))
				}()
				// After that, error routes change the request, and logs read
				// it.
				r.Header.Set("X-Error", "1")
				r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("outside", "error")
			})
		}
	}
}

// A proxy before sse leaves such a dial too, and the proxy after sse sets the
// variable that the dial reads to the value that it already has.
func TestWhatIsSetAgainIsNotWrittenToTheClientsVariables(t *testing.T) {
	h := provision(t, &caddysse.Handler{EarlyStart: &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour)}})
	c := newClient(t)
	r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
	address := struct{ of string }{"the client"}
	caddyhttp.SetVar(r.Context(), "address", address)
	done, looked := make(chan struct{}), make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for first := true; ; first = false {
			caddyhttp.GetVar(r.Context(), "address")
			if first {
				close(looked)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	<-looked
	err := h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		caddyhttp.SetVar(r.Context(), "address", address)
		return stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "data: 1\n\n") })(w, r)
	}))
	if err != nil {
		t.Error(err)
	}
	close(done)
	reading.Wait()
}

func TestAVariableThatCanNotBeComparedGetsOut(t *testing.T) {
	h := provision(t, &caddysse.Handler{EarlyStart: &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour)}})
	c := newClient(t)
	r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
	caddyhttp.SetVar(r.Context(), "list", []string{"outside"})
	err := h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		caddyhttp.SetVar(r.Context(), "list", []string{"inside"})
		return stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "data: 1\n\n") })(w, r)
	}))
	if got, _ := caddyhttp.GetVar(r.Context(), "list").([]string); err != nil || !slices.Equal(got, []string{"inside"}) {
		t.Errorf("%v, %v", got, err)
	}
}

// headed is a client that calls told when its headers are sent.
type headed struct {
	*client
	told func()
}

func (c headed) WriteHeader(status int) {
	c.client.WriteHeader(status)
	c.told()
}

// The same through reverse_proxy, with a dial that is in its TLS handshake when
// the request ends.
func TestADialOfReverseProxyOutlivesItsRequest(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialing := make(chan net.Conn, 100)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			dialing <- conn
		}
	}()
	for _, early := range []string{"", "early_start 20ms"} {
		for _, end := range []string{"client", "admin"} {
			if early == "" && end == "admin" {
				continue // there is no stream yet
			}
			t.Run(early+" "+end, func(t *testing.T) {
				c := startCaddy(t, `
					sse {
						prelude off
						`+early+`
						drain off
					}
					reverse_proxy `+ln.Addr().String()+` {
						transport http {
							tls
							tls_insecure_skip_verify
							tls_server_name {http.request.header.X-Name}
						}
					}`, withAdmin())
				for i := range 20 {
					cl := c.client(clientProtocols[i%3])
					e := cl.begin(cl.request(t, "GET", fmt.Sprint("/", i), nil, acceptStream, "X-Name: example.com", "Accept-Encoding: gzip"))
					conn := <-dialing
					if early != "" {
						res := e.headers(t)
						if end == "admin" {
							c.listed(t, fmt.Sprint("/", i))
							c.adminJSON(t, "DELETE", "/sse/streams?all=true", 202)
							res.follow().expectEnd(t)
						}
					}
					e.leave()
					if early != "" {
						c.closedLine(t, fmt.Sprint("/", i))
					}
					conn.Close() // only now the handshake fails
				}
			})
		}
	}
}

// Handlers before sse see what handlers after it have set, and the other way
// round. Each sees its own request.
func TestWhatHandlersAfterSSESetGetsOut(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/auth" {
			w.Header().Set("X-User", "maria")
			return
		}
		w.Header().Set("X-Seen", fmt.Sprintf("%s %s %s", r.Method, r.RequestURI, r.Header.Get("X-Inside")))
		body, _ := io.ReadAll(r.Body)
		switch r.Header.Get("X-Kind") {
		case "stream":
			w.Header().Set("Content-Type", eventStream)
			fmt.Fprintf(w, "data: %s\n\n", body)
		case "text":
			w.Write(body)
		default:
			panic(http.ErrAbortHandler) // reverse_proxy answers with 502
		}
	})
	for _, early := range []string{"", "early_start 1h any"} {
		for _, auth := range []string{"", "forward_auth " + up.addr + " {\nuri /auth\ncopy_headers X-User\n}"} {
			t.Run(early+" "+strings.SplitN(auth, " ", 2)[0], func(t *testing.T) {
				c := startCaddy(t, `
					log
					log_append upstream_address {http.reverse_proxy.upstream.hostport}
					log_append inside {http.vars.inside}
					log_append from_map {mapped}
					header >X-Inside {http.vars.inside}
					header >X-Map {mapped}
					route {
						vars outside before
						`+auth+`
						sse {
							prelude off
							`+early+`
						}
						vars inside "{http.vars.outside} {http.request.method} {http.request.header.X-User}"
						map {http.request.orig_uri.path} {mapped} {
							/asked "mapped {http.vars.outside}"
						}
						request_header X-Inside "{http.request.body}"
						method PUT
						rewrite /rewritten{http.request.orig_uri.path}?
						reverse_proxy `+up.addr+` {
							header_down X-Method {http.request.method}
							header_down X-Orig {http.request.orig_method}
						}
					}
					handle_errors {
						respond "{err.status_code} {http.request.header.Accept-Encoding} {http.request.orig_uri} {http.vars.inside} {http.reverse_proxy.upstream.hostport}" 502
					}`)
				user := "maria"
				if auth == "" {
					user = ""
				}
				overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
					for _, kind := range []string{"stream", "text", "dead"} {
						req := cl.request(t, "POST", "/asked?"+kind+cl.proto, strings.NewReader("question"),
							acceptStream, "Accept-Encoding: br", "X-Kind: "+kind)
						res := cl.do(t, req)
						text, err := res.text()
						if err != nil {
							t.Error(err)
						}
						want, status := map[string]string{"stream": "data: question\n\n", "text": "question"}[kind], 200
						inside := strings.TrimSpace("before POST " + user)
						if kind == "dead" {
							want, status = "502 br /asked?dead"+cl.proto+" "+"before POST "+user+" "+up.addr, 502
						} else {
							for field, value := range map[string]string{
								"X-Seen": "PUT /rewritten/asked question", "X-Inside": "before POST " + user, "X-Map": "mapped before",
								"X-Method": "PUT", "X-Orig": "POST",
							} {
								if got := res.Header.Get(field); strings.TrimSpace(got) != strings.TrimSpace(value) {
									t.Errorf("%s: %s: got %q, want %q", kind, field, got, value)
								}
							}
						}
						if text != want || res.StatusCode != status {
							t.Errorf("%s: got %s %q, want %q", kind, res.Status, text, want)
						}
						access := c.accessLogOf(t, "/asked?"+kind+cl.proto)
						if got := access["upstream_address"]; got != up.addr {
							t.Errorf("%s: the access log has the upstream %v, want %s: %v", kind, got, up.addr, access)
						}
						if got := strings.TrimSpace(fmt.Sprint(access["inside"])); got != inside {
							t.Errorf("%s: the access log has %q, want %q", kind, got, inside)
						}
						if access["from_map"] != "mapped before" {
							t.Errorf("%s: the access log has %v from map", kind, access["from_map"])
						}
					}
				})
			})
		}
	}
}

// accessLogOf waits for the access log line for a URI.
func (c *testCaddy) accessLogOf(t testing.TB, uri string) logEntry {
	t.Helper()
	timeout := time.After(patience)
	for {
		c.logged.mu.Lock()
		entries, changed := c.logged.entries, c.logged.changed
		c.logged.mu.Unlock()
		for _, entry := range entries {
			request, _ := entry["request"].(map[string]any)
			if strings.HasPrefix(entry.logger(), "http.log.access") && request["uri"] == uri {
				return entry
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%s is not in the access log within %v", uri, patience)
		}
	}
}

// A proxy before sse, such as forward_auth, leaves placeholders of the same
// names.
func TestTheProxyAfterSSEIsTheOneThatIsTold(t *testing.T) {
	for _, early := range []bool{false, true} {
		for _, proxied := range []bool{false, true} {
			config := silent()
			if early {
				config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour), Any: true}
			}
			repl := caddy.NewReplacer()
			repl.Set("http.reverse_proxy.upstream.hostport", "auth:1")
			repl.Set("http.reverse_proxy.upstream.latency_ms", 7)
			c := newClient(t)
			r := caddyhttp.PrepareRequest(get("text/event-stream"), repl, c, new(caddyhttp.Server))
			err := provision(t, config).ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
				if proxied {
					r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.reverse_proxy.upstream.hostport", "app:2")
				}
				return stream(func(http.ResponseWriter) {})(w, r)
			}))
			if err != nil {
				t.Error(err)
			}
			want := map[string]string{"http.reverse_proxy.upstream.hostport": "auth:1", "http.reverse_proxy.upstream.latency_ms": "7"}
			if proxied {
				want = map[string]string{"http.reverse_proxy.upstream.hostport": "app:2", "http.reverse_proxy.upstream.latency_ms": ""}
			}
			for _, placeholder := range slices.Sorted(maps.Keys(want)) {
				if got, _ := repl.GetString(placeholder); got != want[placeholder] {
					t.Errorf("early %v, proxied %v: {%s} is %q, want %q", early, proxied, placeholder, got, want[placeholder])
				}
			}
		}
	}
}

// Error routes run after the handlers, with the original request.
func TestErrorRoutesGetTheRequestAsItCame(t *testing.T) {
	for _, early := range []bool{false, true} {
		for _, encodings := range [][]string{nil, {"gzip"}, {"gzip", "br"}} {
			config := silent()
			if early {
				config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour)}
			}
			r := get("text/event-stream")
			if encodings != nil {
				r.Header["Accept-Encoding"] = encodings
			}
			before := r.Header.Clone()
			r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, new(caddyhttp.Server))
			var kept http.Header
			err := provision(t, config).ServeHTTP(newClient(t), r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
				kept = r.Header
				return caddyhttp.Error(502, errors.New("it failed"))
			}))
			if statusOf, ok := errors.AsType[caddyhttp.HandlerError](err); !ok || statusOf.StatusCode != 502 {
				t.Errorf("it left with %v", err)
			}
			if fmt.Sprint(r.Header) != fmt.Sprint(before) {
				t.Errorf("early %v: got %v, want %v", early, r.Header, before)
			}
			if got := kept["Accept-Encoding"]; !slices.Equal(got, []string{"identity"}) {
				t.Errorf("early %v: the handlers' own header has become %q", early, got)
			}
			if err := r.Context().Err(); err != nil {
				t.Errorf("early %v: the context of the request is over: %v", early, err)
			}
		}
	}
}
