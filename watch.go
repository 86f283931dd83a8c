package caddysse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	watchPath = "/sse/watch"

	defaultWatchInterval = time.Second
	minWatchInterval     = 100 * time.Millisecond
	maxWatchInterval     = time.Minute

	// watchRetry is when the client of a watch reconnects after its end.
	watchRetry = time.Second

	// watchPatience is how long a client may take to read a snapshot.
	watchPatience = 10 * time.Second

	// lastWatchPatience is how long it may take to read the rest when the listener
	// stops. Caddy waits for that.
	lastWatchPatience = 500 * time.Millisecond
)

// watches are those on one admin listener, which ends at a reload and at an exit.
type watches struct {
	once sync.Once
	over context.Context // done when the listener stops
	end  context.CancelFunc
}

func newWatches() *watches {
	ws := new(watches)
	ws.over, ws.end = context.WithCancel(context.Background())
	return ws
}

// endWithServer makes the watches end together with their server, which only a
// request knows.
func (ws *watches) endWithServer(r *http.Request) {
	server, ok := r.Context().Value(http.ServerContextKey).(*http.Server)
	if !ok {
		return
	}
	ws.once.Do(func() {
		server.RegisterOnShutdown(ws.end)
		// A server that has begun to stop makes no more calls.
		if errors.Is(server.Serve(noListener{}), http.ErrServerClosed) {
			ws.end()
		}
	})
}

// noListener is a listener that accepts nothing: Serve returns when the server
// stops.
type noListener struct{}

func (noListener) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (noListener) Addr() net.Addr            { return new(net.TCPAddr) }
func (noListener) Close() error              { return nil }

// serve sends a snapshot at once, and then one every interval, until the client
// leaves or the listener stops.
func (ws *watches) serve(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return methodNotAllowed(w, r, "GET")
	}
	observer, interval, err := parseWatch(r)
	if err != nil {
		return badRequest(err)
	}
	ws.endWithServer(r)
	watch := &watch{w: w, control: http.NewResponseController(w)}
	// The listener's read timeout is meant for requests; when it expired, the
	// request of a stream would seem cancelled.
	_ = watch.control.SetReadDeadline(time.Time{})
	defer watch.hurryAfter(ws.over)()

	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprintf(&watch.next, "retry: %d\n\n", watchRetry.Milliseconds())
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for watch.send(observer.observe()) == nil {
		select {
		case <-ticker.C:
		case <-ws.over.Done():
			return nil
		case <-r.Context().Done():
			return nil
		}
	}
	return nil // a client that does not read can't be sent an error
}

// parseWatch parses what to watch, and how often.
func parseWatch(r *http.Request) (*observer, time.Duration, error) {
	values, err := parseQuery(r.URL, append([]string{"interval", "sort"}, filterKeys...)...)
	if err != nil {
		return nil, 0, err
	}
	o := new(observer)
	if o.filter, err = newFilter(values); err != nil {
		return nil, 0, err
	}
	if by, given := values["sort"]; given {
		if o.order, err = parseOrder(by); err != nil {
			return nil, 0, err
		}
	}
	interval := defaultWatchInterval
	if text, given := values["interval"]; given {
		if interval, err = time.ParseDuration(text); err != nil {
			return nil, 0, fmt.Errorf("interval: %q is no duration, such as 500ms or 2s", printable(text, 64))
		}
		if interval < minWatchInterval || interval > maxWatchInterval {
			return nil, 0, fmt.Errorf("interval: %s is not between %s and %s", interval, minWatchInterval, maxWatchInterval)
		}
	}
	return o, interval, nil
}

// watch is the answer to one client.
type watch struct {
	w       http.ResponseWriter
	control *http.ResponseController
	next    bytes.Buffer // what is sent next

	mu      sync.Mutex
	hurries bool // the listener is stopping
	left    bool // the answer is complete
}

// hurryAfter gives the client little time for the rest once over is done, until
// the returned function is called.
func (w *watch) hurryAfter(over context.Context) (leave func()) {
	stop := context.AfterFunc(over, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !w.left {
			w.hurries = true
			w.extendLocked(lastWatchPatience)
		}
	})
	return func() {
		stop()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.left = true
	}
}

// extendLocked gives the client this much time from now on. A connection's
// deadlines may be set while another goroutine writes.
func (w *watch) extendLocked(patience time.Duration) {
	_ = w.control.SetWriteDeadline(time.Now().Add(patience))
}

func (w *watch) send(snapshot snapshotJSON) error {
	w.next.WriteString("event: snapshot\ndata: ")
	if err := json.NewEncoder(&w.next).Encode(snapshot); err != nil { // one line, with its line end
		return err
	}
	w.next.WriteByte('\n')
	w.mu.Lock()
	if !w.hurries {
		w.extendLocked(watchPatience)
	}
	w.mu.Unlock()
	defer w.next.Reset()
	if _, err := w.w.Write(w.next.Bytes()); err != nil {
		return err
	}
	return w.control.Flush()
}
