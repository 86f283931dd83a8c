package caddysse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// errStreamEnded is what the upstream's side gets for writing to a stream that
// is over, and the cause of its context. It is a cancellation: reverse_proxy
// counts any other failure of a request against the upstream.
var errStreamEnded = fmt.Errorf("sse: the stream has ended: %w", context.Canceled)

// bom is the byte order mark that clients strip, but only as the first bytes of
// a stream (WHATWG HTML, section 9.2.6).
const bom = "\xef\xbb\xbf"

// slowWrite is how long a write may take before it counts that the upstream can
// send nothing meanwhile.
const slowWrite = 100 * time.Millisecond

// endPatience is how long an early end waits for the event that is on its way.
const endPatience = time.Second

// writePatience is how long it then waits for the write that is on its way: most
// end in a moment, and only one that blocks is broken off.
const writePatience = 200 * time.Millisecond

// leavePatience is how long the handlers of a stream that was ended may take to
// leave. The client of one that does not heed its context, as FastCGI's while it
// waits for the upstream, is let go without them.
const leavePatience = 5 * time.Second

// bodyKind says what a stream's body is, and with it whether frames may go.
type bodyKind uint8

const (
	eventStreamBody bodyKind = iota
	encodedBody              // some Content-Encoding: a frame would corrupt it
	otherBody                // says text/event-stream and is a JSON document
)

// stream is one live stream, the client's half: the only owner of its
// ResponseWriter from the headers on. It does not know who feeds it.
//
// There are many of them, most of them quiet: mind what it weighs.
type stream struct {
	*exchange                 // the request it answers
	ctx       context.Context // the request's, over for the upstream's half when cancel is called
	id        uuid.UUID       // the request's
	client    client          // who is at the other end

	// Neighbours among the live streams of the same name, guarded by the
	// group's lock.
	previous, next *stream

	opened time.Duration // age at which the headers went out

	// ending is the reason of an early end that has been asked for.
	ending         atomic.Uint32
	status         uint16 // what the client got
	upstreamStatus uint16 // what the upstream answered; guarded by facts
	proto          proto
	resumable      bool // its client comes back by itself, so it may be ended on purpose
	begun          bool // it is among the live ones
	waiting        bool // started early: the upstream has not answered; guarded by facts

	agendaIndex int32 // kept by the agenda

	// mu guards w and all that decides what may be written next. It is
	// held across writes, so a client that does not read holds it too: whoever
	// must not wait for that client uses TryLock. It is given back by unlock.
	mu        sync.Mutex
	lastHeard time.Duration // age at which the client heard something last
	wait      time.Duration // silence after which the next frame is due; 0: none

	body       bodyKind // changes with facts locked too
	bomHeld    uint8
	failed     reason // what the writer's first error means; nothing goes out behind it
	cut        bool   // ended early; what the upstream still sends is dropped
	closed     bool
	told       bool // the client has been told of the error
	unflushed  bool
	spoken     bool // something followed the headers
	overdue    bool // a frame was due where none may go
	retryOwed  bool // the reconnection time is still to be told
	lfOwed     bool // a frame brought the LF of the upstream's last CR along
	bomChecked bool // the body does not begin with a BOM any more

	// These are guarded by facts.
	headed  bool // the headers have gone out
	gone    bool // the ResponseWriter must not be touched from outside any more
	hurried bool // an early end does not wait for an event boundary any more
	broken  bool // its write was broken off by an early end

	// facts guards what observers ask for. It is never held across a write.
	facts      sync.Mutex
	heartbeats uint32
	deferred   uint32        // heartbeats that were due where none may go
	bytes      uint64        // of the upstream's body
	lastBytes  time.Duration // age at which the upstream sent something last
	longestGap time.Duration // the longest time it sent nothing
	firstEvent time.Duration // age at which the client had the first event; 0: none yet
	scan       eventstream.Scanner
}

// instant is a moment on the monotonic clock. It weighs a third of a time.Time.
type instant time.Duration

// clockStart is where instants count from.
var clockStart = time.Now()

func now() instant { return instant(time.Since(clockStart)) }

// age is the time since the request came.
func (s *stream) age() time.Duration { return time.Duration(now() - s.began) }

// counts is what has gone by.
type counts struct {
	events, bytes, heartbeats, deferred uint64
}

// countsLocked wants facts to be locked.
func (s *stream) countsLocked() counts {
	return counts{
		events:     s.scan.Events(),
		bytes:      s.bytes,
		heartbeats: uint64(s.heartbeats),
		deferred:   uint64(s.deferred),
	}
}

// begin opens the stream, in the place that was reserved for it if any, and
// lets it be known.
func (s *stream) begin(reserved reservation) {
	defer func() {
		if !s.begun { // a writer around this one panicked
			s.h.group.release(reserved, s.client.ip)
		}
	}()
	ownWriteTimeouts(s.ctx, s.w)
	if s.h.writeTimeout > 0 {
		peer.LimitUnsent(peer.Accepted(s.ctx))
	}
	s.open()
	s.uploads().suspend(s.w)
	s.h.group.add(s, reserved)
	s.begun = true
	s.joinDrain()
	if s.h.deadClientTimeout > 0 {
		peer.FromContext(s.ctx).Watch(s.h.deadClientTimeout)
	}
	collector.observeOpened(s)
	s.h.tellOpened(s)
}

// giveConnectionBack undoes what begin did to the connection, and tells what has
// become of it.
func (s *stream) giveConnectionBack() (fate peer.Fate) {
	if s.h.deadClientTimeout > 0 {
		fate = peer.FromContext(s.ctx).Leave(s.h.deadClientTimeout)
	}
	s.uploads().resume()
	return fate
}

// open sends the headers and starts the clocks.
func (s *stream) open() {
	s.mu.Lock()
	defer s.unlock()
	err := s.sendHeadersLocked()
	s.facts.Lock()
	if s.id == uuid.Nil {
		s.id = newID(s.ctx) // handlers around this one may have asked for it on seeing the headers
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
		frames := &s.h.frames
		s.retryOwed = frames.retryMin > 0
		s.wait = frames.prelude
		if s.wait == 0 {
			s.wait = frames.wait()
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
	return s.flushLocked()
}

// scheduleLocked has tick called when the next thing is due, if any.
func (s *stream) scheduleLocked() {
	wait, _ := s.untilEnd(false)
	if s.wait > 0 && s.body == eventStreamBody {
		wait = min(wait, s.lastHeard+s.wait-s.age())
	}
	if wait < never {
		s.callIn(wait)
	}
}

// never is a wait without end.
const never = time.Duration(math.MaxInt64)

// watchWrite has tick called when a write that begins now has taken too long.
func (s *stream) watchWrite() {
	if timeout := s.h.writeTimeout; timeout > 0 {
		s.callIn(timeout)
	}
}

// moves notes that a write has begun, or got further, at an age.
func (s *stream) moves(age time.Duration) { s.moved.Store(max(int64(age), 1)) }

// rests notes that it is done.
func (s *stream) rests() { s.moved.Store(0) }

// callIn has tick called.
func (s *stream) callIn(wait time.Duration) {
	s.h.agenda.set(s, now()+instant(wait))
}

// untilEnd returns how long it is at least until the stream's own limits end
// it, and which. While something is being written, the upstream is not silent.
func (s *stream) untilEnd(writing bool) (wait time.Duration, why reason) {
	wait = never
	age := s.age()
	if timeout := s.h.writeTimeout; timeout > 0 {
		wait, why = timeout, writeTimeout
		if moved := time.Duration(s.moved.Load()); writing && moved > 0 {
			wait = moved + timeout - age
		}
	}
	s.facts.Lock()
	defer s.facts.Unlock()
	if timeout := s.h.upstreamTimeout; timeout > 0 && s.headed && !writing {
		if left := s.lastBytes + timeout - age; left < wait {
			wait, why = left, upstreamTimeout
		}
	}
	if limit := s.h.MaxDuration; limit != nil && limit.Duration > 0 && s.headed && s.resumesLocked() {
		oldest := time.Duration(limit.Duration) + time.Duration(s.share()*float64(max(limit.Jitter, 0)))
		if left := s.opened + oldest - age; left < wait {
			wait, why = left, maxDuration
		}
	}
	return wait, why
}

// share is a number from 0 to 1 that differs from stream to stream. It comes
// from the id, so that it needs no memory.
func (s *stream) share() float64 {
	return float64(binary.BigEndian.Uint64(s.id[8:])<<2) / math.MaxUint64
}

// resumes reports whether the stream may be ended on purpose: its client comes
// back by itself, and its body has event boundaries to end at.
func (s *stream) resumes() bool {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.resumesLocked()
}

// resumesLocked wants facts to be locked.
func (s *stream) resumesLocked() bool {
	return s.resumable && s.body == eventStreamBody
}

// unlock gives mu back. An end that was asked for meanwhile could not get it
// and relies on being looked for here.
func (s *stream) unlock() {
	s.mu.Unlock()
	if s.ending.Load() != 0 {
		s.cutAtBoundary()
	}
}

// write passes on what the upstream sent, and flushes it. Only a stream whose
// first bytes meet a frame or a retry field can take bytes without passing them
// on: those of a BOM, which must not follow anything, or an LF that the client
// has already.
func (s *stream) write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil || len(p) == 0 {
		return 0, err
	}
	lead, body := s.followLocked(p)
	if len(lead) == 0 && len(body) == 0 {
		if s.overdue {
			s.beatLocked() // the silence is still on, and here a frame may go
		}
		return len(p), s.errLocked()
	}
	if err := s.sendLocked(s.lastBytes, lead, body); err != nil {
		return 0, err
	}
	first, slow := s.firstEvent == 0 && s.scan.Events() > 0, s.lastHeard-s.lastBytes > slowWrite
	if first || slow {
		s.facts.Lock()
		if first {
			s.firstEvent = s.lastHeard
		}
		s.lastBytes = s.lastHeard // the upstream was not listened to meanwhile
		s.facts.Unlock()
	}
	return len(p), nil
}

// followLocked takes note of what the upstream sent and returns what the client
// gets for it.
func (s *stream) followLocked(p []byte) (lead, body []byte) {
	if p = s.noteLocked(p); s.body != eventStreamBody || len(p) == 0 {
		return nil, p
	}
	if s.lfOwed {
		s.lfOwed = false
		if p[0] == '\n' {
			p = p[1:]
		}
	}
	if s.scan.LooksLikeJSON() {
		s.facts.Lock()
		s.body = otherBody
		s.facts.Unlock()
		s.h.unprotected(causeOtherBody)
		lead, s.bomHeld = []byte(bom[:s.bomHeld]), 0
		return lead, p
	}
	if s.bomChecked && !s.retryOwed {
		return nil, p
	}
	return s.beginLocked(p)
}

// noteLocked is what observers see of the upstream's bytes. It returns those
// that belong to the stream: all of them, unless an early end waits for the end
// of an event.
func (s *stream) noteLocked(p []byte) []byte {
	age := s.age()
	s.facts.Lock()
	defer s.facts.Unlock()
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	switch {
	case s.body == encodedBody:
	case s.body == eventStreamBody && s.ending.Load() != 0:
		p = p[:s.scanToEndLocked(p)]
	default:
		// What looks like JSON too: its client reads what it says it is.
		s.scan.Scan(p)
	}
	s.bytes += uint64(len(p))
	return p
}

// scanToEndLocked follows what an early end lets through, up to the next event
// boundary, and returns how many bytes that is. The LF of a CR belongs to them:
// some clients look for both. It wants facts to be locked.
func (s *stream) scanToEndLocked(p []byte) (n int) {
	if !s.scan.PendingCR() || !isBoundary(s.scan.Place()) {
		n = s.scan.ScanToBoundary(p)
	}
	if n == len(p) || !s.scan.PendingCR() {
		return n
	}
	if p[n] == '\n' {
		s.scan.Scan(p[n : n+1])
		return n + 1
	}
	s.hurried = true // there is none to wait for
	return n
}

func isBoundary(place eventstream.Place) bool {
	return place == eventstream.Start || place == eventstream.Boundary
}

// beginLocked is followLocked for the first bytes of an event stream.
func (s *stream) beginLocked(p []byte) (lead, body []byte) {
	if !s.bomChecked && (s.spoken || s.retryOwed) {
		for len(p) > 0 && s.bomHeld < uint8(len(bom)) && p[0] == bom[s.bomHeld] {
			s.bomHeld++
			p = p[1:]
		}
		switch {
		case s.bomHeld == uint8(len(bom)):
			s.bomHeld = 0
		case len(p) == 0:
			return nil, nil
		}
	}
	s.bomChecked = true
	if len(p) == 0 {
		return nil, nil
	}
	return s.leadLocked(), p
}

// leadLocked is what comes before the upstream's first bytes: the reconnection
// time, if it is owed, and what was held as the beginning of a BOM.
func (s *stream) leadLocked() (lead []byte) {
	if s.retryOwed {
		s.retryOwed = false
		lead = s.h.frames.retry(lead, s.scan.LineEnding().Text())
	}
	lead = append(lead, bom[:s.bomHeld]...)
	s.bomHeld = 0
	return lead
}

// flush sends what a handler may have left in a buffer on the way. Every write
// has been flushed already, so there is nothing to do, and doing nothing keeps
// one write one flush.
func (s *stream) flush() error {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil {
		return err
	}
	if !s.unflushed {
		return nil
	}
	s.moves(s.age())
	defer s.rests()
	return s.flushLocked()
}

// setWriteDeadline is for handlers that have a deadline of their own.
func (s *stream) setWriteDeadline(deadline time.Time) error {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil {
		return err
	}
	return connectionWriter(s.w).SetWriteDeadline(deadline)
}

func (s *stream) errLocked() error {
	if s.closed || s.cut || s.failed != notEnded {
		return errStreamEnded
	}
	return nil
}

// failLocked notes that the client can't be written to any more.
func (s *stream) failLocked(err error) {
	s.failed = clientClosed
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.failed = writeTimeout
	}
}

// sendLocked writes and flushes. since is the age at which the bytes were there
// to be written.
func (s *stream) sendLocked(since time.Duration, lead, body []byte) error {
	if err := s.passLocked(since, lead, body); err != nil {
		return err
	}
	s.lastHeard = s.age()
	if !s.spoken || s.overdue {
		// The silence is over, and with it the prelude.
		s.spoken, s.overdue = true, false
		s.wait = s.h.frames.wait()
	}
	return nil
}

// passLocked writes piece by piece, so that a client that is slow is not taken
// for one that takes nothing.
func (s *stream) passLocked(since time.Duration, lead, body []byte) error {
	defer s.rests() // also behind a panic
	for _, part := range [2][]byte{lead, body} {
		for len(part) > 0 {
			s.moves(since)
			piece := part[:min(len(part), progressUnit)]
			s.unflushed = true
			if _, err := s.w.Write(piece); err != nil {
				s.failLocked(err)
				return err
			}
			if part = part[len(piece):]; len(part) > 0 {
				since = s.age()
			}
		}
	}
	return s.flushLocked()
}

func (s *stream) flushLocked() error {
	if !s.unflushed {
		return nil
	}
	s.unflushed = false
	err := http.NewResponseController(s.w).Flush()
	if err == nil || errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	s.failLocked(err)
	return err
}

// panicError is a panic on a goroutine of the module's own, such as one of the
// writers around this one may cause.
type panicError struct{ value any }

func (p *panicError) Error() string { return fmt.Sprint("panic: ", p.value) }

// Unwrap makes it a cancellation, as errStreamEnded is one.
func (p *panicError) Unwrap() error { return context.Canceled }

// survive is deferred where no server would recover a panic, which would end the
// process: this one ends the stream, and goes on in the request's goroutine.
func (s *stream) survive() {
	value := recover()
	if value == nil {
		return
	}
	s.h.logger.Error("panic beside a request",
		zap.Any("panic", value),
		zap.ByteString("stack", debug.Stack()))
	s.cancel(&panicError{value})
}

// tick is called by the agenda when something may be due.
func (s *stream) tick() {
	defer s.survive()
	free := s.mu.TryLock()
	left, why := s.untilEnd(!free)
	switch {
	case left <= 0 && why == writeTimeout:
		s.endNow(why)
		return
	case left <= 0:
		if free {
			s.unlock()
		}
		s.end(why)
		return
	case !free:
		// A write is on its way and restarts the clock; if it is stuck, a frame
		// would be stuck behind it.
		s.callIn(min(left, max(s.h.frames.reserve, time.Millisecond)))
		return
	}
	defer s.unlock()
	if s.errLocked() != nil {
		return
	}
	if s.wait > 0 && s.body == eventStreamBody && s.age()-s.lastHeard >= s.wait {
		s.watchWrite() // the agenda has forgotten the stream on calling tick
		s.beatLocked()
		if s.failed != notEnded {
			return
		}
		if s.wait = s.h.frames.wait(); s.overdue && s.wait > 0 {
			s.wait += s.age() - s.lastHeard
		}
	}
	s.scheduleLocked()
}

// beatLocked sends a frame, or notes that it is due and can't go here.
func (s *stream) beatLocked() {
	place, ending, pendingCR := s.scan.Place(), s.scan.LineEnding(), s.scan.PendingCR()
	eol := ending.Text()
	var lead []byte
	if s.retryOwed && place == eventstream.Start {
		lead = s.h.frames.retry(lead, eol)
	}
	if pendingCR && ending != eventstream.CR {
		// The LF of this CR may still come, and behind a frame it would be a
		// blank line. The client gets it first and the upstream's is dropped.
		// (Where lines end in CR, an LF would join the CR that ends the frame.)
		if ending == eventstream.NoLineEnding {
			eol = eventstream.CRLF.Text()
		}
		if !s.lfOwed {
			lead = append(lead, '\n')
		}
	}
	frame, ok := s.h.frames.heartbeat(lead, place, eol)
	if !ok {
		s.overdue = true
		s.facts.Lock()
		s.deferred++
		s.facts.Unlock()
		return
	}
	if err := s.sendLocked(s.age(), nil, frame); err != nil {
		s.cancel(fmt.Errorf("%w: %w", errStreamEnded, err))
		return
	}
	s.retryOwed = s.retryOwed && place != eventstream.Start
	s.lfOwed = pendingCR && ending != eventstream.CR
	s.facts.Lock()
	s.heartbeats++
	s.facts.Unlock()
}

// end asks for an early end and never waits for the client. The first reason
// counts. The end comes at the next event boundary: now, if the stream is at
// one, else behind the event that is on its way, which gets endPatience.
func (s *stream) end(why reason) bool {
	if !s.ending.CompareAndSwap(0, uint32(why)) {
		return false
	}
	if !s.cutAtBoundary() {
		time.AfterFunc(endPatience, s.cutAnyway)
	}
	return true
}

// endNow ends the stream without waiting for an event or for the client.
func (s *stream) endNow(why reason) {
	s.ending.CompareAndSwap(0, uint32(why))
	s.breakOff()
}

// cutAtBoundary cuts a stream that is to end where that harms no event, or where
// it is if that took too long. Whoever holds mu does it on giving it back.
func (s *stream) cutAtBoundary() (done bool) {
	if !s.mu.TryLock() {
		return false
	}
	defer s.mu.Unlock()
	s.facts.Lock()
	hurried := s.hurried
	s.facts.Unlock()
	if !hurried && !s.atBoundaryLocked() {
		return false
	}
	s.cutLocked()
	return true
}

// atBoundaryLocked reports whether an end harms no event, nor a line end.
func (s *stream) atBoundaryLocked() bool {
	if s.body != eventStreamBody {
		return true
	}
	torn := s.scan.PendingCR() && s.scan.LineEnding() != eventstream.CR && !s.lfOwed
	return isBoundary(s.scan.Place()) && !torn
}

// cutAnyway is the end of the patience with an upstream in mid-event or with a
// client that takes no bytes.
func (s *stream) cutAnyway() {
	s.facts.Lock()
	s.hurried = true
	s.facts.Unlock()
	if !s.cutAtBoundary() {
		time.AfterFunc(writePatience, s.breakOff)
	}
}

// breakOff cuts the stream, and a write that is in the way.
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
	if s.proto == http2 && s.stuck() {
		// The reset of the stream has not gone out either.
		peer.Expire(peer.Accepted(s.ctx))
	}
	s.cancel(errStreamEnded)
	time.AfterFunc(endPatience, s.breakOff) // a writer between two pieces may have set a deadline of its own
}

// stuck reports whether a write has got nowhere for the write timeout and the
// time that it takes to break it off.
func (s *stream) stuck() bool {
	moved := time.Duration(s.moved.Load())
	return s.h.writeTimeout > 0 && moved > 0 && s.age()-moved >= s.h.writeTimeout+endPatience
}

func (s *stream) cutLocked() {
	if s.closed || s.cut || s.failed != notEnded {
		return
	}
	s.cut = true
	s.cancel(errStreamEnded)
	ended := weak.Make(s) // there may be many, and most have left in a moment
	time.AfterFunc(leavePatience, func() {
		if s := ended.Value(); s != nil {
			s.letGo()
		}
	})
}

// letGo breaks off a response that its handlers do not leave.
func (s *stream) letGo() {
	s.facts.Lock()
	defer s.facts.Unlock()
	if s.breakWriteLocked() && s.proto == http1 {
		peer.HangUp(peer.Accepted(s.ctx))
	}
}

// aborts reports whether the client must see that its answer is not whole.
func (s *stream) aborts(why reason) bool {
	switch why {
	case upstreamError:
		return !s.told
	case writeTimeout, deadClient, serverClosed:
		return true
	case upstreamTimeout:
		return s.broken || !s.resumable || s.body != eventStreamBody
	case drained, maxDuration, endedByAdmin:
		return s.broken || s.body != eventStreamBody
	}
	return false
}

// breakWriteLocked makes a write that blocks return, unless the handlers have
// left. It goes to the connection's own writer: those around it are not made for
// a second goroutine, while a connection's deadlines may be set from any. It
// wants facts to be locked.
func (s *stream) breakWriteLocked() (done bool) {
	if s.gone {
		return false
	}
	s.broken = true
	past := time.Unix(1, 0)
	own := connectionWriter(s.w)
	_ = own.SetWriteDeadline(past)
	if s.proto == http1 {
		// Before the headers, net/http reads what is left of the request's body.
		_ = own.SetReadDeadline(past)
	}
	return true
}

// boundLastWrite sets a deadline for what is written when the agenda does not
// look any more.
func (s *stream) boundLastWrite() {
	if timeout := s.h.writeTimeout; timeout > 0 {
		_ = connectionWriter(s.w).SetWriteDeadline(time.Now().Add(timeout))
	}
}

// close waits until nobody writes, and lets nobody write again.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.facts.Lock()
	s.gone = true
	s.facts.Unlock()
	s.h.agenda.drop(s)
	if s.bomHeld > 0 && s.errLocked() == nil {
		// The body was a piece of a BOM, which makes it no BOM.
		s.boundLastWrite()
		_ = s.sendLocked(s.age(), s.leadLocked(), nil)
	}
	s.closed = true
	s.facts.Lock()
	defer s.facts.Unlock()
	s.longestGap = max(s.longestGap, s.age()-s.lastBytes)
}
