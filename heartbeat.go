package caddysse

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
)

const (
	styleAuto  = "auto"
	styleBlock = "block"
	styleLine  = "line"
	styleEvent = "event"
)

// maxReserve bounds the part of an interval that is reserved for the time between
// a timer and the actual write.
const maxReserve = 500 * time.Millisecond

// frames says what the bytes look like that this module adds to a stream, and
// when they are due.
type frames struct {
	eventstream.Frames

	interval time.Duration // the longest silence; 0: no heartbeats
	prelude  time.Duration // silence after the headers before the first frame; 0: none
	reserve  time.Duration // the part of the interval reserved for the time between a timer and the write

	retryMin, retryMax time.Duration // the reconnection time to send; 0: none
}

func newFrames(hb *Heartbeat, retry *Retry) frames {
	if hb == nil {
		hb = new(Heartbeat)
	}
	f := frames{
		Frames:   eventstream.Frames{Comment: hb.Comment, Event: hb.Event, Data: hb.Data, Pad: max(hb.Pad, 0)},
		interval: time.Duration(hb.Interval),
		prelude:  time.Duration(hb.Prelude),
	}
	switch hb.Interval {
	case 0:
		f.interval = defaultHeartbeatInterval
	case off:
		f.interval = 0
	}
	switch {
	case hb.Prelude == off, hb.Prelude == 0 && f.interval == 0:
		f.prelude = 0
	case hb.Prelude == 0:
		f.prelude = defaultPrelude
	}
	if f.interval > 0 && f.prelude >= f.interval {
		f.prelude = 0 // the heartbeat comes first
	}
	f.reserve = maxReserve
	if period := max(f.interval, f.prelude); period > 0 {
		f.reserve = min(period/10, maxReserve)
	}
	switch hb.Style {
	case styleLine:
		f.Style = eventstream.Line
	case styleEvent:
		f.Style = eventstream.Event
	}
	if f.Comment == "" {
		f.Comment = defaultHeartbeatComment
	}
	if retry != nil && retry.Min > 0 {
		f.retryMin, f.retryMax = time.Duration(retry.Min), time.Duration(max(retry.Min, retry.Max))
	}
	return f
}

// wait returns how long a client may receive nothing before a frame is due: 75 %
// to 100 % of the interval, so that streams opened together do not send frames
// together, minus the reserve, so that no silence exceeds the interval.
func (f *frames) wait() time.Duration {
	if f.interval == 0 {
		return 0
	}
	return f.interval - f.reserve - rand.N(f.interval/4-f.reserve+1)
}

// reconnectionTime returns a random one in the range.
func (f *frames) reconnectionTime() time.Duration {
	return f.retryMin + rand.N(sum(f.retryMax-f.retryMin, 1))
}

// retryBlock is a complete stream that contains only a reconnection time.
func (f *frames) retryBlock() []byte {
	var splicer eventstream.Splicer
	f.oweRetry(&splicer)
	return splicer.Block(&f.Frames, nil, nil)
}

// oweRetry makes a stream's client get a reconnection time, and returns it; 0:
// none.
func (f *frames) oweRetry(splicer *eventstream.Splicer) (told time.Duration) {
	if f.retryMin > 0 {
		told = f.reconnectionTime()
		splicer.OweRetry(told)
	}
	return told
}

// tick is called by the agenda when something may be due.
func (s *stream) tick() {
	defer s.survive()
	if s.isAskedEnd() {
		s.tickEnding()
		return
	}
	free := s.mu.TryLock()
	s.facts.Lock()
	left, why := s.untilEndLocked(s.age(), !free)
	retrying := s.at() == stageRetrying
	if left > 0 && !free && !s.gone && s.isLiveLocked() {
		// The current write restarts the clock. If it is stuck, a frame would be
		// stuck too.
		s.callIn(min(left, max(s.frames.reserve, time.Millisecond)))
	}
	s.facts.Unlock()
	switch {
	case left <= 0 && why == writeTimeout:
		if free {
			s.unlock()
		}
		s.endNow(why)
		return
	case left <= 0 && retrying && isBreak(why):
		if free {
			s.unlock()
		}
		s.giveUpWaiting()
		return
	case left <= 0:
		if !free || !s.triesAfter(why) {
			s.end(why)
		}
		return
	case !free:
		return
	}
	defer s.unlock()
	if s.errLocked() != nil {
		return
	}
	if s.wait > 0 && s.body == eventStreamBody && s.age()-s.lastHeard >= s.wait {
		s.watchWrite() // the agenda has dropped the stream by calling tick
		s.beatLocked()
		if s.failed != notEnded {
			return
		}
		if s.wait = s.frames.wait(); s.splicer.Overdue() && s.wait > 0 {
			s.wait = sum(s.wait, s.age()-s.lastHeard)
		}
	}
	s.scheduleLocked()
}

// beatLocked sends a frame, or records that one is due and not allowed here.
func (s *stream) beatLocked() {
	ends := s.endsSilenceLocked()
	frame, ok := s.splicer.Frame(&s.frames.Frames, nil)
	if ok {
		if err := s.sendLocked(s.age(), frame, nil); err != nil {
			s.cancel(fmt.Errorf("%w: %w", errStreamEnded, err))
			return
		}
		if ends {
			s.wait = s.frames.wait()
		}
	}
	s.facts.Lock()
	defer s.facts.Unlock()
	if ok {
		s.heartbeats++
	} else {
		s.deferred++
	}
}
