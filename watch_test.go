package caddysse_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// watching is a client of a watch.
type watching struct {
	res   *http.Response
	lines *bufio.Reader
}

// watch starts a watch through the admin API.
func (c *testCaddy) watch(t testing.TB, query string) *watching {
	t.Helper()
	res := askAdmin(t, c.adminSocket(), "GET", "/sse/watch"+query, "")
	t.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != 200 {
		body, _ := io.ReadAll(res.Body)
		t.Fatalf("%s: %s %s", query, res.Status, body)
	}
	return &watching{res: res, lines: bufio.NewReader(res.Body)}
}

// line returns the next line.
func (w *watching) line(t testing.TB) string {
	t.Helper()
	line, err := w.lines.ReadString('\n')
	if err != nil {
		t.Fatalf("got %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// next returns the next snapshot.
func (w *watching) next(t testing.TB) (shown shownSnapshot) {
	t.Helper()
	for {
		data, found := strings.CutPrefix(w.line(t), "data: ")
		if !found {
			continue
		}
		if err := json.Unmarshal([]byte(data), &shown); err != nil {
			t.Fatal(err)
		}
		return shown
	}
}

// end waits for a clean end.
func (w *watching) end(t testing.TB) {
	t.Helper()
	if _, err := io.Copy(io.Discard, w.lines); err != nil {
		t.Errorf("the watch ended with %v", err)
	}
}

func TestAWatchIsAnEventStreamOfSnapshots(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name watched
		}
		reverse_proxy `+up.addr, withAdmin())
	o := c.open(t, c.client("h1"), up, "/one", "User-Agent: tests/1")
	w := c.watch(t, "?name=watched&interval=100ms")
	for header, want := range map[string]string{"Content-Type": "text/event-stream", "Cache-Control": "no-store"} {
		if got := w.res.Header.Get(header); got != want {
			t.Errorf("%s is %q", header, got)
		}
	}
	var lines [4]string
	for i := range lines {
		lines[i] = w.line(t)
	}
	if lines[0] != "retry: 1000" || lines[1] != "" || lines[2] != "event: snapshot" {
		t.Errorf("it begins with %q", lines[:3])
	}
	var first map[string]any
	data, _ := strings.CutPrefix(lines[3], "data: ")
	if err := json.Unmarshal([]byte(data), &first); err != nil {
		t.Fatalf("%q: %v", lines[3], err)
	}
	figures := map[string]any{"open": 0.0, "opened": 0.0, "closed": map[string]any{}, "events": 0.0, "bytes": 0.0, "heartbeats": 0.0}
	expectFields(t, "a snapshot", first, map[string]any{
		"at": "", "seconds": 0.0, "totals": figures, "deltas": figures, "names": []any{}, "matching": 0.0, "streams": []any{},
	})
	for _, key := range []string{"totals", "deltas"} {
		expectFields(t, key, first[key].(map[string]any), figures)
	}
	if first["seconds"] != 0.0 {
		t.Errorf("the first is %v s after the one before", first["seconds"])
	}
	if _, err := time.Parse(time.RFC3339Nano, first["at"].(string)); err != nil {
		t.Error(err)
	}

	// It reports the same about names and streams as the other endpoints.
	handlers := c.adminJSON(t, "GET", "/sse/handlers", 200)["handlers"]
	if fmt.Sprint(first["names"]) != fmt.Sprint(handlers) {
		t.Errorf("names: %v\nhandlers: %v", first["names"], handlers)
	}
	one := first["streams"].([]any)[0].(map[string]any)
	listed := c.listed(t, "/one")
	for _, field := range []string{"opened_at", "duration_seconds", "idle_seconds"} { // the two were taken at different times
		if fmt.Sprintf("%T", one[field]) != fmt.Sprintf("%T", listed[field]) {
			t.Errorf("%s is %v", field, one[field])
		}
		delete(one, field)
		delete(listed, field)
	}
	if fmt.Sprint(one) != fmt.Sprint(listed) {
		t.Errorf("watched: %v\nlisted: %v", one, listed)
	}

	o.call.send("data: 1\n\n")
	o.body.expect(t, "data: 1\n\n")
	deltas := 0
	for deadline := time.Now().Add(patience); deltas < 1 && time.Now().Before(deadline); {
		s := w.next(t)
		deltas += s.Deltas.Events
		if s.Seconds <= 0 {
			t.Errorf("%v s after the one before", s.Seconds)
		}
	}
	if deltas != 1 {
		t.Errorf("the deltas have %d events", deltas)
	}
}

func TestAWatchIsFiltered(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		handle /chat* {
			sse {
				prelude off
				name watched_chat
			}
			reverse_proxy `+up.addr+`
		}
		handle {
			sse {
				prelude off
				name watched_feed
			}
			reverse_proxy `+up.addr+`
		}`, withAdmin(), withGlobal(`servers {
		trusted_proxies static 127.0.0.1
	}`))
	cl := c.client("h1")
	for _, one := range []struct{ path, ip string }{
		{"/chat/1", "203.0.113.7"}, {"/chat/2", "2001:db8::1"}, {"/chat2", "203.0.113.7"}, {"/feed", "203.0.113.8"},
	} {
		c.open(t, cl, up, one.path, "X-Forwarded-For: "+one.ip)
	}
	for query, want := range map[string]struct {
		open  int // in the totals, which only the name filters
		paths []string
	}{
		"":                              {4, []string{"/chat/1", "/chat/2", "/chat2", "/feed"}},
		"?name=watched_chat":            {3, []string{"/chat/1", "/chat/2", "/chat2"}},
		"?name=watched_feed":            {1, []string{"/feed"}},
		"?name=other":                   {0, nil},
		"?path=/chat/":                  {4, []string{"/chat/1", "/chat/2"}},
		"?client_ip=::ffff:203.0.113.7": {4, []string{"/chat/1", "/chat2"}},
		"?client_ip=203.0.113.7&name=watched_chat&path=/chat/": {3, []string{"/chat/1"}},
		"?sort=path":                   {4, []string{"/chat/1", "/chat/2", "/chat2", "/feed"}},
		"?sort=-path":                  {4, []string{"/feed", "/chat2", "/chat/2", "/chat/1"}},
		"?sort=opened_at&interval=1m":  {4, []string{"/feed", "/chat2", "/chat/2", "/chat/1"}},
		"?sort=-client_ip&path=/chat/": {4, []string{"/chat/1", "/chat/2"}},
	} {
		s := c.watch(t, query).next(t)
		var paths []string
		for _, one := range s.Streams {
			paths = append(paths, one["path"].(string))
		}
		if !slices.Equal(paths, want.paths) || s.Matching != len(want.paths) || s.Totals.Open != want.open {
			t.Errorf("%s: got %q of %d, %d open", query, paths, s.Matching, s.Totals.Open)
		}
	}
}

func TestAWatchThatCanNotBeReadIsAnError(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, "respond hello", withAdmin())
	for _, test := range []struct {
		method, query string
		status        int
		says          string
	}{
		{"GET", "?interval=99ms", 400, "99ms is not between 100ms and 1m0s"},
		{"GET", "?interval=61s", 400, "1m1s is not between"},
		{"GET", "?interval=-1s", 400, "-1s is not between"},
		{"GET", "?interval=1", 400, `"1" is no duration`},
		{"GET", "?interval=", 400, "interval"},
		{"GET", "?interval=1s&interval=2s", 400, "interval"},
		{"GET", "?sort=age", 400, `"age" is no key of a stream; there are id, name,`},
		{"GET", "?sort=--bytes", 400, `"--bytes" is no key`},
		{"GET", "?sort=", 400, "sort"},
		{"GET", "?sort=Bytes", 400, `"Bytes"`},
		{"GET", "?limit=10", 400, `"limit"`},
		{"GET", "?all=true", 400, `"all"`},
		{"GET", "?client_ip=nowhere", 400, "nowhere"},
		{"GET", "?path=%zz", 400, "%zz"},
		{"POST", "", 405, "POST"},
		{"DELETE", "?name=x", 405, "DELETE"},
	} {
		answer := c.adminJSON(t, test.method, "/sse/watch"+test.query, test.status)
		if said, _ := answer["error"].(string); !strings.Contains(said, test.says) {
			t.Errorf("%s %s: got %v, want %s", test.method, test.query, answer, test.says)
		}
	}
}

func TestAWatchEndsCleanlyAtAReload(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, "respond hello", withAdmin())
	first, second := c.watch(t, "?interval=1m"), c.watch(t, "?interval=100ms")
	first.next(t)
	second.next(t)
	c.reload("respond again")
	first.end(t)
	second.end(t)
	c.waitForLog("stopped previous server", 0)
	c.watch(t, "").next(t)
	for _, entry := range c.logs() {
		if entry.level() == "error" {
			t.Errorf("logged: %v", entry)
		}
	}
}

// Caddy's exit status shows whether its admin listener could be stopped.
func TestAWatchThatDoesNotReadDelaysNoExit(t *testing.T) {
	t.Parallel()
	up := newUpstreamFunc(t, eventThenSilence)
	c := startCaddyProcess(t, drainSite(up.addr, "drain off"), "grace_period 1s")
	c.followMany(210)
	conn, err := net.Dial("unix", c.adminSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /sse/watch?interval=100ms HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
	reading := c.watch(t, "?interval=100ms")
	for range 15 { // more than the socket buffers of the watch that is not read can hold
		reading.next(t)
	}
	var ending sync.WaitGroup
	ending.Go(func() { reading.end(t) })
	c.stop("SIGTERM")
	ending.Wait()
}

// route returns the admin API's handler for a path.
func route(t testing.TB, pattern string) http.Handler {
	t.Helper()
	module, err := caddy.GetModule("admin.api.sse")
	if err != nil {
		t.Fatal(err)
	}
	routes := module.New().(caddy.AdminRouter).Routes()
	i := slices.IndexFunc(routes, func(route caddy.AdminRoute) bool { return route.Pattern == pattern })
	if i < 0 {
		t.Fatalf("no route for %s", pattern)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := routes[i].Handler.ServeHTTP(w, r); err != nil {
			t.Error(err)
		}
	})
}

// pipeListener accepts the server's ends of pipes. These have no buffer: a
// client that does not read blocks the first write.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	over  chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), over: make(chan struct{})}
}

func (ln *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-ln.conns:
		return conn, nil
	case <-ln.over:
		return nil, net.ErrClosed
	}
}

func (ln *pipeListener) Close() error   { ln.once.Do(func() { close(ln.over) }); return nil }
func (ln *pipeListener) Addr() net.Addr { return new(net.UnixAddr) }

// dial connects and sends a request.
func (ln *pipeListener) dial(target string) net.Conn {
	client, server := net.Pipe()
	ln.conns <- server
	fmt.Fprintf(client, "GET %s HTTP/1.1\r\nHost: test\r\n\r\n", target)
	return client
}

// shutDown stops a server and returns how long that took.
func shutDown(t testing.TB, server *http.Server) time.Duration {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // as in Caddy
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	return time.Since(began)
}

func TestAWatchThatDoesNotReadDelaysItsListenerByLessThanASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln, server := newPipeListener(), &http.Server{Handler: route(t, "/sse/watch")}
		go server.Serve(ln)
		for range 3 {
			defer ln.dial("/sse/watch?interval=100ms").Close()
		}
		synctest.Wait() // until their first snapshots are being written
		if took := shutDown(t, server); took > time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestAWatchThatDoesNotReadIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln, left := newPipeListener(), make(chan time.Time, 1)
		handler := route(t, "/sse/watch")
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handler.ServeHTTP(w, r)
			left <- time.Now()
		})}
		go server.Serve(ln)
		began := time.Now()
		defer ln.dial("/sse/watch").Close()
		if took := (<-left).Sub(began); took != 10*time.Second {
			t.Errorf("after %v", took)
		}
		shutDown(t, server)
	})
}

func TestAWatchThatBeginsWhileItsListenerStopsEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln, stopping := newPipeListener(), make(chan struct{})
		handler := route(t, "/sse/watch")
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-stopping
			handler.ServeHTTP(w, r)
		})}
		server.RegisterOnShutdown(func() { close(stopping) })
		go server.Serve(ln)
		conn := ln.dial("/sse/watch")
		defer conn.Close()
		go io.Copy(io.Discard, conn)
		synctest.Wait()
		if took := shutDown(t, server); took > time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestSnapshotsComeAtOnceAndThenEachInterval(t *testing.T) {
	for query, interval := range map[string]time.Duration{
		"": time.Second, "?interval=100ms": 100 * time.Millisecond, "?interval=1m": time.Minute,
	} {
		synctest.Test(t, func(t *testing.T) {
			// The admin listener's read timeout applies to requests, not to
			// answers.
			ln, server := newPipeListener(), &http.Server{Handler: route(t, "/sse/watch"), ReadTimeout: interval + interval/2}
			go server.Serve(ln)
			began := time.Now()
			conn := ln.dial("/sse/watch" + query)
			defer conn.Close()
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			w := &watching{res: res, lines: bufio.NewReader(res.Body)}
			for i := range 5 {
				s := w.next(t)
				if after := time.Since(began); after != time.Duration(i)*interval {
					t.Errorf("%s: snapshot %d came after %v", query, i, after)
				}
				if want := interval.Seconds() * float64(min(i, 1)); s.Seconds != want {
					t.Errorf("%s: snapshot %d is over %v s", query, i, s.Seconds)
				}
			}
			var stopping sync.WaitGroup
			stopping.Go(func() { shutDown(t, server) })
			w.end(t)
			stopping.Wait()
		})
	}
}
