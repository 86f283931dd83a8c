package caddysse

import "time"

// silence measures for how long an upstream has sent nothing, without the time in
// which the process did not run. It looks at regular intervals, and the time
// between two looks counts as at most that interval.
type silence struct {
	timer  *time.Timer
	looked instant
	since  time.Duration // silence up to the last look
}

func (s *silence) stop() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// look returns how long the silence has been. pulse is the longest time until the
// next look.
func (s *silence) look(at, heard instant, pulse time.Duration) time.Duration {
	if heard > s.looked {
		s.since, s.looked = 0, heard
	}
	s.since += min(max(time.Duration(at-s.looked), 0), pulse+stopSlack)
	s.looked = at
	return s.since
}

// watchSilenceLocked ends the upstream of a run that has sent nothing for too
// long.
func (r *run) watchSilenceLocked() {
	timeout := r.h.upstreamTimeout
	if timeout <= 0 {
		return
	}
	pulse := max(min(timeout/4, maxPulse), minPulse)
	r.silence.stop()
	r.silence = silence{looked: now()}
	r.silence.timer = time.AfterFunc(min(pulse, timeout), func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.stage != runOpen {
			return
		}
		if r.feed.waits.Load() {
			r.feed.hears() // it is not read
		}
		left := timeout - r.silence.look(now(), instant(r.feed.heard.Load()), pulse)
		if left > 0 {
			r.silence.timer.Reset(min(left, pulse))
			return
		}
		go r.isSilent()
	})
}
