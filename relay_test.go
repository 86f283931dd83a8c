package caddysse_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// hooked is a client whose headers go through a hook, as with a deferred
// `header` operation.
type hooked struct {
	*client
	hook func()
}

func (c hooked) WriteHeader(status int) {
	c.hook()
	c.client.WriteHeader(status)
}

// goroutine returns the id of the caller's goroutine.
func goroutine() string {
	buf := make([]byte, 64)
	id, _, _ := bytes.Cut(bytes.TrimPrefix(buf[:runtime.Stack(buf, false)], []byte("goroutine ")), []byte(" "))
	return string(id)
}

// The hooks of handlers around sse access what belongs to the request without a
// lock. An early start runs them while the handlers after sse work.
func TestTheHooksOfAnEarlyStartDoNotMeetTheHandlersAtWork(t *testing.T) {
	h := provision(t, &caddysse.Handler{EarlyStart: &caddysse.EarlyStart{Delay: caddy.Duration(time.Millisecond)}})
	working, started := make(chan struct{}), make(chan struct{})
	var hooks []string
	var r *http.Request
	c := hooked{newClient(t), func() {
		<-working
		hooks = append(hooks, goroutine())
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		repl.ReplaceAll("{http.vars.foo}{mapped}{unknown}{http.request.header.X-Inside}{http.request.uri}{http.request.orig_uri}", "")
		caddyhttp.SetVar(r.Context(), "hook", "ran")
		r.Header.Set("X-Hook", "ran")
		close(started)
	}}
	r = caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
	err := h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		for at := 0; ; at++ {
			caddyhttp.SetVar(r.Context(), "foo", fmt.Sprint(at))
			repl.Set("set", fmt.Sprint(at))
			repl.Map(func(key string) (any, bool) { return at, key == "mapped" })
			r.Header.Set("X-Inside", "1")
			w.Header().Set("X-Inside", "1")
			r.URL.Path = "/rewritten"
			if at == 0 {
				close(working)
			}
			select {
			case <-started:
				caddyhttp.SetVar(r.Context(), "foo", "last")
				return stream(func(w http.ResponseWriter) { write(t, w, "data: 1\n\n") })(w, r)
			case <-time.After(10 * time.Microsecond):
			}
		}
	}))
	if err != nil || c.body.String() != "data: 1\n\n" {
		t.Errorf("got %q, %v", c.body.String(), err)
	}
	if len(hooks) != 1 || hooks[0] != goroutine() {
		t.Errorf("the hooks ran on the goroutines %v, want once on the request's, %s", hooks, goroutine())
	}
	if got := caddyhttp.GetVar(r.Context(), "foo"); got != "last" {
		t.Errorf("outside, the variable is %v", got)
	}
	if got, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).GetString("mapped"); got == "" {
		t.Error("outside, what map has added is not known")
	}
	if r.URL.Path == "/rewritten" || r.Header.Get("X-Inside") != "" {
		t.Error("the client's request has been rewritten")
	}
}

// Handlers that ignore their context continue to use what they have after the
// request is over.
func TestHandlersThatAreLeftBehindShareNothingWithTheirRequest(t *testing.T) {
	checkLeaks(t)
	for _, ended := range []string{"before an answer", "as a stream", "as no stream"} {
		t.Run(ended, func(t *testing.T) {
			t.Parallel()
			config := silent()
			config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour)}
			c := newClient(t)
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			stop := make(chan struct{})
			left := make(chan struct{})
			r := caddyhttp.PrepareRequest(get("text/event-stream").WithContext(ctx), caddy.NewReplacer(), c, new(caddyhttp.Server))
			err := provision(t, config).ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
				defer close(left)
				_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
				if idle != nil {
					defer idle.Override(time.Second, 0, 0)()
				}
				switch ended {
				case "as a stream":
					w.Header().Set("Content-Type", eventStream)
					fallthrough
				case "as no stream":
					w.WriteHeader(200)
				}
				leave()
				for {
					caddyhttp.SetVar(r.Context(), "foo", "bar")
					r.Header.Set("X-Inside", "1")
					w.Header().Set("X-Inside", "1")
					if ended != "before an answer" {
						_, _ = io.WriteString(w, "data: 1\n\n")
					}
					select {
					case <-stop:
						return nil
					default:
						runtime.Gosched()
					}
				}
			}))
			if err != nil {
				t.Error(err)
			}
			// The server completes the response, and logs.
			c.header.Set("X-Late", "1")
			r.Header.Set("X-Late", "1")
			for range 100 {
				caddyhttp.SetVar(r.Context(), "late", "1")
				_ = caddyhttp.GetVar(r.Context(), "foo")
			}
			if ended == "before an answer" && c.status != 499 {
				t.Errorf("the access log would have %d", c.status)
			}
			c.gone = true
			close(stop)
			<-left
		})
	}
}

func TestAConnectionThatIsHijackedBeforeTheDelayIsLeftAlone(t *testing.T) {
	checkLeaks(t)
	h := newTestHandler(t)
	c := startCaddy(t, `
		sse {
			early_start 20ms any
			max_streams 1
			name hijacked
		}
		`+h.directive)
	for range 2 { // the only place must become free again
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(conn, "GET /tunnel HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
		call := h.accept(t)
		var tunnel net.Conn
		call.do(func(w http.ResponseWriter) {
			if tunnel, _, err = http.NewResponseController(w).Hijack(); err != nil {
				t.Fatal(err)
			}
			io.WriteString(tunnel, "RAW1\n")
			time.Sleep(100 * time.Millisecond) // five times the delay
			io.WriteString(tunnel, "RAW2\n")
			tunnel.Close()
		})
		text, err := io.ReadAll(conn)
		if string(text) != "RAW1\nRAW2\n" || err != nil {
			t.Errorf("got %q, %v", text, err)
		}
		call.end()
	}
}

// If a writer around sse panics, the handler that writes gets the panic, on
// whichever goroutine it runs. If a handler panics, the server gets it.
func TestPanicsCrossTheRelay(t *testing.T) {
	config := silent()
	config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Hour)}
	for _, from := range []string{"writer", "handler", "abort"} {
		var seen any
		c := newClient(t)
		panicked := func() (panicked any) {
			defer func() { panicked = recover() }()
			w := hooked{c, func() {
				if from == "writer" {
					panic("a writer's bug")
				}
			}}
			r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), w, new(caddyhttp.Server))
			_ = provision(t, config).ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
				defer func() {
					if seen = recover(); seen != nil {
						panic(seen)
					}
				}()
				switch from {
				case "handler":
					panic("a handler's bug")
				case "abort":
					panic(http.ErrAbortHandler)
				}
				w.WriteHeader(204)
				return nil
			}))
			return nil
		}()
		want := map[string]any{"writer": "a writer's bug", "handler": "a handler's bug", "abort": http.ErrAbortHandler}[from]
		if panicked != want || seen != want {
			t.Errorf("%s: the handler saw %v, the server %v, want %v", from, seen, panicked, want)
		}
	}
}

// curl --http2 offers to upgrade to HTTP/2 without TLS, and continues if the
// offer is ignored.
func TestAnOfferOfHTTP2DoesNotPreventAnEarlyStart(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, earlySite(up.addr))
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET /h2c HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"+
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n")
	call := up.accept(t)
	var got strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(got.String(), ":heartbeat\n\n") {
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("after %q: %v", got.String(), err)
		}
		got.Write(buf[:n])
	}
	if !strings.HasPrefix(got.String(), "HTTP/1.1 200 OK\r\n") {
		t.Errorf("got %q", got.String())
	}
	call.start(eventStream)
	call.end()
	expectEnd(t, c.closedLine(t, "/h2c"), "upstream_closed", "info")
}
