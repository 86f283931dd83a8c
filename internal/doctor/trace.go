package doctor

import (
	"math"
	"slices"
	"time"
)

// Trace is what was seen of one stream. Durations count from the start of the
// check, by the doctor's own clock, unless stated otherwise. All conclusions are
// drawn from traces, so that they can be tested without a network.
type Trace struct {
	Name   string
	Script string // empty: without a probe

	Started time.Duration // the request was sent
	Headers time.Duration // the answer's headers arrived, if it has a status
	Ended   time.Duration // the answer was over, or given up
	Clean   bool          // it ended like a complete answer
	GivenUp bool          // the doctor ended it
	Error   string        // why there is no answer

	Proto    string // "1.1", "2" …; empty without an answer
	Status   int    // 0: there was no answer
	Type     string // Content-Type
	Encoding string // Content-Encoding, if it is a coding
	Via      string
	Server   string
	Cache    string // Cache-Control
	Buffer   string // X-Accel-Buffering

	Arrivals []Arrival // of the text
	Raw      []Arrival // of the encoded body, if it is encoded
	Events   []Event
	Wanted   int // events of the script
	Comments int

	// Longest is the longest time between two bytes.
	Longest time.Duration

	// Request is what the probe reports about the request.
	Request *Request

	Stalls []Span
}

// Arrival says how many bytes of a body had arrived at a moment.
type Arrival struct {
	At    time.Duration
	Bytes int64 // from the beginning
}

// Event is an event of a stream.
type Event struct {
	Own  float64 // seconds, by its creator's clock; NaN if unknown
	From int64   // its first byte
	To   int64   // the byte after its last one
}

// Span is a time in which the doctor itself did not run.
type Span struct{ From, To time.Duration }

// Request is what a probe reports about a request.
type Request struct {
	Probe     int               `json:"probe"`
	Method    string            `json:"method"`
	Proto     string            `json:"proto"`
	Host      string            `json:"host"`
	ClientIP  string            `json:"client_ip"`
	Headers   map[string]string `json:"headers"`
	BodyBytes int64             `json:"body_bytes"`
	Limits    Limits            `json:"limits"`
}

// Limits are those of a probe.
type Limits struct {
	DurationSeconds float64 `json:"duration_seconds"`
	Probes          int     `json:"probes"`
	Bytes           int     `json:"bytes"`
}

// whole reports whether everything in the script has arrived.
func (t *Trace) whole() bool {
	return t.Error == "" && len(t.Events) == t.Wanted
}

// answered reports whether there is an answer.
func (t *Trace) answered() bool { return t != nil && t.Error == "" && t.Status > 0 }

// bytes is how much of the text arrived.
func (t *Trace) bytes() int64 {
	if len(t.Arrivals) == 0 {
		return 0
	}
	return t.Arrivals[len(t.Arrivals)-1].Bytes
}

// last is when the last byte arrived, or else the headers.
func (t *Trace) last() time.Duration {
	arrivals := t.Arrivals
	if len(t.Raw) > 0 {
		arrivals = t.Raw
	}
	if len(arrivals) == 0 {
		return t.Headers
	}
	return arrivals[len(arrivals)-1].At
}

// arrived is when this many bytes of the text had arrived.
func (t *Trace) arrived(bytes int64) time.Duration {
	i, _ := slices.BinarySearchFunc(t.Arrivals, bytes, func(a Arrival, bytes int64) int {
		return int(min(max(a.Bytes-bytes, -1), 1))
	})
	if i == len(t.Arrivals) {
		return math.MaxInt64
	}
	return t.Arrivals[i].At
}

// began and finished are when the first and the last byte of an event arrived.
func (t *Trace) began(i int) time.Duration    { return t.arrived(t.Events[i].From + 1) }
func (t *Trace) finished(i int) time.Duration { return t.arrived(t.Events[i].To) }

// between is the time from one event to a later one, by their sender's clock.
func (t *Trace) between(i, j int) time.Duration {
	return seconds(t.Events[j].Own - t.Events[i].Own)
}

// stalled reports whether, in a span of time, the doctor did not run for longer
// than a limit.
func (t *Trace) stalled(from, to, limit time.Duration) bool {
	var sum time.Duration
	for _, stall := range t.Stalls {
		sum += max(min(stall.To, to)-max(stall.From, from), 0)
	}
	return sum > limit
}

// hold says whether an event was held back.
type hold struct {
	held    time.Duration // for at least this long; 0: it was not held back
	unknown bool          // it seems so, but the doctor itself may be the cause
}

// tolerated is the part of a silence that jitter may take away.
const tolerated = 4

// holdOf finds out whether an event was held back until later ones had been sent:
// it arrived together with them although they were sent with a silence in
// between. Neither the network delay nor the clocks matter.
func (t *Trace) holdOf(i int) hold {
	var h hold
	finished := t.finished(i)
	for j := i + 1; j < len(t.Events); j++ {
		silence := t.between(i, j)
		if silence <= 0 || t.began(j)-finished > silence/tolerated {
			continue
		}
		if t.stalled(finished-silence, t.began(j), silence/tolerated) {
			h.unknown = true
			continue
		}
		h.held = max(h.held, silence)
	}
	h.unknown = h.unknown && h.held == 0
	return h
}

// rests are how many bytes had arrived each time that nothing more arrived for a
// while, except at the end.
func rests(arrivals []Arrival, while time.Duration) []int64 {
	var rests []int64
	for i := 1; i < len(arrivals); i++ {
		if arrivals[i].At-arrivals[i-1].At >= while {
			rests = append(rests, arrivals[i-1].Bytes)
		}
	}
	return rests
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second))
}

// round is a duration in seconds, rounded to hundredths for people.
func round(d time.Duration) float64 {
	return math.Round(d.Seconds()*100) / 100
}

// median is the middle value, the lower one of two.
func median[T int64 | time.Duration](values []T) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)/2]
}
