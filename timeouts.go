package caddysse

import (
	"context"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// The timeouts and minimum rates of the server do not end a stream: a write that
// gets no further is noticed by the stream's agenda, at no cost for all others,
// and a request's body may come as slowly as its answer. What is changed for
// that belongs to one request: the next one on the connection gets the server's
// timeouts again (net/http sets a connection's deadlines for each request, Caddy
// wraps the writer and the body of each).

// progressUnit is how much of a write has to get into the kernel's buffer within
// the write timeout. (That takes more from the client: see peer.LimitUnsent.)
const progressUnit = 4 << 10

// What a writer gets that sets a deadline before each write: a controller that
// supports none, and nowhere to say so.
var (
	noDeadlines = http.NewResponseController(struct{ http.ResponseWriter }{})
	noLog       = zap.NewNop()
)

// ownWriteTimeouts takes a stream out of the server's write timeouts.
func ownWriteTimeouts(ctx context.Context, w http.ResponseWriter) {
	if _, idle := caddyhttp.IdleTimeoutsFromContext(ctx); idle != nil {
		idle.Ctrl, idle.Logger = noDeadlines, noLog
	}
	// Where deadlines are not supported there is none to clear.
	_ = connectionWriter(w).SetWriteDeadline(time.Time{})
}

// connectionWriter controls the connection's own writer, past all around it.
func connectionWriter(w http.ResponseWriter) *http.ResponseController {
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	return http.NewResponseController(w)
}

// uploads is between the body of a request and its connection. Caddy sets a
// deadline before each read, on whatever goroutine reads, and does so until
// there is a stream. It is nil where Caddy sets none, and for requests without a
// body.
type uploads struct {
	http.ResponseWriter // none: it is for http.NewResponseController
	next                *http.ResponseController

	mu        sync.Mutex
	suspended bool
}

// newUploads puts one in, as long as nobody reads.
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

// suspend takes a stream out of the server's read timeouts, which would show up
// as if the client had left. Its headers have been sent: before, net/http may
// have had to read what is left of the body.
func (u *uploads) suspend(w http.ResponseWriter) {
	if u != nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.suspended = true
	}
	_ = connectionWriter(w).SetReadDeadline(time.Time{})
}

// resume lets the server bound how long it reads what is left of the body.
func (u *uploads) resume() {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.suspended = false
}
