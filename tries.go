package caddysse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// tries is what a request needs for upstream_retry: the request as it arrived,
// and the progress of the tries.
type tries struct {
	live bool

	// entered is the request as it arrived at sse, without a body, and state is
	// what handlers find in its context: both as they were before the first
	// attempt.
	entered *http.Request
	state   *isolation
	body    *watchedBody // nil: there is none

	// ctx is the context of all attempts. It ends with the client's request, or
	// when cancel is called.
	ctx    context.Context
	cancel context.CancelCauseFunc

	// What follows belongs to the request's goroutine.
	waits  retryWaits
	after  time.Duration // the Retry-After of the last answer
	events uint64        // the stream's events before the present try
	result tryResult     // of the present try
	over   bool          // there is no other try

	// What follows is guarded by the stream's facts.
	attempt *attempt      // the present one
	count   int           // how many tries there were
	told    time.Duration // the reconnection time that we have sent; 0: none
	why     reason        // why the upstream broke off
	until   instant       // when the stream gives up, while it retries
	id      string        // where the upstream should continue; empty: no position
	inside  bool          // the handlers of an upstream that was given up have not returned
	noBody  bool          // a later body turned out not to be an event stream
	gaveUp  error         // why it has given up; nil: it has not
}

// tryResult is the result of a try.
type tryResult uint8

const (
	pendingTry tryResult = iota
	resumedTry           // a stream with an event
	failedTry            // no event, no answer, or a status after which another try makes sense
	refusedTry           // an answer that is not a stream
)

var tryResults = [...]string{resumedTry: "resumed", failedTry: "failed", refusedTry: "refused"}

func (r tryResult) String() string { return tryResults[r] }

// Why a stream gives up, if no answer of the upstream says so.
var (
	errTriesOver      = errors.New("upstream_retry: the upstream has not come back within the window")
	errHandlersStay   = errors.New("upstream_retry: the handlers have not left")
	errConfigReplaced = errors.New("upstream_retry: the configuration has been replaced")
)

// tries returns the request's data for upstream_retry; nil: it does not apply.
func (x *exchange) tries() *tries {
	if x.rare == nil {
		return nil
	}
	return x.rare.tries
}

// prepareTries keeps the request as it is, if upstream_retry may apply to it.
func (x *exchange) prepareTries() bool {
	window := x.h.UpstreamRetry.window()
	if window == 0 || !mayLackBody(x.r) || !x.kind.resumable {
		return false
	}
	t := &tries{
		live:    x.h.UpstreamRetry.Live,
		entered: withoutBody(x.r),
		state:   newIsolation(x.r),
		waits:   retryWaits{window: window},
	}
	t.ctx, t.cancel = context.WithCancelCause(x.context())
	x.rarely().tries = t
	return true
}

// withoutBody is a copy of the request without a body, for later attempts.
func withoutBody(r *http.Request) *http.Request {
	r = r.Clone(r.Context())
	r.Body, r.ContentLength = http.NoBody, 0
	r.TransferEncoding, r.Trailer = nil, nil
	return r
}

// mayLackBody reports whether a request may have no body. Over HTTP/2 or HTTP/3,
// a request that does not say whether it has one counts as one without: HTTP/3
// has no other way to say so.
func mayLackBody(r *http.Request) bool {
	return r.ContentLength == 0 || r.ContentLength < 0 && r.ProtoMajor > 1
}

// watchedBody is the body of a request that does not say whether it has one.
type watchedBody struct {
	io.ReadCloser
	found atomic.Bool // it is not empty
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.found.Store(true)
	}
	return n, err
}

// watchBody records whether the handlers of the first attempt find a body.
func (x *exchange) watchBody() {
	if t := x.tries(); t != nil && x.r.ContentLength < 0 && x.r.Body != nil {
		t.body = &watchedBody{ReadCloser: x.r.Body}
		x.attempt.request.Body = t.body
	}
}

// callAgain calls the handlers, and repeats that each time the upstream breaks
// off where it can continue.
func (x *exchange) callAgain(next caddyhttp.Handler) (out outcome) {
	defer func() { x.rare.tries.over = true }()
	if x.mayStartEarly() || x.startedEarly {
		out = x.callRelayed(next)
	} else {
		x.attempt = x.newAttempt(nil)
		x.watchBody()
		out = x.callHere(next, &x.response)
	}
	for x.stream != nil && x.stream.brokeOff(out) && x.awaitTry() {
		out = x.try(next)
	}
	return out
}

// callHere calls the handlers on the request's goroutine. A panic continues only
// if there is no stream that must be told first.
func (x *exchange) callHere(next caddyhttp.Handler, w http.ResponseWriter) (out outcome) {
	out.left = true
	defer func() {
		if x.role > aside || x.stream != nil {
			out.panicked = recover()
		}
	}()
	out.err = next.ServeHTTP(w, x.attempt.request)
	return out
}

// awaitTry waits until the stream may try again. It returns false if it must not,
// or has ended in the meantime.
func (x *exchange) awaitTry() bool {
	s, t := x.stream, x.rare.tries
	s.facts.Lock()
	upstreams, told := s.splicer.Scanner().Retry()
	ours := t.told
	s.facts.Unlock()
	wait, ok := t.waits.wait(time.Now(), reconnection(upstreams, told, ours), t.after)
	t.after = 0
	if !ok {
		s.giveUp(errTriesOver)
		return false
	}
	over, _ := t.waits.end()
	s.facts.Lock()
	t.until, t.inside = instant(sum(time.Duration(now()), time.Until(over))), false
	s.h.agenda.hasten(s, t.until)
	s.facts.Unlock()
	turn := s.h.group.tries.enter(wait)
	defer s.h.group.tries.leave(turn)
	select {
	case <-turn.come:
	case <-t.ctx.Done():
		return false
	}
	if s.h.isReplaced() {
		s.giveUp(errConfigReplaced)
		return false
	}
	return true
}

// isReplaced reports whether a reload has replaced the handler's configuration:
// its health checks have stopped, so upstreams that were down then stay down.
func (h *Handler) isReplaced() bool {
	return h.drain.replaced.Load() || h.ctx.Err() != nil && !exit.exiting()
}

// try calls the handlers once more, for a stream that is already open.
func (x *exchange) try(next caddyhttp.Handler) outcome {
	s, t := x.stream, x.rare.tries
	x.attempt.cancel(errStreamEnded) // or it would be kept as long as the client stays
	w := &laterResponse{response: &x.response, header: make(http.Header)}
	a := x.newAttemptOf(t.entered, t.ctx, w, t.state.copy())
	a.context.replacer.Set(requestUUID, s.id.String())
	x.attempt, x.role = a, undecided
	x.rare.relay = nil
	s.facts.Lock()
	if t.id != "" {
		a.request.Header["Last-Event-Id"] = []string{t.id}
	} else {
		delete(a.request.Header, "Last-Event-Id")
	}
	t.attempt = a
	t.count++
	t.events = s.splicer.Scanner().Events()
	s.rare.letGo = nil // of a first attempt on another goroutine
	s.facts.Unlock()
	t.result = pendingTry
	out := x.callHere(next, w)
	if x.role == undecided && out.panicked == nil && t.ctx.Err() == nil {
		x.unansweredAgain(out.err, w.header)
	}
	x.role = streaming // even if there was no answer: there is a stream
	x.finishTry(failedTry)
	return out
}

// unansweredAgain treats an error of the handlers as the answer that it would
// become, if it says more than that there was none.
func (x *exchange) unansweredAgain(err error, header http.Header) {
	handlerErr, stated := errors.AsType[caddyhttp.HandlerError](err)
	switch {
	case err == nil:
		x.answeredAgain(http.StatusOK, header)
	case stated && handlerErr.StatusCode != 0:
		x.answeredAgain(handlerErr.StatusCode, header)
	}
}

// triesAgain reports whether the present attempt is not the first one.
func (x *exchange) triesAgain() bool {
	t := x.tries()
	if t == nil {
		return false
	}
	x.stream.facts.Lock()
	defer x.stream.facts.Unlock()
	return t.count > 0
}

// answeredAgain takes the headers of a later try. All that matters is whether the
// upstream continues.
func (x *exchange) answeredAgain(status int, header http.Header) {
	s, t := x.stream, x.rare.tries
	switch {
	case t.ctx.Err() != nil: // the proxy answers, for a stream that is ending
	case status == http.StatusBadGateway, status == http.StatusServiceUnavailable, status == http.StatusGatewayTimeout:
		t.after = statedRetryAfter(header.Get("Retry-After"))
		x.attempt.cancel(errStreamEnded)
	case isStream(status, header) && !isEncoded(header):
		s.reopen(x.attempt.upstream())
	default:
		x.finishTry(refusedTry)
		s.giveUp(fmt.Errorf("upstream_retry: the upstream answered %d %s, %s", status, http.StatusText(status), typeOf(header)))
	}
}

// finishTry counts the result of the present try, once.
func (x *exchange) finishTry(result tryResult) {
	t := x.rare.tries
	if t.result != pendingTry {
		return
	}
	t.result = result
	collector.retries.WithLabelValues(x.h.Name, result.String()).Inc()
	if result == resumedTry {
		t.waits.resumed()
	}
}

// noteEvents checks whether the present try has brought an event.
func (x *exchange) noteEvents() {
	s, t := x.stream, x.rare.tries
	if t.result != pendingTry {
		return
	}
	s.facts.Lock()
	events, noBody := s.splicer.Scanner().Events(), t.noBody
	s.facts.Unlock()
	switch {
	case noBody:
		x.finishTry(refusedTry)
	case events > t.events:
		x.finishTry(resumedTry)
	}
}

// laterResponse is the ResponseWriter of a later try. Its headers are discarded,
// because the stream's have been sent.
type laterResponse struct {
	*response
	header http.Header
}

func (lr *laterResponse) Header() http.Header { return lr.header }

func (lr *laterResponse) WriteHeader(status int) { lr.writeHeader(status, lr.header) }

// begin decides for handlers that write or flush before they call WriteHeader.
func (lr *laterResponse) begin() {
	if lr.x.role == undecided {
		lr.WriteHeader(http.StatusOK)
	}
}

func (lr *laterResponse) Write(p []byte) (int, error) {
	lr.begin()
	n, err := lr.response.Write(p)
	lr.x.noteEvents()
	return n, err
}

func (lr *laterResponse) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(writerOnly{lr}, r)
}

// Hijack is refused: the connection has a stream.
func (lr *laterResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return nil, nil, http.ErrNotSupported
}

func (lr *laterResponse) FlushError() error {
	lr.begin()
	return lr.response.FlushError()
}

// Interface guards
var (
	_ http.ResponseWriter             = (*laterResponse)(nil)
	_ http.Hijacker                   = (*laterResponse)(nil)
	_ io.ReaderFrom                   = (*laterResponse)(nil)
	_ interface{ FlushError() error } = (*laterResponse)(nil)
)
