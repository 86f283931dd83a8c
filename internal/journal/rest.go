package journal

import (
	"sync"
	"sync/atomic"
)

// A reader that has all that there is can rest: from then on a [Server] reads for
// it, so that an event for many readers does not wake a goroutine for each. A
// cursor is one goroutine's at a time, and its state says whose.
const (
	held    uint32 = iota // the reader's
	waiting               // the reader's, which is told when there is more
	resting               // nobody's: the server is told when there is more
	lent                  // the server's
)

// Server reads for readers that rest.
type Server interface {
	// Serve is called with those for which there is something new. It must not
	// block, nor read itself.
	Serve(due *Due)
}

// ServedBy says who reads for readers that rest. It is called before there is
// one.
func (j *Journal) ServedBy(s Server) { j.server = s }

// Due is readers that rest and have something new to read.
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

// Next returns what one of the readers has called [Cursor.Rest] with, and nil where
// there is no other one left. It is for any number of goroutines.
func (d *Due) Next() (deliver func(worker any)) {
	i := d.next.Add(1) - 1
	if i >= int64(len(d.cursors)) {
		return nil
	}
	return d.cursors[i].deliver
}

// Recycle is called when nobody uses it any more.
func (d *Due) Recycle() {
	clear(d.cursors)
	d.cursors = d.cursors[:0]
	d.next.Store(0)
	dues.Put(d)
}

// Rest lends the cursor to the journal's server. When there is more, that calls
// deliver, with whatever it wants to tell, which reads, and ends with
// [Cursor.Rested] or [Cursor.GiveBack]. The
// channel gets a value when the cursor may be the reader's again: see
// [Cursor.IsHeld]. A reader that can't wait for that calls [Cursor.Reclaim].
func (c *Cursor) Rest(deliver func(worker any)) <-chan struct{} {
	c.deliver = deliver
	select {
	case <-c.wake: // from before
	default:
	}
	chunk, offset := c.chunk, c.offset // as long as they are the reader's
	c.state.Store(resting)
	if c.j.hasMore(chunk, offset) {
		c.giveBackIf(resting)
	}
	return c.wake
}

// IsHeld reports whether the cursor is the reader's again.
func (c *Cursor) IsHeld() bool { return c.state.Load() == held }

// Rested says that who reads for a reader has come to the end of what there is.
// It returns false where there is more by now, and who reads is to go on.
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

// giveBackIf gives it back unless it is somebody else's meanwhile.
func (c *Cursor) giveBackIf(state uint32) {
	if c.state.CompareAndSwap(state, held) {
		c.Wake()
	}
}

// Reclaim takes the cursor back. Where somebody is reading for the reader, it
// waits until that has come to an end.
func (c *Cursor) Reclaim() {
	c.wanted.Store(true)
	for !c.state.CompareAndSwap(resting, held) && c.state.Load() != held {
		<-c.wake
	}
	c.wanted.Store(false)
}
