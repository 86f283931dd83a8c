//go:build interop

// Package intermediaries_test puts nginx, HAProxy and another Caddy, each as a
// real process, in front of a Caddy with this module.
package intermediaries_test

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	ticks    = 8
	tickTime = 300 * time.Millisecond

	// atOnce is much less than the time that a stream with delayed events
	// takes, and much more than a busy machine needs.
	atOnce = time.Second
)

// origin is the upstream at the end of each chain. The first element of a path
// selects what it does; the rest distinguishes tests.
type origin struct {
	addr string

	mutex sync.Mutex
	left  map[string]time.Time // when the client of a path left
}

func startOrigin(t *testing.T) *origin {
	o := &origin{left: make(map[string]time.Time)}
	o.addr = harness.Serve(t, o.serve)
	return o
}

func (o *origin) serve(w http.ResponseWriter, r *http.Request) {
	harness.Begin(w)
	switch strings.Split(r.URL.Path, "/")[1] {
	case "ticks": // each event says when it was sent
		for i := range ticks {
			if i > 0 && !pause(r, tickTime) {
				return
			}
			harness.Send(w, fmt.Sprintf("id: %d\nevent: tick\ndata: %d\n\n", i, time.Now().UnixNano()))
		}
	case "quiet":
		harness.Send(w, "id: 1\ndata: only\n\n")
		<-r.Context().Done()
		o.mutex.Lock()
		defer o.mutex.Unlock()
		o.left[r.URL.Path] = time.Now()
	case "silent": // headers and nothing more
		<-r.Context().Done()
	case "bulk":
		harness.Send(w, bulk)
	case "finish":
		harness.Send(w, "data: one\n\n")
		pause(r, 100*time.Millisecond)
		harness.Send(w, "data: last\n\n")
	case "abort":
		harness.Send(w, "data: one\n\n")
		pause(r, 100*time.Millisecond)
		panic(http.ErrAbortHandler)
	}
}

// bulk is more than all buffers on the way can hold, and compresses badly.
var bulk = func() string {
	var body strings.Builder
	for i := range 100 {
		fmt.Fprintf(&body, "id: %d\r\ndata: %s\r\n\r\n", i, strings.Repeat(rand.Text(), 2000))
	}
	return body.String()
}()

func pause(r *http.Request, d time.Duration) bool {
	select {
	case <-r.Context().Done():
		return false
	case <-time.After(d):
		return true
	}
}

// awaitLeft waits until the client of a path has left.
func (o *origin) awaitLeft(t *testing.T, path string, within time.Duration) {
	t.Helper()
	start := time.Now()
	harness.Eventually(t, within, "the upstream of "+path+" loses its client", func() bool {
		o.mutex.Lock()
		defer o.mutex.Unlock()
		return !o.left[path].IsZero()
	})
	t.Logf("the upstream lost its client within %v", time.Since(start).Round(time.Millisecond))
}

// awaitClosed waits for the `stream closed` line of a path.
func awaitClosed(t *testing.T, caddy *harness.Caddy, path string) (closed harness.Closed) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "the stream of "+path+" is closed", func() bool {
		for _, line := range caddy.ClosedStreams() {
			if line.Path == path {
				closed = line
				return true
			}
		}
		return false
	})
	return closed
}

// site is a Caddy that answers for any Host, because some intermediaries replace
// the client's.
type site struct {
	*harness.Caddy
	port       int
	tls        int
	directives string
}

func startSite(t *testing.T, directives string) *site {
	t.Helper()
	s := &site{port: harness.FreePort(t), tls: harness.FreePort(t), directives: directives}
	s.Caddy = harness.StartCaddy(t, s.caddyfile())
	s.URL, s.TLSURL = "http://"+s.plain(), fmt.Sprintf("https://localhost:%d", s.tls)
	return s
}

func (s *site) plain() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

func (s *site) caddyfile() string {
	return fmt.Sprintf(`{
	auto_https disable_redirects
	servers {
		protocols h1 h2 h2c
	}
}
http://:%d {
	bind 127.0.0.1
	%s
}
https://localhost:%d {
	bind 127.0.0.1
	tls internal
	%[2]s
}
`, s.port, s.directives, s.tls)
}

// reload loads the same site with a small change, because Caddy ignores a
// configuration that has not changed.
func (s *site) reload(t *testing.T) {
	t.Helper()
	s.directives += "\nheader X-Loaded again"
	s.Reload(t, s.caddyfile())
}

// address is one way to reach a chain.
type address struct {
	name     string
	protocol string // of harness.Client
	url      string
	rootCA   string // of addresses with TLS
}

func (a address) client(t *testing.T) *http.Client {
	t.Helper()
	if a.rootCA == "" {
		return harness.Client(t, a.protocol)
	}
	return harness.Client(t, a.protocol, a.rootCA)
}

func (a address) open(t *testing.T, path string, options ...harness.RequestOption) *harness.Stream {
	t.Helper()
	stream := harness.Open(t, a.client(t), a.url+path, options...)
	proto := "HTTP/2.0"
	if a.protocol == "h1" {
		proto = "HTTP/1.1"
	}
	if stream.Response.Proto != proto || stream.Response.StatusCode != http.StatusOK {
		t.Fatalf("%s %s, not %s", stream.Response.Proto, stream.Response.Status, proto)
	}
	return stream
}

// chain is a client, an intermediary, a Caddy with this module, and the origin.
type chain struct {
	name   string
	caddy  *site
	origin *origin

	// hidesAborts is the protocol ("all" for every one) over which the
	// intermediary makes an aborted response look complete.
	hidesAborts string
	// holdsHeaders is the protocol over which it delays headers until a body
	// follows.
	holdsHeaders string

	// leaves is how long it may take until the upstream notices that a client
	// has left.
	leaves time.Duration
}

// passes checks everything that must hold for every chain.
func (c chain) passes(t *testing.T, entrances []address) {
	for _, a := range entrances {
		t.Run(a.name, func(t *testing.T) {
			id := c.name + "-" + a.name
			t.Run("events at once", func(t *testing.T) { t.Parallel(); c.eventsAtOnce(t, a, "/ticks/"+id) })
			t.Run("headers at once", func(t *testing.T) { t.Parallel(); c.headersAtOnce(t, a, "/silent/"+id) })
			t.Run("heartbeats and leaving", func(t *testing.T) { t.Parallel(); c.heartbeatsAndLeaving(t, a, "/quiet/"+id) })
			t.Run("every byte", func(t *testing.T) { t.Parallel(); c.everyByte(t, a, "/bulk/"+id) })
			t.Run("clean end", func(t *testing.T) { t.Parallel(); c.cleanEnd(t, a, "/finish/"+id) })
			t.Run("aborted end", func(t *testing.T) { t.Parallel(); c.abortedEnd(t, a, "/abort/"+id) })
		})
	}
}

func (c chain) eventsAtOnce(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	if worst := worstLateness(t, stream); worst > atOnce {
		t.Errorf("an event came %v late", worst)
	}
	if err := stream.AwaitEnd(t, 5*time.Second); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"Content-Length", "Content-Encoding", "X-Accel-Buffering"} {
		if value := stream.Response.Header.Get(name); value != "" && !(name == "X-Accel-Buffering" && value == "no") {
			t.Errorf("%s: %s", name, value)
		}
	}
	if got := stream.Response.Header.Values("Cache-Control"); len(got) != 1 || !strings.Contains(got[0], "no-transform") {
		t.Errorf("Cache-Control: %q", got)
	}
	if got := stream.Response.Header.Values("Incremental"); len(got) != 1 || got[0] != "?1" {
		t.Errorf("Incremental: %q", got)
	}
	if closed := awaitClosed(t, c.caddy.Caddy, path); closed.Reason != "upstream_closed" || closed.Events != ticks {
		t.Errorf("%+v", closed)
	}
}

// worstLateness reads all ticks and returns the longest delay of one.
func worstLateness(t *testing.T, stream *harness.Stream) (worst time.Duration) {
	t.Helper()
	var each []string
	for range ticks {
		event := stream.Next(t, harness.Patience)
		sent, err := strconv.ParseInt(event.Data, 10, 64)
		if err != nil || event.Type != "tick" {
			t.Fatalf("%+v", event)
		}
		late := event.At.Sub(time.Unix(0, sent))
		worst = max(worst, late)
		each = append(each, late.Round(time.Millisecond).String())
	}
	t.Logf("late by %s", strings.Join(each, " "))
	return worst
}

// headersAtOnce checks that headers are not delayed: a page's `open` event
// depends on them.
func (c chain) headersAtOnce(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	within := atOnce
	if a.name == c.holdsHeaders {
		within += time.Second // the prelude
	}
	if took := stream.HeadersAt.Sub(stream.Asked); took > within {
		t.Errorf("headers after %v", took)
	}
	stream.NextComment(t, 3*time.Second)
}

func (c chain) heartbeatsAndLeaving(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	if event := stream.Next(t, atOnce); event.Data != "only" || event.ID != "1" {
		t.Errorf("%+v", event)
	}
	for range 4 {
		if beat := stream.NextComment(t, 3*time.Second); beat.Text != "heartbeat" {
			t.Errorf("comment %q", beat.Text)
		}
	}
	stream.Close()
	c.origin.awaitLeft(t, path, c.leaves)
	if closed := awaitClosed(t, c.caddy.Caddy, path); closed.Reason != "client_closed" || closed.Heartbeats == 0 || closed.Level != "info" {
		t.Errorf("%+v", closed)
	}
}

func (c chain) everyByte(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	if err := stream.AwaitEnd(t, harness.Patience); err != nil {
		t.Error(err)
	}
	if stream.Body() != bulk {
		t.Errorf("%d bytes, %d events; the upstream sent %d and 100", len(stream.Body()), len(stream.Events()), len(bulk))
	}
}

func (c chain) cleanEnd(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	if err := stream.AwaitEnd(t, 5*time.Second); err != nil {
		t.Errorf("the end is not clean: %v", err)
	}
	if stream.Body() != "data: one\n\ndata: last\n\n" {
		t.Errorf("%q", stream.Body())
	}
	if closed := awaitClosed(t, c.caddy.Caddy, path); closed.Reason != "upstream_closed" {
		t.Errorf("%+v", closed)
	}
}

func (c chain) abortedEnd(t *testing.T, a address, path string) {
	stream := a.open(t, path)
	err := stream.AwaitEnd(t, 5*time.Second)
	t.Logf("the client saw: %v", err)
	if hidden := c.hidesAborts == "all" || c.hidesAborts == stream.Response.Proto; (err == nil) != hidden {
		t.Errorf("the client saw %v", err)
	}
	if stream.Body() != "data: one\n\n" {
		t.Errorf("%q", stream.Body())
	}
	if closed := awaitClosed(t, c.caddy.Caddy, path); closed.Reason != "upstream_error" || closed.Level != "warn" {
		t.Errorf("%+v", closed)
	}
}

// drains checks that a reload of the Caddy with this module reaches the clients
// as a clean end, and that they can reconnect.
func (c chain) drains(t *testing.T, entrances []address) {
	t.Helper()
	streams := make([]*harness.Stream, len(entrances))
	for i, a := range entrances {
		streams[i] = a.open(t, "/quiet/drained-"+c.name+"-"+a.name)
		streams[i].Next(t, harness.Patience)
	}
	c.caddy.reload(t)
	for i, a := range entrances {
		if err := streams[i].AwaitEnd(t, 10*time.Second); err != nil {
			t.Errorf("%s: the end of the drained stream is not clean: %v", a.name, err)
		}
		path := "/quiet/drained-" + c.name + "-" + a.name
		if closed := awaitClosed(t, c.caddy.Caddy, path); closed.Reason != "drained" {
			t.Errorf("%s: %+v", a.name, closed)
		}
		c.origin.awaitLeft(t, path, 5*time.Second)
		again := a.open(t, "/quiet/again-"+c.name+"-"+a.name)
		again.Next(t, 5*time.Second)
		if again.Response.Header.Get("X-Loaded") != "again" {
			t.Errorf("%s: the new stream is not the new configuration's", a.name)
		}
		again.Close()
	}
}
