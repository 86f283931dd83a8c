package journal

import "slices"

// chunkSizeLocked is how large the next chunk is.
func (j *Journal) chunkSizeLocked() int {
	size := smallestChunk
	if c := j.tail; c != nil {
		size = 2 * len(c.buf)
	} else if j.end > 0 {
		size = largestChunk // the journal has been busy
	}
	return max(min(size, largestChunk, j.history/8), smallestChunk/4)
}

// addChunkLocked appends a chunk, which begins with the bytes of head.
func (j *Journal) addChunkLocked(size int, head []byte) *chunk {
	c := &chunk{
		base:          j.end,
		before:        j.events,
		atBase:        j.last,
		buf:           make([]byte, size),
		firstBoundary: -1,
		lastBoundary:  -1,
	}
	c.used = copy(c.buf, head)
	j.end += int64(c.used)
	if tail := j.tail; tail != nil {
		j.publishLocked()
		tail.sealed = true
		tail.next.Store(c)
	}
	j.chunks, j.tail = append(j.chunks, c), c
	j.bytes += c.cost()
	return c
}

// growRingLocked makes room for want more bytes of the unfinished block, which
// stays contiguous: so every slice that a reader gets ends at a boundary.
func (j *Journal) growRingLocked(want int) (bool, error) {
	c := j.tail
	unfinished := int(j.end - j.edge)
	need := unfinished + want
	most := max(largestEvent, min(j.history, largestEver))
	if need > most {
		return false, ErrEventTooLarge
	}
	inPlace := unfinished > 0 && c.base == j.edge // no reader can have seen a byte of it
	size := max(j.chunkSizeLocked(), need)
	cost := chunkOverhead + size
	switch {
	case inPlace:
		size = min(max(need, 2*len(c.buf)), most)
		cost = size - len(c.buf)
	case unfinished > 0: // more will probably come
		size = max(size, min(2*need, largestChunk))
		cost = chunkOverhead + size
	}
	j.starve()
	for j.bytes+cost > j.history {
		if victim := j.victimLocked(); victim >= 0 && !j.takenLocked(j.chunks[victim].events()) {
			return false, nil
		}
		if !j.dropOldestLocked() {
			break
		}
	}
	j.starved.Store(false)
	switch {
	case inPlace:
		j.bytes += cost
		grown := make([]byte, size)
		copy(grown, c.buf[:c.used])
		c.buf = grown
	case unfinished > 0:
		head := c.buf[j.edge-c.base : c.used]
		c.used -= unfinished
		j.end = j.edge
		j.addChunkLocked(size, head)
	default:
		j.addChunkLocked(size, nil)
	}
	return true, nil
}

// takenLocked reports whether the fastest reader has been given this many events,
// or there is no reader: the upstream is read no faster than that.
func (j *Journal) takenLocked(events uint64) bool {
	if events <= j.fastest {
		return true
	}
	waiting := false
	for _, r := range j.readers {
		if r.told {
			continue
		}
		waiting = true
		if j.fastest = max(j.fastest, r.held.Load()); events <= j.fastest {
			return true
		}
	}
	return !waiting
}

// trimRingLocked drops what exceeds the journal's own history.
func (j *Journal) trimRingLocked() {
	for j.bytes > j.history {
		victim := j.victimLocked()
		if victim < 0 || !j.takenLocked(j.chunks[victim].events()) || !j.dropOldestLocked() {
			return
		}
	}
}

// victimLocked is the chunk of a ring that is dropped first: the oldest one,
// except the one with the newest event and the one that is being filled; -1 if
// there is no other. Comments after the newest event are dropped before that
// event.
func (j *Journal) victimLocked() int {
	victim := 0
	if len(j.chunks) > 0 && len(j.chunks[0].ends) > 0 && j.chunks[0].events() == j.events {
		victim = 1
	}
	if victim >= len(j.chunks)-1 {
		return -1
	}
	return victim
}

// dropOldestLocked drops a chunk of a ring. The budget's lock must be held, too.
func (j *Journal) dropOldestLocked() bool {
	victim := j.victimLocked()
	if victim < 0 {
		return false
	}
	c := j.chunks[victim]
	if victim == 0 {
		j.chunks[0] = nil
		j.chunks = j.chunks[1:]
		j.start, j.gone = j.chunks[0].base, j.chunks[0].before
	} else {
		j.chunks[0].next.Store(j.chunks[2])
		j.chunks = slices.Delete(j.chunks, 1, 2)
	}
	c.next.Store(dropped)
	j.bytes -= c.cost()
	j.forgetIDsLocked(c)
	j.findLaggedLocked()
	return true
}

// forgetIDsLocked removes the ids of a dropped chunk from the map. If one comes
// again later, that becomes its place.
func (j *Journal) forgetIDsLocked(c *chunk) {
	for _, m := range c.ids {
		spot := j.ids[m.id]
		switch {
		case m.id == "":
			continue
		case spot.count == 1:
			delete(j.ids, m.id)
			continue
		case spot.offset == c.base+int64(m.end):
			spot.offset = j.nextWithIDLocked(m.id, spot.offset)
		}
		spot.count--
		j.ids[m.id] = spot
	}
}

// nextWithIDLocked is where an id comes again after an offset.
func (j *Journal) nextWithIDLocked(id string, after int64) int64 {
	for _, c := range j.chunks {
		for _, m := range c.ids {
			if end := c.base + int64(m.end); m.id == id && end > after {
				return end
			}
		}
	}
	return after
}

// findLaggedLocked notifies the readers whose next events are gone, because a
// reader that is blocked in a write does not look at its cursor.
func (j *Journal) findLaggedLocked() {
	if j.gone <= j.slowest {
		return
	}
	slowest := j.events
	for _, r := range j.readers {
		held := r.held.Load()
		if held < j.gone && held >= r.keptEvents && !r.told {
			r.told = true
			if r.lagged != nil {
				j.budget.calls = append(j.budget.calls, r.lagged)
			}
		}
		if !r.told {
			slowest = min(slowest, held)
		}
	}
	j.slowest = slowest
}

// growBacklogLocked adds a chunk if there is room for one, or if dropping what
// has been sent makes room.
func (j *Journal) growBacklogLocked() (bool, error) {
	limit := j.history
	if j.passing {
		limit = min(limit, passingHistory)
	}
	j.starve()
	size := j.chunkSizeLocked()
	for j.bytes+chunkOverhead+size > limit && j.dropSentLocked() {
	}
	size = min(size, limit-j.bytes-chunkOverhead)
	if size < smallestChunk/4 {
		if !j.passing && len(j.chunks) > 0 && j.chunks[0].end() > j.edge {
			j.starved.Store(false)
			return false, ErrEventTooLarge
		}
		return false, nil
	}
	j.starved.Store(false)
	j.addChunkLocked(size, nil)
	return true, nil
}

// sentLocked is how much of a backlog has been sent.
func (j *Journal) sentLocked() int64 {
	if j.reader != nil {
		return j.reader.sent.Load()
	}
	return j.sent
}

// dropSentLocked drops the oldest chunk of a backlog if all of it has been sent,
// and the event at its end too. The budget's lock must be held, too.
func (j *Journal) dropSentLocked() bool {
	if len(j.chunks) == 0 {
		return false
	}
	c := j.chunks[0]
	start := j.firstBoundaryFromLocked(c.end())
	if start < 0 || start > j.sentLocked() || c.used == 0 {
		return false
	}
	gone := j.eventsAtLocked(start)
	j.chunks[0] = nil
	j.chunks = j.chunks[1:]
	if len(j.chunks) == 0 {
		j.tail = nil
	}
	j.start, j.gone = start, gone
	c.next.Store(dropped)
	j.bytes -= c.cost()
	return true
}

// firstBoundaryFromLocked is the first event boundary at an offset or after it;
// -1: there is none yet.
func (j *Journal) firstBoundaryFromLocked(offset int64) int64 {
	if j.passing {
		return offset
	}
	for _, c := range j.chunks {
		switch {
		case c.end() < offset:
		case c.end() == offset:
			if int(c.lastBoundary) == c.used {
				return offset
			}
		case c.firstBoundary >= 0:
			return c.base + int64(c.firstBoundary)
		}
	}
	return -1
}
