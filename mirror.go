package caddysse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// leastPending is how many bytes a run may always have waiting for the store,
	// even with a small history.
	leastPending = 1 << 20

	// mostPending is the same for all runs of a store together.
	mostPending = 64 << 20

	// largestIdleBlock is the largest buffer that a run keeps for its next event.
	largestIdleBlock = 4 << 10

	// largestWrite is about how many bytes of a run are written at a time.
	largestWrite = 256 << 10
)

// mirror is what a store has of a run, or is about to get: whole events, which
// are also in the run's own journal. The handlers' goroutine adds to it, and
// never waits for the store. If the store does not accept something in time, the
// run continues as without resume.
type mirror struct {
	d       *storeSession
	run     *run
	key     store.Key
	ttl     time.Duration
	limit   int // bytes that may wait
	release func()

	lost atomic.Bool // the store does not have all that it should

	// What follows belongs to the handlers' goroutine.
	block   []byte // what came after the last event, without complete comments
	started int    // where the incomplete block begins
	tokenAt int    // where the run's token was cut out of block; -1: nowhere

	mu      sync.Mutex
	begin   []byte // nil: the store has it
	waiting []store.Event
	taken   int     // how many of them are being written
	size    int     // bytes of all waiting events
	since   instant // since when something has been waiting
	stage   mirrorStage
	end     []byte // to be written; nil: nothing, or the store has it
	said    []byte // the end that the store has accepted
	stored  uint64 // the newest event that it has accepted
	queued  bool   // among the session's dirty mirrors, or being written
}

// mirrorStage is what happens to the part of a run that a store has.
type mirrorStage uint8

const (
	mirrorOpen    mirrorStage = iota
	mirrorEnded               // the run has ended: the store keeps it for its window
	mirrorLeft                // the process exits: the run is left to the other nodes
	mirrorDropped             // the store must keep nothing
	mirrorDone                // nothing more is written: the store knows, or can't be told
)

// newMirror begins to write a new run to the store. release ends the run's use of
// the session.
func (d *storeSession) newMirror(r *run, begin []byte, release func()) *mirror {
	rs := r.h.resuming
	m := &mirror{
		d:       d,
		run:     r,
		key:     keyOf(r.token()),
		ttl:     sum(rs.window, d.lease, d.lease),
		limit:   max(4*rs.history, leastPending),
		release: release,
		tokenAt: -1,
		begin:   begin,
		since:   now(),
	}
	d.mu.Lock()
	d.mirrors[m] = struct{}{}
	d.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queueLocked()
	return m
}

// add appends bytes to the incomplete block.
func (m *mirror) add(p []byte) { m.block = append(m.block, p...) }

// addID appends the line with the id of an event, but not the run's token in it.
// With the token, a client can come back, so it does not leave this process.
func (m *mirror) addID(line []byte) {
	at := bytes.Index(line, []byte(runIDPrefix)) + len(runIDPrefix)
	m.add(line[:at])
	m.tokenAt = len(m.block)
	m.add(line[at+runTokenLength:])
}

// commit says that a block is complete, and whether it is event n. A block that
// is not an event is kept only if it has a new reconnection time.
func (m *mirror) commit(event bool, n uint64, retry bool) {
	switch {
	case event:
		m.event(n)
	case retry: // the last one counts
		m.block = append(m.block[:0], m.block[m.started:]...)
		m.started = len(m.block)
	default:
		m.rollback()
	}
}

// rollback drops the incomplete block.
func (m *mirror) rollback() {
	m.block = m.block[:m.started]
	m.tokenAt = -1
}

// event queues event n for the store.
func (m *mirror) event(n uint64) {
	head := uint64(m.tokenAt+1) << 1
	if m.run.feed.useless.Load() {
		head |= uselessMark
	}
	data := make([]byte, 0, len(m.block)+binary.MaxVarintLen32)
	data = binary.AppendUvarint(data, head)
	data = append(data, m.block...)
	m.block, m.started = m.block[:0], 0
	m.tokenAt = -1
	if cap(m.block) > largestIdleBlock {
		m.block = nil // a quiet run does not need it
	}
	m.mu.Lock()
	if m.stage != mirrorOpen || m.lost.Load() {
		m.mu.Unlock()
		return
	}
	m.waiting = append(m.waiting, store.Event{Number: n, Data: data})
	m.size += len(data)
	tooMuch := m.size > m.limit
	m.queueLocked()
	m.mu.Unlock()
	if m.d.pending.Add(int64(len(data))) > mostPending || tooMuch {
		m.lose()
	}
}

// uselessMark is the lowest bit of the number that an event in a store begins
// with. It says that the upstream's answer is useless, and the event is not from
// the upstream. The other bits are 1 plus the place of the run's token; 0: there
// is none.
const uselessMark = 1

// eventText appends an event as clients get it, with the run's token in its id.
func eventText(dst, data []byte, token string) (text []byte, useless bool, err error) {
	head, n := binary.Uvarint(data)
	at := head >> 1
	if n <= 0 || at > uint64(len(data)-n)+1 {
		return dst, false, errors.New("an event in the store is damaged")
	}
	data, useless = data[n:], head&uselessMark != 0
	if at == 0 {
		return append(dst, data...), useless, nil
	}
	dst = append(dst, data[:at-1]...)
	dst = append(dst, token...)
	return append(dst, data[at-1:]...), useless, nil
}

// finish records how the run ended. The store keeps the run for its window.
func (m *mirror) finish(end runEnd) {
	m.moveTo(mirrorEnded, marshalEnd(end, false))
}

// forget records that no client can come back to the run here any more. On an
// exit, what the store has stays: the run's clients come back to other nodes.
func (m *mirror) forget() {
	if exit.exiting() {
		m.moveTo(mirrorLeft, marshalEnd(runEnd{reason: serverClosed}, true))
		return
	}
	m.moveTo(mirrorDropped, nil)
}

// moveTo moves to a later stage. Only the first end counts.
func (m *mirror) moveTo(stage mirrorStage, end []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage >= stage {
		return
	}
	if m.stage == mirrorOpen {
		if m.end = end; m.lost.Load() {
			m.end = withLoss(m.end)
		}
	}
	m.stage = stage
	m.queueLocked()
}

// queueLocked tells the writer that this run has something to write.
func (m *mirror) queueLocked() {
	if m.queued {
		return
	}
	m.queued = true
	m.since = now()
	m.d.queue(m)
}

// stays returns for how long the run stays in the store, if it is there.
func (m *mirror) stays() (ttl time.Duration, key store.Key, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ttl, m.key, m.begin == nil && m.stage <= mirrorEnded
}

// sayAgain writes the end once more: a client of another node still reads, so the
// store may have lost the end, or may not have accepted it.
func (m *mirror) sayAgain() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stage <= mirrorEnded && m.end == nil && m.said != nil {
		m.end = m.said
		m.queueLocked()
	}
}

// lose records that the store lacks something. The run continues as without
// resume from when its upstream next sends something.
func (m *mirror) lose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loseLocked()
	m.queueLocked()
}

// loseLocked does not tell the writer; its caller must. For other nodes the run
// ends now: its upstream may send nothing for a long time, and their clients must
// know that the store will not get everything.
func (m *mirror) loseLocked() {
	if m.lost.Swap(true) {
		return
	}
	m.dropWaitingLocked(m.taken)
	if m.stage == mirrorOpen {
		m.end = marshalEnd(runEnd{reason: upstreamError}, true)
	} else {
		m.end = withLoss(m.end)
	}
}

// dropWaitingLocked drops what is waiting after the first n events.
func (m *mirror) dropWaitingLocked(n int) {
	dropped := 0
	for _, event := range m.waiting[n:] {
		dropped += len(event.Data)
	}
	m.waiting = slices.Clip(m.waiting[:n])
	m.size -= dropped
	m.d.pending.Add(-int64(dropped))
}

// loseIfLate gives up a run if the store has accepted nothing of it for too long:
// by now, other nodes consider this one dead.
func (m *mirror) loseIfLate() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now()-m.since > instant(m.d.lease) {
		m.loseLocked()
	}
}

// take returns what must be written next; ok is false if there is nothing.
func (m *mirror) take() (w store.Write, ok bool) {
	gone := m.run.feed.journal.Figures().Gone
	m.mu.Lock()
	defer m.mu.Unlock()
	w = store.Write{Run: m.key, TTL: m.ttl}
	switch {
	case m.stage == mirrorDropped:
		w.Drop = true
		return w, true
	case m.lost.Load() && m.begin != nil:
		m.dropWaitingLocked(0)
		return w, false
	}
	for size := 0; m.taken < len(m.waiting) && size < largestWrite; m.taken++ {
		size += len(m.waiting[m.taken].Data)
	}
	w.Begin, w.Events = m.begin, m.waiting[:m.taken:m.taken]
	if !m.lost.Load() {
		w.After = m.stored
	}
	if m.taken > 0 && m.stage < mirrorLeft { // after that, the journal has nothing any more
		w.Oldest = min(gone+1, w.Events[m.taken-1].Number+1)
	}
	if m.taken == len(m.waiting) {
		w.End = m.end
	}
	return w, w.Begin != nil || m.taken > 0 || w.End != nil
}

// settle handles the result of a write, or that there was nothing to write.
func (m *mirror) settle(w store.Write, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queued = false
	if err == nil {
		if n := len(w.Events); n > 0 {
			m.stored = w.Events[n-1].Number
		}
		m.dropTakenLocked() // w.Events is not valid any more
		if w.Begin != nil {
			m.begin = nil
		}
		if w.End != nil {
			m.said, m.end = w.End, nil
		}
		switch {
		case w.Drop, m.stage == mirrorLeft && (m.end == nil || m.lost.Load()):
			m.doneLocked()
		case m.stage == mirrorDropped, len(m.waiting) > 0, m.end != nil && !(m.lost.Load() && m.begin != nil):
			m.queueLocked()
		}
		return
	}
	m.taken = 0
	late := time.Duration(now() - m.since)
	switch {
	case errors.Is(err, store.ErrUnknown):
		m.loseLocked()
		m.dropWaitingLocked(0)
		m.begin = nil
		mayHavePart := w.After > 0 || len(w.Events) > 0
		if m.stage == mirrorDropped && !w.Drop || m.end != nil && mayHavePart {
			m.queueLocked()
			return
		}
		m.end = nil
		if m.stage >= mirrorLeft {
			m.doneLocked()
		}
		return
	case m.stage == mirrorOpen && late > m.d.lease:
		m.loseLocked()
		m.said, m.end = m.end, nil // written when a client still reads, or when the run is over
		return
	case m.stage >= mirrorLeft && late > 2*m.d.lease:
		m.doneLocked() // what the store has expires by itself
		return
	}
	m.queued = true
	m.d.queue(m) // m.since stays as it was
}

func (m *mirror) dropTakenLocked() {
	wrote := 0
	for _, event := range m.waiting[:m.taken] {
		wrote += len(event.Data)
	}
	m.waiting = slices.Delete(m.waiting, 0, m.taken)
	if len(m.waiting) == 0 && cap(m.waiting) > 64 {
		m.waiting = nil
	}
	m.taken = 0
	m.size -= wrote
	m.d.pending.Add(-int64(wrote))
}

// doneLocked ends the mirror: the store gets nothing more from it.
func (m *mirror) doneLocked() {
	m.stage = mirrorDone
	m.taken = len(m.waiting)
	m.dropTakenLocked()
	m.d.dropMirror(m)
	m.release()
}
