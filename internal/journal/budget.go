package journal

import (
	"container/heap"
	"slices"
	"sync"
)

// Budget bounds how many bytes the journals of one kind hold together. Its lock
// is taken when chunks are added and dropped, not for each event. A journal's own
// lock may be taken inside it, never the other way round.
type Budget struct {
	policy Policy

	mu       sync.Mutex
	limit    int
	used     int
	journals int
	heap     longest    // journals that have something to drop
	ended    []*Journal // KeepUnsent: journals that have ended and of which all has been sent, in that order
	calls    []func()   // callbacks for when the locks are free
}

// NewBudget returns a budget of that many bytes for journals of one policy.
func NewBudget(policy Policy, limit int) *Budget {
	return &Budget{policy: policy, limit: limit}
}

// SetLimit changes the limit. The excess is dropped at the next append.
func (b *Budget) SetLimit(limit int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit = limit
}

// Used returns how many bytes the journals hold, overhead included, and how
// many journals there are.
func (b *Budget) Used() (bytes, journals int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used, b.journals
}

// Open returns a new journal, or nil if the budget is used up. began may be an id
// of the upstream's, which counts as the id at the journal's beginning. If the
// budget drops an ended journal, it calls that journal's evicted, which must not
// block.
func (b *Budget) Open(history int, began string, evicted func()) *Journal {
	b.mu.Lock()
	defer b.unlockAndTell()
	// What can be dropped later may free some room, but the existing journals will
	// need that.
	reserve := max(2*largestChunk, b.limit/64)
	if b.policy == KeepUnsent {
		b.reclaimLocked(reserve)
	}
	if b.used+reserve > b.limit {
		return nil
	}
	b.journals++
	return &Journal{
		budget:  b,
		policy:  b.policy,
		history: max(history, smallestHistory),
		evicted: evicted,
		last:    mark{id: began},
	}
}

// unlockAndTell unlocks the budget, and then calls the callbacks.
func (b *Budget) unlockAndTell() {
	calls := b.calls
	b.calls = nil
	b.mu.Unlock()
	for _, call := range calls {
		call()
	}
}

// grow gives a journal a chunk for want more bytes.
func (b *Budget) grow(j *Journal, want int) (bool, error) {
	b.mu.Lock()
	defer b.unlockAndTell()
	j.mu.Lock()
	if j.over {
		j.mu.Unlock()
		return false, ErrDiscarded
	}
	var (
		grown bool
		err   error
	)
	if b.policy == KeepNewest {
		grown, err = j.growRingLocked(want)
	} else {
		grown, err = j.growBacklogLocked()
	}
	b.chargeLocked(j)
	j.mu.Unlock()
	b.reclaimLocked(0)
	return grown, err
}

// settle adds a journal's growth to the budget, and trims both.
func (b *Budget) settle(j *Journal) {
	b.mu.Lock()
	defer b.unlockAndTell()
	j.mu.Lock()
	if b.policy == KeepNewest {
		j.trimRingLocked()
	}
	b.chargeLocked(j)
	j.mu.Unlock()
	b.reclaimLocked(0)
}

// chargeLocked counts what a journal holds now. Both locks must be held.
func (b *Budget) chargeLocked(j *Journal) {
	if j.removed {
		return
	}
	b.used += j.bytes - j.charged
	j.charged, j.settled = j.bytes, j.bytes
	if j.heapIndex > 0 {
		heap.Fix(&b.heap, j.heapIndex-1)
	} else if len(j.chunks) > 0 {
		b.offerLocked(j)
	}
}

// offerLocked adds a journal to those that have something to drop.
func (b *Budget) offerLocked(j *Journal) {
	if j.heapIndex == 0 && !j.removed {
		heap.Push(&b.heap, j)
	}
}

// offer is offerLocked for readers, after they have read something that may be
// dropped.
func (b *Budget) offer(j *Journal) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.offerLocked(j)
}

// offerEnded records that a journal has ended and that all of it has been sent.
func (b *Budget) offerEnded(j *Journal) {
	if b.policy != KeepUnsent {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	j.mu.Lock()
	ended := j.endedLocked()
	j.mu.Unlock()
	if ended && !j.inEnded && !j.removed {
		j.inEnded = true
		b.ended = append(b.ended, j)
	}
}

// endedLocked reports whether the journal is closed and all of it sent.
func (j *Journal) endedLocked() bool {
	return j.closed.Load() != nil && j.sentLocked() >= j.end
}

// reclaimLocked drops what may be dropped until there is room for this many
// bytes.
func (b *Budget) reclaimLocked(room int) {
	for b.used+room > b.limit && len(b.ended) > 0 {
		j := b.ended[0]
		b.ended = b.ended[1:]
		j.inEnded = false
		j.mu.Lock()
		ended := j.endedLocked()
		j.mu.Unlock()
		if ended { // no reader has come back to an earlier place in the meantime
			b.discardLocked(j)
			if j.evicted != nil {
				b.calls = append(b.calls, j.evicted)
			}
		}
	}
	for b.used+room > b.limit && len(b.heap) > 0 {
		j := b.heap[0]
		j.mu.Lock()
		var fell bool
		if b.policy == KeepNewest {
			fell = j.dropOldestLocked()
		} else {
			fell = j.reader != nil && j.dropSentLocked()
		}
		if fell {
			b.chargeLocked(j)
		} else {
			heap.Pop(&b.heap) // until it has something to drop again
		}
		j.mu.Unlock()
	}
}

func (b *Budget) discard(j *Journal) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.discardLocked(j)
}

func (b *Budget) discardLocked(j *Journal) {
	if j.removed {
		return
	}
	j.removed = true
	b.journals--
	b.used -= j.charged
	j.charged = 0
	if j.heapIndex > 0 {
		heap.Remove(&b.heap, j.heapIndex-1)
	}
	if j.inEnded {
		j.inEnded = false
		b.ended = slices.DeleteFunc(b.ended, func(other *Journal) bool { return other == j })
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.discardLocked()
}

// longest implements heap.Interface: the longest journal is the first.
type longest []*Journal

func (h longest) Len() int           { return len(h) }
func (h longest) Less(i, j int) bool { return h[i].charged > h[j].charged }

func (h longest) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIndex, h[j].heapIndex = i+1, j+1
}

func (h *longest) Push(x any) {
	j := x.(*Journal)
	*h = append(*h, j)
	j.heapIndex = len(*h)
	j.offered.Store(true)
}

func (h *longest) Pop() any {
	last := (*h)[len(*h)-1]
	(*h)[len(*h)-1] = nil
	*h = (*h)[:len(*h)-1]
	last.heapIndex = 0
	last.offered.Store(false)
	return last
}
