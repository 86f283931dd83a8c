package caddysse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// runWriter is the ResponseWriter for the handlers of a run's attempt.
type runWriter interface {
	http.ResponseWriter

	// asked says which request the handlers got.
	asked(request *http.Request)

	// yield leaves the answer to an inner sse handler: no client of the run gets
	// it.
	yield()
}

// runKey is the context key of the runWriter to which a request's handlers
// answer.
type runKey struct{}

// ask makes the attempts of a run, one after the other, and returns how the run
// ended. It must run on a goroutine of its own.
func (r *run) ask(lastEventID string) runEnd {
	w := &runResponse{run: r, header: make(http.Header)}
	ctx := r.beginAttempt()
	err := r.attempt(ctx, lastEventID, w)
	end := r.endOf(ctx, w, err)
	if w.kind != answerStream || !w.brokeOff(end) {
		return end
	}
	return r.tryAgain(end)
}

// attempt is one call of the handlers.
func (r *run) attempt(ctx context.Context, lastEventID string, w *runResponse) error {
	defer w.close()
	err := r.callSafely(ctx, lastEventID, w)
	if errors.Is(err, errPanic) {
		w.failed = err // a bug, not an upstream that may come back
	}
	return err
}

// callSafely recovers panics of the handlers, because no server would.
func (r *run) callSafely(ctx context.Context, lastEventID string, w runWriter) (err error) {
	defer func() {
		switch panicked := recover(); {
		case panicked == nil:
		case isAbort(panicked):
			err = errBrokenOff
		default:
			r.h.survive(panicked, debug.Stack())
			err = fmt.Errorf("%w: %v", errPanic, panicked)
		}
	}()
	return r.call(ctx, lastEventID, w)
}

var errPanic = errors.New("panic")

// errBrokenOff is the error of a run whose upstream has broken off.
var errBrokenOff = errors.New("the upstream broke off")

// endOf returns how the run ends after an attempt, if there is no other.
func (r *run) endOf(ctx context.Context, w *runResponse, err error) runEnd {
	cause := context.Cause(ctx)
	switch {
	case cause == errUpstreamSilent:
		return runEnd{reason: upstreamTimeout}
	case w.failed != nil:
		return runEnd{reason: upstreamError, err: w.failed, soft: w.soft}
	case w.try != nil && w.kind != answerStream:
		return runEnd{reason: upstreamError, err: cmp.Or(err, errNoAnswer)}
	case w.kind == answerPending && err == nil:
		r.head(runAnswer{kind: answerOther}) // the handlers have not answered
		return runEnd{reason: upstreamClosed}
	case w.kind == answerPending:
		if errors.Is(err, errBrokenOff) {
			err = caddyhttp.Error(http.StatusBadGateway, err)
		}
		r.head(runAnswer{kind: answerFailure, err: err})
		return runEnd{reason: upstreamError, err: err}
	case err != nil:
		return runEnd{reason: upstreamError, err: err}
	}
	return runEnd{reason: upstreamClosed}
}

// answeredOther reports whether each client must ask the upstream itself. An
// answer after the run has been given up is not the upstream's: reverse_proxy
// answers 499 then.
func (r *run) answeredOther(end runEnd) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch r.answer.kind {
	case answerOther:
		return true
	case answerStream:
		return errors.Is(end.err, errOtherBody)
	}
	return false
}

// runResponse is the ResponseWriter that the handlers of a run's attempt get. It
// has a header map of its own, and no client.
type runResponse struct {
	run     *run
	request *http.Request // that they got

	header http.Header
	kind   answerKind
	answer runAnswer // a failure, until its body is complete
	failed error     // an error of this module that ended the run
	soft   bool
	try    *runTry // nil: this is the first attempt
}

func (w *runResponse) asked(request *http.Request) { w.request = request }

func (w *runResponse) Header() http.Header { return w.header }

// WriteHeader decides what the answer is. 1xx do not reach clients, because
// clients that join later would miss them.
func (w *runResponse) WriteHeader(status int) {
	if status < 200 && status != http.StatusSwitchingProtocols || w.kind != answerPending {
		return
	}
	if w.try != nil {
		w.kind = w.try.answered(status, w)
		return
	}
	answer := runAnswer{status: status, header: runsHeader(w.header), upstream: w.upstream()}
	switch {
	case isStream(status, w.header) && !isEncoded(w.header):
		answer.kind = answerStream
		w.run.head(answer)
	case status >= 500:
		answer.kind = answerFailure
		w.answer = answer
		// Wait a moment for its body, but no longer.
		time.AfterFunc(failureBodyWait, func() {
			w.run.head(answer)
			w.run.cancel(errRunEnded)
		})
	default:
		answer.kind = answerOther
		w.standAside(answer)
	}
	w.kind = answer.kind
}

func (w *runResponse) yield() {
	if w.kind == answerPending {
		w.standAside(runAnswer{})
	}
}

// standAside makes each client ask the upstream itself.
func (w *runResponse) standAside(answer runAnswer) {
	w.kind, answer.kind, w.failed = answerOther, answerOther, errOtherBody
	w.run.head(answer)
	w.run.cancel(errRunEnded)
}

// notOfRun are the header fields of an upstream's answer that no client of a run
// gets.
var notOfRun = []string{"Alt-Svc", "Date", "Set-Cookie", "Trailer", "Via"}

// upstream returns the upstream that reverse_proxy has chosen, if any. Only the
// handlers' goroutine may call it.
func (w *runResponse) upstream() string {
	if w.request == nil {
		return ""
	}
	repl, ok := w.request.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	upstream, _ := repl.GetString(upstreamPlaceholder)
	return printable(upstream, 255)
}

func (w *runResponse) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	switch w.kind {
	case answerStream:
		if w.failed != nil {
			return 0, w.failed
		}
		n, err := w.run.feed.write(p)
		if err != nil {
			w.fail(err)
		}
		if w.try != nil {
			w.try.noteEvents()
		}
		return n, err
	case answerFailure:
		if w.try != nil {
			return 0, errRunEnded
		}
		if len(w.answer.body)+len(p) > maxFailureBody {
			w.answer.body = nil
			w.close()
			return 0, errRunEnded
		}
		w.answer.body = append(w.answer.body, p...)
		return len(p), nil
	}
	return 0, errRunEnded
}

// How much of an error's body the waiting clients get, and how long to wait for
// it.
const (
	maxFailureBody  = 64 << 10
	failureBodyWait = time.Second
)

// fail records that the journal takes no more.
func (w *runResponse) fail(err error) {
	w.failed = err
	if errors.Is(err, journal.ErrEventTooLarge) {
		w.soft = true
	}
}

// close says that the answer is complete.
func (w *runResponse) close() {
	if w.kind == answerFailure && w.try == nil {
		w.run.head(w.answer)
	}
}

// FlushError is what http.ResponseController flushes with. Everything has already
// been published.
func (w *runResponse) FlushError() error {
	w.WriteHeader(http.StatusOK)
	return w.failed
}

// Interface guards
var (
	_ http.ResponseWriter             = (*runResponse)(nil)
	_ interface{ FlushError() error } = (*runResponse)(nil)
)
