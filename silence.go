package caddysse

import "time"

// silence measures for how long an upstream has sent nothing, without the time
// in which the process did not run: it looks again and again, and what is
// between two looks counts for no longer than it should have been.
type silence struct {
	timer  *time.Timer
	looked instant
	since  time.Duration // of silence at the last look
}

func (s *silence) stop() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// look returns how long the silence has been. pulse is when to look at the
// latest after the last look.
func (s *silence) look(at, heard instant, pulse time.Duration) time.Duration {
	if heard > s.looked {
		s.since, s.looked = 0, heard
	}
	s.since += min(max(time.Duration(at-s.looked), 0), pulse+stopSlack)
	s.looked = at
	return s.since
}

// watchSilenceLocked ends the upstream of a run when that has sent nothing for
// too long.
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
			r.feed.hears() // it is not listened to
		}
		left := timeout - r.silence.look(now(), instant(r.feed.heard.Load()), pulse)
		if left > 0 {
			r.silence.timer.Reset(min(left, pulse))
			return
		}
		go r.isSilent()
	})
}
