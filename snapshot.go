package caddysse

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// watchedStreams is how many streams a snapshot shows. More would help no reader,
// and 10,000 a second would be work for both sides.
const watchedStreams = 200

// snapshotJSON is one snapshot of a watch.
type snapshotJSON struct {
	At       time.Time     `json:"at"`
	Seconds  float64       `json:"seconds"` // since the previous snapshot; 0: this is the first
	Totals   figuresJSON   `json:"totals"`
	Deltas   figuresJSON   `json:"deltas"` // since the previous snapshot
	Names    []handlerJSON `json:"names"`
	Matching int           `json:"matching"`
	Streams  []streamJSON  `json:"streams"`
}

// observer takes the snapshots of one watch, one after the other. It makes no
// report of a stream that it does not show, and holds each lock only long enough
// to read a few numbers: a snapshot of many streams delays none of them.
type observer struct {
	filter filter
	order  order

	before figuresJSON // in the previous snapshot
	when   instant     // of that one; 0: there was none

	// Memory that snapshots reuse. It keeps no stream alive in between.
	streams []*stream
	top     []sighting
	seen    sighting
}

// observe takes a snapshot.
func (o *observer) observe() snapshotJSON {
	moment, at := now(), time.Now().UTC()
	snapshot := snapshotJSON{
		At:     at.Round(time.Millisecond),
		Totals: newHandlerJSON(totals{}).figuresJSON,
		Names:  []handlerJSON{},
	}
	o.top = o.top[:0]
	for _, g := range live.all() {
		var t totals
		t, o.streams = g.roll(o.streams[:0])
		chosen := o.filter.name == "" || o.filter.name == g.name
		for _, s := range o.streams {
			shown := chosen && o.filter.matches(s)
			o.seen.take(s, moment, o.order, shown)
			t.counts.add(o.seen.counts)
			if shown {
				snapshot.Matching++
				o.offer()
			}
		}
		clear(o.streams)
		handler := newHandlerJSON(t)
		snapshot.Names = append(snapshot.Names, handler)
		if chosen {
			snapshot.Totals.add(handler.figuresJSON)
		}
	}
	if o.when == 0 {
		o.before = snapshot.Totals
	} else {
		snapshot.Seconds = seconds(time.Duration(moment - o.when))
	}
	snapshot.Deltas = snapshot.Totals.since(o.before)
	o.before, o.when = snapshot.Totals, moment
	snapshot.Streams = o.show(at)
	return snapshot
}

// show reports the streams at the top.
func (o *observer) show(at time.Time) []streamJSON {
	if o.order.key != nil {
		slices.SortFunc(o.top, func(a, b sighting) int { return o.order.compare(&a, &b) })
	}
	shown := make([]streamJSON, 0, len(o.top))
	for i := range o.top {
		shown = append(shown, newStreamJSON(o.top[i].report(at, o.order)))
	}
	clear(o.top)
	o.seen = sighting{}
	return shown
}

// offer keeps the stream that was seen if it is one of the first so far. Without
// an order, these are the first ones in the list.
func (o *observer) offer() {
	switch {
	case len(o.top) < watchedStreams:
		o.top = append(o.top, o.seen)
		if o.order.key != nil {
			o.rise(len(o.top) - 1)
		}
	case o.order.key != nil && o.order.compare(&o.seen, &o.top[0]) < 0:
		o.top[0] = o.seen
		o.sink()
	}
}

// rise and sink keep top a heap if there is an order: the last one is at the
// root, so that most streams cost one comparison.
func (o *observer) rise(child int) {
	for child > 0 {
		parent := (child - 1) / 2
		if o.order.compare(&o.top[child], &o.top[parent]) <= 0 {
			return
		}
		o.top[child], o.top[parent] = o.top[parent], o.top[child]
		child = parent
	}
}

func (o *observer) sink() {
	for parent := 0; ; {
		last := parent
		for child := 2*parent + 1; child <= 2*parent+2 && child < len(o.top); child++ {
			if o.order.compare(&o.top[child], &o.top[last]) > 0 {
				last = child
			}
		}
		if last == parent {
			return
		}
		o.top[parent], o.top[last] = o.top[last], o.top[parent]
		parent = last
	}
}

// sighting is what an observer records of a stream.
type sighting struct {
	s              *stream
	at             stage
	duration, idle time.Duration
	counts         counts
	text           string // the sort key, if that is text
}

// take records a stream at a moment: only its counts, unless it may be shown.
func (seen *sighting) take(s *stream, moment instant, by order, shown bool) {
	s.facts.Lock()
	defer s.facts.Unlock()
	seen.counts = s.countsLocked()
	if s.ended != nil {
		seen.counts = s.ended.counts // as they were added to the total
	}
	if !shown {
		return
	}
	age := time.Duration(moment - s.arrived)
	seen.s = s
	seen.at = s.at()
	seen.duration = max(age-s.opened, 0)
	seen.idle = max(age-s.lastBytes, 0)
	if by.key != nil && by.key.text != nil {
		seen.text = by.key.text(s)
	}
}

// report is the stream as it was when it was seen, so that what is shown agrees
// with the order.
func (seen *sighting) report(at time.Time, by order) report {
	r := seen.s.report()
	r.state = seen.at.state()
	r.duration, r.idle = seen.duration, seen.idle
	r.openedAt = at.Add(-seen.duration)
	r.counts = seen.counts
	if by.key != nil && by.key.restore != nil {
		by.key.restore(&r, seen.text)
	}
	return r
}

// order is how streams are sorted.
type order struct {
	key      *sortKey // nil: as they are listed
	reversed bool
}

// sortKey is a key of a stream to sort by.
type sortKey struct {
	name string

	// number is a numeric sort key; the largest, longest or newest comes first.
	number func(*sighting) int64

	// text is a sort key that is text, from A to Z. It must be called with the
	// stream's facts locked.
	text func(*stream) string

	// restore puts a text that may have changed in the meantime into a report.
	restore func(r *report, text string)
}

// sortKeys are the keys of streamJSON.
var sortKeys = []sortKey{
	{name: "id", text: func(s *stream) string { return s.id.String() }},
	{name: "name", text: func(s *stream) string { return s.h.Name }},
	{
		name:    "state",
		text:    func(s *stream) string { return s.at().state() },
		restore: func(r *report, text string) { r.state = text },
	},
	{name: "client_ip", text: func(s *stream) string { return s.client.ip }},
	{name: "method", text: func(s *stream) string { method, _ := s.original(); return method }},
	{name: "host", text: func(s *stream) string { return s.client.host }},
	{name: "path", text: func(s *stream) string { _, path := s.original(); return path }},
	{name: "proto", text: func(s *stream) string { return s.proto.String() }},
	{name: "user_agent", text: func(s *stream) string { return s.client.userAgent }},
	{
		name:    "upstream",
		text:    func(s *stream) string { return s.client.upstream },
		restore: func(r *report, text string) { r.upstream = text },
	},
	{name: "resumable", number: func(seen *sighting) int64 {
		if seen.s.kind.resumable {
			return 1
		}
		return 0
	}},
	{name: "opened_at", number: func(seen *sighting) int64 { return -int64(seen.duration) }},
	{name: "duration_seconds", number: func(seen *sighting) int64 { return int64(seen.duration) }},
	{name: "idle_seconds", number: func(seen *sighting) int64 { return int64(seen.idle) }},
	{name: "events", number: func(seen *sighting) int64 { return int64(seen.counts.events) }},
	{name: "bytes", number: func(seen *sighting) int64 { return int64(seen.counts.bytes) }},
	{name: "heartbeats", number: func(seen *sighting) int64 { return int64(seen.counts.heartbeats) }},
	{
		name:    "last_event_id",
		text:    (*stream).lastEventIDLocked,
		restore: func(r *report, text string) { r.lastEventID = text },
	},
}

// parseOrder parses a key of a stream; a leading - reverses the order.
func parseOrder(text string) (order, error) {
	name, reversed := strings.CutPrefix(text, "-")
	i := slices.IndexFunc(sortKeys, func(key sortKey) bool { return key.name == name })
	if i < 0 {
		known := make([]string, len(sortKeys))
		for i, key := range sortKeys {
			known[i] = key.name
		}
		return order{}, fmt.Errorf("sort: %q is no key of a stream; there are %s, each also with a - in front",
			printable(text, 64), strings.Join(known, ", "))
	}
	return order{key: &sortKeys[i], reversed: reversed}, nil
}

// compare is negative if a comes before b. It is 0 only for the same stream, so
// that equal streams keep their order.
func (by order) compare(a, b *sighting) int {
	var result int
	if by.key.text != nil {
		result = cmp.Compare(a.text, b.text)
	} else {
		result = cmp.Compare(by.key.number(b), by.key.number(a))
	}
	if by.reversed {
		result = -result
	}
	if result == 0 {
		result = cmp.Compare(a.s.arrived, b.s.arrived)
	}
	if result == 0 {
		result = bytes.Compare(a.s.id[:], b.s.id[:])
	}
	return result
}

// add adds other figures.
func (f *figuresJSON) add(other figuresJSON) {
	f.Open += other.Open
	f.Opened += other.Opened
	for why, n := range other.Closed {
		f.Closed[why] += n
	}
	f.Events += other.Events
	f.Bytes += other.Bytes
	f.Heartbeats += other.Heartbeats
}

// since is the difference to earlier figures.
func (f figuresJSON) since(before figuresJSON) figuresJSON {
	passed := figuresJSON{
		Open:       f.Open - before.Open,
		Opened:     f.Opened - before.Opened,
		Closed:     make(map[string]uint64, len(f.Closed)),
		Events:     f.Events - before.Events,
		Bytes:      f.Bytes - before.Bytes,
		Heartbeats: f.Heartbeats - before.Heartbeats,
	}
	for why, n := range f.Closed {
		passed.Closed[why] = n - before.Closed[why]
	}
	return passed
}
