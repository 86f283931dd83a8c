package caddysse

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// errStreamEnded is what the upstream's side gets when it writes to a stream that
// is over, and the cause of its context. It is a cancellation, because
// reverse_proxy counts any other failure of a request against the upstream.
var errStreamEnded = fmt.Errorf("sse: the stream has ended: %w", context.Canceled)

// stage is where a stream is in its life. A stream only moves forward, except
// that a retrying stream is open again when its upstream has come back.
type stage uint8

const (
	stageWaiting   stage = iota // started early: the upstream has not answered
	stageOpen                   // bytes pass
	stageRetrying               // the upstream broke off, and is tried again
	stageEnding                 // an early end was requested; it comes at the next event boundary
	stageHurried                // it comes as soon as nothing is being written, boundary or not
	stageBreaking               // the write in its way is being broken off
	stageCut                    // nothing more is sent, and the handlers should return
	stageAbandoned              // they have not returned: the client is let go without them
	stageClosed                 // accounted for
)

// How long a stream stays in a stage, if nothing happens first.
const (
	// endPatience is how long an early end waits for the current event.
	endPatience = time.Second

	// writePatience is how long it then waits for the current write: most end in a
	// moment, and only one that blocks is broken off.
	writePatience = 200 * time.Millisecond

	// stuckPatience is how long an HTTP/2 connection may take nothing before it is
	// closed for the early end of one of its streams: that ends the others, too.
	stuckPatience = 5 * time.Second

	// leavePatience is how long the handlers of a stream that was ended may take to
	// return. Handlers may ignore their context, as FastCGI's do while they wait
	// for the upstream; after this time, their client is let go without them.
	leavePatience = 5 * time.Second
)

func (s *stream) at() stage        { return stage(s.stage.Load()) }
func (s *stream) isEnding() bool   { at := s.at(); return at >= stageEnding && at < stageCut }
func (s *stream) isCut() bool      { return s.at() >= stageCut }
func (s *stream) isAskedEnd() bool { return s.at() >= stageEnding }

// isLiveLocked and isEndingLocked must be called with facts locked: the answer
// stays true until facts is unlocked.
func (s *stream) isLiveLocked() bool   { return s.at() < stageEnding }
func (s *stream) isEndingLocked() bool { return s.isEnding() }

// moveLocked moves the stream to a later stage, and has tick called when that
// stage is over. It does nothing if the stream is in that stage or beyond. The
// caller must hold facts.
func (s *stream) moveLocked(to stage, patience time.Duration) bool {
	if s.at() >= to {
		return false
	}
	s.stage.Store(uint32(to))
	s.due = now() + instant(patience)
	if s.rare != nil {
		s.rare.excused = false
	}
	if to < stageAbandoned && !s.gone {
		s.h.agenda.hasten(s, s.due)
	}
	return true
}

func (s *stream) move(to stage, patience time.Duration) bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.moveLocked(to, patience)
}

// ask records the reason of an early end. Only the first reason counts, and none
// does once the handlers have left: the stream has then ended by itself.
func (s *stream) ask(why reason, to stage, patience time.Duration) bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	if s.gone {
		return false
	}
	first := s.at() < stageEnding
	if first {
		s.why = why
	}
	s.moveLocked(to, patience)
	return first
}

// end requests an early end and never waits for the client. The first reason
// counts. The end comes at the next event boundary: now, if the stream is at one,
// else after the current event, which gets endPatience.
func (s *stream) end(why reason) bool {
	first := s.ask(why, stageEnding, endPatience)
	if first {
		s.cutAtBoundary()
	}
	return first
}

// endNow ends the stream without waiting for an event or for the client.
func (s *stream) endNow(why reason) {
	s.ask(why, stageBreaking, endPatience)
	s.breakOff()
}

// hurryLocked lets an early end come wherever the stream is, because there is
// nothing to wait for. The caller must hold facts.
func (s *stream) hurryLocked() { s.moveLocked(stageHurried, writePatience) }

// cutAtBoundary cuts a stream that should end, if it is at a place where that
// harms no event, or anywhere if reaching such a place took too long. Whoever
// holds mu calls it on unlocking.
func (s *stream) cutAtBoundary() {
	if !s.mu.TryLock() {
		return
	}
	defer s.mu.Unlock()
	if s.at() == stageEnding && s.body == eventStreamBody && !s.splicer.MayEnd() {
		return
	}
	s.cutLocked()
}

// cutLocked stops all output and cancels the upstream's half.
func (s *stream) cutLocked() {
	if s.isCut() || s.failed != notEnded {
		return
	}
	s.move(stageCut, leavePatience)
	s.cancel(errStreamEnded)
}

// breakOff cuts the stream, and breaks off a write that is in the way.
func (s *stream) breakOff() {
	if s.mu.TryLock() {
		s.cutLocked()
		s.mu.Unlock()
		return
	}
	s.facts.Lock()
	defer s.facts.Unlock()
	if !s.breakWriteLocked() {
		return
	}
	if s.proto == http2 && now() >= s.due && s.isStuck() {
		// The reset of the stream has not gone out either.
		s.breakConnection()
	}
	s.cancel(errStreamEnded)
	// Try again after a while: a writer in between may have set a deadline of its
	// own between two pieces.
	s.due = now() + instant(endPatience)
	s.h.agenda.hasten(s, s.due)
}

// isStuck reports whether a write has made no progress for so long that nothing
// else on its connection can have made any.
func (s *stream) isStuck() bool {
	moved := time.Duration(s.moved.Load())
	return moved > 0 && s.age()-moved >= stuckPatience
}

// breakWriteLocked makes a write that blocks return, unless the handlers have
// left. It uses the connection's own writer: the writers around it are not made
// for a second goroutine, but a connection's deadlines may be set from any. The
// caller must hold facts.
func (s *stream) breakWriteLocked() (done bool) {
	if s.gone {
		return false
	}
	s.broken = true
	s.expireWritesLocked()
	if s.proto == http1 {
		s.breakConnection()
	}
	return true
}

// breakConnection sends nothing more on the client's connection. The last write may
// have been cut inside a TLS record, and the client would take an alert after that for
// the rest of the record.
func (s *stream) breakConnection() {
	conn := peer.Accepted(s.ctx)
	peer.Expire(conn)
	peer.HangUp(conn)
}

// abandon lets the client go without the handlers, which do not return.
func (s *stream) abandon() {
	s.facts.Lock()
	switch moved := s.moveLocked(stageAbandoned, 0); {
	case !moved:
	case s.letGoLocked() != nil:
		s.broken = true // its request continues, and ends with an abort
	default:
		s.breakWriteLocked()
	}
	s.facts.Unlock()
	s.accountWithoutHandlers()
}

// letGoLocked returns a function that lets the request continue without its
// handlers; nil: that is impossible. The caller must hold facts.
func (s *stream) letGoLocked() func() {
	if s.rare == nil {
		return nil
	}
	return s.rare.letGo
}

// clientLeft accounts for the stream of a client that has left, at once: its
// handlers may not react to that.
func (s *stream) clientLeft() {
	defer s.survive()
	s.accountWithoutHandlers()
}

// accountWithoutHandlers accounts for a stream whose handlers are not waited
// for.
func (s *stream) accountWithoutHandlers() {
	s.facts.Lock()
	why, asked, letGo := s.why, s.isAskedEnd(), s.letGoLocked()
	s.facts.Unlock()
	if !asked {
		why = clientClosed
	}
	s.account(why, nil)
	if letGo != nil && asked {
		letGo()
	}
	// Someone may be writing, to a client that takes nothing any more.
	s.facts.Lock()
	defer s.facts.Unlock()
	if !s.gone && s.h.writeTimeout > 0 {
		s.h.agenda.hasten(s, s.arrived+instant(sum(s.age(), s.h.writeTimeout)))
	}
}

// excuseLocked makes a stage that is over longer, if the process was stopped just now,
// and returns by how much. It does so once in a stage: a machine that is too busy looks
// like one that stops again and again. The caller must hold facts.
func (s *stream) excuseLocked() time.Duration {
	grace := s.h.agenda.stopGrace()
	if grace <= 0 || s.rarely().excused {
		return 0
	}
	s.rare.excused = true
	s.due = now().plus(grace)
	return grace
}

// tickEnding is tick for a stream that is ending: its stage may be over.
func (s *stream) tickEnding() {
	s.facts.Lock()
	at, left := s.at(), time.Duration(s.due-now())
	if left <= 0 && at < stageCut {
		left = s.excuseLocked()
	}
	if left > 0 && at < stageAbandoned {
		s.callIn(left)
	}
	s.facts.Unlock()
	if left > 0 && at < stageAbandoned {
		return
	}
	switch at {
	case stageEnding:
		s.move(stageHurried, writePatience)
		s.cutAtBoundary()
	case stageHurried:
		s.move(stageBreaking, endPatience)
		s.breakOff()
	case stageBreaking:
		s.breakOff()
	case stageCut:
		s.abandon()
	case stageClosed:
		if s.moved.Load() != 0 {
			s.facts.Lock()
			s.breakWriteLocked()
			s.facts.Unlock()
		}
	}
}

// aborts reports whether the client must see that its answer is not complete.
func (s *stream) aborts(why reason) bool {
	switch why {
	case upstreamError:
		return !s.told && !s.gaveUpCleanly() && !(s.kind.eventSource && s.fed.endedSoftly())
	case lagged, takenOver:
		return s.broken || !s.kind.eventSource
	case clientClosed:
		// The client is still there: another request has ended its stream.
		return s.isSentAway() && (s.broken || !s.kind.eventSource)
	case writeTimeout, deadClient, serverClosed:
		return true
	case upstreamTimeout, drained, maxDuration, endedByAdmin:
		return s.broken || !s.kind.eventSource || s.body != eventStreamBody
	}
	return false
}

// arrivalPatience is how long the last bytes of a stream over HTTP/3 have to
// reach the client before the stream is aborted.
const arrivalPatience = 200 * time.Millisecond

// letArrive waits for the last bytes before an abort, because QUIC's reset of a
// stream takes back what has not arrived (RFC 9000, section 3.2).
func (s *stream) letArrive() {
	if s.proto != http3 {
		return
	}
	select {
	case <-time.After(s.lastHeard + arrivalPatience - s.age()):
	case <-s.ctx.Done():
	}
}

func (s *stream) isSentAway() bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.why == clientClosed
}

// close waits until no one writes, and prevents all later writes.
func (s *stream) close() {
	if s.unwatch != nil {
		s.unwatch()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.errLocked()
	s.facts.Lock()
	s.gone = true
	s.h.agenda.drop(s)
	s.facts.Unlock()
	if rest := s.splicer.Rest(&s.frames.Frames); rest != nil && err == nil {
		// The body was only a part of a BOM, and so not a BOM.
		s.boundLastWrite()
		_ = s.sendLocked(s.age(), rest, nil)
	}
}

// verdict says why a stream ended whose handlers have left, or are not waited
// for.
func (s *stream) verdict(out outcome) (reason, error) {
	s.facts.Lock()
	why, over, gaveUp := s.why, s.isCut() || s.broken, s.gaveUpLocked()
	s.facts.Unlock()
	switch {
	case gaveUp != nil:
		return why, gaveUp
	case why == upstreamError:
		return upstreamError, errUnusable(out.err)
	case over && why != notEnded:
		return why, nil
	case s.failed == writeTimeout:
		return writeTimeout, nil
	case s.failed != notEnded, s.ctx.Err() != nil:
		return clientClosed, nil
	case out.run.reason != notEnded:
		return out.run.reason, out.run.err
	case isAbort(out.panicked):
		return upstreamError, errors.New("the upstream broke off")
	case out.panicked != nil:
		return upstreamError, fmt.Errorf("panic: %v", out.panicked)
	case out.err != nil:
		return upstreamError, out.err
	}
	return upstreamClosed, nil
}

// errUnusable is the error of a stream that was started early and got no
// upstream: the handlers' own error, if it says more than that we ended them.
func errUnusable(err error) error {
	if err != nil {
		return err
	}
	return errors.New("the upstream's answer to an early start was no stream")
}

// whyGone distinguishes a client that left from one whose host is dead, and from
// one whose stream we ended.
func (s *stream) whyGone(fate peer.Fate) reason {
	if s.proto == http3 && s.h.drain.graceIsOver() {
		return serverClosed // its server closes connections before we come to it
	}
	switch fate {
	case peer.Dead:
		return deadClient
	case peer.Stalled:
		return writeTimeout
	}
	return clientClosed
}

// account accounts for the stream once. The first caller counts: the request's
// goroutine when its handlers have left, or someone who does not wait for them.
// clientClosed stands for all ways in which a client can be gone.
func (s *stream) account(why reason, err error) {
	if !s.started {
		return
	}
	s.accounted.Do(func() {
		var fate peer.Fate
		if s.h.deadClientTimeout > 0 {
			fate = peer.FromContext(s.ctx).Leave(s.h.deadClientTimeout)
		}
		if why == clientClosed {
			why = s.whyGone(fate)
		}
		live.telling.Add(1) // before it counts as closed
		defer live.telling.Add(-1)
		s.facts.Lock()
		s.stage.Store(uint32(stageClosed))
		s.longestGap = max(s.longestGap, s.age()-s.lastBytes)
		r := s.reportLocked()
		r.end.reason, r.end.err = why, err
		s.ended = &r
		s.facts.Unlock()
		s.h.group.remove(s, why, r.counts)
		collector.observeClosed(r)
		s.h.tellClosed(r)
	})
}

// final is what there is to report about a stream that has been accounted for.
func (s *stream) final() *report {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.ended
}

// survive is deferred where no server would recover a panic, such as one from the
// writers around this one: it ends the stream, and the panic continues on the
// request's goroutine.
func (s *stream) survive() {
	value := recover()
	if value == nil {
		return
	}
	s.h.survive(value, debug.Stack())
	s.mu.Lock()
	s.failed = clientClosed // nothing more is sent
	s.mu.Unlock()
	s.facts.Lock()
	s.rarely().panicked = value
	s.facts.Unlock()
	s.cancel(errStreamEnded)
}

// panicked returns the panic that survive has recovered.
func (s *stream) panicked() any {
	s.facts.Lock()
	defer s.facts.Unlock()
	if s.rare == nil {
		return nil
	}
	return s.rare.panicked
}
