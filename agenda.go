package caddysse

import (
	"container/heap"
	"sync"
	"time"
)

// agenda calls on each stream when its time has come. It is one timer for all
// streams of a handler: a timer of its own would be a tenth of what a quiet
// stream may weigh.
type agenda struct {
	mu      sync.Mutex
	entries entries
	timer   *time.Timer // nil until there is an entry
	armed   instant     // when the timer fires; 0: it does not
}

// entry says when a stream is to be called on.
type entry struct {
	at instant
	s  *stream
}

// set has the stream called on at a moment, instead of any other.
func (a *agenda) set(s *stream, at instant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := int(s.agendaIndex) - 1; i >= 0 {
		a.entries[i].at = at
		heap.Fix(&a.entries, i)
	} else {
		heap.Push(&a.entries, entry{at, s})
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

// armLocked lets the timer fire for the first entry. It may fire early for one
// that is gone, never late.
func (a *agenda) armLocked() {
	if len(a.entries) == 0 {
		return
	}
	first := a.entries[0].at
	if a.armed != 0 && a.armed <= first {
		return
	}
	a.armed = first
	wait := time.Duration(first - now())
	if a.timer == nil {
		a.timer = time.AfterFunc(wait, a.fire)
	} else {
		a.timer.Reset(wait)
	}
}

// fire calls on every stream whose time has come, each on a goroutine of its
// own: its client may not read.
func (a *agenda) fire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = 0
	for at := now(); len(a.entries) > 0 && a.entries[0].at <= at; {
		go heap.Pop(&a.entries).(entry).s.tick()
	}
	a.armLocked()
}

// entries implements heap.Interface, and tells each stream where its entry is.
type entries []entry

func (e entries) Len() int           { return len(e) }
func (e entries) Less(i, j int) bool { return e[i].at < e[j].at }

func (e entries) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].s.agendaIndex = int32(i) + 1
	e[j].s.agendaIndex = int32(j) + 1
}

func (e *entries) Push(x any) {
	added := x.(entry)
	*e = append(*e, added)
	added.s.agendaIndex = int32(len(*e))
}

func (e *entries) Pop() any {
	last := (*e)[len(*e)-1]
	(*e)[len(*e)-1] = entry{}
	*e = (*e)[:len(*e)-1]
	last.s.agendaIndex = 0
	return last
}
