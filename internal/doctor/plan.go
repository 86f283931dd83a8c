package doctor

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// The tests of a check with a probe.
const (
	testRequest  = "request"
	testPost     = "post"
	testSizes    = "sizes"
	testDrip     = "drip"
	testDelay    = "delay"
	testEncoding = "encoding"
	testSilence  = "silence"
	testAge1     = "age 1"
	testAge2     = "age 2"
)

const (
	// bursts are events sent shortly after each other: if a hop waits for more
	// data, several of them arrive together.
	burstCount  = 6
	burstEvents = 16
	burstStep   = 20 * time.Millisecond
	burstGap    = 500 * time.Millisecond

	dripEvents = 64

	encodingEvents = 4
	encodingPause  = 600 * time.Millisecond

	// ageGap is the time between the starts of the two streams whose ages are
	// compared.
	ageGap = time.Second

	// margin is how much longer than its script an answer may take.
	margin = 10 * time.Second

	// tries is how often a test is made at most.
	tries = 3

	// retryAfter is how long a check waits before it asks a busy probe again.
	retryAfter = time.Second

	// enoughPlaces is the number of tests that run in parallel.
	enoughPlaces = 8
)

// sizes are those of the events that find a buffer, from 256 bytes to 64 KiB.
// Most are prime, so that whole events rarely fill a buffer exactly.
var sizes = []int{256, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65536}

// plan is how long the tests are.
type plan struct {
	sizesPause, dripPause time.Duration
	long                  time.Duration // the silence, and the ages
}

// planFor fits the tests into the given time and the probe's limits.
func planFor(limit time.Duration, limits Limits) plan {
	unit := min(float64(limit)/float64(DefaultFor), 1)
	scaled := func(d, least time.Duration) time.Duration {
		return max(time.Duration(float64(d)*unit), least).Round(time.Millisecond)
	}
	p := plan{
		sizesPause: scaled(time.Second, 400*time.Millisecond),
		dripPause:  scaled(150*time.Millisecond, 60*time.Millisecond),
		long:       time.Duration(float64(limit) * 0.85),
	}
	if places := time.Duration(max(limits.Probes, 1)); places < enoughPlaces {
		// One after the other: the short ones, and three long ones.
		short := time.Duration(len(sizes)+1)*p.sizesPause + burstCount*(burstEvents*burstStep+burstGap) + encodingEvents*encodingPause
		rounds := (3 + places - 1) / places
		p.long = (p.long - short/places) / rounds
	}
	if allowed := seconds(limits.DurationSeconds); allowed > 0 {
		p.long = min(p.long, allowed*9/10)
		p.sizesPause = min(p.sizesPause, allowed*9/10/time.Duration(len(sizes)+1))
		p.dripPause = min(p.dripPause, allowed*9/10/dripEvents)
	}
	p.long = max(p.long.Truncate(time.Second), time.Second)
	return p
}

// measurement is the plan of one test.
func (c *check) measurement(name string, p plan, s sent) measurement {
	m := measurement{name: name, method: c.config.Method, body: c.config.Data, encoding: "identity"}
	var takes time.Duration
	switch name {
	case testRequest:
		m.script, m.wanted, m.lastID = "r", 1, s.lastEventID
	case testPost:
		m.script, m.wanted, m.method, m.body = "r", 1, http.MethodPost, c.postBody()
	case testSizes:
		var script strings.Builder
		fmt.Fprintf(&script, "w%v", p.sizesPause)
		for _, size := range sizes {
			fmt.Fprintf(&script, ",e%d,w%v", size, p.sizesPause)
		}
		m.script, m.wanted = script.String(), len(sizes)
		takes = p.sizesPause * time.Duration(len(sizes)+1)
	case testDrip:
		m.script, m.wanted = fmt.Sprintf("%d*(e%d,w%v)", dripEvents, dripSize, p.dripPause), dripEvents
		takes = p.dripPause * dripEvents
	case testDelay:
		burst := fmt.Sprintf("%d*(e,w%v),w%v", burstEvents, burstStep, burstGap)
		m.script, m.wanted = strings.Join(slices.Repeat([]string{burst}, burstCount), ","), burstCount*burstEvents
		takes = burstCount * (burstEvents*burstStep + burstGap)
	case testEncoding:
		m.script, m.wanted = fmt.Sprintf("%d*(e1021,w%v)", encodingEvents, encodingPause), encodingEvents
		m.encoding = "gzip, deflate, br, zstd"
		takes = encodingEvents * encodingPause
	case testSilence:
		m.script, m.wanted = fmt.Sprintf("e,w%v,e", p.long), 2
		takes = p.long
	case testAge1, testAge2:
		n := max(int(p.long/time.Second), 1)
		m.script, m.wanted = fmt.Sprintf("%d*(e,w1s),e", n), n+1
		takes = time.Duration(n) * time.Second
	}
	m.within = takes + margin
	return m
}

func (c *check) postBody() []byte {
	if c.config.Data != nil {
		return c.config.Data
	}
	return []byte(`{"check":true}`)
}

// sent is what the requests contain.
func (c *check) sent() (sent, error) {
	r, err := c.request(context.Background(), measurement{method: http.MethodGet, lastID: "check-" + rand.Text()[:8]})
	if err != nil {
		return sent{}, err
	}
	return sent{
		accept:       strings.Join(r.Header["Accept"], ", "),
		cacheControl: strings.Join(r.Header["Cache-Control"], ", "),
		lastEventID:  r.Header.Get("Last-Event-ID"),
		postBody:     len(c.postBody()),
	}, nil
}

// ask checks with a probe. It returns what it has measured.
func (c *check) ask(ctx context.Context, r *Report) *seen {
	c.config.Begin(fmt.Sprintf("Asks the probe at %s in eight streams, most of them side by side: what arrives of a request, what is held back, "+
		"delayed, compressed or cut. That takes about %v, and at most %v.", r.URL, planFor(c.config.For, Limits{Probes: enoughPlaces}).long+3*time.Second, c.config.For))
	said, err := c.sent()
	if err != nil {
		r.Error = clean(plain(err).Error())
		return nil
	}
	t := c.run(ctx, c.measurement(testRequest, plan{}, said), nil)
	r.add(c, t)
	switch {
	case t.Error != "":
		r.Error = t.Error
		return nil
	case t.Request == nil:
		r.Error = "the answer is a stream, but none of an sse_probe"
		return nil
	}
	p := planFor(c.config.For-c.age(), t.Request.Limits)
	s := &seen{request: t, sent: said}
	v := c.runAll(ctx, p, s, r)
	r.Findings = append(r.Findings, v.findings...)
	r.Untold = append(r.Untold, v.untold...)
	r.Covered = s.covered()
	return s
}

// places are the streams that may be open at a time; nil: any number.
type places chan struct{}

// run makes a test as soon as there is a place for it.
func (c *check) run(ctx context.Context, m measurement, free places) *Trace {
	for waited := false; ; waited = true {
		if free != nil {
			select {
			case free <- struct{}{}:
			case <-ctx.Done():
				return c.noPlace(m)
			}
		}
		t, err := c.measure(ctx, m)
		if free != nil {
			<-free
		}
		if err == nil && waited && t.Status == 0 && ctx.Err() != nil {
			return c.noPlace(m)
		}
		if err == nil {
			return t
		}
		select {
		case <-time.After(retryAfter):
		case <-ctx.Done():
			return c.noPlace(m)
		}
	}
}

func (c *check) noPlace(m measurement) *Trace {
	return &Trace{Name: m.name, Script: m.script, Wanted: m.wanted, Started: c.age(), Ended: c.age(), GivenUp: true, Error: "the probe had no place for it in time"}
}

// runAll makes the tests, repeats those that have no result because the doctor
// was stopped, and makes further ones that the results require.
func (c *check) runAll(ctx context.Context, p plan, s *seen, r *Report) verdict {
	free := make(places, max(s.request.Request.Limits.Probes, 1))
	results := make(chan *Trace)
	running := make(map[string]bool)
	tried := make(map[string]int)
	start := func(name string, after time.Duration) {
		running[name] = true
		tried[name]++
		s.put(name, nil)
		q := p
		if left := c.config.For - c.age() - after - time.Second; tried[name] > 1 {
			q.long = max(min(q.long, left.Truncate(time.Second)), time.Second)
		}
		m := c.measurement(name, q, s.sent)
		go func() {
			select {
			case <-time.After(after):
			case <-ctx.Done():
			}
			results <- c.run(ctx, m, free)
		}()
	}
	for _, name := range []string{testPost, testSizes, testDelay, testEncoding, testSilence, testAge1} {
		start(name, 0)
	}
	start(testAge2, ageGap)

	watch := time.NewTicker(10 * time.Second)
	defer watch.Stop()
	for len(running) > 0 {
		select {
		case <-watch.C:
			c.config.Progress(fmt.Sprintf("%.0f s of at most %v; still running: %s", c.age().Seconds(), c.config.For, strings.Join(slices.Sorted(maps.Keys(running)), ", ")))
		case t := <-results:
			delete(running, t.Name)
			s.put(t.Name, t)
			r.add(c, t)
			for _, name := range s.conclude().again {
				if running[name] || tried[name] >= tries || !c.fits(name, p, s) {
					continue
				}
				if tried[name] > 0 {
					c.config.Progress(name + ": measured again, as this process did not run all the time")
				}
				after := time.Duration(0)
				if name == testAge2 {
					after = ageGap
				}
				start(name, after)
			}
		}
	}
	s.final = true
	v := s.conclude()
	for _, name := range v.again {
		v.untold = append(v.untold, name+": this process did not run all the time, so what it saw is no evidence")
	}
	return v
}

// fits reports whether there is time for a test. It makes sense to repeat a test
// that was cut only if there is time to see the cut again.
func (c *check) fits(name string, p plan, s *seen) bool {
	left := c.config.For - c.age() - time.Second
	switch name {
	case testSizes:
		return left > p.sizesPause*time.Duration(len(sizes)+1)
	case testDrip:
		return left > p.dripPause*dripEvents
	case testSilence:
		return left-time.Second > s.silence.Ended-s.silence.Started
	case testAge1, testAge2:
		var longest time.Duration
		for _, t := range s.ages {
			if t != nil {
				longest = max(longest, t.Ended-t.Started)
			}
		}
		return left-ageGap-time.Second > longest
	}
	return left > burstCount*(burstEvents*burstStep+burstGap)
}

func (s *seen) put(name string, t *Trace) {
	switch name {
	case testPost:
		s.post = t
	case testSizes:
		s.sizes = t
	case testDrip:
		s.drip = t
	case testDelay:
		s.delay = t
	case testEncoding:
		s.encoding = t
	case testSilence:
		s.silence = t
	case testAge1:
		s.ages[0] = t
	case testAge2:
		s.ages[1] = t
	}
}
