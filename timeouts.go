package caddysse

import (
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// The timeouts and minimum rates of the server do not end a stream. The stream's
// agenda detects writes that make no progress, at no cost for the others, and a
// request's body may arrive as slowly as its answer. Everything that is changed
// for this belongs to one request: the next one on the connection gets the
// server's timeouts again (net/http sets a connection's deadlines for each
// request, Caddy wraps the writer and the body of each).

// progressUnit is how much of a write has to get into the kernel's buffer within
// the write timeout. (The client must read more than that: see peer.LimitUnsent.)
const progressUnit = 4 << 10

// For a writer that sets a deadline before each write: a controller that supports
// none, and a logger that discards the complaint.
var (
	noDeadlines = http.NewResponseController(struct{ http.ResponseWriter }{})
	noLog       = zap.NewNop()
)

// ownWriteTimeouts removes the server's write timeouts from a stream, and
// deadlines that handlers have set.
func (s *stream) ownWriteTimeouts() {
	reader, idle := caddyhttp.IdleTimeoutsFromContext(s.ctx)
	var inner [2]*http.ResponseController
	if idle != nil {
		inner[0] = idle.Ctrl
		idle.Ctrl, idle.Logger = noDeadlines, noLog
	}
	if reader != nil {
		inner[1] = reader.Ctrl
	}
	if connectionWriter(s.w).SetWriteDeadline(time.Time{}) == nil {
		return
	}
	// If a writer in between hides what it wraps, the writer of Caddy's own
	// timeouts knows the way. If there is none, there is no deadline to clear.
	for _, control := range inner {
		if control != nil && control.SetWriteDeadline(time.Time{}) == nil {
			s.rarely().control = control
			return
		}
	}
}

// controlLocked controls the deadlines of the stream's response. It must be
// called with facts locked.
func (s *stream) controlLocked() *http.ResponseController {
	if s.rare != nil && s.rare.control != nil {
		return s.rare.control
	}
	return connectionWriter(s.w)
}

// expireWritesLocked makes writes return, one that blocks and all later ones. It
// must be called with facts locked.
func (s *stream) expireWritesLocked() {
	past := time.Unix(1, 0)
	control := s.controlLocked()
	if control.SetWriteDeadline(past) != nil {
		// There is no way to reach only the response.
		peer.Expire(peer.Accepted(s.ctx))
	}
	if s.proto == http1 {
		// Before the headers, net/http reads the rest of the request's body.
		_ = control.SetReadDeadline(past)
	}
}

// expireWrites is expireWritesLocked for callers that have not locked facts.
func (s *stream) expireWrites() {
	s.facts.Lock()
	defer s.facts.Unlock()
	s.expireWritesLocked()
}

// boundLastWrite sets a deadline for writes after the agenda has stopped looking.
func (s *stream) boundLastWrite() {
	if timeout := s.h.writeTimeout; timeout > 0 {
		s.facts.Lock()
		defer s.facts.Unlock()
		_ = s.controlLocked().SetWriteDeadline(time.Now().Add(timeout))
	}
}

// connectionWriter controls the connection's own writer, past everything around
// it.
func connectionWriter(w http.ResponseWriter) *http.ResponseController {
	return http.NewResponseController(innermost(w))
}

func innermost(w http.ResponseWriter) http.ResponseWriter {
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	return w
}

// idleTimeoutsOfHandlers is what handlers after sse find as the server's idle
// timeouts, and override (the timeouts handler does). They get those of a
// separate writer, because a stream's heartbeats use the server's, on another
// goroutine.
func (x *exchange) idleTimeoutsOfHandlers() any {
	ctx := x.r.Context()
	reader, writer := caddyhttp.IdleTimeoutsFromContext(ctx)
	if writer == nil || x.role == aside {
		return ctx.Value(idleTimeoutsKey)
	}
	rare := x.rarely()
	if rare.idle == nil {
		rare.idle = &caddyhttp.IdleTimeoutWriter{
			Ctrl:     noDeadlines,
			Deadline: writer.Deadline,
			MaxChunk: writer.MaxChunk,
			Logger:   noLog,
		}
		rare.lent = writer.Deadline
	}
	return caddyhttp.ContextWithIdleTimeouts(ctx, reader, rare.idle).Value(idleTimeoutsKey)
}

// lendIdleTimeouts gives the server's writer what handlers have overridden, if
// the answer is not a stream.
func (x *exchange) lendIdleTimeouts() {
	if x.role != aside || x.rare == nil || x.rare.idle == nil {
		return
	}
	if x.rare.idle.Deadline == x.rare.lent {
		return // what the server has counted for its minimum rate stays
	}
	_, writer := caddyhttp.IdleTimeoutsFromContext(x.r.Context())
	x.rare.lent = x.rare.idle.Deadline
	writer.Deadline, writer.MaxChunk = x.rare.idle.Deadline, x.rare.idle.MaxChunk
}

// uploads is between the body of a request and its connection. Caddy sets a
// deadline before each read, on whatever goroutine reads; uploads passes it on
// only until there is a stream. It is nil if Caddy sets none, and for requests
// without a body.
type uploads struct {
	http.ResponseWriter // unused: http.NewResponseController needs one
	next                *http.ResponseController

	mu        sync.Mutex
	suspended bool
}

// newUploads inserts one. The body must not be in use yet.
func newUploads(r *http.Request) *uploads {
	if r.ContentLength == 0 {
		return nil
	}
	idle, _ := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if idle == nil {
		return nil
	}
	u := &uploads{next: idle.Ctrl}
	idle.Ctrl = http.NewResponseController(u)
	return u
}

// SetReadDeadline is for http.ResponseController.
func (u *uploads) SetReadDeadline(deadline time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.suspended {
		return nil
	}
	return u.next.SetReadDeadline(deadline)
}

// SetWriteDeadline is for callers for which this is the only way to the
// connection (see stream.ownWriteTimeouts).
func (u *uploads) SetWriteDeadline(deadline time.Time) error {
	return u.next.SetWriteDeadline(deadline)
}

// suspend removes the server's read timeouts from a stream; they would look as if
// the client had left. The headers must have been sent: before that, net/http may
// have to read the rest of the body.
func (u *uploads) suspend(w http.ResponseWriter) {
	if u == nil {
		_ = connectionWriter(w).SetReadDeadline(time.Time{})
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.suspended = true
	if connectionWriter(w).SetReadDeadline(time.Time{}) != nil {
		_ = u.next.SetReadDeadline(time.Time{})
	}
}

// resume lets the server limit again how long it reads the rest of the body.
func (u *uploads) resume() {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.suspended = false
}
