package caddysse

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// keptResponse is the ResponseWriter of handlers whose stream may become a run's.
// Until it does, everything that they do is passed on to the request's goroutine,
// and after that to the run.
type keptResponse struct {
	*relayedResponse
	k *keeping

	mu   sync.Mutex
	run  *run
	feed *feed // the run's
	left bool  // the handlers have left

	// What follows belongs to the handlers' goroutine; the request's goroutine may
	// only write it while the handlers wait.
	aside    bool // the answer is not a stream
	answered bool // the upstream's answer is known
	failed   error
	end      runEnd // of an answer that is not usable
}

func (k *keeping) responseAround(w *relayedResponse) *keptResponse {
	k.response = &keptResponse{relayedResponse: w, k: k}
	return k.response
}

// kept is the run that gets what the handlers do; nil if there is none.
func (w *keptResponse) kept() *run {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.run
}

func (w *keptResponse) haveLeft() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.left
}

// handlersLeft ends the run of handlers that have left. It returns false if there
// is no run.
func (k *keeping) handlersLeft(out outcome) bool {
	w := k.response
	w.mu.Lock()
	r := w.run
	w.left = r == nil
	w.mu.Unlock()
	if r == nil {
		return false
	}
	end := w.endOf(out)
	w.mu.Lock()
	w.left = true
	w.mu.Unlock()
	isBug := out.panicked != nil && !isAbort(out.panicked)
	if r.call != nil && isBreak(end.reason) && w.failed == nil && !isBug && k.lacksBody() {
		end = r.tryAgain(end)
	}
	r.feed.end()
	r.finish(end)
	return true
}

// endOf returns how the run ended, after its handlers have left.
func (w *keptResponse) endOf(out outcome) runEnd {
	cause := context.Cause(w.k.x.attempt.context.Context)
	switch {
	case w.end.reason != notEnded:
		return w.end
	case cause == errUpstreamSilent:
		return runEnd{reason: upstreamTimeout}
	case w.failed != nil:
		return runEnd{reason: upstreamError, err: w.failed}
	case !w.answered && w.run.ctx.Err() == nil:
		status := statusOf(out.err)
		if out.panicked != nil {
			status = http.StatusBadGateway
		}
		w.fail(status, "the upstream did not answer", out.err)
		return w.end
	case isAbort(out.panicked):
		return runEnd{reason: upstreamError, err: errBrokenOff}
	case out.panicked != nil:
		return runEnd{reason: upstreamError, err: fmt.Errorf("panic: %v", out.panicked)}
	case out.err != nil:
		return runEnd{reason: upstreamError, err: out.err}
	}
	return runEnd{reason: upstreamClosed}
}

// answer handles the upstream's headers, if they arrive after an early start.
// They must be those of a stream.
func (w *keptResponse) answer(r *run, status int) {
	if status < 200 && status != http.StatusSwitchingProtocols || w.answered {
		return
	}
	w.answered = true
	upstream := w.k.x.attempt.upstream()
	r.hasAnswered(status, upstream)
	switch {
	case !isStream(status, w.header):
		w.fail(status, fmt.Sprintf("the upstream answered %d %s, %s", status, http.StatusText(status), typeOf(w.header)), nil)
	case isEncoded(w.header):
		w.fail(status, "the upstream answered with an encoded body", nil)
	}
}

// hasAnswered records which upstream answered after an early start, and with
// which status.
func (r *run) hasAnswered(status int, upstream string) {
	r.mu.Lock()
	r.answer.upstream = upstream
	r.feed.hears()
	readers := r.readersLocked()
	r.mu.Unlock()
	for _, reader := range readers {
		reader.mu.Lock()
		s := reader.stream
		reader.mu.Unlock()
		if s != nil {
			s.hears(status, upstream)
		}
	}
}

// hears records that the upstream of a stream that was started early has answered
// its run.
func (s *stream) hears(status int, upstream string) {
	age := s.age()
	s.facts.Lock()
	defer s.facts.Unlock()
	s.upstreamStatus = uint16(status)
	s.client.upstream = upstream
	if s.headed {
		s.longestGap = max(s.longestGap, age-s.lastBytes)
		s.lastBytes = age
	}
	if s.at() == stageWaiting {
		s.stage.Store(uint32(stageOpen))
	}
}

// fail tells the client of a stream that was started early that the upstream has
// no stream for it, and ends the run. The journal is kept for a client that is
// away.
func (w *keptResponse) fail(status int, message string, err error) {
	countEarlyStartFailure(w.k.x.h, status)
	w.end = runEnd{reason: upstreamError, err: errUnusable(err), told: true}
	w.failed = errRunEnded
	w.feed.useless.Store(true)
	// An error means that the client has ended the run.
	_, _ = w.feed.write(errorEvent(http.StatusBadGateway, "upstream_error", message))
	w.k.x.attempt.cancel(errRunEnded)
}

// decide makes sure that the kind of answer is known, for handlers that write or
// flush before they call WriteHeader. It returns the run, if there is one.
func (w *keptResponse) decide() (r *run, ok bool) {
	if w.aside {
		return nil, true
	}
	r = w.kept()
	if r == nil {
		ok = w.do(func() { w.rw.beginWith(w.header); w.aside = w.rw.x.role == aside })
		r = w.kept()
	}
	if r != nil {
		w.answer(r, http.StatusOK)
	}
	return r, ok || r != nil
}

func (w *keptResponse) WriteHeader(status int) {
	r := w.kept()
	if r == nil && w.do(func() { w.rw.writeHeader(status, w.header) }) {
		return
	}
	if r = w.kept(); r != nil {
		w.answer(r, status)
	}
}

func (w *keptResponse) Write(p []byte) (int, error) {
	r, ok := w.decide()
	switch {
	case !ok:
		return 0, errStreamEnded
	case r == nil:
		return w.relayedResponse.Write(p)
	case w.failed != nil:
		return 0, w.failed
	}
	n, err := w.feed.write(p)
	if err != nil {
		w.failed = err
	}
	return n, err
}

func (w *keptResponse) ReadFrom(r io.Reader) (int64, error) {
	run, ok := w.decide()
	switch {
	case !ok:
		return 0, errStreamEnded
	case run == nil:
		return w.relayedResponse.ReadFrom(r)
	}
	return io.Copy(writerOnly{w}, r)
}

// FlushError is what http.ResponseController flushes with. Everything that a run
// was given has already been published.
func (w *keptResponse) FlushError() error {
	r, ok := w.decide()
	switch {
	case !ok:
		return errStreamEnded
	case r == nil:
		return w.relayedResponse.FlushError()
	}
	return w.failed
}

// Unwrap returns the writer that this one wraps, as long as the client's request
// has it.
func (w *keptResponse) Unwrap() http.ResponseWriter {
	if w.kept() != nil {
		return nil
	}
	return w.relayedResponse.Unwrap()
}

// Push is not supported without a client's connection.
func (w *keptResponse) Push(target string, opts *http.PushOptions) error {
	if w.kept() != nil {
		return http.ErrNotSupported
	}
	return w.relayedResponse.Push(target, opts)
}

// Hijack is not supported without a client's connection.
func (w *keptResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.kept() != nil {
		return nil, nil, http.ErrNotSupported
	}
	return w.relayedResponse.Hijack()
}

// Deadlines of a run's handlers apply to no client: each client has its own.

func (w *keptResponse) SetReadDeadline(deadline time.Time) error {
	if w.kept() != nil {
		return nil
	}
	return w.relayedResponse.SetReadDeadline(deadline)
}

func (w *keptResponse) SetWriteDeadline(deadline time.Time) error {
	if w.kept() != nil {
		return nil
	}
	return w.relayedResponse.SetWriteDeadline(deadline)
}

func (w *keptResponse) EnableFullDuplex() error {
	if w.kept() != nil {
		return nil
	}
	return w.relayedResponse.EnableFullDuplex()
}

// Interface guards
var (
	_ http.ResponseWriter             = (*keptResponse)(nil)
	_ http.Pusher                     = (*keptResponse)(nil)
	_ http.Hijacker                   = (*keptResponse)(nil)
	_ io.ReaderFrom                   = (*keptResponse)(nil)
	_ interface{ FlushError() error } = (*keptResponse)(nil)
)
