package caddysse

import (
	"context"
	"encoding/binary"
	"math"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// bodyKind says what a stream's body is, and so whether frames are allowed.
type bodyKind uint8

const (
	eventStreamBody bodyKind = iota
	encodedBody              // some Content-Encoding: a frame would corrupt it
	otherBody                // says text/event-stream and is a JSON document
)

// stream is one live stream, the client's half: the only owner of its
// ResponseWriter from the headers on. It does not know who feeds it.
//
// There are many streams, most of them quiet, so every field costs. The fields
// that a write uses are next to each other, because most streams have left the
// processor's caches by the time of their next write.
type stream struct {
	// mu guards w and everything that decides what may be written next. It is held
	// during writes, so it may be held as long as a client does not read: code that
	// must not wait for the client uses TryLock. Unlock it with unlock.
	mu sync.Mutex

	// facts guards what observers read. It is never held during a write. Inside it,
	// only the agenda's lock and a journal's may be taken.
	facts sync.Mutex

	w      http.ResponseWriter
	frames *frames // which frames its client can take

	arrived   instant       // when the request came; ages count from here
	lastHeard time.Duration // age at which the client was last sent something; mu
	lastBytes time.Duration // age at which the upstream last sent something; facts

	// moved is the age at which the current write last made progress; 0: there is
	// none.
	moved atomic.Int64

	longestGap time.Duration // the longest time the upstream sent nothing; facts
	bytes      uint64        // of the upstream's body; facts
	wait       time.Duration // silence after which the next frame is due; 0: none; mu

	stage     atomic.Uint32 // a stage; changes with facts locked
	body      bodyKind      // changes with both locked
	failed    reason        // what the writer's first error means; nothing is sent after it; mu
	unflushed bool          // mu
	told      bool          // the client has been sent the error event; mu
	why       reason        // of an early end that was requested; facts
	gone      bool          // the handlers have left, and the ResponseWriter with them; changes with both locked
	broken    bool          // a write was broken off by an early end; facts
	kind      kind          // does its client reconnect by itself?
	started   bool          // it is registered
	headed    bool          // the headers have gone out; facts
	proto     proto

	// splicer decides which bytes are sent. What it says about the upstream's body
	// changes with both locked.
	splicer eventstream.Splicer

	// The fields that a write rarely uses.
	h          *Handler      // the settings and the totals
	firstEvent time.Duration // age at which the client had the first event; 0: none yet; facts
	opened     time.Duration // age at which the headers went out
	due        instant       // when the stage is over, if nothing happens first; facts
	heartbeats uint32        // facts
	deferred   uint32        // heartbeats that were due where none is allowed; facts

	agendaIndex    int32  // kept by the agenda
	status         uint16 // of the client's response
	upstreamStatus uint16 // of the upstream's response; facts

	ctx    context.Context         // the client's request's
	cancel context.CancelCauseFunc // ends the upstream's half
	rare   *rareStream             // nil for most; facts, once the stream has started
	fed    *fed                    // if a run feeds it; nil: its handlers do
	chunks net.Conn                // to which chunks may be written; nil: none; mu

	// Neighbours among the live streams of the same name, guarded by the
	// group's lock.
	previous, next *stream

	id        uuid.UUID // the request's
	client    client    // who is at the other end
	ended     *report   // when it has been accounted for; facts
	accounted sync.Once
	unwatch   func() bool
}

// rareStream is what few streams need.
type rareStream struct {
	key      keyHash                  // the client's key for the limit, if not its address
	panicked any                      // a panic on a goroutine where no server would recover it
	control  *http.ResponseController // of the connection, if writers in between hide it
	tries    *tries                   // nil: no upstream_retry; set before the stream starts
	letGo    func()                   // lets the request continue without its handlers; nil: impossible
	drainDue instant                  // when a drain ends it; 0: none does; facts
	excused  bool                     // a stop of the process has made its stage longer; facts
}

// rarely returns the rare part, and makes it if there is none. Once the stream
// has started, the caller must hold facts.
func (s *stream) rarely() *rareStream {
	if s.rare == nil {
		s.rare = new(rareStream)
	}
	return s.rare
}

// newStream makes the stream of a request. It has not started yet.
func (x *exchange) newStream(status int) *stream {
	s := &stream{
		h:       x.h,
		w:       x.w,
		arrived: x.arrived,
		ctx:     x.r.Context(),
		cancel:  x.cancelFeed(),
		client:  x.newClient(),
		status:  uint16(status),
		proto:   protoOf(x.r),
		kind:    x.kind,
		frames:  x.frames,
	}
	s.stage.Store(uint32(stageOpen))
	switch {
	case x.rare == nil:
	case x.rare.fed != nil:
		s.fed = x.rare.fed
		s.fed.greeting.owe(s)
	case x.rare.unknown:
		x.oweLost(s)
	}
	if x.rare != nil {
		s.id = x.rare.id
		if x.rare.key != (keyHash{}) {
			s.rarely().key = x.rare.key
		}
		if t := x.rare.tries; t != nil {
			t.attempt = x.attempt
			s.rarely().tries = t
			s.cancel = t.cancel
		}
		if abandon := x.rare.abandon; abandon != nil {
			s.rarely().letGo = sync.OnceFunc(func() { close(abandon) })
		}
	}
	return s
}

// age is the time since the request came.
func (s *stream) age() time.Duration { return time.Duration(now() - s.arrived) }

// countsLocked must be called with facts locked.
func (s *stream) countsLocked() counts {
	if s.fed.hasNothing() {
		return counts{heartbeats: uint64(s.heartbeats), deferred: uint64(s.deferred)}
	}
	return counts{
		events:     s.splicer.Scanner().Events(),
		bytes:      s.bytes,
		heartbeats: uint64(s.heartbeats),
		deferred:   uint64(s.deferred),
	}
}

// start sends the headers, takes the reserved place, if there is one, and
// registers the stream.
func (s *stream) start(reserved *place) {
	s.ownWriteTimeouts()
	if s.h.writeTimeout > 0 {
		peer.LimitUnsent(peer.Accepted(s.ctx))
	}
	s.open()
	s.h.group.add(s, reserved.use())
	s.started = true
	if s.h.deadClientTimeout > 0 {
		peer.FromContext(s.ctx).Watch(s.h.deadClientTimeout)
	}
	s.joinDrain()
	collector.observeOpened(s)
	s.h.tellOpened(s)
	s.unwatch = context.AfterFunc(s.ctx, s.clientLeft)
}

// open sends the headers and starts the clocks.
func (s *stream) open() {
	s.mu.Lock()
	defer s.unlock()
	err := s.sendHeadersLocked()
	s.facts.Lock()
	if s.id == uuid.Nil {
		s.id = newID(s.ctx) // handlers around this one may have used it on seeing the headers
	}
	s.opened = s.age()
	s.headed = true
	s.lastBytes = s.opened
	s.facts.Unlock()
	s.lastHeard = s.opened
	if err != nil {
		return
	}
	if s.body == eventStreamBody {
		if s.kind.resumable && s.fed == nil {
			s.toldReconnection(s.frames.oweRetry(&s.splicer))
		}
		s.wait = s.frames.prelude
		if s.wait == 0 || s.splicer.Spoken() {
			s.wait = s.frames.wait()
		}
	}
	s.scheduleLocked()
}

func (s *stream) sendHeadersLocked() error {
	s.watchWrite()
	s.moves(s.age())
	defer s.rests()
	s.w.WriteHeader(int(s.status))
	s.unflushed = true
	if s.fed != nil {
		if err := s.sendFirstLocked(); err != nil {
			return err
		}
	}
	return s.flushLocked()
}

// scheduleLocked makes the agenda call tick when the next thing is due, if any.
func (s *stream) scheduleLocked() {
	s.facts.Lock()
	defer s.facts.Unlock()
	age := s.age()
	wait, _ := s.untilEndLocked(age, false)
	if s.isLiveLocked() {
		if s.wait > 0 && s.body == eventStreamBody {
			wait = min(wait, sum(s.lastHeard, s.wait)-age)
		}
	} else {
		wait = time.Duration(s.due - now())
	}
	if wait < never {
		s.callIn(wait)
	}
}

// watchWrite makes the agenda call tick when a write that begins now has taken
// too long.
func (s *stream) watchWrite() {
	if timeout := s.h.writeTimeout; timeout > 0 {
		s.h.agenda.hasten(s, now().plus(timeout))
	}
}

// moves records that a write has begun, or made progress, at an age.
func (s *stream) moves(age time.Duration) { s.moved.Store(max(int64(age), 1)) }

// rests records that the write is done.
func (s *stream) rests() { s.moved.Store(0) }

// callIn makes the agenda call tick after a wait. It must be called with facts
// locked, so that the deadline of a stage that begins at the same time is not
// lost.
func (s *stream) callIn(wait time.Duration) {
	s.h.agenda.set(s, now().plus(wait))
}

// untilEndLocked returns the shortest time until the stream's own limits end it,
// and which limit. During a write, the upstream does not count as silent. It must
// be called with facts locked.
func (s *stream) untilEndLocked(age time.Duration, writing bool) (wait time.Duration, why reason) {
	wait = never
	retrying := s.at() == stageRetrying
	if t := s.triesLocked(); retrying {
		wait, why = time.Duration(t.until-now()), t.why
	}
	if timeout := s.h.writeTimeout; timeout > 0 {
		left := timeout
		if moved := time.Duration(s.moved.Load()); writing && moved > 0 {
			left = max(sum(moved, timeout)-age, s.h.agenda.stopGrace())
		}
		if left < wait {
			wait, why = left, writeTimeout
		}
	}
	isRuns := s.fed != nil && s.at() != stageWaiting // the run has its own limits
	if timeout := s.h.upstreamTimeout; timeout > 0 && s.headed && !writing && !retrying && !isRuns {
		silentSince := s.arrived + instant(s.lastBytes)
		if left := sum(s.lastBytes, timeout, s.h.agenda.stoppedSince(silentSince)) - age; left < wait {
			wait, why = left, upstreamTimeout
		}
	}
	if limit := s.h.MaxDuration; limit != nil && limit.Duration > 0 && s.headed && s.resumesLocked() {
		jitter := time.Duration(s.share() * float64(max(limit.Jitter, 0)))
		if left := sum(s.opened, time.Duration(limit.Duration), jitter) - age; left < wait {
			wait, why = left, maxDuration
		}
	}
	if s.rare != nil && s.rare.drainDue != 0 && s.resumesLocked() {
		if left := time.Duration(s.rare.drainDue - now()); left < wait {
			wait, why = left, drained
		}
	}
	return wait, why
}

// share is a number from 0 to 1 that differs from stream to stream. It is derived
// from the id, so that it needs no memory.
func (s *stream) share() float64 {
	return float64(binary.BigEndian.Uint64(s.id[8:])<<2) / math.MaxUint64
}

// resumes reports whether the stream may be ended early: its client reconnects by
// itself, and its body has event boundaries to end at.
func (s *stream) resumes() bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.resumesLocked()
}

// resumesLocked must be called with facts locked.
func (s *stream) resumesLocked() bool {
	return s.kind.resumable && s.body == eventStreamBody
}

// unlock unlocks mu. An early end that was requested in the meantime could not lock
// mu, and relies on this check.
func (s *stream) unlock() {
	s.mu.Unlock()
	if s.isEnding() {
		s.cutAtBoundary()
	}
}
