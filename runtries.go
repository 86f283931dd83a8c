package caddysse

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// runTry is one more attempt of a run whose upstream has broken off.
type runTry struct {
	run    *run
	waits  *retryWaits
	events uint64 // of the run, before the try
	result tryResult
	after  time.Duration // the Retry-After of its answer
}

// brokeOff reports whether an attempt ended in a way after which the upstream is
// asked again.
func (w *runResponse) brokeOff(end runEnd) bool {
	return isBreak(end.reason) && w.failed == nil
}

// tryAgain asks an upstream that has broken off until it stays away for too
// long, or ends cleanly. broken is how it broke off, and how the run ends if it
// does not come back.
func (r *run) tryAgain(broken runEnd) runEnd {
	waits := &retryWaits{window: r.h.UpstreamRetry.window()}
	if waits.window == 0 {
		return broken
	}
	var after time.Duration
	for {
		lastEventID, ok := r.feed.upstreamPosition()
		if !ok && !r.h.UpstreamRetry.Live || !r.feed.mayGoOn() {
			return broken
		}
		if !r.awaitTry(waits, after) {
			broken.soft = true
			return broken
		}
		try := &runTry{run: r, waits: waits, events: r.feed.events}
		w := &runResponse{run: r, header: make(http.Header), try: try}
		ctx := r.beginAttempt()
		forget := r.endTryAt(waits)
		err := r.attempt(ctx, lastEventID, w)
		forget()
		if r.ctx.Err() != nil {
			return broken
		}
		if w.kind == answerPending && w.failed == nil {
			try.unanswered(w, err)
		}
		after = try.after
		if try.result == refusedTry || w.failed != nil {
			try.finish(refusedTry)
			broken.soft = true
			return broken
		}
		try.finish(failedTry) // unless it has brought an event
		if end := r.endOf(ctx, w, err); w.kind == answerStream {
			if !w.brokeOff(end) {
				return end
			}
			broken = end
		}
	}
}

// awaitTry waits until the run may try again. It returns false where it must
// not, or has ended meanwhile.
func (r *run) awaitTry(waits *retryWaits, after time.Duration) bool {
	told, upstreams := r.feed.upstreamRetry()
	if !upstreams {
		var ours time.Duration
		if r.h.frames.retryMin > 0 {
			ours = r.h.frames.reconnectionTime()
		}
		told = reconnection(0, false, ours)
	}
	wait, ok := waits.wait(time.Now(), told, after)
	if !ok || !r.retries() {
		return false
	}
	turn := r.group().tries.enter(wait)
	defer r.group().tries.leave(turn)
	select {
	case <-turn.come:
	case <-r.ctx.Done():
		return false
	}
	if r.h.isReplaced() {
		return false
	}
	r.feed.again()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tried.Add(1)
	return r.stage == runRetrying
}

// retries says that the run waits for its upstream. It returns false where the
// run is about to end.
func (r *run) retries() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stage != runOpen && r.stage != runRetrying {
		return false
	}
	r.stage = runRetrying
	return true
}

// endTryAt breaks off a try that has not been answered when the window is over.
func (r *run) endTryAt(waits *retryWaits) (forget func()) {
	over, _ := waits.end()
	timer := time.AfterFunc(time.Until(over), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.stage == runRetrying {
			r.cancelAttempt(errRunEnded)
		}
	})
	return func() { timer.Stop() }
}

// reopen lets the run go on: its upstream has come back.
func (r *run) reopen(upstream string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stage != runRetrying {
		return
	}
	r.stage = runOpen
	r.upstream = upstream
	r.feed.hears()
	r.watchSilenceLocked()
}

// isAway reports whether a status says that the upstream may come back.
func isAway(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout
}

// answered takes the headers of a try. All that counts is whether the upstream
// goes on.
func (t *runTry) answered(status int, w *runResponse) answerKind {
	switch {
	case isAway(status):
		t.after = statedRetryAfter(w.header.Get("Retry-After"))
		return answerFailure
	case isStream(status, w.header) && !isEncoded(w.header):
		t.run.reopen(w.upstream())
		return answerStream
	}
	t.finish(refusedTry)
	w.failed = fmt.Errorf("upstream_retry: the upstream answered %d %s, %s", status, http.StatusText(status), typeOf(w.header))
	return answerOther
}

// unanswered takes an error of the handlers for the answer that it would become.
func (t *runTry) unanswered(w *runResponse, err error) {
	status := http.StatusOK
	if err != nil {
		status = http.StatusBadGateway
		if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && handlerErr.StatusCode != 0 {
			status = handlerErr.StatusCode
		}
	}
	t.answered(status, w)
}

// noteEvents finds out whether the try has brought an event.
func (t *runTry) noteEvents() {
	if t.run.feed.events > t.events {
		t.finish(resumedTry)
	}
}

// finish counts what came of the try, once.
func (t *runTry) finish(result tryResult) {
	if t.result != pendingTry {
		return
	}
	t.result = result
	collector.retries.WithLabelValues(t.run.h.Name, result.String()).Inc()
	if result == resumedTry {
		t.waits.resumed()
	}
}
