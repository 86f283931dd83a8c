package redis

import (
	"bytes"
	"strconv"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// mostTold is how many bytes of events a notice may contain. If a write has
	// more, its notice contains none.
	mostTold = 16 << 10

	// longestTail limits what is kept for a reader that has not read it yet, and
	// mostTails what is kept for all readers of a node. Above that, readers ask
	// the server.
	longestTail = 64 << 10
	mostTails   = 16 << 20

	// toldCost is what an event counts for, in addition to its bytes.
	toldCost = 64
)

// tail is the events of a run that notices have brought, so that readers need not
// ask the server for each event.
type tail struct {
	// sure: the server has nothing after the newest event except what notices
	// will bring.
	sure bool

	newest uint64        // number of the newest event brought by a notice, or found; 0: none
	events []store.Event // up to the newest one; those that nobody has read yet
	size   int           // bytes of them, with toldCost for each
	doubts uint64        // how often notices may have been missed
}

// doubt records that there may be more than notices have brought.
func (t *tail) doubt() {
	*t = tail{doubts: t.doubts + 1}
}

// add adds events from a notice. room is how many bytes the tail may have.
func (t *tail) add(events []store.Event, room int) {
	if events[0].Number != t.newest+1 {
		t.clear()
	}
	for _, event := range events {
		t.size += len(event.Data) + toldCost
	}
	t.events = append(t.events, events...)
	t.newest = events[len(events)-1].Number
	if t.size > room {
		t.clear()
	}
}

func (t *tail) clear() { t.events, t.size = nil, 0 }

// take returns and removes the events after an event. ask says that the caller
// must ask the server.
func (t *tail) take(after uint64, maxBytes int) (events []store.Event, ask bool) {
	switch {
	case !t.sure:
		return nil, true
	case len(t.events) == 0:
		return nil, after < t.newest
	case t.events[0].Number > after+1:
		return nil, true
	}
	for len(t.events) > 0 && (maxBytes > 0 || len(events) == 0) {
		event := t.events[0]
		t.events[0] = store.Event{}
		t.events = t.events[1:]
		t.size -= len(event.Data) + toldCost
		if event.Number > after {
			events = append(events, event)
			maxBytes -= len(event.Data)
		}
	}
	if len(t.events) == 0 {
		t.clear()
	}
	return events, false
}

// found records what the server returned: events after after, up to last, or none
// if last equals after. doubts is the number of doubts when it was asked.
func (t *tail) found(after, last uint64, doubts uint64) {
	switch {
	case t.doubts != doubts:
	case len(t.events) > 0 && t.events[0].Number <= last+1, t.newest == last && last > 0:
		t.sure = true
	case last == after && t.newest <= last:
		t.newest, t.sure = last, true
		t.clear()
	}
}

// unmarshalTold reads the events of a notice; none if it only says that there is
// something new.
func unmarshalTold(text string) (events []store.Event) {
	first, rest, _ := bytes.Cut([]byte(text), []byte(" "))
	number, err := strconv.ParseUint(string(first), 10, 64)
	if err != nil {
		return nil
	}
	for len(rest) > 0 {
		var length []byte
		length, rest, _ = bytes.Cut(rest, []byte(" "))
		n, err := strconv.ParseUint(string(length), 10, 32)
		if err != nil || n == 0 || n > uint64(len(rest)) {
			return nil
		}
		events = append(events, store.Event{Number: number, Data: rest[:n:n]})
		rest = rest[n:]
		number++
	}
	return events
}
