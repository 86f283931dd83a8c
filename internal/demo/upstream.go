// Package demo has the parts around Caddy in `caddy sse demo`: an upstream that
// causes every kind of trouble with Server-Sent Events, another one that only
// counts, a proxy with an idle timer and a plug in front of Caddy, and a page
// that shows what reaches a browser.
package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Upstream serves event streams that go wrong on purpose. It says nothing about
// caches or buffers, is silent for long, leaves an event half written over a
// silence, sends no heartbeat, ends each stream in mid-event without a word, and
// restarts when asked to. Only one thing does it well: a client that comes back
// with Last-Event-ID gets what it has missed.
//
//	GET /events[?client=<name>]  a stream
//
// Events happen at the same time for everybody. They are numbered from 1 and come
// in bursts; the last of each burst is named tick, the others have no name. A new
// client gets the newest event and what follows.
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
	// Away is how long a restart takes.
	Away time.Duration

	// Endings records why a stream ended. It may be nil.
	Endings *Endings

	// mu guards what follows.
	mu         sync.Mutex
	began      time.Time // when event 1 happened
	active     map[*http.Request]struct{}
	server     *http.Server
	addr       string
	restarting bool
}

// NewUpstream returns an upstream whose silences are long enough for common idle
// timers to cut them, and whose streams are short enough to see one end.
func NewUpstream() *Upstream {
	return &Upstream{
		Lead:     time.Second,
		Step:     700 * time.Millisecond,
		Burst:    3,
		Silence:  20 * time.Second,
		Lifetime: 2 * time.Minute,
		Away:     6 * time.Second,
	}
}

// Start listens on a loopback port of its own until ctx is done, and returns the
// address.
func (u *Upstream) Start(ctx context.Context) (addr string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.addr = listener.Addr().String()
	u.serveLocked(ctx, listener)
	context.AfterFunc(ctx, u.stop)
	return u.addr, nil
}

func (u *Upstream) serveLocked(ctx context.Context, listener net.Listener) {
	u.server = &http.Server{
		Handler:     u.Handler(),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	go u.server.Serve(listener)
}

// stop closes the listener and every connection, as when a process ends.
func (u *Upstream) stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.server.Close()
}

// Restart stops the upstream at once and starts it again at the same address. It
// does nothing while a restart is in progress.
func (u *Upstream) Restart(ctx context.Context) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.restarting || ctx.Err() != nil {
		return
	}
	u.restarting = true
	for r := range u.active {
		u.Endings.say(r, "the upstream restarted")
	}
	u.server.Close()
	time.AfterFunc(u.Away, func() { u.comeBack(ctx) })
}

// comeBack listens again, as soon as the address is free.
func (u *Upstream) comeBack(ctx context.Context) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	listener, err := net.Listen("tcp", u.addr)
	if err != nil {
		time.AfterFunc(100*time.Millisecond, func() { u.comeBack(ctx) })
		return
	}
	u.restarting = false
	u.serveLocked(ctx, listener)
}

// Handler returns the upstream's handler.
func (u *Upstream) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", u.serveEvents)
	return mux
}

func (u *Upstream) serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	// Frameworks add validators to every response.
	w.Header().Set("ETag", `W/"demo"`)
	w.Header().Set("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
	if r.Method == http.MethodHead {
		return
	}
	u.mu.Lock()
	if u.active == nil {
		u.active = make(map[*http.Request]struct{})
	}
	u.active[r] = struct{}{}
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.active, r)
	}()
	if u.send(r.Context(), w, u.firstEvent(r.Header.Get("Last-Event-ID"))) == expired {
		u.Endings.say(r, "the upstream ended it, in the middle of an event")
	}
}

// firstEvent returns the event with which a client begins: the one after its last
// event, or the newest.
func (u *Upstream) firstEvent(lastEventID string) uint64 {
	if last, err := strconv.ParseUint(lastEventID, 10, 32); err == nil {
		return last + 1
	}
	age := time.Since(u.due(1))
	place := min(uint64(age%u.period()/u.Step), u.Burst-1)
	return uint64(age/u.period())*u.Burst + place + 1
}

// period is the time from one burst to the next.
func (u *Upstream) period() time.Duration {
	return time.Duration(u.Burst-1)*u.Step + u.Silence
}

// due returns when an event happens. The first one happens at the first request.
func (u *Upstream) due(id uint64) time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.began.IsZero() {
		u.began = time.Now()
	}
	burst, place := (id-1)/u.Burst, (id-1)%u.Burst
	return u.began.Add(time.Duration(burst)*u.period() + time.Duration(place)*u.Step)
}

// end is why a stream ends.
type end uint8

const (
	gone    end = iota // the client, or the server
	expired            // the stream's lifetime is over
)

// send writes events, from id on, until the end.
func (u *Upstream) send(ctx context.Context, w http.ResponseWriter, id uint64) end {
	flush := http.NewResponseController(w).Flush
	write := func(s string) bool {
		if _, err := io.WriteString(w, s); err != nil {
			return false
		}
		return flush() == nil
	}
	lifetime := time.NewTimer(u.Lifetime)
	defer lifetime.Stop()
	why := gone
	pause := func(d time.Duration) (over bool) {
		select {
		case <-time.After(d):
			return false
		case <-lifetime.C:
			why = expired
		case <-ctx.Done():
		}
		return true
	}

	if flush() != nil || pause(u.Lead) {
		return why
	}
	for ; ; id++ {
		begin, rest := u.event(id)
		if wait := time.Until(u.due(id)); wait > 0 {
			if u.splits(id) {
				if !write(begin) {
					return gone
				}
				begin = ""
			}
			if pause(wait) {
				write(begin)
				return why
			}
		}
		if !write(begin + rest) {
			return gone
		}
	}
}

// event returns event id in two pieces. A parser puts a line break between the
// two data fields, which JSON allows.
func (u *Upstream) event(id uint64) (begin, rest string) {
	begin = fmt.Sprintf("id: %d\n", id)
	if id%u.Burst == 0 {
		begin += "event: tick\n"
	}
	begin += fmt.Sprintf("data: {\"n\": %d,\n", id)
	rest = fmt.Sprintf("data: \"of_burst\": %d}\n\n", (id-1)/u.Burst+1)
	return begin, rest
}

// splits reports whether the silence before an event is in the middle of it.
func (u *Upstream) splits(id uint64) bool {
	return (id-1)%u.Burst == 0 && (id-1)/u.Burst%2 == 1
}
