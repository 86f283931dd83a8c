package journal

import (
	"slices"
	"sync/atomic"
)

const (
	// smallestChunk is the size of a journal's first chunk: a quiet stream should
	// not pay for a busy one. Each chunk is twice as large as the one before it, up
	// to largestChunk.
	smallestChunk = 512
	largestChunk  = 16 << 10

	// chunkOverhead is the cost of a chunk without its bytes and its index.
	chunkOverhead = 256

	// idOverhead is the cost of an id without its text: its entries in the chunk
	// and in the journal's map.
	idOverhead = 144
)

// chunk is a piece of the journal. Bytes that readers may have seen never change,
// so readers get slices of buf, and keep them after the journal has dropped the
// chunk.
//
// The fields that an event uses come first: see [Journal].
type chunk struct {
	base   int64  // offset of the first byte
	before uint64 // how many events had ended at base

	// buf is replaced only while no reader can see a byte of it.
	buf  []byte
	used int // bytes written; set by the appender, under the journal's lock

	ends          []uint32 // where its events end
	firstBoundary int32    // the first event boundary after base; -1: none
	lastBoundary  int32    // and the last one; -1: none

	// published is how many bytes readers may see, and how many events end in them.
	// It is one word, so that a reader gets both as of one moment.
	published atomic.Uint64

	// next is the chunk that follows, set after the last change of published.
	// It is dropped once the journal has dropped this chunk: otherwise one slow
	// reader would keep everything that came after its place.
	next atomic.Pointer[chunk]

	sealed bool // nothing more is added, even if there is room

	// Where the last block with invalid UTF-8 ends, and the last one that commits
	// the id in force again; 0: there is none.
	invalid, repeats atomic.Int64

	ids    []idMark // where ids were committed
	atBase mark     // the id in force at base
}

// dropped stands for everything after a chunk that the journal has dropped.
var dropped = new(chunk)

// mark is an id in force, how many events had ended when it was committed, and
// where its block ended.
type mark struct {
	id     string
	told   string // replaces id in logs, if no client can send that back
	events uint64
	offset int64
}

// idMark is an id that was committed in a chunk.
type idMark struct {
	mark
	end uint32 // where its block ends
}

// cost is what a mark adds to the journal's size.
func (m mark) cost() int { return idOverhead + len(m.id) + len(m.told) }

func (c *chunk) end() int64 { return c.base + int64(c.used) }

// events is how many events have ended at the chunk's end.
func (c *chunk) events() uint64 { return c.before + uint64(len(c.ends)) }

// cost is what the chunk adds to the journal's size.
func (c *chunk) cost() int {
	cost := chunkOverhead + len(c.buf) + 4*cap(c.ends)
	for _, m := range c.ids {
		cost += m.cost()
	}
	return cost
}

// publish makes the first n bytes visible to readers.
func (c *chunk) publish(n int) {
	c.published.Store(uint64(n)<<32 | uint64(len(c.ends)))
}

// visible is how many bytes readers may see, and how many events have ended
// with them.
func (c *chunk) visible() (n int, events uint64) {
	p := c.published.Load()
	return int(p >> 32), c.before + p&(1<<32-1)
}

// eventsAt is how many events have ended at an offset inside the chunk.
func (c *chunk) eventsAt(offset int64) uint64 {
	n, found := slices.BinarySearch(c.ends, uint32(offset-c.base))
	if found {
		n++
	}
	return c.before + uint64(n)
}

// idAt is the id in force at an offset inside the chunk.
func (c *chunk) idAt(offset int64) mark {
	m := c.atBase
	for _, next := range c.ids {
		if c.base+int64(next.end) > offset {
			break
		}
		m = next.mark
	}
	return m
}
