package caddysse

import (
	"container/heap"
	"sync"
	"time"
)

// agenda calls each stream's tick when its time has come. It has one timer for
// all streams of a handler: a timer per stream would be a tenth of the memory
// that a quiet stream may use.
type agenda struct {
	mu      sync.Mutex
	entries entries
	added   entry       // what setLocked adds; a local variable would be allocated
	timer   *time.Timer // nil until there is an entry
	armed   instant     // when the timer fires; 0: it does not
	pool    tickPool

	// pulse is the longest time between two calls of the timer while there is an
	// entry, so that times in which the process did not run are noticed; 0: not
	// needed.
	pulse time.Duration
	stops []stop // the latest ones

	resumed instant // when the timer last fired as late as it does after a stop; 0: it has not
}

// entry says when a stream's tick is due.
type entry struct {
	at instant
	s  *stream
}

// set schedules the stream's tick, instead of any earlier schedule.
func (a *agenda) set(s *stream, at instant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.setLocked(s, at)
}

// hasten schedules the stream's tick, unless it is due sooner anyway.
func (a *agenda) hasten(s *stream, at instant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := int(s.agendaIndex) - 1; i < 0 || at < a.entries[i].at {
		a.setLocked(s, at)
	}
}

func (a *agenda) setLocked(s *stream, at instant) {
	if i := int(s.agendaIndex) - 1; i >= 0 {
		a.entries[i].at = at
		heap.Fix(&a.entries, i)
	} else {
		a.added = entry{at, s}
		heap.Push(&a.entries, &a.added)
		a.added = entry{}
	}
	a.armLocked()
}

// drop forgets a stream.
func (a *agenda) drop(s *stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := int(s.agendaIndex) - 1; i >= 0 {
		heap.Remove(&a.entries, i)
	}
	if len(a.entries) == 0 && a.timer != nil {
		a.timer.Stop()
		a.armed = 0
	}
}

// armLocked lets the timer fire for the first entry. It may fire too early if
// that entry has been dropped, never too late.
func (a *agenda) armLocked() {
	if len(a.entries) == 0 {
		return
	}
	at := now()
	first := a.entries[0].at
	if a.pulse > 0 {
		first = min(first, at+instant(a.pulse))
	}
	if a.armed != 0 && a.armed <= first {
		return
	}
	a.armed = first
	wait := time.Duration(first - at)
	if a.timer == nil {
		a.timer = time.AfterFunc(wait, a.fire)
	} else {
		a.timer.Reset(wait)
	}
}

// fire calls the tick of every stream whose time has come.
func (a *agenda) fire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := now()
	if a.armed != 0 {
		a.noteStopLocked(a.armed, at)
	}
	a.armed = 0
	for len(a.entries) > 0 && a.entries[0].at <= at {
		a.pool.add(heap.Pop(&a.entries).(*stream))
	}
	a.armLocked()
}

// stop is a time in which the process did not run: it was stopped, or got no CPU
// time.
type stop struct{ from, to instant }

const (
	// minPulse is the shortest pulse: a stop is noticed if it is longer than that.
	minPulse = 50 * time.Millisecond
	maxPulse = time.Second

	// stopSlack is how late a timer may fire on a machine that is just busy.
	stopSlack = 100 * time.Millisecond

	// keptStops is how many stops are remembered. More of them during one silence
	// of an upstream are not worth the memory.
	keptStops = 8

	// resumePatience is how long a write has to make progress after a stop, and an
	// event that delays an early end has to arrive.
	resumePatience = 500 * time.Millisecond
)

// noteStopLocked records that a timer that was due fired late.
func (a *agenda) noteStopLocked(due, at instant) {
	if time.Duration(at-due) < stopSlack {
		return
	}
	a.resumed = at
	if a.pulse == 0 {
		return
	}
	if len(a.stops) == keptStops {
		a.stops = append(a.stops[:0], a.stops[1:]...)
	}
	a.stops = append(a.stops, stop{due, at})
}

// stoppedSince returns for how long the process has not run since a moment.
func (a *agenda) stoppedSince(moment instant) (stopped time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.stops {
		if s.to > moment {
			stopped += time.Duration(s.to - max(s.from, moment))
		}
	}
	return stopped
}

// stopGrace returns how much longer a write or an event may take, whatever its time
// limit says, because the process was stopped: the client may have taken all there
// was, and the upstream may have sent the rest, but timers fire before sockets are
// read.
func (a *agenda) stopGrace() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.resumed == 0 {
		return 0
	}
	return max(time.Duration(a.resumed.plus(resumePatience)-now()), 0)
}

// entries implements heap.Interface, and tells each stream where its entry is.
// Push takes an *entry and Pop returns a *stream: pointers need no allocation.
type entries []entry

func (e entries) Len() int           { return len(e) }
func (e entries) Less(i, j int) bool { return e[i].at < e[j].at }

func (e entries) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].s.agendaIndex = int32(i) + 1
	e[j].s.agendaIndex = int32(j) + 1
}

func (e *entries) Push(x any) {
	added := *x.(*entry)
	*e = append(*e, added)
	added.s.agendaIndex = int32(len(*e))
}

func (e *entries) Pop() any {
	last := (*e)[len(*e)-1]
	(*e)[len(*e)-1] = entry{}
	*e = (*e)[:len(*e)-1]
	last.s.agendaIndex = 0
	return last.s
}
