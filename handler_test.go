package caddysse_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// These tests drive the module as Caddy does: settings as JSON, requests
// through ServeHTTP, and a ResponseWriter that records everything that reaches
// it.

// logged holds the warnings of all handlers of these tests. Tests that read it
// must not be parallel.
var logged *observer.ObservedLogs

// logCore is the logging core that passes them to logged.
type logCore struct {
	zapcore.Core `json:"-"`
}

func (logCore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.cores.sse_test", New: func() caddy.Module {
		var core zapcore.Core
		core, logged = observer.New(zapcore.WarnLevel)
		return &logCore{core}
	}}
}

// configContext stands for a running Caddy configuration. It is made before any
// test, because a context that is made in a bubble can't be used outside of it.
var configContext = contextWithCore(logCore{}, "WARN")

// contextWithCore runs a configuration that logs to a core.
func contextWithCore(core caddy.Module, level string) caddy.Context {
	caddy.RegisterModule(core)
	var config caddy.Config
	err := json.Unmarshal([]byte(fmt.Sprintf(`{
		"admin": {"disabled": true},
		"logging": {"logs": {"default": {"writer": {"output": "discard"}, "level": %q, "core": {"module": %q}}}},
		"apps": {"events": {}}
	}`, level, core.CaddyModule().ID.Name())), &config)
	if err != nil {
		panic(err)
	}
	ctx, err := caddy.ProvisionContext(&config)
	if err != nil {
		panic(err)
	}
	ctx.Done()
	return ctx
}

// load provisions and validates the handler for a JSON configuration.
func load(t testing.TB, config string) (*caddysse.Handler, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(configContext)
	t.Cleanup(cancel)
	module, err := ctx.WithValue(caddyhttp.ServerCtxKey, new(caddyhttp.Server)).LoadModuleByID("http.handlers.sse", []byte(config))
	if err != nil {
		return nil, err
	}
	return module.(*caddysse.Handler), nil
}

func provision(t testing.TB, config *caddysse.Handler) *caddysse.Handler {
	t.Helper()
	caddysse.ForgetDrains()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	h, err := load(t, string(text))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// silent returns a handler without heartbeats.
func silent() *caddysse.Handler {
	return &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: -1}}
}

// happening is one thing that reached a client.
type happening struct {
	what  string // 103, 200, write, flush, …
	bytes string
	at    time.Duration
}

// client is a ResponseWriter that records everything that reaches it. It has no
// lock, so that the race detector reports uses at the same time.
type client struct {
	t      testing.TB
	start  time.Time
	header http.Header
	sent   http.Header // the headers at the time they were sent
	status int
	body   bytes.Buffer
	log    []happening
	gone   bool // the handler has returned

	fail  error         // the error that writes return
	stall chan struct{} // writes wait until it is closed
}

func newClient(t testing.TB) *client {
	return &client{t: t, start: time.Now(), header: make(http.Header)}
}

func (c *client) note(what, bytes string) {
	if c.gone {
		c.t.Errorf("%s %q after the handler had returned", what, bytes)
	}
	c.log = append(c.log, happening{what, bytes, time.Since(c.start)})
}

func (c *client) Header() http.Header { return c.header }

func (c *client) WriteHeader(status int) {
	c.note(strconv.Itoa(status), "")
	if status >= 200 || status == http.StatusSwitchingProtocols {
		c.status = status
		c.sent = c.header.Clone()
	}
}

func (c *client) Write(p []byte) (int, error) {
	if c.status == 0 {
		c.status = http.StatusOK
		c.sent = c.header.Clone()
	}
	c.note("write", string(p))
	if c.stall != nil {
		<-c.stall
	}
	if c.fail != nil {
		return 0, c.fail
	}
	return c.body.Write(p)
}

func (c *client) FlushError() error {
	c.note("flush", "")
	return nil
}

// happenings returns what reached the client, without the times.
func (c *client) happenings() []string {
	var all []string
	for _, h := range c.log {
		all = append(all, strings.TrimRight(h.what+" "+h.bytes, " "))
	}
	return all
}

// serve makes h serve one request, as Caddy would.
func serve(h caddyhttp.MiddlewareHandler, c *client, r *http.Request, next caddyhttp.HandlerFunc) error {
	defer func() { c.gone = true }()
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), c, new(caddyhttp.Server))
	return h.ServeHTTP(c, r, next)
}

func get(accept ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "http://example.com/events?token=secret", nil)
	if len(accept) > 0 {
		r.Header["Accept"] = accept
	}
	likeEventSource(r)
	return r
}

// stream is an upstream that answers with an event stream.
func stream(body func(w http.ResponseWriter)) caddyhttp.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		body(w)
		return nil
	}
}

// play serves a stream and returns the client.
func play(t testing.TB, h *caddysse.Handler, body func(w http.ResponseWriter)) *client {
	t.Helper()
	c := newClient(t)
	if err := serve(h, c, get("text/event-stream"), stream(body)); err != nil {
		t.Errorf("the handler returned %v", err)
	}
	return c
}

func write(t testing.TB, w io.Writer, text string) {
	t.Helper()
	if n, err := io.WriteString(w, text); err != nil || n != len(text) {
		t.Errorf("writing %q: got (%d, %v), want (%d, nil)", text, n, err, len(text))
	}
}

// quiet lets time pass in a bubble, and waits until everything that is due has
// happened. If handlers run at the same time, they must sleep instead.
func quiet(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func expect(t testing.TB, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\ngot  %q\nwant %q", what, got, want)
	}
}

// isStream reports whether the client got a stream.
func isStream(c *client) bool {
	return c.sent.Get("Incremental") != ""
}

func TestAResponseIsAStreamByItsStatusMediaTypeAndMethod(t *testing.T) {
	h := provision(t, silent())
	for _, test := range []struct {
		status      int
		method      string
		contentType string
		want        bool
	}{
		{200, "GET", "text/event-stream", true},
		{201, "GET", "text/event-stream", true},
		{202, "GET", "text/event-stream", true},
		{203, "GET", "text/event-stream", true},
		{226, "GET", "text/event-stream", true},
		{299, "GET", "text/event-stream", true},
		{101, "GET", "text/event-stream", false},
		{204, "GET", "text/event-stream", false},
		{205, "GET", "text/event-stream", false},
		{206, "GET", "text/event-stream", false},
		{300, "GET", "text/event-stream", false},
		{304, "GET", "text/event-stream", false},
		{404, "GET", "text/event-stream", false},
		{503, "GET", "text/event-stream", false},

		{200, "POST", "text/event-stream", true},
		{200, "PUT", "text/event-stream", true},
		{200, "PATCH", "text/event-stream", true},
		{200, "DELETE", "text/event-stream", true},
		{200, "OPTIONS", "text/event-stream", true},
		{200, "QUERY", "text/event-stream", true},
		{200, "HEAD", "text/event-stream", false},
		{200, "CONNECT", "text/event-stream", false},

		{200, "GET", "text/event-stream; charset=utf-8", true},
		{200, "GET", "text/event-stream;charset=utf-8;x=y", true},
		{200, "GET", "text/event-stream ; charset=utf-8", true},
		{200, "GET", " text/event-stream", true},
		{200, "GET", "text/event-stream;", true},
		{200, "GET", "Text/Event-Stream", true},
		{200, "GET", "TEXT/EVENT-STREAM; Charset=UTF-8", true},
		{200, "GET", "text/event-streams", false},
		{200, "GET", "text/event", false},
		{200, "GET", "application/text/event-stream", false},
		{200, "GET", "text/plain; x=text/event-stream", false},
		{200, "GET", "application/x-ndjson", false},
		{200, "GET", "text/html, text/event-stream", true},
		{200, "GET", "text/event-stream, text/html", false},
		{200, "GET", "text/event-stream,", true},
		{200, "GET", "", false},
	} {
		t.Run(fmt.Sprintf("%d %s %s", test.status, test.method, test.contentType), func(t *testing.T) {
			answer := func(w http.ResponseWriter, _ *http.Request) error {
				w.Header().Set("Content-Type", test.contentType)
				w.Header().Set("Content-Length", "6")
				w.WriteHeader(test.status)
				return nil
			}
			r := get()
			r.Method = test.method
			c := newClient(t)
			if err := serve(h, c, r, answer); err != nil {
				t.Fatal(err)
			}
			if isStream(c) != test.want {
				t.Errorf("a stream: got %v, want %v; headers %v", isStream(c), test.want, c.sent)
			}
			if c.status != test.status {
				t.Errorf("status: got %d", c.status)
			}
		})
	}
}

func TestAResponseWithoutContentTypeIsNoStream(t *testing.T) {
	c := newClient(t)
	_ = serve(provision(t, silent()), c, get("text/event-stream"), func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(200)
		return nil
	})
	if isStream(c) {
		t.Errorf("headers: %v", c.sent)
	}
}

// capable is a client with all abilities of a server's ResponseWriter.
type capable struct{ *client }

func (c capable) ReadFrom(r io.Reader) (int64, error) {
	text, err := io.ReadAll(r)
	c.note("sendfile", string(text))
	return int64(len(text)), err
}

func (c capable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c.note("hijack", "")
	return nil, nil, nil
}

func (c capable) Push(target string, _ *http.PushOptions) error {
	c.note("push", target)
	return nil
}

func (c capable) EnableFullDuplex() error {
	c.note("full duplex", "")
	return nil
}

func (c capable) SetReadDeadline(time.Time) error {
	c.note("read deadline", "")
	return nil
}

func (c capable) SetWriteDeadline(time.Time) error {
	c.note("write deadline", "")
	return nil
}

// answers are answers that are not streams.
var answers = map[string]caddyhttp.HandlerFunc{
	"status and body": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Content-Length", "5")
		w.Header().Set("Etag", `"x"`)
		w.Header().Set("Cache-Control", "max-age=5")
		w.Header()["lower-case"] = []string{"x"}
		w.WriteHeader(200)
		_, err := io.WriteString(w, "hello")
		return err
	},
	"no status": func(w http.ResponseWriter, _ *http.Request) error {
		_, err := io.WriteString(w, "hello")
		return err
	},
	"nothing at all": func(http.ResponseWriter, *http.Request) error { return nil },
	"two statuses": func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(404)
		w.WriteHeader(200)
		return nil
	},
	"event stream that is not found": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Content-Length", "9")
		w.WriteHeader(404)
		_, err := io.WriteString(w, "data: a\n\n")
		return err
	},
	"event stream type too late": func(w http.ResponseWriter, _ *http.Request) error {
		_, _ = io.WriteString(w, "hello")
		w.Header().Set("Content-Type", "text/event-stream")
		_, err := io.WriteString(w, "hello")
		return err
	},
	"event stream type after the status": func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(200)
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(200)
		_, err := io.WriteString(w, "hello")
		return err
	},
	"event stream type after a flush": func(w http.ResponseWriter, _ *http.Request) error {
		_ = http.NewResponseController(w).Flush()
		w.Header().Set("Content-Type", "text/event-stream")
		_, err := io.WriteString(w, "hello")
		return err
	},
	"flushes": func(w http.ResponseWriter, _ *http.Request) error {
		rc := http.NewResponseController(w)
		w.WriteHeader(200)
		_ = rc.Flush()
		_, _ = io.WriteString(w, "a")
		_, _ = io.WriteString(w, "b")
		return errors.Join(rc.Flush(), rc.Flush())
	},
	"copy": func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(200)
		_, err := io.Copy(w, struct{ io.Reader }{strings.NewReader("file")})
		return err
	},
	"copy without status": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "video/mp4")
		_, err := io.Copy(w, struct{ io.Reader }{strings.NewReader("file")})
		return err
	},
	"early hints": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(103)
		w.WriteHeader(102)
		w.Header().Del("Link")
		w.WriteHeader(200)
		_, err := io.WriteString(w, "hello")
		return err
	},
	"WebSocket": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
		w.WriteHeader(101)
		_, _, err := http.NewResponseController(w).Hijack()
		return err
	},
	"hijack without status": func(w http.ResponseWriter, _ *http.Request) error {
		_, _, err := http.NewResponseController(w).Hijack()
		return err
	},
	"controls": func(w http.ResponseWriter, _ *http.Request) error {
		rc := http.NewResponseController(w)
		return errors.Join(rc.EnableFullDuplex(), rc.SetReadDeadline(time.Time{}), rc.SetWriteDeadline(time.Time{}))
	},
	"push": func(w http.ResponseWriter, _ *http.Request) error {
		return w.(http.Pusher).Push("/style.css", nil)
	},
	"trailers": func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Trailer", "Checksum")
		w.WriteHeader(200)
		_, err := io.WriteString(w, "hello")
		w.Header().Set("Checksum", "1")
		w.Header().Set(http.TrailerPrefix+"Late", "2")
		return err
	},
}

func TestAResponseThatIsNoStreamPassesAsIfTheModuleWereNotThere(t *testing.T) {
	retry := &caddysse.Retry{Min: caddy.Duration(time.Second)}
	testThatItPasses(t, provision(t, &caddysse.Handler{Retry: retry}))
}

func TestAResponseThatIsNoStreamPassesAsIfResumeWereNotThere(t *testing.T) {
	testThatItPasses(t, provision(t, &caddysse.Handler{Resume: &caddysse.Resume{Window: caddy.Duration(time.Minute), Any: true}}))
}

func testThatItPasses(t *testing.T, h *caddysse.Handler) {
	for name, answer := range answers {
		for _, accept := range []string{"*/*", "text/event-stream"} {
			t.Run(name+" to "+accept, func(t *testing.T) {
				serve := func(h caddyhttp.MiddlewareHandler) (capable, error) {
					c := capable{newClient(t)}
					r := caddyhttp.PrepareRequest(get(accept), caddy.NewReplacer(), c, new(caddyhttp.Server))
					return c, h.ServeHTTP(c, r, answer)
				}
				without, wantErr := serve(absent{})
				with, err := serve(h)
				expect(t, "what reached the client", with.happenings(), without.happenings())
				// Handlers on their own goroutine also have their own header
				// map, which becomes the client's when they answer.
				own := h.Resume != nil
				if !own && (fmt.Sprint(with.sent) != fmt.Sprint(without.sent) || fmt.Sprint(with.header) != fmt.Sprint(without.header)) {
					t.Errorf("headers:\ngot  %v, then %v\nwant %v, then %v", with.sent, with.header, without.sent, without.header)
				}
				if fmt.Sprint(err) != fmt.Sprint(wantErr) {
					t.Errorf("error: got %v, want %v", err, wantErr)
				}
			})
		}
	}
}

// absent stands for a configuration without sse: it only calls next.
type absent struct{}

func (absent) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

func TestWhatTheServerCannotDoFailsAsItDoesWithoutTheModule(t *testing.T) {
	h := provision(t, silent())
	_ = serve(h, newClient(t), get(), func(w http.ResponseWriter, _ *http.Request) error {
		if _, _, err := http.NewResponseController(w).Hijack(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("hijacking: got %v", err)
		}
		return nil
	})
}

func TestInformationalResponsesBeforeAStreamPass(t *testing.T) {
	c := newClient(t)
	_ = serve(provision(t, silent()), c, get(), func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(103)
		w.WriteHeader(100)
		w.WriteHeader(200)
		w.WriteHeader(103)
		w.WriteHeader(500)
		_, err := io.WriteString(w, "data: a\n\n")
		return err
	})
	expect(t, "what reached the client", c.happenings(), []string{"103", "100", "200", "flush", "write data: a\n\n", "flush"})
	if !isStream(c) {
		t.Error("no stream has come of it")
	}
}

func TestAStreamMayBeginWithoutWriteHeader(t *testing.T) {
	h := provision(t, silent())
	for name, test := range map[string]struct {
		begin func(w http.ResponseWriter) error
		want  []string
	}{
		"by a write": {func(w http.ResponseWriter) error {
			_, err := io.WriteString(w, "data: a\n\n")
			return err
		}, []string{"200", "flush", "write data: a\n\n", "flush"}},
		"by an empty write": {func(w http.ResponseWriter) error {
			_, err := w.Write(nil)
			return err
		}, []string{"200", "flush"}},
		"by a flush": {func(w http.ResponseWriter) error {
			return http.NewResponseController(w).Flush()
		}, []string{"200", "flush"}},
		"by a copy": {func(w http.ResponseWriter) error {
			_, err := io.Copy(w, struct{ io.Reader }{strings.NewReader("data: a\n\n")})
			return err
		}, []string{"200", "flush", "write data: a\n\n", "flush"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t)
			err := serve(h, c, get(), func(w http.ResponseWriter, _ *http.Request) error {
				w.Header().Set("Content-Type", "text/event-stream")
				return test.begin(w)
			})
			if err != nil {
				t.Error(err)
			}
			expect(t, "what reached the client", c.happenings(), test.want)
			if !isStream(c) {
				t.Error("no stream has come of it")
			}
		})
	}
}

func TestTheUpstreamIsAskedForTextWhereAnEventStreamIsAccepted(t *testing.T) {
	h := provision(t, silent())
	for _, test := range []struct {
		accept []string
		want   bool
	}{
		{[]string{"text/event-stream"}, true},
		{[]string{"Text/Event-Stream"}, true},
		{[]string{"text/event-stream; charset=utf-8"}, true},
		{[]string{"text/event-stream;q=0.1"}, true},
		{[]string{"text/event-stream;q=1.000"}, true},
		{[]string{"text/event-stream;q=0.001"}, true},
		{[]string{"application/json, text/event-stream"}, true},
		{[]string{"application/json,text/event-stream;q=0.5,*/*;q=0.1"}, true},
		{[]string{"application/json", "text/event-stream"}, true},
		{[]string{"text/event-stream;q=0, text/event-stream"}, true},
		{[]string{"text/event-stream;q=0"}, false},
		{[]string{"text/event-stream; Q=0.000"}, false},
		{[]string{"text/event-stream;charset=utf-8; q = 0.0"}, false},
		{[]string{"*/*"}, false},
		{[]string{"text/*"}, false},
		{[]string{"application/json"}, false},
		{[]string{"text/event-streams"}, false},
		{[]string{""}, false},
		{nil, false},
	} {
		for name, encoding := range map[string][]string{
			"of one line":   {"gzip, br"},
			"of many lines": {"gzip", "br"},
			"empty":         {""},
			"absent":        nil,
		} {
			t.Run(fmt.Sprintf("%q with Accept-Encoding %s", test.accept, name), func(t *testing.T) {
				r := get(test.accept...)
				if encoding != nil {
					r.Header["Accept-Encoding"] = slices.Clone(encoding)
				}
				r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, new(caddyhttp.Server))
				before := r.Header.Clone()
				want := r.Header.Clone()
				if test.want {
					want.Set("Accept-Encoding", "identity")
				}
				_ = h.ServeHTTP(newClient(t), r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
					if fmt.Sprint(r.Header) != fmt.Sprint(want) {
						t.Errorf("towards the upstream:\ngot  %v\nwant %v", r.Header, want)
					}
					return nil
				}))
				if fmt.Sprint(r.Header) != fmt.Sprint(before) {
					t.Errorf("afterwards:\ngot  %v\nwant %v", r.Header, before)
				}
			})
		}
	}
}

func TestTheRequestIsAsItWasAfterAPanicOfTheUpstream(t *testing.T) {
	r := get("text/event-stream")
	r.Header.Set("Accept-Encoding", "gzip")
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, new(caddyhttp.Server))
	func() {
		defer func() { _ = recover() }()
		_ = provision(t, silent()).ServeHTTP(newClient(t), r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			panic("upstream")
		}))
	}()
	if got := r.Header["Accept-Encoding"]; !slices.Equal(got, []string{"gzip"}) {
		t.Errorf("Accept-Encoding: got %q", got)
	}
	if err := r.Context().Err(); err != nil {
		t.Errorf("the request's context: %v", err)
	}
}

// Handlers for an error need a context that is not canceled.
func TestTheRequestCanBeUsedAfterItsStreamWasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(time.Second)}
		c := newClient(t)
		r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
		err := provision(t, config).ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(200)
			<-r.Context().Done()
			return r.Context().Err()
		}))
		if err != nil || r.Context().Err() != nil {
			t.Errorf("left with %v and a context that is over: %v", err, r.Context().Err())
		}
	})
}

// contextKey is the key of a value that an outer handler has set.
type contextKey struct{}

func TestTheUpstreamSeesARequestOfItsOwnThatSaysWhatTheClientsDoes(t *testing.T) {
	body := io.NopCloser(strings.NewReader("question"))
	r := httptest.NewRequest(http.MethodPost, "/chat", nil)
	r.Body = body
	r = r.WithContext(context.WithValue(r.Context(), contextKey{}, "value"))
	repl := caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r, repl, nil, new(caddyhttp.Server))
	repl.Set("outside", "set before")
	repl.Set("http.reverse_proxy.upstream.hostport", "auth:1") // as forward_auth sets it
	err := provision(t, silent()).ServeHTTP(newClient(t), r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, seen *http.Request) error {
		if seen == r {
			t.Error("the request is the client's own")
		}
		if seen.Body != body {
			t.Errorf("the body is %T", seen.Body)
		}
		if seen.Context().Value(contextKey{}) != "value" {
			t.Error("the context has lost its values")
		}
		inner := seen.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		for placeholder, want := range map[string]string{
			"outside":                              "set before",
			"http.request.orig_uri":                "/chat",
			"http.request.uri":                     "/chat",
			"http.request.header.Accept":           "",
			"http.reverse_proxy.upstream.hostport": "auth:1",
		} {
			if got, _ := inner.GetString(placeholder); got != want {
				t.Errorf("{%s}: got %q, want %q", placeholder, got, want)
			}
		}
		// Placeholders show what handlers after sse have changed in their
		// request.
		seen.Method = http.MethodPut
		seen.Header.Set("X-Inside", "inside")
		seen.URL.Path = "/rewritten"
		for placeholder, want := range map[string]string{
			"http.request.method":          "PUT",
			"http.request.header.X-Inside": "inside",
			"http.request.uri":             "/rewritten",
			"http.request.orig_uri":        "/chat",
		} {
			if got, _ := inner.GetString(placeholder); got != want {
				t.Errorf("{%s}: got %q, want %q", placeholder, got, want)
			}
		}
		inner.Set("inside", "set after")
		inner.Set("http.reverse_proxy.upstream.hostport", "app:2")
		caddyhttp.SetVar(seen.Context(), "variable", "set after")
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(200)
		if seen.Context().Err() != nil {
			t.Error("the context is done")
		}
		return nil
	}))
	if err != nil {
		t.Error(err)
	}
	// Handlers before sse see what handlers after it have set.
	for placeholder, want := range map[string]string{
		"outside":                              "set before",
		"inside":                               "set after",
		"http.vars.variable":                   "set after",
		"http.reverse_proxy.upstream.hostport": "app:2",
		"http.sse.reason":                      "upstream_closed",
	} {
		if got, _ := repl.GetString(placeholder); got != want {
			t.Errorf("{%s} outside: got %q, want %q", placeholder, got, want)
		}
	}
	if r.Method != http.MethodPost {
		t.Errorf("the client's request has become a %s", r.Method)
	}
	if err := r.Context().Err(); err != nil {
		t.Errorf("afterwards the request's context is over: %v", err)
	}
}

func TestTheUpstreamsContextIsDoneWhenTheClientsIs(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	_ = serve(provision(t, silent()), newClient(t), get().WithContext(ctx), func(w http.ResponseWriter, r *http.Request) error {
		leave()
		<-r.Context().Done()
		return r.Context().Err()
	})
}

func TestAnErrorBeforeTheHeadersIsPassedOn(t *testing.T) {
	want := caddyhttp.Error(http.StatusBadGateway, errors.New("no upstream"))
	c := newClient(t)
	err := serve(provision(t, &caddysse.Handler{}), c, get("text/event-stream"), func(w http.ResponseWriter, _ *http.Request) error {
		return want
	})
	if err != error(want) {
		t.Errorf("got %v, want %v", err, want)
	}
	if len(c.log) > 0 {
		t.Errorf("the client got %q", c.happenings())
	}
}

func TestAPanicOfTheUpstreamPassesUnchangedAndNothingIsWrittenAfterIt(t *testing.T) {
	for name, before := range map[string]func(w http.ResponseWriter){
		"before the headers": func(http.ResponseWriter) {},
		"after the headers of what is no stream": func(w http.ResponseWriter) {
			w.WriteHeader(200)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				want := &struct{ int }{7}
				h := provision(t, &caddysse.Handler{})
				c := newClient(t)
				func() {
					defer func() {
						if got := recover(); got != want {
							t.Errorf("got the panic %v", got)
						}
					}()
					_ = serve(h, c, get(), func(w http.ResponseWriter, _ *http.Request) error {
						before(w)
						panic(want)
					})
				}()
				quiet(24 * time.Hour)
			})
		})
	}
	t.Run("in a stream", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			want := &struct{ int }{7}
			h := provision(t, &caddysse.Handler{})
			c := newClient(t)
			func() {
				defer func() {
					if got := recover(); got != want {
						t.Errorf("got the panic %v", got)
					}
				}()
				_ = serve(h, c, get(), stream(func(w http.ResponseWriter) {
					write(t, w, "data: a\n\n")
					panic(want)
				}))
			}()
			quiet(24 * time.Hour)
			if got := c.body.String(); got != "data: a\n\n" {
				t.Errorf("the client got %q", got)
			}
		})
	})
}

// brokenClient panics in one of its methods.
type brokenClient struct {
	*client
	call string
}

func (c brokenClient) WriteHeader(status int) {
	if c.call == "WriteHeader" {
		panic("WriteHeader's bug")
	}
	c.client.WriteHeader(status)
}

func (c brokenClient) Write(p []byte) (int, error) {
	if c.call == "Write" {
		panic("Write's bug")
	}
	return c.client.Write(p)
}

func (c brokenClient) FlushError() error {
	if c.call == "Flush" {
		panic("Flush's bug")
	}
	return c.client.FlushError()
}

// A ResponseWriter of another module may panic. The server must get that panic
// on the request's goroutine, whichever goroutine wrote, and other streams of
// the same name must not be affected.
func TestAPanicOfAWriterStaysItsOwn(t *testing.T) {
	for _, call := range []string{"WriteHeader", "Write", "Flush"} {
		for _, early := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, early %v", call, early), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					config := &caddysse.Handler{Name: "panics " + t.Name(), MaxStreams: 2}
					if early {
						config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second)}
					}
					h := provision(t, config)
					end := make(chan struct{})
					healthy := newClient(t)
					var all sync.WaitGroup
					all.Go(func() {
						if err := serve(h, healthy, get("text/event-stream"), stream(func(http.ResponseWriter) { <-end })); err != nil {
							t.Error(err)
						}
					})
					synctest.Wait()
					for range 3 {
						c := brokenClient{newClient(t), call}
						r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
						func() {
							defer func() {
								if got := recover(); got != call+"'s bug" {
									t.Errorf("the server gets %v", got)
								}
							}()
							_ = h.ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
								if early {
									<-r.Context().Done()
									return r.Context().Err()
								}
								w.Header().Set("Content-Type", "text/event-stream")
								w.WriteHeader(200)
								<-r.Context().Done() // wait for the heartbeat's panic
								return r.Context().Err()
							}))
						}()
						c.gone = true
						listed := callAdmin(t, "/sse/streams?name="+url.QueryEscape(config.Name)).Body.String()
						if !strings.Contains(listed, `"total":1`) {
							t.Errorf("listed: %s", listed)
						}
					}
					close(end)
					all.Wait()
					handlers := callAdmin(t, "/sse/handlers").Body.String()
					_, own, _ := strings.Cut(handlers, config.Name+`","open":`)
					if !strings.HasPrefix(own, "0,") {
						t.Errorf("handlers: %s", handlers)
					}
					quiet(24 * time.Hour)
				})
			})
		}
	}
}

func TestAPanicOfAWriterThatAHandlerRecoversAborts(t *testing.T) {
	c := brokenClient{newClient(t), "WriteHeader"}
	r := caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), c, new(caddyhttp.Server))
	defer func() {
		if got := recover(); got != http.ErrAbortHandler {
			t.Errorf("the server gets %v", got)
		}
	}()
	_ = provision(t, silent()).ServeHTTP(c, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
		defer func() { _ = recover() }()
		return stream(func(http.ResponseWriter) {})(w, r)
	}))
}

// nested calls an outer handler around an inner one.
type nested struct{ outer, inner caddyhttp.MiddlewareHandler }

func (n nested) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return n.outer.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		return n.inner.ServeHTTP(w, r, next)
	}))
}

func TestWhereTwoHandlersMeetTheInnerOneOwnsTheStream(t *testing.T) {
	for name, between := range map[string]func(w http.ResponseWriter) http.ResponseWriter{
		"directly": func(w http.ResponseWriter) http.ResponseWriter { return w },
		"through another handler's ResponseWriter": func(w http.ResponseWriter) http.ResponseWriter {
			return &struct {
				caddyhttp.ResponseWriterWrapper
			}{caddyhttp.ResponseWriterWrapper{ResponseWriter: w}}
		},
		"through one that says nothing of what it is around": func(w http.ResponseWriter) http.ResponseWriter { return opaqueWriter{w} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer := provision(t, &caddysse.Handler{
					Name:         "outer",
					CacheControl: "outer",
					Heartbeat:    &caddysse.Heartbeat{Comment: "outer", Interval: caddy.Duration(time.Second)},
					Retry:        &caddysse.Retry{Min: caddy.Duration(time.Second)},
				})
				inner := provision(t, &caddysse.Handler{
					Name:         "inner",
					CacheControl: "inner",
					Heartbeat:    &caddysse.Heartbeat{Comment: "inner", Interval: caddy.Duration(10 * time.Second), Prelude: -1},
					Retry:        &caddysse.Retry{Min: caddy.Duration(2 * time.Second)},
				})
				logged.TakeAll()
				for range 3 {
					c := newClient(t)
					h := nested{outer, wrapping{between, inner}}
					err := serve(h, c, get("text/event-stream"), stream(func(w http.ResponseWriter) {
						quiet(10 * time.Second)
						write(t, w, "data: a\n\n")
						quiet(10 * time.Second)
					}))
					if err != nil {
						t.Error(err)
					}
					expect(t, "what reached the client", c.happenings(), []string{
						"200", "flush",
						"write retry: 2000\n\n:inner\n\n", "flush",
						"write data: a\n\n", "flush",
						"write :inner\n\n", "flush",
					})
					if got := c.sent["Cache-Control"]; !slices.Equal(got, []string{"inner, no-transform"}) {
						t.Errorf("Cache-Control: got %q", got)
					}
				}
				warnings := logged.FilterLevelExact(zapcore.WarnLevel).All()
				if len(warnings) != 1 {
					t.Fatalf("got %d warnings, want 1: %v", len(warnings), warnings)
				}
				if fields := warnings[0].ContextMap(); fields["inner"] != "inner" || fields["outer"] != "outer" {
					t.Errorf("the warning says %v", fields)
				}
				if name := warnings[0].LoggerName; name != "http.handlers.sse" {
					t.Errorf("the logger is %q", name)
				}
			})
		})
	}
}

func TestOnlyTheInnerHandlersLimitCountsItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, names := range [][2]string{{"nested limits", "nested limits"}, {"outer limits", "inner limits"}} {
			limited := func(name string) *caddysse.Handler {
				config := silent()
				config.Name, config.MaxStreams, config.MaxStreamsPerClient = name, 1, 1
				return provision(t, config)
			}
			outer, inner := limited(names[0]), limited(names[1])
			c, other := newClient(t), newClient(t)
			err := serve(nested{outer, inner}, c, get("text/event-stream"), stream(func(http.ResponseWriter) {
				var refused caddyhttp.HandlerError
				err := serve(outer, other, get("text/event-stream"), stream(func(http.ResponseWriter) {}))
				if free := names[0] != names[1]; free != (err == nil) || !free && !errors.As(err, &refused) {
					t.Errorf("%v: meanwhile the outer one answers %v", names, err)
				}
			}))
			if err != nil || !isStream(c) {
				t.Errorf("%v: got %v", names, err)
			}
		}
	})
}

// wrapping puts its own ResponseWriter between two handlers.
type wrapping struct {
	between func(w http.ResponseWriter) http.ResponseWriter
	inner   caddyhttp.MiddlewareHandler
}

func (h wrapping) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return h.inner.ServeHTTP(h.between(w), r, next)
}

func TestAnOuterHandlerAloneOwnsTheStream(t *testing.T) {
	logged.TakeAll()
	h := provision(t, silent())
	c := play(t, h, func(w http.ResponseWriter) {})
	if !isStream(c) {
		t.Error("no stream has come of it")
	}
	if warnings := logged.FilterLevelExact(zapcore.WarnLevel).All(); len(warnings) > 0 {
		t.Errorf("got the warnings %v", warnings)
	}
}

func TestWhatIsNoStreamPassesTwoHandlersAsIfTheyWereNotThere(t *testing.T) {
	h := nested{provision(t, &caddysse.Handler{}), provision(t, &caddysse.Handler{})}
	for _, name := range slices.Sorted(maps.Keys(answers)) {
		t.Run(name, func(t *testing.T) {
			serve := func(h caddyhttp.MiddlewareHandler) capable {
				c := capable{newClient(t)}
				r := caddyhttp.PrepareRequest(get(), caddy.NewReplacer(), c, new(caddyhttp.Server))
				_ = h.ServeHTTP(c, r, answers[name])
				return c
			}
			with, without := serve(h), serve(absent{})
			expect(t, "what reached the client", with.happenings(), without.happenings())
			if fmt.Sprint(with.sent) != fmt.Sprint(without.sent) {
				t.Errorf("headers: got %v, want %v", with.sent, without.sent)
			}
		})
	}
}
