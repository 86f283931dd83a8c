// Package journal keeps what an upstream has sent for the clients that read
// it: whole events, in order, numbered from 1, bounded in bytes. It knows
// neither HTTP nor clocks, and starts no goroutine.
//
// One goroutine appends; any number of [Cursor] read. A reader takes no lock
// that others want, gets slices of the journal's own memory and never holds up
// the appender. What a reader has been given does not change and stays valid
// for as long as it is held, whatever the journal drops meanwhile.
package journal

import (
	"errors"
	"sort"
	"sync"
	"sync/atomic"
)

// Policy says what is dropped first when a journal is full.
type Policy uint8

const (
	// KeepNewest is a ring for many readers: the oldest events are dropped, whether
	// they have been read or not; only the newest one always stays. Readers get
	// whole blocks. A reader that falls behind gets [ErrLagged].
	KeepNewest Policy = iota

	// KeepUnsent is for one reader at a time, which may be away: what it has been
	// sent is dropped first, oldest first, and what it has not been sent is never
	// dropped. When that fills the journal, Append takes no more. Readers get bytes
	// as they come, even those of an unfinished event.
	KeepUnsent
)

const (
	// largestEvent is the largest newest event of a ring, even if its history is
	// smaller. A larger history allows larger events, up to what a chunk can count.
	largestEvent = 16 << 20
	largestEver  = 1 << 30

	// smallestHistory is the smallest size of a journal: a smaller one would be
	// mostly overhead.
	smallestHistory = 1 << 10

	// passingHistory bounds what is on its way to a client if nothing is kept any
	// more.
	passingHistory = 64 << 10

	// unsettled is how much a journal may grow before its budget counts it.
	unsettled = 4 << 10
)

var (
	// ErrEventTooLarge means that one event is larger than the journal can hold.
	// With KeepNewest the unfinished event is lost, and the run with it. With
	// KeepUnsent continue with [Journal.Pass].
	ErrEventTooLarge = errors.New("an event is larger than the history")

	// ErrLagged means that the reader has fallen behind: events that come next
	// are gone.
	ErrLagged = errors.New("the reader has fallen behind")

	// ErrDiscarded means that the journal has been discarded, or that it was closed
	// before an append.
	ErrDiscarded = errors.New("the journal has been discarded")
)

// Journal is a sequence of events. Offsets count its bytes from its beginning.
// Only one goroutine may call Append, Commit, Rollback and Pass; any goroutine
// may call the other methods.
//
// There are many journals, and most have left the processor's caches by the time
// of their next event, so the fields that it uses are next to each other and
// first.
type Journal struct {
	mu      sync.Mutex
	policy  Policy
	passing bool // what has been sent is not kept
	over    bool // closed or discarded: nothing may be appended

	starved atomic.Bool             // the appender waits for room
	offered atomic.Bool             // in the budget's heap; readers see this without its lock
	tail    *chunk                  // the last chunk; nil: there is none
	end     int64                   // after the last byte
	edge    int64                   // the last event boundary
	events  uint64                  // how many events have ended
	bytes   int                     // held, overhead included
	settled int                     // how much of that the budget has counted
	closed  atomic.Pointer[closing] // nil: open
	readers []*Cursor
	alone   [1]*Cursor // initial memory for readers

	budget  *Budget
	history int
	evicted func()
	server  Server // of resting readers; set before there is one

	chunks []*chunk          // oldest first; none before the first byte
	start  int64             // the event boundary where the oldest kept event begins
	gone   uint64            // how many events ended before start
	ids    map[string]idSpot // the first of each id that is kept; nil until there is one
	last   mark              // the id in force at edge

	slowest uint64  // no reader has been given fewer events
	fastest uint64  // some reader has been given this many
	reader  *Cursor // KeepUnsent: the one that counts
	sent    int64   // KeepUnsent: what has been sent, while there is no reader

	room chan struct{} // tells the appender that there is room; made when it first waits

	// Guarded by the budget's lock.
	charged   int
	heapIndex int // counts from 1; 0: not in the heap
	inEnded   bool
	removed   bool
}

// closing is how a journal ended.
type closing struct{ cause error }

// idSpot is where an id that is kept was first committed.
type idSpot struct {
	offset int64
	count  int // how often it was committed in what is kept
}

// Block describes the bytes since the last event boundary. Only KeepNewest uses
// the ids: a backlog is read by its numbers.
type Block struct {
	Event  bool   // a client dispatches an event
	SetsID bool   // the block commits an id field of the upstream
	ID     string // that id; empty for none, or for one that no client can send back
	Told   string // what logs show for one that no client can send back

	RepeatsID bool // it commits the same id again
	Invalid   bool // it contains invalid UTF-8
}

// Append adds bytes to the unfinished block and returns how many it has taken.
// They are copied. Readers see them after [Journal.Publish], and those of a ring
// not before [Journal.Commit] either.
//
// It takes fewer bytes, without an error, if it must not drop what is in the way:
// with KeepUnsent what the reader has not been sent, with KeepNewest what not
// even the fastest reader has been given, if there are readers. Append the rest
// when [Journal.Room] says so.
func (j *Journal) Append(p []byte) (n int, err error) {
	for {
		j.mu.Lock()
		if j.over {
			j.mu.Unlock()
			return n, ErrDiscarded
		}
		n += j.fillLocked(p[n:])
		j.mu.Unlock()
		if n == len(p) {
			return n, nil
		}
		grown, err := j.budget.grow(j, len(p)-n)
		if !grown {
			j.Publish()
			return n, err
		}
	}
}

// fillLocked writes as much of p into the last chunk as fits.
func (j *Journal) fillLocked(p []byte) int {
	c := j.tail
	if c == nil || c.sealed {
		return 0
	}
	n := copy(c.buf[c.used:], p)
	c.used += n
	j.end += int64(n)
	return n
}

// Commit says that the stream is at an event boundary. It returns how many events
// have ended, which is the number of this one if it is one. No block may begin
// with the LF of the CR that ended the one before: a client that starts there
// would treat it as a line of its own.
func (j *Journal) Commit(b Block) uint64 {
	j.mu.Lock()
	if j.passing || j.over {
		events := j.events
		j.mu.Unlock()
		return events
	}
	j.edge = j.end
	// There is no chunk if no byte has come since the last one was dropped.
	if c := j.tail; c != nil {
		at := c.used
		if c.firstBoundary < 0 {
			c.firstBoundary = int32(at)
		}
		c.lastBoundary = int32(at)
		if b.Event {
			j.events++
			before := cap(c.ends)
			c.ends = append(c.ends, uint32(at))
			j.bytes += 4 * (cap(c.ends) - before)
		}
		if b.Invalid {
			c.invalid.Store(c.end())
		}
		if b.RepeatsID {
			c.repeats.Store(c.end())
		}
		if b.SetsID && j.policy == KeepNewest {
			j.markIDLocked(c, b)
		}
		if j.policy == KeepNewest {
			j.fitLocked(c)
		}
	}
	due := j.bytes-j.settled >= unsettled || j.policy == KeepNewest && j.bytes > j.history
	events := j.events
	j.mu.Unlock()
	if due {
		j.budget.settle(j)
	}
	return events
}

func (j *Journal) markIDLocked(c *chunk, b Block) {
	id := b.ID
	j.last = mark{id: id, told: b.Told, events: j.events, offset: c.end()}
	c.ids = append(c.ids, idMark{mark: j.last, end: uint32(c.used)})
	j.bytes += j.last.cost()
	if id == "" {
		return
	}
	if j.ids == nil {
		j.ids = make(map[string]idSpot)
	}
	spot := j.ids[id]
	if spot.count == 0 {
		spot.offset = c.end()
	}
	spot.count++
	j.ids[id] = spot
}

// fitLocked ends a chunk that was made for one large event: otherwise the next
// event would be kept and dropped together with it.
func (j *Journal) fitLocked(c *chunk) {
	if len(c.buf) <= largestChunk {
		return
	}
	c.sealed = true
	if visible, _ := c.visible(); visible == 0 && c.used < len(c.buf)-len(c.buf)/4 {
		j.bytes += c.used - len(c.buf)
		c.buf = append(make([]byte, 0, c.used), c.buf[:c.used]...)
	}
}

// Publish makes what has been appended and committed visible to the readers, and
// wakes those that wait. Call it once for all that the upstream has sent at a
// time.
func (j *Journal) Publish() {
	j.mu.Lock()
	j.publishLocked()
	due := j.wakeLocked()
	j.mu.Unlock()
	if due != nil {
		j.server.Serve(due)
	}
}

func (j *Journal) publishLocked() {
	c := j.tail
	if c == nil {
		return
	}
	n := c.used
	if j.policy == KeepNewest {
		n = int(j.edge - c.base)
	}
	c.publish(n)
}

// wakeLocked wakes the readers that wait, and returns those that rest: the server
// must read for them.
func (j *Journal) wakeLocked() (due *Due) {
	for _, r := range j.readers {
		switch r.state.Load() {
		case waiting:
			if r.state.CompareAndSwap(waiting, held) {
				r.Wake()
			}
		case resting:
			if j.over || j.server == nil {
				r.giveBackIf(resting)
			} else if r.state.CompareAndSwap(resting, lent) {
				due = due.add(r)
			}
		}
	}
	return due
}

// Rollback drops the unfinished block of a ring: the upstream has broken off
// inside it, and no reader has seen any of it.
func (j *Journal) Rollback() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.policy != KeepNewest || j.over {
		return
	}
	c := j.tail
	if c == nil {
		return
	}
	c.used = int(j.edge - c.base)
	j.end = j.edge
	if c.used == 0 && len(c.buf) > largestChunk { // no reader can have seen a byte of it
		j.bytes -= len(c.buf)
		c.buf = make([]byte, smallestChunk)
		j.bytes += len(c.buf)
	}
}

// Pass stops keeping anything: from now on the journal only passes bytes on to
// its present reader, and takes more as that reader takes them. Events are no
// longer counted.
func (j *Journal) Pass() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.passing = true
}

// Close says that no more will come, and how the upstream ended: nil is a clean
// end. Readers first get what is there. The unfinished block of a ring is
// dropped.
func (j *Journal) Close(cause error) {
	j.Rollback()
	j.mu.Lock()
	if j.over {
		j.mu.Unlock()
		return
	}
	j.publishLocked()
	j.over = true
	j.closed.Store(&closing{cause})
	j.wakeLocked() // no reader is due: each sees the end itself
	j.mu.Unlock()
	j.budget.offerEnded(j)
}

// Discard frees the memory at once. Readers get [ErrDiscarded] after what they
// already hold.
func (j *Journal) Discard() {
	j.budget.discard(j)
}

// discardLocked also needs the budget's lock.
func (j *Journal) discardLocked() {
	j.over = true
	j.closed.Store(&closing{ErrDiscarded})
	for _, c := range j.chunks {
		c.next.Store(dropped)
	}
	j.chunks, j.tail, j.ids = nil, nil, nil
	j.start, j.gone = j.end, j.events
	j.bytes, j.settled = 0, 0
	j.wakeLocked()
	j.tellRoom()
}

// Room returns a channel that receives a value when Append, which has taken fewer
// bytes, may take more. Only the appender may use it.
func (j *Journal) Room() <-chan struct{} { return j.room }

// starve says that the appender may have to wait for room, before it checks
// whether there is some: readers then report what they take.
func (j *Journal) starve() {
	if j.room == nil {
		j.room = make(chan struct{}, 1)
	}
	j.starved.Store(true)
}

// tellRoom wakes the appender if it waits for room.
func (j *Journal) tellRoom() {
	if j.starved.Load() && j.starved.CompareAndSwap(true, false) {
		select {
		case j.room <- struct{}{}:
		default:
		}
	}
}

// Figures are those of a journal at one moment.
type Figures struct {
	Events uint64 // how many have ended
	Gone   uint64 // how many of them are no longer kept
	Unsent uint64 // KeepUnsent: how many have not been sent
	Bytes  int    // held, overhead included
}

// Figures returns the journal's figures.
func (j *Journal) Figures() Figures {
	j.mu.Lock()
	defer j.mu.Unlock()
	f := Figures{Events: j.events, Gone: j.gone, Bytes: j.bytes}
	if j.policy == KeepUnsent {
		f.Unsent = j.events - j.eventsAtLocked(j.sentLocked())
	}
	return f
}

// chunkAtLocked is the chunk that holds the byte at an offset, or the first one
// after it; nil if that byte is still to come.
func (j *Journal) chunkAtLocked(offset int64) *chunk {
	i := sort.Search(len(j.chunks), func(i int) bool { return j.chunks[i].end() > offset })
	if i < len(j.chunks) {
		return j.chunks[i]
	}
	if c := j.tail; c != nil && c.end() == offset && !c.sealed {
		return c // the next byte goes here, if it fits
	}
	return nil
}

// eventsAtLocked is how many events have ended at an offset.
func (j *Journal) eventsAtLocked(offset int64) uint64 {
	i := sort.Search(len(j.chunks), func(i int) bool { return j.chunks[i].end() >= offset })
	switch {
	case i == len(j.chunks):
		return j.events
	case offset <= j.chunks[i].base:
		return max(j.chunks[i].before, j.gone)
	}
	return max(j.chunks[i].eventsAt(offset), j.gone)
}
