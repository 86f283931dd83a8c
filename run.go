package caddysse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// run is one upstream stream that is independent of any client's connection. What
// the upstream sends goes into a journal, from which clients read. All that it
// knows about a client is how to end its stream.
//
// Attempts (calls of the handlers after sse) run on the run's own goroutine.
// Their answer goes to head first and then to feed.write. When the last one is
// over, finish is called, once.
type run struct {
	h        *Handler // the configuration that it began with
	use      runUse
	id       uuid.UUID // for the admin API, because the token is a secret
	host     string
	path     string
	feed     *feed
	began    instant
	answered chan struct{} // closed when the upstream's answer is known

	ctx    context.Context // of the run's attempts
	cancel context.CancelCauseFunc

	tried atomic.Int64 // tries of upstream_retry

	// stays returns how long the run stays without a client from now on; it must be
	// called with mu held. forget removes the run from where clients look for it;
	// it may be called several times, without mu.
	stays  func() time.Duration
	forget func()

	// call calls the handlers after sse; they answer to w.
	call func(ctx context.Context, lastEventID string, w runWriter) error

	mu      sync.Mutex
	stage   runStage
	answer  runAnswer
	why     reason // of an early end that was requested
	end     runEnd
	readers map[*runReader]struct{}
	joined  int     // clients in total
	alone   instant // since when it has had no client
	idle    *time.Timer
	limits  []*time.Timer
	silence silence

	catchUps      catchUps
	upstream      string // of the last attempt with an answer
	attempts      int
	cancelAttempt context.CancelCauseFunc

	kept *keptRun // only of a resumedRun
}

// runUse is whether a run belongs to share or to resume.
type runUse uint8

const (
	sharedRun runUse = iota
	resumedRun
)

// runStage is where a run is in its life. A run only moves forward, except for
// retrying.
type runStage uint8

const (
	runAsking   runStage = iota // the upstream has not answered yet
	runOpen                     // it sends
	runRetrying                 // it broke off, and will be tried again
	runEnding                   // an early end was requested
	runEnded                    // it has ended; what the journal has is kept for clients
	runGone                     // removed and reported
)

var runStageNames = [...]string{
	runAsking:   "waiting",
	runOpen:     "open",
	runRetrying: "retrying",
	runEnding:   "ending",
	runEnded:    "ended",
	runGone:     "ended",
}

// runAnswer is what the upstream answered a run.
type runAnswer struct {
	kind     answerKind
	status   int
	header   http.Header // must not be modified; readers copy it
	upstream string
	body     []byte // of a failure
	err      error  // of a failure without an answer
}

// answerKind says what the clients that wait for a run's answer do with it.
type answerKind uint8

const (
	answerPending answerKind = iota
	answerStream             // they join
	answerOther              // each asks the upstream itself
	answerFailure            // each gets it
)

// runEnd is how a run ended.
type runEnd struct {
	reason reason
	err    error
	soft   bool // an upstream_error after which an EventSource gets a clean end
	told   bool // an upstream_error that an event has reported, so the end is clean
}

var (
	// errRunEnded is the cause of the context of a run that is over. It is a
	// cancellation, like errStreamEnded.
	errRunEnded = fmt.Errorf("sse: the run has ended: %w", context.Canceled)

	// errUpstreamSilent is the cause of the context of an attempt that has exceeded
	// upstream_timeout.
	errUpstreamSilent = fmt.Errorf("sse: the upstream is silent: %w", context.Canceled)

	errNoAnswer = errors.New("the upstream has not answered")
)

// newRun makes a run and registers it. It does not call the upstream yet.
func (h *Handler) newRun(use runUse, f *feed) *run {
	ctx, cancel := context.WithCancelCause(context.Background())
	r := h.makeRun(use, f, ctx, cancel)
	h.group.addRun(r)
	return r
}

// makeRun makes a run whose attempts have a context already. It is not
// registered.
func (h *Handler) makeRun(use runUse, f *feed, ctx context.Context, cancel context.CancelCauseFunc) *run {
	r := &run{
		h:        h,
		use:      use,
		id:       uuid.New(),
		feed:     f,
		began:    now(),
		answered: make(chan struct{}),
		readers:  make(map[*runReader]struct{}),
		forget:   func() {},
	}
	r.ctx, r.cancel = ctx, cancel
	f.stop = r.ctx.Done()
	return r
}

// token is the first part of the run's ids.
func (r *run) token() runToken { return r.feed.token }

// head takes the upstream's answer. A stream opens the run; after any other
// answer the run ends without having been open.
func (r *run) head(answer runAnswer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.headLocked(answer)
}

func (r *run) headLocked(answer runAnswer) {
	if r.answer.kind != answerPending {
		return
	}
	r.answer = answer
	if answer.kind == answerStream && r.stage == runAsking {
		r.stage, r.upstream = runOpen, answer.upstream
		r.feed.hears()
		r.watchSilenceLocked()
	}
	close(r.answered)
}

// endAfter stops the run after d, with this reason; 0: never.
func (r *run) endAfter(d time.Duration, why reason) {
	if d <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stage < runEnded {
		r.limits = append(r.limits, time.AfterFunc(d, func() { r.stop(why) }))
	}
}

// breakOff cancels all attempts. It does not wait for handlers that ignore that.
func (r *run) breakOff(end runEnd) {
	r.cancel(errRunEnded)
	time.AfterFunc(leavePatience, func() { r.finish(end) })
}

// beginAttempt makes the context of the next attempt. Its cause says why it was
// cancelled.
func (r *run) beginAttempt() context.Context {
	ctx, cancel := context.WithCancelCause(r.ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts++
	if over := r.cancelAttempt; over != nil {
		over(errRunEnded) // else it would be kept as long as the run
	}
	r.cancelAttempt = cancel
	return ctx
}

// isSilent breaks off an attempt whose upstream has sent nothing for too long. If
// its handlers do not return, the run ends without them.
func (r *run) isSilent() {
	r.mu.Lock()
	attempts, cancel := r.attempts, r.cancelAttempt
	r.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel(errUpstreamSilent)
	time.AfterFunc(leavePatience, func() {
		r.mu.Lock()
		stuck := r.attempts == attempts && r.stage == runOpen
		r.mu.Unlock()
		if stuck {
			r.finish(runEnd{reason: upstreamTimeout})
		}
	})
}

// stop ends the run early: clients can't find it any more, its clients' streams
// end at an event boundary with this reason, and then its upstream is cancelled.
// Nothing is kept. It returns false if the run is already ending, or has been
// removed.
func (r *run) stop(why reason) bool {
	r.mu.Lock()
	if r.stage >= runEnding {
		ended := r.stage == runEnded
		if ended {
			r.why = why // nothing is kept once its clients have left
		}
		readers := r.readersLocked()
		r.mu.Unlock()
		if ended { // its clients have not received the rest yet
			r.forget()
			for _, reader := range readers {
				reader.endStream(why)
			}
			if len(readers) == 0 {
				r.remove()
			}
		}
		return ended
	}
	r.stage, r.why = runEnding, why
	r.headLocked(runAnswer{kind: answerFailure, err: caddyhttp.Error(http.StatusServiceUnavailable, errRunEnded)})
	readers := r.readersLocked()
	r.mu.Unlock()
	r.forget()
	end := runEnd{reason: why}
	for _, reader := range readers {
		reader.endStream(why)
	}
	if len(readers) == 0 {
		r.breakOff(end)
	} else {
		time.AfterFunc(endPatience+writePatience, func() { r.breakOff(end) })
	}
	return true
}

func (r *run) readersLocked() []*runReader {
	all := make([]*runReader, 0, len(r.readers))
	for reader := range r.readers {
		all = append(all, reader)
	}
	return all
}

// finish says that the attempts are over, and how the last one ended. Only the
// first call counts.
func (r *run) finish(end runEnd) {
	r.mu.Lock()
	if r.stage >= runEnded {
		r.mu.Unlock()
		return
	}
	if r.stage == runEnding {
		end = runEnd{reason: r.why}
	}
	r.stage, r.end = runEnded, end
	for _, limit := range r.limits {
		limit.Stop()
	}
	r.silence.stop()
	r.headLocked(runAnswer{kind: answerFailure, err: caddyhttp.Error(http.StatusBadGateway, cmp.Or(end.err, errNoAnswer))})
	r.group().dropIdle(r)
	r.mu.Unlock()
	if r.use == sharedRun {
		r.forget()
	}
	r.cancel(errRunEnded)
	if r.kept != nil && r.kept.mirror != nil {
		r.kept.mirror.finish(end)
	}
	if end.reason == upstreamClosed {
		r.feed.journal.Close(nil)
	} else {
		r.feed.journal.Close(errRunEnded)
	}
	r.restIfAlone()
}

// restIfAlone decides what to do with a run that has no client.
func (r *run) restIfAlone() {
	r.mu.Lock()
	if len(r.readers) > 0 || r.stage == runGone {
		r.mu.Unlock()
		return
	}
	stay := time.Duration(0)
	if r.stage != runEnding {
		stay = r.stays()
	}
	ended := r.stage == runEnded
	if stay > 0 {
		if r.idle != nil {
			r.idle.Stop()
		}
		r.idle = time.AfterFunc(stay, r.restIsOver)
		if !ended {
			r.group().addIdle(r)
		}
		if r.kept != nil {
			r.group().addDetached(r)
		}
	}
	r.mu.Unlock()
	switch {
	case stay > 0:
	case ended:
		r.forget()
		r.remove()
	case !r.stop(clientClosed):
		r.breakOff(runEnd{reason: clientClosed}) // its last client has left while it was ending
	}
}

// restIsOver ends a run that has been without a client for too long.
func (r *run) restIsOver() {
	r.mu.Lock()
	alone := len(r.readers) == 0
	r.mu.Unlock()
	if alone {
		r.giveWay()
	}
}

// giveWay ends a run that has no client: it has waited long enough, or others
// need the room.
func (r *run) giveWay() {
	r.mu.Lock()
	if len(r.readers) > 0 || r.stage == runGone {
		r.mu.Unlock()
		return
	}
	ended := r.stage == runEnded
	r.mu.Unlock()
	r.forget()
	if ended {
		r.remove()
	} else {
		r.stop(clientClosed)
	}
}

// remove removes a run that has ended from its group, and reports its end, once.
func (r *run) remove() {
	r.mu.Lock()
	if r.stage == runGone || r.stage != runEnded {
		r.mu.Unlock()
		return
	}
	figures := r.figuresLocked()
	r.stage = runGone
	if r.idle != nil {
		r.idle.Stop()
	}
	opened := r.answer.kind == answerStream
	r.mu.Unlock()
	r.group().removeRun(r)
	r.feed.journal.Discard()
	if opened {
		r.h.tellRunEnded(figures)
	}
}

func (r *run) group() *group { return r.h.group }

// tries implements feedSource.
func (r *run) tries() int64 { return r.tried.Load() }

// hasUpstreamsIDs implements feedSource.
func (r *run) hasUpstreamsIDs() bool { return r.feed.ownIDs.Load() }

// hasNothing implements feedSource.
func (r *run) hasNothing() bool { return r.feed.useless.Load() }

// outcome is how the run ended, for a client that has got all of it.
func (r *run) outcome() runEnd {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.end
}
