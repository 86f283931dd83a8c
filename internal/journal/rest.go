package journal

import (
	"sync"
	"sync/atomic"
)

// A reader that has read everything can rest: from then on a [Server] reads for
// it, so that an event for many readers does not wake a goroutine for each. Only
// one goroutine at a time holds a cursor, and its state says which.
const (
	held    uint32 = iota // by the reader
	waiting               // by the reader, which is woken when there is more
	resting               // by no one: the server is called when there is more
	lent                  // by the server
)

// Server reads for readers that rest.
type Server interface {
	// Serve is called with the readers for which there is something new. It must
	// not block, and must not read itself.
	Serve(due *Due)
}

// ServedBy sets the server for resting readers. It must be called before there is
// one.
func (j *Journal) ServedBy(s Server) { j.server = s }

// Due are the resting readers that have something new to read.
type Due struct {
	cursors []*Cursor
	next    atomic.Int64
}

var dues = sync.Pool{New: func() any { return new(Due) }}

func (d *Due) add(c *Cursor) *Due {
	if d == nil {
		d = dues.Get().(*Due)
	}
	d.cursors = append(d.cursors, c)
	return d
}

// Len is how many readers there were.
func (d *Due) Len() int { return len(d.cursors) }

// Next returns the function with which one of the readers has called
// [Cursor.Rest], and nil if there is no other reader left. Any goroutine may call
// it.
func (d *Due) Next() (deliver func(worker any)) {
	i := d.next.Add(1) - 1
	if i >= int64(len(d.cursors)) {
		return nil
	}
	return d.cursors[i].deliver
}

// Recycle is called when it is no longer used.
func (d *Due) Recycle() {
	clear(d.cursors)
	d.cursors = d.cursors[:0]
	d.next.Store(0)
	dues.Put(d)
}

// Rest lends the cursor to the journal's server. When there is more, the server
// calls deliver with an argument of its choice. deliver reads, and ends with
// [Cursor.Rested] or [Cursor.GiveBack]. The channel receives a value when the
// cursor may be the reader's again: see [Cursor.IsHeld]. A reader that can't wait
// for that calls [Cursor.Reclaim].
func (c *Cursor) Rest(deliver func(worker any)) <-chan struct{} {
	c.deliver = deliver
	select {
	case <-c.wake: // from before
	default:
	}
	chunk, offset := c.chunk, c.offset // while the reader still holds them
	c.state.Store(resting)
	if c.j.hasMore(chunk, offset) {
		c.giveBackIf(resting)
	}
	return c.wake
}

// IsHeld reports whether the cursor is the reader's again.
func (c *Cursor) IsHeld() bool { return c.state.Load() == held }

// Rested says that the server has read everything. It returns false if there is
// more by now, and the server must continue.
func (c *Cursor) Rested() bool {
	chunk, offset := c.chunk, c.offset
	c.state.Store(resting)
	switch {
	case c.wanted.Load():
		c.giveBackIf(resting)
	case c.j.hasMore(chunk, offset):
		return !c.state.CompareAndSwap(resting, lent)
	}
	return true
}

// GiveBack gives the cursor back to its reader.
func (c *Cursor) GiveBack() {
	c.state.Store(held)
	c.Wake()
}

// giveBackIf gives it back unless someone else holds it by now.
func (c *Cursor) giveBackIf(state uint32) {
	if c.state.CompareAndSwap(state, held) {
		c.Wake()
	}
}

// Reclaim takes the cursor back. If the server is reading, it waits until that is
// over.
func (c *Cursor) Reclaim() {
	c.wanted.Store(true)
	for !c.state.CompareAndSwap(resting, held) && c.state.Load() != held {
		<-c.wake
	}
	c.wanted.Store(false)
}
