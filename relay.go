package caddysse

import (
	"bufio"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// relay lets the handlers of an attempt run on a goroutine of their own, while
// everything that uses the client's ResponseWriter runs on the request's
// goroutine, where handlers around sse expect it.
type relay struct {
	mu    sync.Mutex    // one call at a time
	calls chan func()   // to the request's goroutine
	done  chan struct{} // a call has been served
	over  chan struct{} // closed: no more calls are served
	waits atomic.Bool   // the handlers wait for a call, or have left
	end   func()        // closes it
}

func newRelay() *relay {
	r := &relay{calls: make(chan func()), done: make(chan struct{}), over: make(chan struct{})}
	r.end = sync.OnceFunc(func() { close(r.over) })
	return r
}

// do runs f on the request's goroutine and waits for it. A panic in f continues
// in the caller, as it would without a relay. It returns false if the request is
// over.
func (r *relay) do(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var panicked any
	call := func() {
		defer func() { panicked = recover() }()
		f()
	}
	select {
	case r.calls <- call:
	case <-r.over:
		return false
	}
	<-r.done
	if panicked != nil {
		panic(panicked)
	}
	return true
}

// serve runs a call on the request's goroutine.
func (r *relay) serve(call func()) {
	r.waits.Store(true)
	call()
	r.waits.Store(false)
	r.done <- struct{}{}
}

// relayedResponse is the ResponseWriter of handlers on a goroutine of their own.
// They also have a header map of their own. It is copied to the client's when
// they answer, and at the end for the trailers.
type relayedResponse struct {
	*relay
	rw     *response
	header http.Header
}

func (rr *relayedResponse) Header() http.Header { return rr.header }

// Unwrap lets others find what this wraps. They must not write to it.
func (rr *relayedResponse) Unwrap() http.ResponseWriter { return rr.rw.x.w }

func (rr *relayedResponse) WriteHeader(status int) {
	rr.do(func() { rr.rw.writeHeader(status, rr.header) })
}

func (rr *relayedResponse) Write(p []byte) (n int, err error) {
	if !rr.do(func() { rr.rw.beginWith(rr.header); n, err = rr.rw.Write(p) }) {
		return 0, errStreamEnded
	}
	return n, err
}

func (rr *relayedResponse) ReadFrom(r io.Reader) (n int64, err error) {
	if !rr.do(func() { rr.rw.beginWith(rr.header) }) {
		return 0, errStreamEnded
	}
	if rr.rw.x.role != aside {
		return io.Copy(writerOnly{rr}, r)
	}
	if !rr.do(func() { n, err = rr.rw.ReadFrom(r) }) {
		return 0, errStreamEnded
	}
	return n, err
}

func (rr *relayedResponse) FlushError() (err error) {
	if !rr.do(func() { rr.rw.beginWith(rr.header); err = rr.rw.FlushError() }) {
		return errStreamEnded
	}
	return err
}

func (rr *relayedResponse) Push(target string, opts *http.PushOptions) (err error) {
	if !rr.do(func() { err = rr.rw.Push(target, opts) }) {
		return errStreamEnded
	}
	return err
}

func (rr *relayedResponse) Hijack() (conn net.Conn, buffered *bufio.ReadWriter, err error) {
	if !rr.do(func() { conn, buffered, err = rr.rw.Hijack() }) {
		return nil, nil, errStreamEnded
	}
	return conn, buffered, err
}

func (rr *relayedResponse) SetReadDeadline(deadline time.Time) (err error) {
	if !rr.do(func() { err = http.NewResponseController(rr.rw).SetReadDeadline(deadline) }) {
		return errStreamEnded
	}
	return err
}

func (rr *relayedResponse) SetWriteDeadline(deadline time.Time) (err error) {
	if !rr.do(func() { err = rr.rw.SetWriteDeadline(deadline) }) {
		return errStreamEnded
	}
	return err
}

func (rr *relayedResponse) EnableFullDuplex() (err error) {
	if !rr.do(func() { err = http.NewResponseController(rr.rw).EnableFullDuplex() }) {
		return errStreamEnded
	}
	return err
}

// leaveGrace is how long handlers on a goroutine of their own may take to return
// after their client has left: their last results (placeholders for the access
// log) are worth only a moment.
const leaveGrace = time.Second

// callRelayed calls the handlers on a goroutine of their own, and starts the
// stream without them if they take too long.
func (x *exchange) callRelayed(next caddyhttp.Handler) outcome {
	relay := newRelay()
	x.rarely().relay = relay
	x.rare.abandon = make(chan struct{})
	defer relay.end()
	w := &relayedResponse{relay: relay, rw: &x.response, header: x.siteHeader().Clone()}
	var handlers http.ResponseWriter = w
	if x.keeps() {
		handlers = x.rare.keeping.responseAround(w)
	}
	x.attempt = x.newAttempt(handlers)
	x.watchUpload()
	x.watchBody()
	x.fixID()
	x.idleTimeoutsOfHandlers() // before a heartbeat can use the server's
	asked := x.awaitAsking()

	left := make(chan outcome, 1)
	go func() {
		out := x.attempt.call(next, handlers)
		if !x.keeps() || !x.rare.keeping.handlersLeft(out) {
			left <- out
		}
	}()
	delay := time.NewTimer(x.earlyStartIn())
	defer delay.Stop()
	isDue, isAsked := false, false
	clientLeft := x.r.Context().Done()
	var grace <-chan time.Time
	for {
		if x.isKept() {
			relay.end()
			return x.followKept(w)
		}
		select {
		case call := <-relay.calls:
			relay.serve(call)
		case out := <-left:
			relay.waits.Store(true)
			x.handOut()
			x.takeTrailers(w.header)
			return out
		case <-delay.C:
			isDue = true
			if isAsked {
				x.startEarly()
			}
		case <-asked:
			isAsked, asked = true, nil
			if isDue {
				x.startEarly()
			}
		case <-clientLeft:
			clientLeft = nil
			timer := time.NewTimer(leaveGrace)
			defer timer.Stop()
			grace = timer.C
		case <-grace:
			return outcome{}
		case <-x.rare.abandon:
			return outcome{}
		}
	}
}

// takeTrailers copies the trailers that the handlers have set to the client's
// header map (net/http.ResponseWriter).
func (x *exchange) takeTrailers(header http.Header) {
	if x.startedEarly {
		return // the upstream's headers are lost, and its trailers too
	}
	declared := header["Trailer"]
	for field, values := range header {
		isTrailer := strings.HasPrefix(field, http.TrailerPrefix)
		for _, list := range declared {
			isTrailer = isTrailer || hasToken(list, field)
		}
		if isTrailer {
			x.w.Header()[field] = values
		}
	}
}

// writeInformationalWith passes a 1xx on, with headers that are not in the
// client's map yet.
func writeInformationalWith(w http.ResponseWriter, status int, header http.Header) {
	site := w.Header().Clone()
	replaceHeader(w.Header(), header)
	w.WriteHeader(status)
	replaceHeader(w.Header(), site)
}

// replaceHeader makes header equal to another one, in place.
func replaceHeader(header, by http.Header) {
	clear(header)
	maps.Copy(header, by)
}

// Interface guards
var (
	_ http.ResponseWriter             = (*relayedResponse)(nil)
	_ http.Pusher                     = (*relayedResponse)(nil)
	_ http.Hijacker                   = (*relayedResponse)(nil)
	_ io.ReaderFrom                   = (*relayedResponse)(nil)
	_ interface{ FlushError() error } = (*relayedResponse)(nil)
)
