package caddysse_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

const eventStream = "text/event-stream"

// closedLine waits for the `stream closed` line of a stream. Each stream of
// these tests has its own path.
func (c *testCaddy) closedLine(t testing.TB, path string) logEntry {
	t.Helper()
	return c.lineOf(t, "stream closed", path)
}

// lineOf waits for a line about the stream at path, and expects it to be the
// only one with this message.
func (c *testCaddy) lineOf(t testing.TB, message, path string) logEntry {
	t.Helper()
	timeout := time.After(patience)
	for {
		c.logged.mu.Lock()
		entries, changed := c.logged.entries, c.logged.changed
		c.logged.mu.Unlock()
		var found []logEntry
		for _, entry := range entries {
			if entry.message() == message && entry["path"] == path {
				found = append(found, entry)
			}
		}
		switch len(found) {
		case 0:
		case 1:
			return found[0]
		default:
			t.Fatalf("%q was logged %d times for %s: %v", message, len(found), path, found)
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no %q was logged for %s within %v", message, path, patience)
		}
	}
}

// ourLines returns what this module has logged so far.
func (c *testCaddy) ourLines() []logEntry {
	return slices.DeleteFunc(c.logs(), func(e logEntry) bool { return e.logger() != "http.handlers.sse" })
}

// expectEnd checks how a line reports a stream's end.
func expectEnd(t testing.TB, line logEntry, reason, level string) {
	t.Helper()
	if line["reason"] != reason || line.level() != level {
		t.Errorf("the end was told as %v at %v, want %s at %s: %v", line["reason"], line.level(), reason, level, line)
	}
	if _, said := line["error"]; said != (reason == "upstream_error") {
		t.Errorf("%s: an error is told: %v: %v", reason, said, line)
	}
}

// testAnswer is the handler `test_answer <key>`, which answers with a function.
type testAnswer struct {
	Key string `json:"key"`
}

var testAnswers sync.Map // functions by key

func init() {
	caddy.RegisterModule(testAnswer{})
	httpcaddyfile.RegisterHandlerDirective("test_answer", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		var a testAnswer
		h.Next() // consume directive name
		if !h.Args(&a.Key) {
			return nil, h.ArgErr()
		}
		return a, nil
	})
}

func (testAnswer) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_answer", New: func() caddy.Module { return new(testAnswer) }}
}

func (a testAnswer) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	answer, _ := testAnswers.Load(a.Key)
	return answer.(func(http.ResponseWriter, *http.Request) error)(w, r)
}

// answerWith returns a site that answers its streams with a function.
func answerWith(t testing.TB, answer func(w http.ResponseWriter, r *http.Request) error) (site string) {
	testAnswers.Store(t.Name(), answer)
	t.Cleanup(func() { testAnswers.Delete(t.Name()) })
	return "route {\nsse\ntest_answer " + t.Name() + "\n}"
}

// rawUpstream answers every request with bytes written directly to its
// connection, and then closes it.
func rawUpstream(t testing.TB, answer func(conn *net.TCPConn)) (addr string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var answering sync.WaitGroup
	t.Cleanup(answering.Wait)
	t.Cleanup(func() { listener.Close() })
	answering.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			answering.Go(func() {
				defer conn.Close()
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					answer(conn.(*net.TCPConn))
				}
			})
		}
	})
	return listener.Addr().String()
}

// upstreamVariable makes a test binary an upstream.
const upstreamVariable = "CADDYSSE_TEST_UPSTREAM"

// If this process was started for that, playUpstream answers every request with
// one event and then keeps silent.
func playUpstream() {
	if os.Getenv(upstreamVariable) == "" {
		return
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	fmt.Println(listener.Addr())
	io.Copy(io.Discard, os.Stdin) // it ends with the process that started this one
	os.Exit(0)
}

// upstreamProcess starts an upstream in its own process.
func upstreamProcess(t testing.TB) (addr string, kill func()) {
	t.Helper()
	return startProcess(t, upstreamVariable+"=1")
}

func TestEveryEndHasItsReason(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	for _, proto := range clientProtocols {
		// begin opens a stream and waits until the client has its first event.
		begin := func(t *testing.T) (path string, e *exchange, call *upstreamCall, body *follower) {
			cl := c.client(proto)
			path = "/" + t.Name()
			e = cl.begin(cl.request(t, "GET", path, nil))
			call = up.accept(t)
			call.start(eventStream)
			body = e.headers(t).follow()
			call.send("data: 1\n\n")
			body.expect(t, "data: 1\n\n")
			return path, e, call, body
		}
		t.Run(proto+" the upstream finishes", func(t *testing.T) {
			path, _, call, body := begin(t)
			call.end()
			body.expectEnd(t)
			expectEnd(t, c.closedLine(t, path), "upstream_closed", "info")
		})
		t.Run(proto+" the upstream breaks off", func(t *testing.T) {
			path, _, call, body := begin(t)
			call.abort()
			body.expectAbort(t)
			expectEnd(t, c.closedLine(t, path), "upstream_error", "warn")
		})
		t.Run(proto+" the client leaves while the upstream is quiet", func(t *testing.T) {
			path, e, call, _ := begin(t)
			e.leave()
			call.expectGone()
			expectEnd(t, c.closedLine(t, path), "client_closed", "info")
		})
		t.Run(proto+" the client leaves while the upstream writes", func(t *testing.T) {
			path, e, call, body := begin(t)
			burst := strings.Repeat("data: 2\n\n", 1000)
			var writing sync.WaitGroup
			writing.Go(func() {
				call.do(func(w http.ResponseWriter) {
					for call.Context().Err() == nil {
						io.WriteString(w, burst)
					}
				})
			})
			if _, err := body.wait(func(unread string) bool { return len(unread) > 3*len(burst) }); err != nil {
				t.Fatal(err)
			}
			e.leave()
			writing.Wait()
			expectEnd(t, c.closedLine(t, path), "client_closed", "info")
		})
		t.Run(proto+" both at once", func(t *testing.T) {
			for i := range 10 {
				t.Run(fmt.Sprint(i), func(t *testing.T) {
					path, e, call, _ := begin(t)
					var leaving sync.WaitGroup
					leaving.Go(e.leave)
					call.end()
					leaving.Wait()
					line := c.closedLine(t, path)
					if reason := fmt.Sprint(line["reason"]); reason != "upstream_closed" {
						expectEnd(t, line, "client_closed", "info")
					}
				})
			}
		})
		t.Run(proto+" the client leaves while the upstream breaks off", func(t *testing.T) {
			for i := range 10 {
				t.Run(fmt.Sprint(i), func(t *testing.T) {
					path, e, call, _ := begin(t)
					var leaving sync.WaitGroup
					leaving.Go(e.leave)
					call.abort()
					leaving.Wait()
					line := c.closedLine(t, path)
					if reason := fmt.Sprint(line["reason"]); reason == "upstream_error" {
						expectEnd(t, line, "upstream_error", "warn")
					} else {
						expectEnd(t, line, "client_closed", "info")
					}
				})
			}
		})
	}
}

// These upstreams break off below the HTTP level.
func TestABrokenUpstreamIsAnUpstreamError(t *testing.T) {
	if apart(t) {
		return
	}
	const headers = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
	const chunked = headers + "Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
	checkLeaks(t)
	seen := make(chan struct{}) // the client has the event
	reset := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, chunked)
		<-seen
		_ = conn.SetLinger(0)
	})
	short := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, headers+"Content-Length: 100\r\n\r\ndata: 1\n\n")
		<-seen
	})
	unchunked := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, chunked)
		<-seen
		io.WriteString(conn, "no chunk\r\n")
	})
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			killed, kill := upstreamProcess(t)
			c := startCaddy(t, `
				sse {
					prelude off
				}
				handle_path /reset/* {
					reverse_proxy `+reset+`
				}
				handle_path /short/* {
					reverse_proxy `+short+`
				}
				handle_path /unchunked/* {
					reverse_proxy `+unchunked+`
				}
				handle_path /killed/* {
					reverse_proxy `+killed+`
				}`)
			for name, breakOff := range map[string]func(){
				"reset":     func() { seen <- struct{}{} },
				"short":     func() { seen <- struct{}{} },
				"unchunked": func() { seen <- struct{}{} },
				"killed":    kill,
			} {
				t.Run(name, func(t *testing.T) {
					path := "/" + name + "/x"
					body := c.client(proto).get(t, path).follow()
					body.expect(t, "data: 1\n\n")
					breakOff()
					body.expectAbort(t)
					line := c.closedLine(t, path)
					expectEnd(t, line, "upstream_error", "warn")
					if line["events"] != 1.0 {
						t.Errorf("%v events are told", line["events"])
					}
				})
			}
		})
	}
}

func TestAHandlerThatFailsIsAnUpstreamError(t *testing.T) {
	checkLeaks(t)
	seen := make(chan struct{}) // the client has the event
	site := answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
		<-seen
		switch {
		case strings.HasSuffix(r.URL.Path, "/error"):
			return errors.New("the database is gone")
		case strings.HasSuffix(r.URL.Path, "/panic"):
			panic("a bug")
		case strings.HasSuffix(r.URL.Path, "/abort"):
			panic(http.ErrAbortHandler)
		}
		return nil
	})
	c := startCaddy(t, site)
	for _, proto := range clientProtocols {
		for ending, said := range map[string]string{
			"/error": "the database is gone",
			"/panic": "panic: a bug",
			"/abort": "the upstream broke off",
		} {
			t.Run(proto+ending, func(t *testing.T) {
				path := "/" + proto + ending
				body := c.client(proto).get(t, path).follow()
				body.expect(t, "data: 1\n\n")
				seen <- struct{}{}
				body.expectAbort(t)
				line := c.closedLine(t, path)
				expectEnd(t, line, "upstream_error", "warn")
				if line["error"] != said {
					t.Errorf("the error is told as %q, want %q", line["error"], said)
				}
			})
		}
	}
}

func TestAHandlerThatReturnsNilBecauseTheClientLeftIsNoUpstreamEnd(t *testing.T) {
	checkLeaks(t)
	for _, returned := range []error{nil, context.Canceled} {
		t.Run(fmt.Sprint(returned), func(t *testing.T) {
			c := startCaddy(t, answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
				w.Header().Set("Content-Type", eventStream)
				io.WriteString(w, "data: 1\n\n")
				<-r.Context().Done()
				return returned
			}))
			for _, proto := range clientProtocols {
				cl := c.client(proto)
				e := cl.begin(cl.request(t, "GET", "/"+proto, nil))
				e.headers(t).follow().expect(t, "data: 1\n\n")
				e.leave()
				expectEnd(t, c.closedLine(t, "/"+proto), "client_closed", "info")
			}
		})
	}
}

// The fields of the lines, as in the contract, with the types that they have in
// JSON.
var (
	openedLineFields = map[string]any{
		"id": "", "name": "", "client_ip": "", "method": "", "host": "", "path": "",
		"proto": "", "user_agent": "", "upstream": "", "resumable": false,
	}
	figuresFields = map[string]any{
		"reason": "", "status": 0.0,
		"duration": 0.0, "time_to_headers": 0.0, "time_to_first_event": 0.0, "longest_gap": 0.0,
		"events": 0.0, "bytes": 0.0, "heartbeats": 0.0, "heartbeats_deferred": 0.0,
		"last_event_id": "",
	}
	accessLogFields  = union(map[string]any{"id": "", "name": "", "upstream": "", "resumable": false}, figuresFields)
	closedLineFields = union(openedLineFields, figuresFields)
)

func union(sets ...map[string]any) map[string]any {
	all := make(map[string]any)
	for _, set := range sets {
		maps.Copy(all, set)
	}
	return all
}

func expectFields(t testing.TB, what string, got, want map[string]any) {
	t.Helper()
	for field, example := range want {
		value, ok := got[field]
		if !ok {
			t.Errorf("%s: %s is missing: %v", what, field, got)
		} else if g, w := fmt.Sprintf("%T", value), fmt.Sprintf("%T", example); g != w {
			t.Errorf("%s: %s is a %s, want a %s", what, field, g, w)
		}
	}
	for field := range got {
		if _, ok := want[field]; !ok {
			t.Errorf("%s: %s is not in the contract", what, field)
		}
	}
}

// withoutFrame removes the fields that every log line has.
func (e logEntry) withoutFrame() map[string]any {
	fields := maps.Clone(map[string]any(e))
	for _, field := range []string{"level", "ts", "logger", "msg"} {
		delete(fields, field)
	}
	return fields
}

func TestTheLinesHaveTheContractsFields(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name chat
			prelude 1ms
		}
		request_header X-Was-Here yes
		uri /events strip_prefix /events
		reverse_proxy `+up.addr)
	protos := map[string]string{"h1": "HTTP/1.1", "h2": "HTTP/2.0", "h3": "HTTP/3.0"}
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			cl := c.client(proto)
			path := "/events/" + proto
			e := cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream", "User-Agent: tests/1", "Last-Event-ID: 6"))
			call := up.accept(t)
			call.startWith(201, "Content-Type: text/event-stream")
			res := e.headers(t)
			body := res.follow()
			body.expect(t, ":heartbeat\n\n")
			call.send("id: 7\ndata: 1\n\n")
			body.expect(t, "id: 7\ndata: 1\n\n")
			call.end()
			body.expectEnd(t)

			opened, closed := c.lineOf(t, "stream opened", path), c.closedLine(t, path)
			if opened.level() != "debug" || closed.level() != "info" || opened.logger() != "http.handlers.sse" {
				t.Errorf("opened at %s, closed at %s, by %s", opened.level(), closed.level(), opened.logger())
			}
			expectFields(t, "stream opened", opened.withoutFrame(), openedLineFields)
			expectFields(t, "stream closed", closed.withoutFrame(), closedLineFields)
			for field, want := range map[string]any{
				"id": opened["id"], "name": "chat", "client_ip": "127.0.0.1", "method": "GET",
				"host": strings.TrimPrefix(strings.TrimPrefix(cl.url, "https://"), "http://"), "path": path, "proto": protos[proto],
				"user_agent": "tests/1", "upstream": up.addr, "resumable": true,
				"reason": "upstream_closed", "status": 201.0, "events": 1.0, "bytes": 15.0, "heartbeats": 1.0,
				"heartbeats_deferred": 0.0, "last_event_id": "7",
			} {
				if closed[field] != want {
					t.Errorf("%s: got %v, want %v", field, closed[field], want)
				}
				if value, ok := opened[field]; ok && value != want {
					t.Errorf("%s at the opening: got %v, want %v", field, value, want)
				}
			}
			if id := fmt.Sprint(closed["id"]); len(id) != 36 {
				t.Errorf("the id %q is no UUID", id)
			}
			order := []string{"time_to_headers", "time_to_first_event"}
			if closed[order[0]].(float64) > closed[order[1]].(float64) || closed["duration"].(float64) <= 0 {
				t.Errorf("times: %v", closed)
			}
		})
	}
}

func TestAStreamWithoutAnEventHasNoTimeToFirstEvent(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Type", eventStream)
		_, err := io.WriteString(w, ": nothing\n\n")
		return err
	}))
	if _, err := c.client("h1").get(t, "/").text(); err != nil {
		t.Fatal(err)
	}
	line := c.closedLine(t, "/")
	if at, told := line["time_to_first_event"]; told {
		t.Errorf("told: %v", at)
	}
	if line["longest_gap"] == nil {
		t.Error("no longest gap is told")
	}
}

// The following tests check one line without a network.

// told holds what handlers in toldContext log, from DEBUG on.
var told *observer.ObservedLogs

type toldCore struct {
	zapcore.Core `json:"-"`
}

func (toldCore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.cores.sse_told", New: func() caddy.Module {
		var core zapcore.Core
		core, told = observer.New(zapcore.DebugLevel)
		return &toldCore{core}
	}}
}

// toldContext is like configContext, except for what is logged.
var toldContext = contextWithCore(toldCore{}, "DEBUG")

// closedFields serves a stream without a network and returns the fields of its
// `stream closed` line.
func closedFields(t testing.TB, c *client, config *caddysse.Handler, r *http.Request, answer caddyhttp.HandlerFunc) map[string]any {
	t.Helper()
	ctx, cancel := caddy.NewContext(toldContext)
	defer cancel()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ctx.WithValue(caddyhttp.ServerCtxKey, new(caddyhttp.Server)).LoadModuleByID("http.handlers.sse", text)
	if err != nil {
		t.Fatal(err)
	}
	told.TakeAll()
	panicked, err := serveRecovering(h.(*caddysse.Handler), c, r, answer)
	if err != nil || panicked != nil && panicked != http.ErrAbortHandler {
		t.Fatal(panicked, err)
	}
	lines := told.FilterMessage("stream closed").TakeAll()
	if len(lines) != 1 {
		t.Fatalf("%d lines: %v", len(lines), lines)
	}
	return lines[0].ContextMap()
}

// closedFieldsOf is closedFields for a body.
func closedFieldsOf(t testing.TB, r *http.Request, body ...string) map[string]any {
	t.Helper()
	return closedFields(t, newClient(t), silent(), r, stream(func(w http.ResponseWriter) {
		for _, piece := range body {
			write(t, w, piece)
		}
	}))
}

func TestTheLastEventIDIsTheLastCommittedOneOrElseTheRequests(t *testing.T) {
	full, long := strings.Repeat("x", 1024), strings.Repeat("x", 1025)
	for name, test := range map[string]struct{ request, body, want string }{
		"none at all":                {"", "data: 1\n\n", ""},
		"the request's":              {"6", "data: 1\n\n", "6"},
		"an event's":                 {"6", "id: 7\ndata: 1\n\n", "7"},
		"the last event's":           {"6", "id: 7\ndata: 1\n\nid: 8\ndata: 2\n\n", "8"},
		"of an event without id":     {"6", "id: 7\ndata: 1\n\ndata: 2\n\n", "7"},
		"of a block without data":    {"6", "id: 7\n\n", "7"},
		"not of an unfinished event": {"6", "id: 7\ndata: 1\n\nid: 8\ndata: 2\n", "7"},
		"no event is finished":       {"6", "id: 7\ndata: 1\n", "6"},
		"reset by an empty one":      {"6", "id\ndata: 1\n\n", ""},
		"1 KiB":                      {"", "id: " + full + "\ndata: 1\n\n", full},
		"more than 1 KiB":            {"", "id: " + long + "\ndata: 1\n\n", "(too long)"},
		"1 KiB in the request":       {full, "data: 1\n\n", full},
		"more in the request":        {long, "data: 1\n\n", "(too long)"},
		"shorter after a long one":   {"", "id: " + long + "\ndata: 1\n\nid: 8\ndata: 2\n\n", "8"},
		"with an escape sequence":    {"", "id: \x1b[2J\u202e\ndata: 1\n\n", "\ufffd[2J\ufffd"},
		"with one in the request":    {"\x1b]0;x\x07", "data: 1\n\n", "\ufffd]0;x\ufffd"},
	} {
		t.Run(name, func(t *testing.T) {
			r := get(eventStream)
			if test.request != "" {
				r.Header.Set("Last-Event-ID", test.request)
			}
			if got := closedFieldsOf(t, r, test.body)["last_event_id"]; got != test.want {
				t.Errorf("got %.60q, want %.60q", got, test.want)
			}
		})
	}
}

func TestWhatAClientCanNotReadIsTold(t *testing.T) {
	for name, test := range map[string]struct {
		body                []string
		incomplete, invalid bool
	}{
		"a whole stream":                       {[]string{"data: ä\n\n"}, false, false},
		"nothing":                              {nil, false, false},
		"a comment at the end":                 {[]string{"data: 1\n\n: bye"}, false, false},
		"no blank line at the end":             {[]string{"data: 1\n\ndata: 2\n"}, true, false},
		"half a line at the end":               {[]string{"data: 1\n\nda"}, true, false},
		"Latin-1":                              {[]string{"data: \xe4\n\n"}, false, true},
		"a character that is cut into writes":  {[]string{"data: \xc3", "\xa4\n\n"}, false, false},
		"a character that the end cuts in two": {[]string{"data: \xc3"}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			fields := closedFieldsOf(t, get(eventStream), test.body...)
			for field, want := range map[string]bool{"incomplete_event": test.incomplete, "invalid_utf8": test.invalid} {
				if told, ok := fields[field]; ok != want || ok && told != true {
					t.Errorf("%s: %v (told: %v), want it told: %v", field, told, ok, want)
				}
			}
		})
	}
}

func TestTheFiguresOfABodyDoNotDependOnItsPieces(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		if body.Text == "" || len(body.Text) > 1<<14 {
			continue
		}
		whole := closedFieldsOf(t, get(eventStream), body.Text)
		bytes := closedFieldsOf(t, get(eventStream), strings.Split(body.Text, "")...)
		for _, field := range []string{"events", "bytes", "last_event_id", "incomplete_event", "invalid_utf8"} {
			if whole[field] != bytes[field] {
				t.Errorf("%s: %s is %v in one piece, %v in small ones", body.Name, field, whole[field], bytes[field])
			}
		}
		if want := len(eventstreamtest.Parse([]byte(body.Text)).Events); fmt.Sprint(whole["events"]) != fmt.Sprint(want) {
			t.Errorf("%s: %v events, a client gets %d", body.Name, whole["events"], want)
		}
	}
}

func TestNothingAClientSendsForgesALineOrBreaksATerminal(t *testing.T) {
	evil := "a\r\nb\x1b[31m\u202ec\u2028d\x00\x7f\u009b\xff"
	r := get(eventStream)
	r.Header["User-Agent"] = []string{evil + strings.Repeat("ü", 5000)}
	r.Header["Last-Event-Id"] = []string{evil}
	r.URL.Path = "/" + evil + strings.Repeat("ü", 5000)
	r.Host = evil + strings.Repeat("ü", 5000)
	r.Method = "GET" + evil + strings.Repeat("X", 5000)
	fields := closedFieldsOf(t, r, "id: "+strings.ReplaceAll(strings.ReplaceAll(evil, "\r\n", ""), "\x00", "")+"\ndata: 1\n\n")
	for field, limit := range map[string]int{"user_agent": 256, "path": 1024, "host": 255, "method": 32, "last_event_id": 1024} {
		text := fields[field].(string)
		if len(text) > limit || text == "" {
			t.Errorf("%s: %d bytes, want 1 to %d", field, len(text), limit)
		}
		if strings.ContainsAny(text, "\r\n\x1b\u202e\u2028\x00\x7f\u009b") {
			t.Errorf("%s: %.60q", field, text)
		}
		if !strings.Contains(text, "b\ufffd[31m\ufffdc") {
			t.Errorf("%s: what can be shown is not there: %.60q", field, text)
		}
	}
}

// What a client sends is cut before it is copied, so that the copy does not
// keep the rest in memory.
func TestWhatAClientSendsTakesNoMoreMemoryThanWhatIsLogged(t *testing.T) {
	for name, text := range map[string]string{
		"bytes that are no text": strings.Repeat("\x80", 15_000),
		"long runes":             strings.Repeat("\U0001F600", 4_000),
		"control characters":     strings.Repeat("\x1b", 15_000),
		"plain text":             strings.Repeat("x", 15_000),
		"half a rune":            strings.Repeat("x", 254) + "\u00fc" + strings.Repeat("\xc3", 15_000),
	} {
		for what, of := range map[string]func(r *http.Request){
			"User-Agent":    func(r *http.Request) { r.Header["User-Agent"] = []string{text} },
			"Host":          func(r *http.Request) { r.Host = text },
			"the path":      func(r *http.Request) { r.URL.Path = "/" + text },
			"the method":    func(r *http.Request) { r.Method = text },
			"Last-Event-ID": func(r *http.Request) { r.Header["Last-Event-Id"] = []string{text} },
			"the upstream's name": func(r *http.Request) {
				r.Header.Set("X-Upstream", text)
			},
			"an error": func(r *http.Request) { r.Header.Set("X-Error", text) },
		} {
			r := get(eventStream)
			of(r)
			var before, after runtime.MemStats
			fields := closedFields(t, newClient(t), silent(), r, func(w http.ResponseWriter, r *http.Request) error {
				repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
				if upstream := r.Header.Get("X-Upstream"); upstream != "" {
					repl.Set("http.reverse_proxy.upstream.hostport", upstream)
				}
				w.Header().Set("Content-Type", eventStream)
				runtime.ReadMemStats(&before)
				w.WriteHeader(200)
				runtime.ReadMemStats(&after)
				if failure := r.Header.Get("X-Error"); failure != "" {
					return errors.New(failure)
				}
				return nil
			})
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 12<<10 {
				t.Errorf("%s, %s: opening the stream took %d bytes", what, name, grown)
			}
			for field, limit := range map[string]int{"user_agent": 256, "host": 255, "path": 1024, "method": 32, "last_event_id": 1024, "upstream": 255, "error": 512} {
				told, _ := fields[field].(string)
				if len(told) > limit || !utf8.ValidString(told) {
					t.Errorf("%s, %s: %s has %d bytes: %.40q", what, name, field, len(told), told)
				}
			}
		}
	}
}

// eager is a client that leaves as soon as it has received an event.
type eager struct {
	*client
	leave context.CancelFunc
	told  func() int
}

func (c eager) Write(p []byte) (int, error) {
	n, err := c.client.Write(p)
	c.leave()
	for c.told() == 0 {
		runtime.Gosched() // until its end has been reported
	}
	return n, err
}

func TestAClientThatLeavesWithItsFirstEventHasHadIt(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	config, cancel := caddy.NewContext(toldContext)
	defer cancel()
	module, err := config.WithValue(caddyhttp.ServerCtxKey, new(caddyhttp.Server)).LoadModuleByID("http.handlers.sse", []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	told.TakeAll()
	closed := func() int { return told.FilterMessage("stream closed").Len() }
	c := eager{newClient(t), leave, closed}
	r := caddyhttp.PrepareRequest(get(eventStream).WithContext(ctx), caddy.NewReplacer(), c, new(caddyhttp.Server))
	_ = module.(*caddysse.Handler).ServeHTTP(c, r, stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "data: 1\n\n") }))
	fields := told.FilterMessage("stream closed").TakeAll()[0].ContextMap()
	if took, ok := fields["time_to_first_event"].(time.Duration); fields["reason"] != "client_closed" || !ok || took <= 0 {
		t.Errorf("told: %v", fields)
	}
}

func TestNothingSecretIsTold(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		log
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin(), withLogLevel("DEBUG"))
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		path := "/" + proto
		e := cl.begin(cl.request(t, "GET", path+"?token=SECRET1&SECRET2", nil,
			"Accept: text/event-stream", "Cookie: session=SECRET3", "Authorization: Bearer SECRET4",
			"Proxy-Authorization: Basic SECRET5", "X-Api-Key: SECRET6", "Referer: http://x/?SECRET7"))
		call := up.accept(t)
		call.start(eventStream, "Set-Cookie: session=SECRET8", "X-Token: SECRET9")
		body := e.headers(t).follow()
		call.send("event: SECRETA\ndata: SECRETB\n\n")
		body.expect(t, "event: SECRETA\ndata: SECRETB\n\n")
		_, list := c.admin("GET", "/sse/streams")
		if strings.Contains(list, "SECRET") || !strings.Contains(list, path) {
			t.Errorf("the admin API tells: %s", list)
		}
		if proto == "h2" {
			call.abort()
			body.expectAbort(t)
		} else {
			call.end()
			body.expectEnd(t)
		}
		c.closedLine(t, path)
		c.accessLog(t, path)
	}
	ours := 0
	for _, entry := range c.logs() {
		told := any(entry)
		switch entry.logger() {
		case "http.handlers.sse":
		case "events":
			told = entry["data"] // Caddy logs our events at DEBUG
		case "http.log.access":
			told = entry["sse"]
		default:
			continue
		}
		ours++
		if strings.Contains(fmt.Sprint(told), "SECRET") {
			t.Errorf("told: %v", told)
		}
	}
	if ours < 3*5 { // opened, closed, their events, the access log
		t.Errorf("only %d lines have been looked at", ours)
	}
}

// accessLog waits for the access log line for a path.
func (c *testCaddy) accessLog(t testing.TB, path string) logEntry {
	t.Helper()
	timeout := time.After(patience)
	for {
		c.logged.mu.Lock()
		entries, changed := c.logged.entries, c.logged.changed
		c.logged.mu.Unlock()
		for _, entry := range entries {
			request, _ := entry["request"].(map[string]any)
			uri, _, _ := strings.Cut(fmt.Sprint(request["uri"]), "?")
			if strings.HasPrefix(entry.logger(), "http.log.access") && uri == path {
				return entry
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%s is not in the access log within %v", path, patience)
		}
	}
}

const appendedFields = `
	log_append told_id {http.sse.id}
	log_append told_reason {http.sse.reason}
	log_append told_events {http.sse.events}
	log_append told_bytes {http.sse.bytes}
	log_append told_heartbeats {http.sse.heartbeats}
	log_append told_duration {http.sse.duration}
	log_append told_last_event_id {http.sse.last_event_id}`

func TestTheAccessLogHasTheFiguresOnEveryEnd(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		log`+appendedFields+`
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	for _, proto := range clientProtocols {
		for reason, aborts := range map[string]bool{
			"upstream_closed": false, "client_closed": false, "admin": false, "upstream_error": true,
		} {
			t.Run(proto+" "+reason, func(t *testing.T) {
				path := "/" + proto + "/" + reason
				cl := c.client(proto)
				e := cl.begin(cl.request(t, "GET", path, nil, acceptStream))
				call := up.accept(t)
				call.start(eventStream)
				body := e.headers(t).follow()
				call.send("id: 7\ndata: 1\n\n")
				body.expect(t, "id: 7\ndata: 1\n\n")
				switch reason {
				case "upstream_closed":
					call.end()
				case "client_closed":
					e.leave()
				case "admin":
					c.admin("DELETE", "/sse/streams?path="+path)
				case "upstream_error":
					call.abort()
				}

				closed, access := c.closedLine(t, path), c.accessLog(t, path)
				figures, _ := access["sse"].(map[string]any)
				expectFields(t, "sse", figures, union(accessLogFields, onlyIf(aborts, "error", "")))
				for field, value := range figures {
					if closed[field] != value {
						t.Errorf("%s: %v in the access log, %v in the line", field, value, closed[field])
					}
				}
				if figures["reason"] != reason || figures["last_event_id"] != "7" {
					t.Errorf("the figures are %v", figures)
				}
				for _, field := range []string{"id", "reason", "events", "bytes", "heartbeats", "duration", "last_event_id"} {
					told, ok := access["told_"+field]
					if aborts {
						continue // Caddy sometimes loses them
					}
					if field == "duration" {
						if seconds, isNumber := told.(float64); !isNumber || seconds <= 0 {
							t.Errorf("{http.sse.duration} is %v", told)
						}
						continue
					}
					if !ok || fmt.Sprint(told) != fmt.Sprint(closed[field]) {
						t.Errorf("{http.sse.%s} is %v, want %v", field, told, closed[field])
					}
				}
			})
		}
	}
}

func onlyIf(wanted bool, field string, value any) map[string]any {
	if !wanted {
		return nil
	}
	return map[string]any{field: value}
}

func TestTheAccessLogOfOtherResponsesHasNoFigures(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, `
		log
		sse {
			prelude off
		}
		respond "hello"`)
	if _, err := c.client("h1").get(t, "/").text(); err != nil {
		t.Fatal(err)
	}
	if figures, ok := c.accessLog(t, "/")["sse"]; ok {
		t.Errorf("got %v", figures)
	}
}

// testSubscriber is the event handler `test_subscriber`.
type testSubscriber struct{}

var received = make(chan caddy.Event, 100)

func init() { caddy.RegisterModule(testSubscriber{}) }

func (testSubscriber) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.test_subscriber", New: func() caddy.Module { return new(testSubscriber) }}
}
func (*testSubscriber) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }
func (*testSubscriber) Handle(_ context.Context, e caddy.Event) error {
	received <- e
	return nil
}

func receive(t testing.TB) caddy.Event {
	t.Helper()
	select {
	case e := <-received:
		return e
	case <-time.After(patience):
		t.Fatalf("no event within %v", patience)
		return caddy.Event{}
	}
}

func TestASubscriberGetsWhatTheLogTells(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	site := `
		sse {
			prelude off
		}
		reverse_proxy ` + up.addr
	subscribed := withGlobal(`events {
		on sse_stream_opened test_subscriber
		on sse_stream_closed test_subscriber
	}`)
	c := startCaddy(t, site, subscribed)
	for i, proto := range append(slices.Clone(clientProtocols), "h1") {
		path := fmt.Sprintf("/%d", i)
		cl := c.client(proto)
		e := cl.begin(cl.request(t, "GET", path, nil))
		call := up.accept(t)
		call.start(eventStream)
		body := e.headers(t).follow()
		opened := receive(t)
		call.send("data: 1\n\n")
		body.expect(t, "data: 1\n\n")
		if i == 3 {
			c.reload(`sse 20s
			reverse_proxy `+up.addr, subscribed) // the stream outlives its configuration
		}
		call.abort()
		closed := receive(t)

		if opened.Name() != "sse_stream_opened" || closed.Name() != "sse_stream_closed" {
			t.Fatalf("%s: got %s and %s", path, opened.Name(), closed.Name())
		}
		if origin := closed.Origin().CaddyModule().ID; origin != "http.handlers.sse" {
			t.Errorf("the origin is %s", origin)
		}
		expectSameData(t, opened.Data, c.lineOf(t, "stream opened", path))
		expectSameData(t, closed.Data, c.closedLine(t, path))
		body.expectAbort(t)
	}
}

// expectSameData compares an event's data with a log line, in which durations
// are seconds.
func expectSameData(t testing.TB, data map[string]any, line logEntry) {
	t.Helper()
	want := line.withoutFrame()
	for field, value := range data {
		if d, ok := value.(time.Duration); ok {
			if seconds, _ := want[field].(float64); time.Duration(seconds*float64(time.Second)).Round(time.Microsecond) != d.Round(time.Microsecond) {
				t.Errorf("%s: %v in the event, %v in the log", field, d, want[field])
			}
		} else if fmt.Sprint(value) != fmt.Sprint(want[field]) {
			t.Errorf("%s: %v in the event, %v in the log", field, value, want[field])
		}
		delete(want, field)
	}
	if len(want) > 0 {
		t.Errorf("not in the event: %v", want)
	}
}

func TestTheTimesAreThoseOfTheClient(t *testing.T) {
	for name, interval := range map[string]time.Duration{"with heartbeats": time.Second, "without": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(interval)}}
				c := newClient(t)
				line := closedFields(t, c, h, get(eventStream), func(w http.ResponseWriter, _ *http.Request) error {
					quiet(3 * time.Second)
					w.Header().Set("Content-Type", eventStream)
					w.WriteHeader(http.StatusOK)
					quiet(5 * time.Second)
					write(t, w, ": comment\n\n")
					quiet(7 * time.Second)
					write(t, w, "data: 1\n")
					quiet(11 * time.Second)
					write(t, w, "\n")
					quiet(2 * time.Second)
					write(t, w, "data: 2\n\n")
					return nil
				})
				var headers, firstEvent time.Duration
				for _, h := range c.log {
					switch {
					case h.what == "200":
						headers = h.at
					case h.what == "write" && h.bytes == "\n":
						firstEvent = h.at
					}
				}
				for field, want := range map[string]time.Duration{
					"time_to_headers":     headers,
					"time_to_first_event": firstEvent,
					"longest_gap":         11 * time.Second,
					"duration":            25 * time.Second,
				} {
					if line[field] != want {
						t.Errorf("%s is %v, want %v", field, line[field], want)
					}
				}
				if headers != 3*time.Second || firstEvent != 26*time.Second || (interval > 0) != (line["heartbeats"].(uint64) > 0) {
					t.Errorf("headers after %v, first event after %v, %v heartbeats", headers, firstEvent, line["heartbeats"])
				}
			})
		})
	}
}

// The same over sockets. On a busy machine, a single measurement says little,
// so one good measurement of several is enough.
func TestTheTimesAgreeWithWhatAClientMeasures(t *testing.T) {
	checkLeaks(t)
	const step, exactness = 60 * time.Millisecond, 10 * time.Millisecond
	c := startCaddy(t, strings.Replace(answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
		time.Sleep(step) // the time that an upstream needs
		w.Header().Set("Content-Type", eventStream)
		w.WriteHeader(http.StatusOK)
		time.Sleep(step)
		_, err := io.WriteString(w, "data: 1\n\n")
		return err
	}), "sse", "sse 1h {\nprelude 5ms\n}", 1))
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			cl := c.client(proto)
			cl.get(t, "/warm").text() // the time to connect must not count
			var off []time.Duration
			for i := range 20 {
				path := fmt.Sprintf("/%s/%d", proto, i)
				began := time.Now()
				res := cl.get(t, path)
				headers := time.Since(began)
				body := res.follow()
				body.wait(func(unread string) bool { return strings.Contains(unread, "data: 1\n\n") })
				all := body.all()
				firstEvent := all[len(all)-1].at.Sub(began)
				body.rest()

				line := c.closedLine(t, path)
				if line["heartbeats"] != 1.0 {
					t.Fatalf("%v heartbeats", line["heartbeats"])
				}
				difference := max(
					(headers - seconds(line["time_to_headers"])).Abs(),
					(firstEvent - seconds(line["time_to_first_event"])).Abs())
				if difference <= exactness {
					return
				}
				off = append(off, difference)
			}
			t.Errorf("the client measured times other by %v", off)
		})
	}
}

func seconds(logged any) time.Duration {
	return time.Duration(logged.(float64) * float64(time.Second))
}

// Interface guards
var (
	_ caddyhttp.MiddlewareHandler = testAnswer{}
	_ caddyevents.Handler         = (*testSubscriber)(nil)
)
