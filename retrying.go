package caddysse

import (
	"errors"
	"time"
)

// The stream's side of upstream_retry. The tries themselves are in tries.go.

// isBreak reports whether upstream_retry applies after an end with this reason.
func isBreak(why reason) bool { return why == upstreamError || why == upstreamTimeout }

// triesLocked returns the request's data for upstream_retry, nil for most. It
// must be called with facts locked.
func (s *stream) triesLocked() *tries {
	if s.rare == nil {
		return nil
	}
	return s.rare.tries
}

// toldReconnection records the reconnection time that we have sent; 0: none.
func (s *stream) toldReconnection(told time.Duration) {
	s.facts.Lock()
	defer s.facts.Unlock()
	if t := s.triesLocked(); t != nil {
		t.told = told
	}
}

// retriesLocked returns how many tries there were, -1 if there can be none. It
// must be called with facts locked.
func (s *stream) retriesLocked() int {
	if t := s.triesLocked(); t != nil {
		return t.count
	}
	if s.fed != nil && s.h.UpstreamRetry.window() > 0 {
		return s.fed.retries()
	}
	return -1
}

// brokeOff reports whether the upstream has broken off where it can continue, and
// lets the stream wait for it. The handlers have left.
func (s *stream) brokeOff(out outcome) bool {
	s.mu.Lock()
	defer s.unlock()
	isBug := out.panicked != nil && !isAbort(out.panicked)
	if !s.started || s.errLocked() != nil || s.ctx.Err() != nil || !out.left || isBug {
		return false
	}
	switch s.at() {
	case stageRetrying:
		return true
	case stageOpen:
		isClean := out.panicked == nil && out.err == nil
		return !isClean && s.breakLocked(upstreamError)
	}
	return false
}

// triesAfter reports whether the stream waits for its upstream, whose time is
// over, instead of ending. It unlocks mu.
func (s *stream) triesAfter(why reason) bool {
	defer s.unlock()
	return why == upstreamTimeout && s.breakLocked(why)
}

// breakLocked lets a stream wait for its upstream, which has broken off or is
// given up, if it is at a place where that can continue. It must be called with
// mu locked.
func (s *stream) breakLocked(why reason) bool {
	s.facts.Lock()
	t := s.triesLocked()
	if t == nil || s.gone || s.at() != stageOpen || s.body != eventStreamBody || !s.splicer.MayResume() ||
		t.body != nil && t.body.found.Load() {
		s.facts.Unlock()
		return false
	}
	id, ok := t.positionLocked(s)
	if !ok && !t.live {
		s.facts.Unlock()
		return false
	}
	s.stage.Store(uint32(stageRetrying))
	t.why, t.id = why, id
	// Handlers that do not return cannot be called again.
	t.until, t.inside = now()+instant(leavePatience), true
	torn := s.splicer.Resume(nil)
	s.facts.Unlock()
	t.attempt.cancel(errStreamEnded)
	if len(torn) > 0 {
		s.watchWrite()
		if s.sendLocked(s.age(), torn, nil) != nil {
			s.cancel(errStreamEnded)
			return true
		}
	}
	s.scheduleLocked()
	return true
}

// positionLocked returns where the upstream should continue. ok is false if there
// is no position. It must be called with the stream's facts locked.
func (t *tries) positionLocked(s *stream) (id string, ok bool) {
	p := positionOf(t.entered.Header.Get("Last-Event-ID"))
	if id, committed := s.splicer.Scanner().LastEventID(); committed {
		p.commit(id)
	}
	return p.value()
}

// reopen lets the upstream's bytes pass again.
func (s *stream) reopen(upstream string) {
	s.mu.Lock()
	defer s.unlock()
	age := s.age()
	s.facts.Lock()
	if s.at() != stageRetrying {
		s.facts.Unlock()
		return
	}
	s.stage.Store(uint32(stageOpen))
	s.client.upstream = upstream
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	s.facts.Unlock()
	s.scheduleLocked()
}

// giveUpWaiting ends a stream that has retried for the longest allowed time.
func (s *stream) giveUpWaiting() {
	s.facts.Lock()
	err := errTriesOver
	if s.triesLocked().inside {
		err = errHandlersStay
	}
	s.facts.Unlock()
	s.giveUp(err)
}

// giveUp ends a retrying stream, because its upstream does not come back.
func (s *stream) giveUp(err error) {
	s.facts.Lock()
	retries := s.at() == stageRetrying
	if retries {
		s.giveUpLocked(err)
	}
	s.facts.Unlock()
	if retries {
		s.cutAtBoundary()
	}
}

// giveUpLocked must be called with facts locked. Whoever holds mu cuts the stream
// on unlocking.
func (s *stream) giveUpLocked(err error) {
	t := s.triesLocked()
	t.gaveUp = err
	s.why = t.why
	s.moveLocked(stageEnding, endPatience)
}

// refuseLocked gives up because a later body is not an event stream. It returns
// false if the body is the first one. It must be called with facts locked.
func (s *stream) refuseLocked() bool {
	t := s.triesLocked()
	if t == nil || t.count == 0 {
		return false
	}
	t.noBody = true
	if s.at() == stageOpen {
		s.giveUpLocked(errors.New("upstream_retry: the upstream's answer is no event stream"))
	}
	return true
}

// gaveUpLocked returns why the stream has given up on its upstream; nil: it has
// not. It must be called with facts locked.
func (s *stream) gaveUpLocked() error {
	if t := s.triesLocked(); t != nil {
		return t.gaveUp
	}
	return nil
}

// gaveUpCleanly reports whether the stream has given up on its upstream, and its
// client reconnects after a clean end.
func (s *stream) gaveUpCleanly() bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.gaveUpLocked() != nil && s.kind.eventSource && !s.broken
}
