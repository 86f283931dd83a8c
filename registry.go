package caddysse

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"
)

// registry holds the streams by the name of their handler. A name stays when its
// handlers are gone, so that totals never decrease; configurations have only a
// few names.
type registry struct {
	mu     sync.Mutex
	groups map[string]*group

	// telling is how many streams have closed, but have not been reported yet.
	telling atomic.Int64
}

// group is what handlers of one name share.
type group struct {
	name string

	// mu guards the fields that follow. It is never held during a write, and inside
	// it only a stream's facts may be locked.
	mu          sync.Mutex
	oldest      *stream
	newest      *stream
	open        [protoCount]int
	opened      [protoCount]uint64
	closed      [reasonCount]uint64
	closedTotal counts // of streams that have closed

	drains []instant // when the drains on reload began that still matter, oldest first

	tries    tryQueue         // of upstream_retry; has its own lock
	reserved int              // places of requests that may become streams
	clients  map[clientID]int // streams and places by client; nil without such a limit

	runs runs
}

// group returns the group of a name, and creates it if there is none.
func (r *registry) group(name string) *group {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.groups[name]
	if g == nil {
		g = &group{name: name}
		if r.groups == nil {
			r.groups = make(map[string]*group)
		}
		r.groups[name] = g
	}
	return g
}

// all returns the groups, sorted by name.
func (r *registry) all() []*group {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*group, 0, len(r.groups))
	for _, g := range r.groups {
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b *group) int { return cmp.Compare(a.name, b.name) })
	return all
}

// streams returns the live streams, each name's oldest first.
func (r *registry) streams() []*stream {
	var all []*stream
	for _, g := range r.all() {
		g.mu.Lock()
		for s := g.oldest; s != nil; s = s.next {
			all = append(all, s)
		}
		g.mu.Unlock()
	}
	return all
}

// stream returns the live stream with the id, or nil.
func (r *registry) stream(id uuid.UUID) *stream {
	for _, g := range r.all() {
		g.mu.Lock()
		s := g.oldest
		for s != nil && s.id != id {
			s = s.next
		}
		g.mu.Unlock()
		if s != nil {
			return s
		}
	}
	return nil
}

// add counts a stream as opened, in its reserved place, if it has one.
func (g *group) add(s *stream, r reservation) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r != noPlace {
		g.reserved--
	}
	if r != clientsPlace {
		g.countClientLocked(s.clientID(), +1)
	}
	g.opened[s.proto]++
	g.open[s.proto]++
	s.previous = g.newest
	if g.newest == nil {
		g.oldest = s
	} else {
		g.newest.next = s
	}
	g.newest = s
}

// remove counts a stream as closed. Its counts move from the live streams to the
// total in one step, so that no scrape sees them twice or not at all.
func (g *group) remove(s *stream, why reason, last counts) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open[s.proto]--
	g.closed[why]++
	g.countClientLocked(s.clientID(), -1)
	g.closedTotal.add(last)
	if s.previous == nil {
		g.oldest = s.next
	} else {
		s.previous.next = s.next
	}
	if s.next == nil {
		g.newest = s.previous
	} else {
		s.next.previous = s.previous
	}
	s.previous, s.next = nil, nil
}

// roll appends the live streams to a slice and returns the group's totals without
// them: the counts are those of closed streams. The caller adds the counts of the
// live streams, each once.
func (g *group) roll(streams []*stream) (totals, []*stream) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for s := g.oldest; s != nil; s = s.next {
		streams = append(streams, s)
	}
	return g.closedTotalsLocked(), streams
}

// closedTotalsLocked are the totals without the counts of live streams.
func (g *group) closedTotalsLocked() totals {
	return totals{name: g.name, open: g.open, opened: g.opened, closed: g.closed, counts: g.closedTotal}
}

// totals are those of a group at one moment.
type totals struct {
	name   string
	open   [protoCount]int
	opened [protoCount]uint64
	closed [reasonCount]uint64
	counts counts
}

func (g *group) totals() totals {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.closedTotalsLocked()
	for s := g.oldest; s != nil; s = s.next {
		s.facts.Lock()
		t.counts.add(s.countsLocked())
		s.facts.Unlock()
	}
	return t
}

// counts are what has passed through streams.
type counts struct {
	events, bytes, heartbeats, deferred uint64
}

func (c *counts) add(other counts) {
	c.events += other.events
	c.bytes += other.bytes
	c.heartbeats += other.heartbeats
	c.deferred += other.deferred
}
