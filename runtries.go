package caddysse

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// runTry is one try of upstream_retry for a run.
type runTry struct {
	run    *run
	waits  *retryWaits
	events uint64 // of the run, before the try
	result tryResult
	after  time.Duration // the Retry-After of its answer
}

// brokeOff reports whether upstream_retry applies after an attempt.
func (w *runResponse) brokeOff(end runEnd) bool {
	return isBreak(end.reason) && w.failed == nil
}

// tryAgain repeats the request to an upstream that has broken off, until the
// upstream ends cleanly or stays away for too long. broken is how it broke off;
// the run ends that way if it does not come back.
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

// awaitTry waits until the run may try again. It returns false if it must not, or
// has ended in the meantime.
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

// retries moves the run to runRetrying. It returns false if the run is about to
// end.
func (r *run) retries() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stage != runOpen && r.stage != runRetrying {
		return false
	}
	r.stage = runRetrying
	return true
}

// endTryAt breaks off a try that has no answer when the window is over.
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

// reopen moves the run back to runOpen, because its upstream has come back.
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

// isAway reports whether a status means that the upstream may come back.
func isAway(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout
}

// answered takes the headers of a try. All that matters is whether the upstream
// continues.
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

// unanswered treats an error of the handlers like the answer that Caddy makes of
// it.
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

// noteEvents checks whether the try has brought an event.
func (t *runTry) noteEvents() {
	if t.run.feed.events > t.events {
		t.finish(resumedTry)
	}
}

// finish counts the result of the try, once.
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
