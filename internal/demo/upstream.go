// Package demo is what stands behind `caddy sse demo`: an upstream that gives
// a proxy every kind of trouble there is with Server-Sent Events, and a page
// that shows what of it reaches a browser.
package demo

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Upstream serves event streams that go wrong on purpose, and the page that
// shows them. It says nothing about caches or buffers, is silent for long,
// leaves an event half written over a silence, sends no heartbeat, and ends
// each stream in mid-event without a word. Only one thing does it well: a
// client that comes back with Last-Event-ID gets the event behind that one.
//
//	GET  /events[?client=<name>]  a stream
//	POST /drop?client=<name>      ends that client's stream, as a bad network would
//	GET  /                        the page
//
// The events of a stream are numbered from 1 and come in bursts; the last of
// each burst is named tick, the others have no name.
type Upstream struct {
	// Lead is the silence between the response headers and the first event.
	Lead time.Duration
	// Step is the time between two events of a burst.
	Step time.Duration
	// Burst is how many events come before a silence.
	Burst uint64
	// Silence is the time between two bursts. Every other silence falls into
	// the middle of an event.
	Silence time.Duration
	// Lifetime is the age at which a stream ends.
	Lifetime time.Duration

	mu      sync.Mutex
	streams map[string]*namedStream // by client, guarded by mu
}

// namedStream is the newest stream of a client that gave its name.
type namedStream struct {
	end context.CancelFunc
}

// NewUpstream returns an upstream whose silences are long enough to be cut by
// common idle timers, and whose streams are short enough to watch one end.
func NewUpstream() *Upstream {
	return &Upstream{
		Lead:     3 * time.Second,
		Step:     800 * time.Millisecond,
		Burst:    5,
		Silence:  20 * time.Second,
		Lifetime: 2 * time.Minute,
	}
}

// Handler returns the upstream with its page.
func (u *Upstream) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", u.serveEvents)
	mux.HandleFunc("POST /drop", u.serveDrop)
	mux.Handle("GET /", pageHandler())
	return mux
}

func (u *Upstream) serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	// Frameworks put validators on whatever they send.
	w.Header().Set("ETag", `W/"demo"`)
	w.Header().Set("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
	if r.Method == http.MethodHead {
		return
	}

	ctx, end := context.WithCancel(r.Context())
	defer end()
	if client := r.FormValue("client"); client != "" {
		defer u.remember(client, &namedStream{end: end})()
	}

	last, err := strconv.ParseUint(r.Header.Get("Last-Event-ID"), 10, 32)
	if err != nil {
		last = 0 // none, or not one of ours
	}
	u.send(ctx, w, last)
}

// send writes the events behind last until the stream's lifetime is over, ctx
// is done or the client is gone.
func (u *Upstream) send(ctx context.Context, w http.ResponseWriter, last uint64) {
	flush := http.NewResponseController(w).Flush
	write := func(s string) bool {
		if _, err := io.WriteString(w, s); err != nil {
			return false
		}
		return flush() == nil
	}
	if flush() != nil {
		return
	}

	lifetime := time.NewTimer(u.Lifetime)
	defer lifetime.Stop()
	for id := last + 1; ; id++ {
		begin, rest := u.event(id)
		pause, inside := u.pause(id, last)
		if inside {
			if !write(begin) {
				return
			}
			begin = ""
		}
		select {
		case <-time.After(pause):
			if !write(begin + rest) {
				return
			}
		case <-lifetime.C:
			write(begin)
			return
		case <-ctx.Done():
			return
		}
	}
}

// event returns event id in two pieces. JSON does not mind the line break that
// a parser puts between two data fields.
func (u *Upstream) event(id uint64) (begin, rest string) {
	begin = fmt.Sprintf("id: %d\n", id)
	if id%u.Burst == 0 {
		begin += "event: tick\n"
	}
	begin += fmt.Sprintf("data: {\"n\": %d,\n", id)
	rest = fmt.Sprintf("data: \"of_burst\": %d}\n\n", (id-1)/u.Burst+1)
	return begin, rest
}

// pause returns the silence before event id of a stream that continues behind
// last, and whether it falls inside the event.
func (u *Upstream) pause(id, last uint64) (pause time.Duration, inside bool) {
	switch {
	case id == last+1:
		return u.Lead, false
	case (id-1)%u.Burst == 0:
		return u.Silence, (id-1)/u.Burst%2 == 1
	default:
		return u.Step, false
	}
}

func (u *Upstream) serveDrop(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	stream := u.streams[r.FormValue("client")]
	u.mu.Unlock()
	if stream == nil {
		http.Error(w, "no stream of this client is open", http.StatusNotFound)
		return
	}
	stream.end()
	w.WriteHeader(http.StatusNoContent)
}

// remember makes stream the one that client can have dropped, until the
// returned function is called.
func (u *Upstream) remember(client string, stream *namedStream) (forget func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.streams == nil {
		u.streams = make(map[string]*namedStream)
	}
	u.streams[client] = stream
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		// A client that came back may be here with its next stream already.
		if u.streams[client] == stream {
			delete(u.streams, client)
		}
	}
}
