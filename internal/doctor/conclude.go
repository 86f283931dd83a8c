package doctor

import (
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// delayFrom is the shortest delay that is reported.
	delayFrom = 100 * time.Millisecond

	// dripSize is the size of a drip's events. It is prime, so that no buffer's
	// size is a multiple of it: if only whole events arrived, no buffer has cut
	// them.
	dripSize = 509

	// smallestBuffer is the smallest greatest common divisor that counts as a
	// buffer's size.
	smallestBuffer = 256

	// enoughBursts is how many bursts are needed to conclude a delay.
	enoughBursts = 3
)

// seen is what a check has measured.
type seen struct {
	request  *Trace
	post     *Trace
	sizes    *Trace
	drip     *Trace // nil: no test asked for it
	delay    *Trace
	encoding *Trace
	silence  *Trace
	ages     [2]*Trace

	sent  sent
	final bool // there will be no more tests
}

// sent is what the requests contained.
type sent struct {
	accept, cacheControl, lastEventID string
	postBody                          int
}

// verdict is what some traces show: findings, tests that must be repeated because
// the doctor was stopped for a while, and what remains unknown.
type verdict struct {
	findings []Finding
	again    []string // names of tests
	untold   []string
}

func (v *verdict) add(w verdict) {
	v.findings = append(v.findings, w.findings...)
	v.again = append(v.again, w.again...)
	v.untold = append(v.untold, w.untold...)
}

func found(code string, evidence any) verdict {
	return verdict{findings: []Finding{newFinding(code, evidence)}}
}

// conclude judges the traces.
func (s *seen) conclude() verdict {
	var v verdict
	v.add(s.judgeRequest())
	v.add(s.judgePost())
	v.add(s.judgeBuffer())
	v.add(s.judgeEncoding())
	v.add(s.judgeEnds())
	v.again = slices.Compact(slices.Sorted(slices.Values(v.again)))
	return v
}

// unmade reports a test that could not be made. A test that was cut still counts
// as made.
func unmade(t *Trace, name string) (untold verdict, is bool) {
	switch {
	case t == nil:
		return verdict{untold: []string{name + ": there was no time or no place for it"}}, true
	case t.Error != "":
		return verdict{untold: []string{name + ": " + t.Error}}, true
	}
	return verdict{}, false
}

// judgeRequest compares what was sent with what arrived.
func (s *seen) judgeRequest() (v verdict) {
	r := s.request.Request
	if r == nil {
		return verdict{untold: []string{testRequest + ": the probe did not say what arrived"}}
	}
	for _, header := range []struct {
		name, sent string
		same       func(sent, arrived string) bool
	}{
		{"Accept", s.sent.accept, sameList},
		{"Cache-Control", s.sent.cacheControl, hasAll},
	} {
		arrived := r.Headers[strings.ToLower(header.name)]
		if !header.same(header.sent, arrived) {
			v.add(found(requestChanged, RequestChanged{header.name, clean(header.sent), clean(arrived)}))
		}
	}
	if arrived := r.Headers["last-event-id"]; arrived != s.sent.lastEventID {
		v.add(found(lastEventIDLost, LastEventIDLost{toldID(s.sent.lastEventID), toldID(arrived)}))
	}
	if r.Proto == "HTTP/1.0" {
		v.add(found(http10, HTTP10{r.Proto}))
	}
	return v
}

// toldID is an id as it may be shown: one of a run of this module is a
// capability.
func toldID(id string) string {
	if run, ours := strings.CutPrefix(id, "sse1-"); ours {
		return "sse1-" + clean(run[:min(len(run), 4)]) + "…"
	}
	return clean(id)
}

func (s *seen) judgePost() (v verdict) {
	if v, unmade := unmade(s.post, testPost); unmade {
		return v
	}
	r := s.post.Request
	if r == nil {
		return verdict{untold: []string{testPost + ": the probe did not say what arrived"}}
	}
	if r.Method != http.MethodPost {
		v.add(found(requestChanged, RequestChanged{"method", http.MethodPost, clean(r.Method)}))
	}
	if sent := int64(min(s.sent.postBody, maxBody)); r.BodyBytes != sent {
		v.add(found(requestChanged, RequestChanged{"body", bytesOf(sent), bytesOf(r.BodyBytes)}))
	}
	return v
}

// sameList compares lists, ignoring white space and letter case.
func sameList(sent, arrived string) bool {
	return slices.Equal(listOf(sent), listOf(arrived))
}

// hasAll reports whether everything that was sent has arrived; a hop may add to
// it.
func hasAll(sent, arrived string) bool {
	there := listOf(arrived)
	for _, item := range listOf(sent) {
		if !slices.Contains(there, item) {
			return false
		}
	}
	return true
}

func listOf(value string) (items []string) {
	for item := range strings.SplitSeq(strings.ToLower(value), ",") {
		if item = strings.Join(strings.Fields(item), ""); item != "" {
			items = append(items, item)
		}
	}
	return items
}

// judgeBuffer finds out what holds back headers and events.
func (s *seen) judgeBuffer() verdict {
	t := s.sizes
	if v, unmade := unmade(t, testSizes); unmade {
		return v
	}
	if t.Encoding != "" {
		return verdict{untold: []string{testSizes + ", " + testDelay + ": the answer is compressed although that was not asked for, so its bytes can't be told"}}
	}
	if len(t.Events) < 3 {
		return s.judgeFew(t)
	}
	holds := make([]hold, len(t.Events)-1)
	for i := range holds {
		holds[i] = t.holdOf(i)
	}
	first := holds[:min(len(holds), 4)]
	held, unknown := 0, 0
	for _, h := range first {
		if h.held > 0 {
			held++
		} else if h.unknown {
			unknown++
		}
	}
	switch {
	case held >= 2:
		if s.getsThrough() {
			if v := s.judgeDelay(); len(v.findings) > 0 {
				return v
			}
			return found(delayed, Delayed{round(median(heldFor(holds)))})
		}
		return s.judgeHeld(holds)
	case held+unknown >= 2:
		return verdict{again: []string{testSizes}}
	}
	v := t.judgeHeaders()
	v.add(s.judgeDelay())
	return v
}

// judgeFew judges a stream that was cut before its third event.
func (s *seen) judgeFew(t *Trace) verdict {
	return verdict{untold: []string{testSizes + ", " + testDelay + ": the stream ended after " + countOf(len(t.Events), "event") + " of " + countOf(t.Wanted, "event")}}
}

// getsThrough reports whether a small event arrived alone, in a long silence:
// then a timer holds the others back, not a buffer.
func (s *seen) getsThrough() bool {
	t := s.silence
	if !t.answered() || t.Encoding != "" || len(t.Events) == 0 {
		return false
	}
	after := t.Ended
	if len(t.Events) > 1 {
		after = t.began(1)
	}
	return after-t.finished(0) > max(t.Ended-t.Headers, after-t.Started)/2
}

func heldFor(holds []hold) (held []time.Duration) {
	for _, h := range holds {
		if h.held > 0 {
			held = append(held, h.held)
		}
	}
	return held
}

// judgeHeld distinguishes a buffer from a hop that waits for the end.
func (s *seen) judgeHeld(holds []hold) verdict {
	t := s.sizes
	longest := slices.Max(heldFor(holds))
	if t.whole() && len(rests(t.Arrivals, stepOf(t)/tolerated)) == 0 {
		return found(bufferedToEnd, BufferedToEnd{round(longest), t.bytes()})
	}
	if s.drip == nil && !s.final {
		return verdict{again: []string{testDrip}}
	}
	size, exact := bufferSize(s.drip, t)
	if s.drip.answered() {
		held, known := s.drip.held()
		if len(held)*2 < known {
			return verdict{again: []string{testSizes}} // a buffer would have held these back, too
		}
		longest = max(longest, slices.Max(append(held, 0)))
	}
	return found(buffered, Buffered{size, exact, round(longest)})
}

// held returns for how long events were held back, and for how many events that
// is known.
func (t *Trace) held() (held []time.Duration, known int) {
	for i := range max(len(t.Events)-1, 0) {
		h := t.holdOf(i)
		if h.held > 0 {
			held = append(held, h.held)
		}
		if !h.unknown {
			known++
		}
	}
	return held, known
}

// bufferSize is how much a hop collects. A buffer that is passed on when it is
// full shows in how many bytes come at a time: the greatest common divisor is
// its size. The first time does not count, as the headers may have been in it.
func bufferSize(drip, sizes *Trace) (size int64, exact bool) {
	var largest []int64
	for _, t := range []*Trace{drip, sizes} {
		if !t.answered() {
			continue
		}
		at := rests(t.Arrivals, stepOf(t)/tolerated)
		if len(at) == 0 {
			continue
		}
		steps := make([]int64, len(at)-1)
		for i := range steps {
			steps[i] = at[i+1] - at[i]
		}
		if len(steps) >= 2 {
			if divisor := commonDivisor(steps); divisor >= smallestBuffer && !atEvents(t, at) {
				return divisor, true
			}
		}
		if len(steps) > 0 && t == drip {
			return median(steps), false
		}
		largest = append(largest, at[0])
	}
	if len(largest) == 0 { // nothing came before the end of either
		return sizes.bytes(), false
	}
	return slices.Max(largest), false
}

// stepOf is the silence between a trace's events, by their sender's clock.
func stepOf(t *Trace) time.Duration {
	var steps []time.Duration
	for i := 1; i < len(t.Events); i++ {
		steps = append(steps, t.between(i-1, i))
	}
	return median(steps)
}

// atEvents reports whether nothing was cut in the middle of an event.
func atEvents(t *Trace, at []int64) bool {
	for _, bytes := range at {
		if !slices.ContainsFunc(t.Events, func(e Event) bool { return e.To == bytes }) {
			return false
		}
	}
	return true
}

func commonDivisor(values []int64) int64 {
	var a int64
	for _, b := range values {
		for b != 0 {
			a, b = b, a%b
		}
	}
	return a
}

// judgeHeaders looks whether the headers waited for the first byte.
func (t *Trace) judgeHeaders() verdict {
	silence := seconds(t.Events[0].Own)
	gap := t.began(0) - t.Headers
	if silence <= 0 || gap > silence/tolerated {
		return verdict{}
	}
	if t.stalled(t.began(0)-silence, t.began(0), silence/tolerated) {
		return verdict{again: []string{testSizes}}
	}
	return found(headersHeld, HeadersHeld{round(silence - gap)})
}

// judgeDelay looks how long events are held that nothing else is held for.
func (s *seen) judgeDelay() verdict {
	t := s.delay
	if v, unmade := unmade(t, testDelay); unmade {
		return v
	}
	bursts := t.bursts()
	var held []time.Duration
	for _, burst := range bursts {
		longest, unknown := time.Duration(0), false
		for i := burst.from; i < burst.to; i++ {
			h := t.holdOf(i)
			longest = max(longest, h.held)
			unknown = unknown || h.unknown
		}
		if longest >= delayFrom || !unknown {
			held = append(held, longest)
		}
	}
	switch {
	case len(held) < min(enoughBursts, len(bursts)) && t.whole():
		return verdict{again: []string{testDelay}}
	case len(held) == 0:
		return verdict{untold: []string{testDelay + ": the stream ended too early"}}
	case median(held) < delayFrom:
		return verdict{}
	}
	return found(delayed, Delayed{round(median(held))})
}

type burst struct{ from, to int } // events

// bursts are the events that were sent shortly after each other.
func (t *Trace) bursts() (bursts []burst) {
	for i := range t.Events {
		if i > 0 && t.between(i-1, i) < burstGap/2 {
			bursts[len(bursts)-1].to = i + 1
			continue
		}
		bursts = append(bursts, burst{i, i + 1})
	}
	return slices.DeleteFunc(bursts, func(b burst) bool { return b.to-b.from < burstEvents/2 })
}

// judgeEncoding looks at a stream that may be compressed.
func (s *seen) judgeEncoding() verdict {
	t := s.encoding
	if s.sizes.answered() && s.sizes.Encoding != "" {
		t = s.sizes // compressed without being asked
	}
	if v, unmade := unmade(t, testEncoding); unmade {
		return v
	}
	if t.Encoding == "" {
		return verdict{}
	}
	pause := (t.Ended - t.Started) / time.Duration(max(t.Wanted, 1)) // between events, about
	flushed := len(rests(t.Raw, pause/tolerated)) >= t.Wanted/2
	if !flushed && t.stalled(t.Started, t.Ended, pause/tolerated) {
		return verdict{again: []string{t.Name}}
	}
	return found(compressed, Compressed{t.Encoding, flushed})
}

// covered is how far a check has looked.
func (s *seen) covered() Covered {
	var c Covered
	for _, t := range s.all() {
		if !t.answered() || t.Encoding != "" {
			continue
		}
		if n := len(t.Events); n > 0 {
			c.AgeSeconds = max(c.AgeSeconds, math.Round(t.Events[n-1].Own*100)/100)
		}
		for i := range t.Events {
			if c.Bytes = max(c.Bytes, t.Events[i].To-t.Events[i].From); i > 0 {
				c.SilenceSeconds = max(c.SilenceSeconds, round(t.between(i-1, i)))
			}
		}
	}
	return c
}

// all are the traces that there are.
func (s *seen) all() []*Trace {
	return slices.DeleteFunc(
		[]*Trace{s.request, s.post, s.sizes, s.drip, s.delay, s.encoding, s.silence, s.ages[0], s.ages[1]},
		func(t *Trace) bool { return t == nil })
}
