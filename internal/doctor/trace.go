package doctor

import (
	"math"
	"slices"
	"time"
)

// Trace is what was seen of one stream. Durations count from the moment when
// the check began, by the doctor's own clock, unless something else is said.
// Everything that is concluded is concluded from traces, so that it can be
// tested without a network.
type Trace struct {
	Name   string
	Script string // empty: there is no probe

	Started time.Duration // the request was sent
	Headers time.Duration // its answer's headers were there, if it has a status
	Ended   time.Duration // the answer was over, or given up
	Clean   bool          // it ended as a whole answer does
	GivenUp bool          // it was the doctor who ended it
	Error   string        // why there is no answer

	Proto    string // "1.1", "2" …; empty without an answer
	Status   int    // 0: there was no answer
	Type     string // Content-Type
	Encoding string // Content-Encoding, where it is one
	Via      string
	Server   string
	Cache    string // Cache-Control
	Buffer   string // X-Accel-Buffering

	Arrivals []Arrival // of the text
	Raw      []Arrival // of the encoded body, where it is encoded
	Events   []Event
	Wanted   int // events of the script
	Comments int

	// Longest is the longest time between two bytes.
	Longest time.Duration

	// Request is what the probe says of the request.
	Request *Request

	Stalls []Span
}

// Arrival says that so many bytes of a body were there at a moment.
type Arrival struct {
	At    time.Duration
	Bytes int64 // from the first one on
}

// Event is an event of a stream.
type Event struct {
	Own  float64 // seconds, by whoever sent it; NaN where it does not say
	From int64   // the byte that it begins with
	To   int64   // the one after its last
}

// Span is a time in which the doctor itself did not run.
type Span struct{ From, To time.Duration }

// Request is what a probe says of a request.
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

// Limits are what a probe allows.
type Limits struct {
	DurationSeconds float64 `json:"duration_seconds"`
	Probes          int     `json:"probes"`
	Bytes           int     `json:"bytes"`
}

// whole reports whether everything that the script asks for has come.
func (t *Trace) whole() bool {
	return t.Error == "" && len(t.Events) == t.Wanted
}

// answered reports whether the trace is one of a stream.
func (t *Trace) answered() bool { return t != nil && t.Error == "" && t.Status > 0 }

// bytes is how much of the text came.
func (t *Trace) bytes() int64 {
	if len(t.Arrivals) == 0 {
		return 0
	}
	return t.Arrivals[len(t.Arrivals)-1].Bytes
}

// last is when the last byte came, or else the headers.
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

// arrived is when so many bytes of the text were there.
func (t *Trace) arrived(bytes int64) time.Duration {
	i, _ := slices.BinarySearchFunc(t.Arrivals, bytes, func(a Arrival, bytes int64) int {
		return int(min(max(a.Bytes-bytes, -1), 1))
	})
	if i == len(t.Arrivals) {
		return math.MaxInt64
	}
	return t.Arrivals[i].At
}

// began and finished are when the first and the last byte of an event came.
func (t *Trace) began(i int) time.Duration    { return t.arrived(t.Events[i].From + 1) }
func (t *Trace) finished(i int) time.Duration { return t.arrived(t.Events[i].To) }

// between is the time from one event to a later one, by their sender's clock.
func (t *Trace) between(i, j int) time.Duration {
	return seconds(t.Events[j].Own - t.Events[i].Own)
}

// stalled reports whether the doctor did not run for longer than a limit in a
// span of time.
func (t *Trace) stalled(from, to, limit time.Duration) bool {
	var sum time.Duration
	for _, stall := range t.Stalls {
		sum += max(min(stall.To, to)-max(stall.From, from), 0)
	}
	return sum > limit
}

// hold is what is known of whether an event was held back.
type hold struct {
	held    time.Duration // at least for this long; 0: it was not
	unknown bool          // it looks so, but it may have been the doctor
}

// tolerated is the part of a silence that may be lost to jitter.
const tolerated = 4

// holdOf finds out whether an event was held until later ones had been sent: it
// came with them although there was a silence between them where they were
// sent. How long the way takes does not matter, nor what the clocks say.
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

// rests are how many bytes had come each time that nothing more did for a
// while, the end left out.
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

// round is a duration in seconds as it is told: to a hundredth.
func round(d time.Duration) float64 {
	return math.Round(d.Seconds()*100) / 100
}

// median is the one in the middle, the lower of two.
func median[T int64 | time.Duration](values []T) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)/2]
}
