package demo

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

// errPulled is why the plug breaks a stream off.
var errPulled = errors.New("the plug was pulled")

// Plug is in the path of some streams, between the browser and Caddy, and can be
// pulled. It plugs itself in again.
type Plug struct {
	// Out is how long it stays out.
	Out time.Duration

	mu      sync.Mutex
	in      chan struct{} // closed when it is in again; nil: it is in
	streams map[*http.Request]context.CancelCauseFunc
}

// NewPlug returns a plug that stays out long enough to miss something.
func NewPlug() *Plug { return &Plug{Out: 2 * time.Second} }

// Pull breaks off every stream that passes through the plug. It does nothing
// while the plug is out.
func (p *Plug) Pull() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.in != nil {
		return
	}
	in := make(chan struct{})
	p.in = in
	for _, cancel := range p.streams {
		cancel(errPulled)
	}
	clear(p.streams)
	time.AfterFunc(p.Out, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.in = nil
		close(in)
	})
}

// Through lets requests pass while the plug is in. Requests that arrive while it
// is out wait, as on a network that is down.
func (p *Plug) Through(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, done := p.enter(r)
		defer done()
		next.ServeHTTP(w, r)
		if context.Cause(r.Context()) == errPulled {
			panic(http.ErrAbortHandler) // a client must not treat this as the end
		}
	})
}

// enter waits until the plug is in, or until the client has left.
func (p *Plug) enter(r *http.Request) (_ *http.Request, done func()) {
	ctx, cancel := context.WithCancelCause(r.Context())
	r = r.WithContext(ctx)
	for waiting := true; waiting; {
		p.mu.Lock()
		in := p.in
		if in == nil {
			if p.streams == nil {
				p.streams = make(map[*http.Request]context.CancelCauseFunc)
			}
			p.streams[r] = cancel
		}
		p.mu.Unlock()
		if in == nil {
			break
		}
		select {
		case <-in:
		case <-ctx.Done():
			waiting = false
		}
	}
	return r, func() {
		p.mu.Lock()
		delete(p.streams, r)
		p.mu.Unlock()
		cancel(nil)
	}
}
