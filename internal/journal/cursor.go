package journal

import (
	"io"
	"slices"
	"sync/atomic"
)

// Start says where a reader starts.
type Start struct {
	kind startKind
	n    uint64
	id   string
}

type startKind uint8

const (
	startLive startKind = iota
	startLast
	startAfter
	startAfterID
)

// Live starts at the last event boundary, with what comes from now on.
func Live() Start { return Start{kind: startLive} }

// Last starts with the last n events, or with as many as there are.
func Last(n uint64) Start { return Start{kind: startLast, n: n} }

// After starts with the event after number n. If that is gone, it starts with the
// oldest event, and [Cursor.Missed] says how many are lost. A number that has not
// been reached is unknown.
func After(n uint64) Start { return Start{kind: startAfter, n: n} }

// AfterID starts after the block that committed an id of the upstream's, the
// earliest one that is kept. The id with which the journal began counts. An id
// that the journal does not have is unknown.
func AfterID(id string) Start { return Start{kind: startAfterID, id: id} }

// Cursor is one reader's place in a journal. Any goroutine may call Wake. Only
// one goroutine at a time may call the other methods: the reader's, or the
// server's while the reader rests.
//
// The fields that an event uses come first: see [Journal].
type Cursor struct {
	j       *Journal
	wake    chan struct{}
	chunk   *chunk        // nil if there is none yet
	offset  int64         // of the next byte
	gotTo   int64         // where the slice ends that Next last returned
	gotEnds uint64        // and how many events have ended there
	ends    uint64        // how many events have ended at the reader's place
	state   atomic.Uint32 // who holds the cursor
	wanted  atomic.Bool   // its reader waits to get it back
	repeats bool          // it has been given a block that commits the id in force again
	told    bool          // lagged; under the journal's lock

	sent atomic.Int64  // KeepUnsent: up to where the bytes have been sent
	held atomic.Uint64 // how many events have ended in what the reader has been given

	// kept is what a reader of a ring gets when it joins, even if the ring drops it
	// in the meantime.
	kept       []*chunk
	keptEvents uint64 // how many events have ended at the end of it

	begin   Place
	beginAt int64 // the offset of begin
	missed  uint64
	lagged  func()
	deliver func(worker any)
	index   int // in the journal's readers
}

// Place is an event boundary, as it is described to a client.
type Place struct {
	Number uint64 // how many events come before it
	ID     string // the upstream's id in force there; empty: none
	Exact  bool   // no event lies between the block that committed the id and here
}

// Join adds a reader. Its place, what is kept for it and its registration are
// atomic. ok is false if the place is unknown, or if the journal has been
// discarded. If the reader of a ring falls behind, lagged is called once; it must
// not block, and Next then returns [ErrLagged]. With KeepUnsent only the newest
// reader counts: what it has not been sent is not dropped.
func (j *Journal) Join(at Start, lagged func()) (c *Cursor, ok bool) {
	j.mu.Lock()
	end := j.closed.Load()
	offset, missed, ok := j.findLocked(at)
	if !ok || j.passing || end != nil && end.cause == ErrDiscarded {
		j.mu.Unlock()
		return nil, false
	}
	events := j.eventsAtLocked(offset)
	c = &Cursor{
		j:       j,
		begin:   Place{Number: events, ID: j.idAtLocked(offset)},
		beginAt: offset,
		missed:  missed,
		lagged:  lagged,
		wake:    make(chan struct{}, 1),
		chunk:   j.chunkAtLocked(offset),
		offset:  offset,
		gotTo:   offset,
		gotEnds: events,
		ends:    events,
		index:   len(j.readers),
	}
	c.held.Store(events)
	c.sent.Store(offset)
	if len(j.readers) == 0 || events < j.slowest {
		j.slowest = events
	}
	if j.readers == nil {
		j.readers = j.alone[:0]
	}
	j.readers = append(j.readers, c)
	if j.policy == KeepNewest {
		c.keepLocked()
		j.mu.Unlock()
		return c, true
	}
	j.reader = c
	j.mu.Unlock()
	j.tellRoom()
	if !j.offered.Load() {
		j.budget.offer(j)
	}
	return c, true
}

// keepLocked keeps everything that there is when a reader joins a ring.
func (c *Cursor) keepLocked() {
	c.keptEvents = c.j.events
	if c.chunk == nil || c.ends == c.j.events {
		return
	}
	i := slices.Index(c.j.chunks, c.chunk)
	c.kept = slices.Clone(c.j.chunks[i+1:])
}

// findLocked is the offset of a start, and how many events are missing there.
func (j *Journal) findLocked(at Start) (offset int64, missed uint64, ok bool) {
	switch at.kind {
	case startLive:
		return j.edge, 0, true
	case startLast:
		if at.n >= j.events-j.gone {
			return j.start, 0, true
		}
		return j.afterLocked(j.events - at.n), 0, true
	case startAfter:
		switch {
		case at.n > j.events:
			return 0, 0, false
		case at.n <= j.gone:
			return j.start, j.gone - at.n, true
		}
		return j.afterLocked(at.n), 0, true
	}
	if at.id == "" {
		return 0, 0, false
	}
	// The block that committed it may be gone: the place is known as long as all
	// events after it are there.
	if len(j.chunks) > 0 {
		if m := j.chunks[0].atBase; m.id == at.id && m.events == j.gone {
			return j.start, 0, true
		}
	}
	if spot, found := j.ids[at.id]; found {
		return spot.offset, 0, true
	}
	if j.last.id == at.id && j.last.events == j.events {
		return j.edge, 0, true
	}
	return 0, 0, false
}

// afterLocked is the offset after event n, which is kept or the last one gone.
func (j *Journal) afterLocked(n uint64) int64 {
	if n == j.gone {
		return j.start
	}
	i, _ := slices.BinarySearchFunc(j.chunks, n, func(c *chunk, n uint64) int {
		if c.events() < n {
			return -1
		}
		return 1
	})
	c := j.chunks[i]
	return c.base + int64(c.ends[n-c.before-1])
}

// idAtLocked is the id in force at an offset that is kept.
func (j *Journal) idAtLocked(offset int64) string {
	if offset >= j.edge {
		return j.last.id
	}
	if c := j.chunkAtLocked(offset); c != nil {
		return c.idAt(offset).id
	}
	return j.last.id
}

// Begin returns the place where the reader started.
func (c *Cursor) Begin() Place { return c.begin }

// Missed returns how many events were gone when the reader started.
func (c *Cursor) Missed() uint64 { return c.missed }

// Events returns how many events had ended where the reader is.
func (c *Cursor) Events() uint64 {
	if c.j.policy == KeepUnsent {
		// There may be bytes before it is known that they end an event.
		c.j.mu.Lock()
		defer c.j.mu.Unlock()
		return max(c.ends, c.j.eventsAtLocked(c.offset))
	}
	return c.ends
}

// Place returns the place of the last event boundary that the reader has
// passed.
func (c *Cursor) Place() Place {
	c.j.mu.Lock()
	defer c.j.mu.Unlock()
	p := Place{Number: c.ends, ID: c.begin.ID}
	if c.chunk != nil && c.offset >= c.chunk.base {
		m := c.chunk.idAt(c.offset)
		p.ID, p.Exact = m.id, m.id != "" && m.events == c.ends
	}
	if c.j.policy == KeepUnsent {
		p.Number = max(c.ends, c.j.eventsAtLocked(c.offset))
	}
	return p
}

// Next returns the bytes that come next, as many as are contiguous; none if there
// is nothing yet. Those of a ring end at an event boundary. They must not be
// changed, and stay valid. After the last byte it returns [io.EOF] if the
// upstream ended cleanly, else the error with which the journal was closed;
// [ErrLagged] and [ErrDiscarded] if what comes next is gone.
func (c *Cursor) Next() ([]byte, error) {
	for {
		if p := c.look(); p != nil {
			return p, nil
		}
		moved, err := c.move()
		if err != nil {
			c.j.budget.offerEnded(c.j)
			return nil, err
		}
		if !moved {
			return nil, nil
		}
	}
}

// look returns what there is in the reader's chunk.
func (c *Cursor) look() []byte {
	if c.chunk == nil {
		return nil
	}
	n, events := c.chunk.visible()
	at := int(c.offset - c.chunk.base)
	if n <= at {
		return nil
	}
	c.gotTo, c.gotEnds = c.chunk.base+int64(n), events
	c.held.Store(events)
	if c.j.policy == KeepNewest {
		c.j.tellRoom()
	}
	return c.chunk.buf[at:n:n]
}

// move goes on to the next chunk. It reports whether there may be something to
// read.
func (c *Cursor) move() (bool, error) {
	end := c.j.closed.Load() // first, because nothing is published after it
	if c.chunk != nil {
		next := c.chunk.next.Load()
		if n, _ := c.chunk.visible(); n > int(c.offset-c.chunk.base) {
			return true, nil // published in the meantime
		}
		switch {
		case len(c.kept) > 0:
			c.enter(c.kept[0])
			c.kept[0] = nil
			c.kept = c.kept[1:]
			return true, nil
		case next == nil && end == nil:
			return false, nil
		case next == nil:
			return false, end.error()
		case next != dropped:
			c.enter(next)
			return true, nil
		}
	}
	return c.relocate()
}

// enter moves to the beginning of a chunk. Between two chunks there may be a gap,
// where comments have been dropped.
func (c *Cursor) enter(next *chunk) {
	c.chunk = next
	c.offset = max(c.offset, next.base)
}

// relocate finds the chunk of the reader's place again, if the chunk that it was
// reading has been dropped, or if there was none.
func (c *Cursor) relocate() (bool, error) {
	c.j.mu.Lock()
	defer c.j.mu.Unlock()
	end := c.j.closed.Load()
	next := c.j.chunkAtLocked(c.offset)
	switch {
	case end != nil && end.cause == ErrDiscarded:
		return false, ErrDiscarded
	case c.j.policy == KeepNewest && c.ends < c.j.gone, c.j.policy == KeepUnsent && c.offset < c.j.start:
		return false, ErrLagged
	case next == nil && end != nil:
		return false, end.error()
	case next == nil:
		c.chunk = nil
		return false, nil
	}
	c.enter(next)
	n, _ := next.visible()
	if n > int(c.offset-next.base) {
		return true, nil
	}
	if end != nil {
		return false, end.error()
	}
	return false, nil
}

func (end *closing) error() error {
	if end.cause == nil {
		return io.EOF
	}
	return end.cause
}

// Coming describes the bytes that Next last returned: how many events end in
// them, whether they contain invalid UTF-8, and where they end. It is for a ring.
func (c *Cursor) Coming() (events uint64, invalid bool, end Spot) {
	bad, repeats := c.chunk.invalid.Load(), c.chunk.repeats.Load()
	if repeats > c.offset && repeats <= c.gotTo {
		c.repeats = true
	}
	return c.gotEnds - c.ends, bad > c.offset && bad <= c.gotTo, Spot{c, c.chunk, c.gotTo, c.gotEnds, c.repeats}
}

// Advance says that the next n bytes have been sent.
func (c *Cursor) Advance(n int) {
	c.offset += int64(n)
	if c.offset == c.gotTo {
		c.ends = c.gotEnds
	}
	if c.j.policy == KeepUnsent {
		c.sent.Store(c.offset)
		c.j.tellRoom()
		if !c.j.offered.Load() {
			c.j.budget.offer(c.j) // something more may be dropped
		}
	}
}

// Wait returns a channel that receives a value when Next may return more, and
// after each [Cursor.Wake]. Sometimes there is nothing.
func (c *Cursor) Wait() <-chan struct{} {
	c.state.Store(waiting)
	if c.j.hasMore(c.chunk, c.offset) {
		c.Wake()
	}
	return c.wake
}

// Take takes over the cursor of a reader that waits, so that new events do not
// wake the reader. The caller then reads with Next and Advance, and ends with
// Wait, or with Wake to leave the rest to the reader. It returns false if the
// reader does not wait.
func (c *Cursor) Take() bool { return c.state.CompareAndSwap(waiting, held) }

// hasMore checks again after a reader at a place has announced that it waits:
// what is published from then on wakes it.
func (j *Journal) hasMore(at *chunk, offset int64) bool {
	if j.closed.Load() != nil {
		return true
	}
	if at == nil {
		j.mu.Lock()
		defer j.mu.Unlock()
		next := j.chunkAtLocked(offset)
		if next == nil {
			return false
		}
		n, _ := next.visible()
		return next.base+int64(n) > offset
	}
	n, _ := at.visible()
	return n > int(offset-at.base) || at.next.Load() != nil
}

// Wake makes a reader that waits continue, whatever has happened.
func (c *Cursor) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Leave removes the reader from the journal. A backlog remembers what its reader
// has been sent.
func (c *Cursor) Leave() {
	j := c.j
	j.mu.Lock()
	defer j.mu.Unlock()
	if c.index < 0 {
		return
	}
	last := len(j.readers) - 1
	j.readers[c.index] = j.readers[last]
	j.readers[c.index].index = c.index
	j.readers[last] = nil
	j.readers = j.readers[:last]
	if j.alone[0] == c {
		j.alone[0] = nil // of readers that later became several
	}
	c.index = -1
	c.kept = nil
	if j.reader == c {
		j.reader = nil
		j.sent = c.sent.Load()
	}
	j.tellRoom() // the appender may have waited for this reader
}
