package redis

import (
	"bytes"
	"strconv"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// mostTold is how many bytes of events a notice may have with it. Of a write
	// with more it says only that there is something.
	mostTold = 16 << 10

	// longestTail bounds what is kept for a reader that has not come yet, and
	// mostTails that of all readers of a node. Above that, readers ask the server.
	longestTail = 64 << 10
	mostTails   = 16 << 20

	// toldCost is what an event counts for, besides its bytes.
	toldCost = 64
)

// tail is what notices have told of a run, so that who reads it need not ask the
// server for each event.
type tail struct {
	// sure: the server has nothing after the newest event but what notices will
	// tell.
	sure bool

	newest uint64        // that has been told, or found; 0: none
	events []store.Event // up to the newest one; what nobody has read yet
	size   int           // bytes of them, with toldCost for each
	doubts uint64        // how often there was something that notices did not tell
}

// doubt says that there may be more than notices have told.
func (t *tail) doubt() {
	*t = tail{doubts: t.doubts + 1}
}

// add takes events that a notice has told. room is how many bytes there may be.
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

// take returns the events after one, and no longer keeps them. ask says that only
// the server knows what comes after it.
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

// found says what the server had when it was asked, at so many doubts: events up
// to last, none after after where these two are the same.
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

// unmarshalTold reads the events of a notice; none: it says only that there is
// something.
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
