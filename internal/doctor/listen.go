package doctor

import (
	"context"
	"fmt"
	"math"
	"time"
)

const (
	testStream = "stream"

	// together is how close together events arrive that arrived as one, and apart
	// how far apart their own times must be.
	together = 50 * time.Millisecond
	apart    = time.Second

	// clumpEvents is how many events make a clump.
	clumpEvents = 3
)

// listen checks a stream without a probe.
func (c *check) listen(ctx context.Context, r *Report) {
	c.config.Begin(fmt.Sprintf("Listens to the stream at %s for %v. Without a probe (sse_probe, --token) only what the stream itself shows can be told.", r.URL, c.config.For))
	m := measurement{
		name: testStream, method: c.config.Method, body: c.config.Data,
		encoding: "gzip, deflate, zstd", within: c.config.For,
	}
	watch := time.AfterFunc(c.config.For/2, func() { c.config.Progress(fmt.Sprintf("%v of %v", c.config.For/2, c.config.For)) })
	defer watch.Stop()
	t, err := c.measure(ctx, m)
	if err != nil {
		r.Error = err.Error()
		return
	}
	r.add(c, t)
	r.notes = t.notes()
	if t.Error != "" {
		r.Error = t.Error
		return
	}
	v := t.judgeStream()
	r.Findings = append(r.Findings, v.findings...)
	r.Untold = append(r.Untold, v.untold...)
	r.Covered = t.coveredStream()
}

// notes are what an answer's headers say.
func (t *Trace) notes() []string {
	if t.Status == 0 {
		return nil
	}
	notes := []string{fmt.Sprintf("  Content-Type %s, Content-Encoding %s, Cache-Control %s, X-Accel-Buffering %s, Via %s, Server %s",
		orNone(t.Type), orNone(t.Encoding), orNone(t.Cache), orNone(t.Buffer), orNone(t.Via), orNone(t.Server))}
	if len(t.Arrivals) > 0 {
		notes = append(notes, fmt.Sprintf("  first byte %s after the headers, longest silence %s, %s, %s",
			told(t.Arrivals[0].At-t.Headers), told(t.Longest), countOf(len(t.Events), "event"), countOf(t.Comments, "comment line")))
	}
	return notes
}

func orNone(value string) string {
	if value == "" {
		return "none"
	}
	return value
}

// judgeStream judges a single stream.
func (t *Trace) judgeStream() (v verdict) {
	if t.Encoding != "" {
		v.add(t.judgeCompressed())
	}
	if !t.Clean && !t.GivenUp {
		silence := t.Ended - t.last()
		if t.stalled(t.Ended-time.Second, t.Ended, time.Second/tolerated) {
			v.untold = append(v.untold, testStream+": it was cut while this process did not run")
		} else {
			v.add(found(cutOff, Cut{round(t.Ended - t.Headers), round(silence)}))
		}
	}
	if len(v.findings) == 0 || t.Encoding == "" { // otherwise the compression explains it
		v.add(t.judgeClumps())
	}
	return v
}

func (t *Trace) judgeCompressed() verdict {
	if len(t.Raw) == 0 {
		return verdict{untold: []string{testStream + ": the answer is compressed, and nothing has come of it"}}
	}
	flushed := len(t.Events) > 0 && t.finished(0) < t.Ended-together
	return found(compressed, Compressed{t.Encoding, flushed})
}

// judgeClumps looks for events that arrived together although they were created
// at different times. The first ones may be a replay, which is no evidence.
func (t *Trace) judgeClumps() verdict {
	worst := Clumped{}
	unknown := false
	for i := 0; i < len(t.Events); {
		j := i
		for j+1 < len(t.Events) && t.finished(j+1)-t.finished(i) < together {
			j++
		}
		came := t.finished(i)
		spread := t.spread(i, j)
		// The silence before must be as long as the events were held back.
		if i > 0 && j-i+1 >= clumpEvents && spread >= apart && came-t.finished(i-1) >= spread/2 {
			if t.stalled(came-spread, came+together, spread/tolerated) {
				unknown = true
			} else if spread.Seconds() > worst.SpreadSeconds {
				worst = Clumped{j - i + 1, round(spread)}
			}
		}
		i = j + 1
	}
	switch {
	case worst.Events > 0:
		return found(clumped, worst)
	case unknown:
		return verdict{untold: []string{testStream + ": events came together while this process did not run"}}
	}
	return verdict{}
}

// spread is how far apart events are by their own times.
func (t *Trace) spread(from, to int) time.Duration {
	earliest, latest := math.Inf(1), math.Inf(-1)
	for _, event := range t.Events[from : to+1] {
		if !math.IsNaN(event.Own) {
			earliest, latest = min(earliest, event.Own), max(latest, event.Own)
		}
	}
	if latest < earliest {
		return 0
	}
	return seconds(latest - earliest)
}

func (t *Trace) coveredStream() Covered {
	c := Covered{SilenceSeconds: round(t.Longest), AgeSeconds: round(t.Ended - t.Headers)}
	for _, event := range t.Events {
		c.Bytes = max(c.Bytes, event.To-event.From)
	}
	return c
}
