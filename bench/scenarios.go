//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

var scenarios = []struct {
	name string
	run  func(*bench) error
}{
	{"quiet", (*bench).quiet},
	{"events", (*bench).events},
	{"burst", (*bench).burst},
	{"churn", (*bench).churn},
	{"reload", (*bench).reload},
	{"shared-quiet", (*bench).sharedQuiet},
	{"shared-events", (*bench).sharedEvents},
	{"shared-events-h2", (*bench).sharedEventsTLS},
	{"shared-burst", (*bench).sharedBurst},
	{"shared-stalled", (*bench).sharedStalled},
}

func scenarioNames() (names []string) {
	for _, scenario := range scenarios {
		names = append(names, scenario.name)
	}
	return names
}

const kiB = 1024

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func (b *bench) newFleet(p *proxy, path string) *fleet {
	return &fleet{addr: p.addr, path: path, tls: p.tls}
}

// settle is longer than the second after which the first heartbeat comes.
const settle = 4 * time.Second

// quiet measures the memory of a stream on which nothing happens, and the cost of
// heartbeats when there are most of them.
func (b *bench) quiet() error {
	most := 0
	for _, n := range b.settings.Quiet {
		most = max(most, n)
	}
	for _, n := range b.settings.Quiet {
		err := b.each(fmt.Sprintf("%d quiet streams", n), way{}, func(p *proxy, sample func(string, string, float64)) error {
			return b.quietStreams(p, n, "stream", n == most, sample)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) quietStreams(p *proxy, n int, one string, heartbeats bool, sample func(metric, unit string, value float64)) error {
	var before measure.Runtime
	var err error
	if p.admin != nil {
		if before, err = p.admin.Runtime(); err != nil {
			return err
		}
	}
	residentBefore, proportionalBefore, err := p.process().Memory()
	if err != nil {
		return err
	}
	f := b.newFleet(p, "/events")
	defer f.close()
	cpuBefore := p.process().CPU()
	if err := f.openAll(b.context, n); err != nil {
		return err
	}
	time.Sleep(settle)
	cpu := p.process().CPU() - cpuBefore
	resident, proportional, err := p.process().Memory()
	if err != nil {
		return err
	}
	streams := float64(n)
	sample("resident per "+one, "KiB", (resident-residentBefore)/streams/kiB)
	sample("proportional per "+one, "KiB", (proportional-proportionalBefore)/streams/kiB)
	if p.admin != nil {
		after, err := p.admin.Runtime()
		if err != nil {
			return err
		}
		heap, stacks := (after.Heap-before.Heap)/streams/kiB, (after.Stacks-before.Stacks)/streams/kiB
		sample("heap + stacks per "+one, "KiB", heap+stacks)
		sample("live heap per "+one, "KiB", heap)
		sample("stacks per "+one, "KiB", stacks)
		sample("goroutines per "+one, "", (after.Goroutines-before.Goroutines)/streams)
		sample("allocations to open a "+one, "", (after.Allocations-before.Allocations)/streams)
	}
	sample("CPU to open a "+one, "µs", microseconds(cpu)/streams)
	if heartbeats && p.admin != nil {
		if err := b.heartbeats(p, f, sample); err != nil {
			return err
		}
	}
	if counts := f.counts(); counts.CleanEnds+counts.BrokenEnds > 0 {
		return fmt.Errorf("%d streams ended by themselves", counts.CleanEnds+counts.BrokenEnds)
	}
	f.close()
	if p.shared {
		return nil // the upstream's stream stays for a while
	}
	closed := time.Now()
	if err := b.origin.awaitNone(p.group, 60*time.Second); err != nil {
		return err
	}
	sample("until the upstream is rid of all", "ms", float64(time.Since(closed).Milliseconds()))
	return nil
}

func (b *bench) heartbeats(p *proxy, f *fleet, sample func(metric, unit string, value float64)) error {
	cpuBefore, beatsBefore, start := p.process().CPU(), f.counts().Heartbeats, time.Now()
	time.Sleep(b.settings.Beats)
	cpu, beats, took := p.process().CPU()-cpuBefore, f.counts().Heartbeats-beatsBefore, time.Since(start)
	sample("CPU while quiet", "% of one", 100*float64(cpu)/float64(took))
	sample("heartbeats per second", "", float64(beats)/took.Seconds())
	if beats > 0 {
		sample("CPU per heartbeat", "µs", microseconds(cpu)/float64(beats))
	}
	return f.counts().wrong()
}

// events measures the cost of an event. All systems have their streams open, and
// get events in turn, in a different order each time.
func (b *bench) events() error {
	return b.eventsOf(way{}, fmt.Sprintf("%d streams, %d events/s in all", b.settings.Streams, b.settings.Rate))
}

func (b *bench) eventsOf(as way, title string) error {
	return b.withAll(title, as, func(round int, proxies []*proxy, fleets []*fleet) error {
		for window := -1; window < b.settings.Windows; window++ { // the first is not counted
			for _, i := range rand.Perm(len(proxies)) {
				err := b.window(proxies[i], fleets[i], func(metric, unit string, value float64) {
					if window >= 0 {
						b.report.add(title, metric, unit, proxies[i].name, round*b.settings.Windows+window, value)
					}
				})
				if err != nil {
					return fmt.Errorf("%s: %w", proxies[i].name, err)
				}
			}
		}
		return nil
	})
}

// withAll opens the streams of all systems and leaves them open.
func (b *bench) withAll(title string, as way, measure func(round int, proxies []*proxy, fleets []*fleet) error) error {
	for round := range b.settings.Rounds {
		fmt.Printf("%s, round %d of %d\n", title, round+1, b.settings.Rounds)
		err := func() error {
			var proxies []*proxy
			var fleets []*fleet
			for i := range b.systems {
				p, err := b.start(i, as)
				if err != nil {
					return err
				}
				defer p.stop()
				f := b.newFleet(p, "/events")
				defer f.close()
				if err := f.openAll(b.context, b.settings.Streams); err != nil {
					return fmt.Errorf("%s: %w\n%s", p.name, err, p.lastOutput())
				}
				proxies, fleets = append(proxies, p), append(fleets, f)
			}
			time.Sleep(2 * time.Second)
			return measure(round, proxies, fleets)
		}()
		if err != nil {
			return err
		}
		for i := range b.systems {
			if err := b.origin.awaitNone(i, 20*time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) window(p *proxy, f *fleet, sample func(metric, unit string, value float64)) error {
	if err := b.context.Err(); err != nil {
		return err
	}
	var err error
	var countBefore, sizeBefore float64
	if p.admin != nil {
		if countBefore, sizeBefore, err = p.admin.Allocations(); err != nil {
			return err
		}
	}
	interval := time.Duration(b.settings.Streams) * time.Second / time.Duration(b.settings.Rate)
	rounds := max(1, int(b.settings.Window/interval))
	do := "send"
	if p.shared {
		do = "broadcast"
	}
	cpuBefore := p.process().CPU()
	answer, err := b.origin.do(order{Group: p.group, Do: do, Rounds: rounds, Interval: interval})
	if err != nil {
		return err
	}
	if want := rounds * p.upstreams(b.settings.Streams); answer.Sent != want {
		return fmt.Errorf("the upstream could send %d events of %d", answer.Sent, want)
	}
	took, err := f.collect(rounds * b.settings.Streams)
	if err != nil {
		return err
	}
	cpu, events := p.process().CPU()-cpuBefore, float64(len(took))
	var count, size float64
	if p.admin != nil {
		if count, size, err = p.admin.Allocations(); err != nil {
			return err
		}
	}
	sample("CPU per million events", "s", cpu.Seconds()/events*1e6)
	for _, q := range []struct {
		name  string
		share float64
	}{{"p50", 0.5}, {"p99", 0.99}, {"p99.9", 0.999}} {
		sample("latency "+q.name, "µs", microseconds(quantile(took, q.share)))
	}
	if p.admin != nil {
		// Those of asking are among them: a few per window.
		sample("allocations per event", "", (count-countBefore)/events)
		sample("allocated per event", "B", (size-sizeBefore)/events)
	}
	return nil
}

// burst is one event for all at once, as a broadcast is.
func (b *bench) burst() error {
	n := b.settings.BurstStreams
	return b.burstOf(way{}, n, fmt.Sprintf("burst of one event to %d streams", n))
}

func (b *bench) burstOf(as way, n int, title string) error {
	return b.each(title, as, func(p *proxy, sample func(string, string, float64)) error {
		f := b.newFleet(p, "/events")
		defer f.close()
		if err := f.openAll(b.context, n); err != nil {
			return err
		}
		time.Sleep(2 * time.Second)
		var half, most, all, cpu []float64
		for i := -1; i < b.settings.Bursts; i++ { // the first is not counted
			cpuBefore := p.process().CPU()
			answer, err := b.origin.do(order{Group: p.group, Do: "burst"})
			if err != nil {
				return err
			}
			if want := p.upstreams(n); answer.Sent != want {
				return fmt.Errorf("the upstream could send %d events of %d", answer.Sent, want)
			}
			took, err := f.collect(n)
			if err != nil {
				return err
			}
			if i >= 0 {
				const ms = 1000
				half = append(half, microseconds(quantile(took, 0.5))/ms)
				most = append(most, microseconds(quantile(took, 0.99))/ms)
				all = append(all, microseconds(took[len(took)-1])/ms)
				cpu = append(cpu, microseconds(p.process().CPU()-cpuBefore)/float64(n))
			}
			time.Sleep(500 * time.Millisecond)
		}
		sample("until half have it", "ms", median(half))
		sample("until 99 % have it", "ms", median(most))
		sample("until all have it", "ms", median(all))
		sample("CPU per event", "µs", median(cpu))
		return nil
	})
}

// churn opens streams, waits for one event on each and leaves.
func (b *bench) churn() error {
	n := b.settings.Churn
	return b.each(fmt.Sprintf("%d streams opened and closed", n), way{}, func(p *proxy, sample func(string, string, float64)) error {
		if err := b.churnStreams(p, n/10); err != nil { // to warm up
			return err
		}
		if err := b.origin.awaitNone(p.group, 20*time.Second); err != nil {
			return err
		}
		filesBefore := p.process().Files()
		cpuBefore, start := p.process().CPU(), time.Now()
		if err := b.churnStreams(p, n); err != nil {
			return err
		}
		took := time.Since(start)
		if err := b.origin.awaitNone(p.group, 20*time.Second); err != nil {
			return err
		}
		sample("CPU per stream", "µs", microseconds(p.process().CPU()-cpuBefore)/float64(n))
		sample("streams per second", "", float64(n)/took.Seconds())
		var files int
		for range 50 {
			if files = p.process().Files() - filesBefore; files <= 0 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		sample("descriptors left", "", float64(max(0, files)))
		return nil
	})
}

func (b *bench) churnStreams(p *proxy, n int) error {
	return sideBySide(b.context, b.settings.ChurnWorkers, n, func() error {
		f := b.newFleet(p, "/hello")
		defer f.close()
		err := f.open(b.context)
		if err == nil {
			_, err = f.collect(1)
		}
		return err
	})
}

// reload loads another configuration while streams are open. A client whose
// stream ends reconnects within a second, as an EventSource does with a retry
// field, to the new configuration.
func (b *bench) reload() error {
	n := b.settings.ReloadStreams
	const watched = 14 * time.Second // the streams' ends spread over 10 s
	return b.each(fmt.Sprintf("reload with %d streams", n), way{}, func(p *proxy, sample func(string, string, float64)) error {
		f := b.newFleet(p, "/events")
		defer f.close()
		var opening sync.WaitGroup
		var mutex sync.Mutex
		var ends []time.Time
		var failed error
		f.ended = func(*clientStream) {
			mutex.Lock()
			ends = append(ends, time.Now())
			mutex.Unlock()
			opening.Go(func() {
				time.Sleep(rand.N(time.Second))
				if err := f.open(b.context); err != nil {
					mutex.Lock()
					failed = err
					mutex.Unlock()
				}
			})
		}
		if err := f.openAll(b.context, n); err != nil {
			return err
		}
		time.Sleep(settle)
		residentBefore, _, err := p.process().Memory()
		if err != nil {
			return err
		}
		cpuBefore, start := p.process().CPU(), time.Now()
		if err := p.reload(p); err != nil {
			return err
		}
		sample("reload returns after", "ms", float64(time.Since(start).Milliseconds()))
		time.Sleep(time.Until(start.Add(watched)))
		opening.Wait()
		cpu := p.process().CPU() - cpuBefore
		resident, _, err := p.process().Memory()
		if err != nil {
			return err
		}
		mutex.Lock()
		defer mutex.Unlock()
		if failed != nil {
			return failed
		}
		counts := f.counts()
		sample("streams left on the old configuration", "", float64(n-len(ends)))
		sample("ends that were not clean", "", float64(counts.BrokenEnds))
		if len(ends) > 0 {
			sample("until the last had ended", "s", ends[len(ends)-1].Sub(start).Seconds())
			sample("most ends within a second", "", float64(densest(ends)))
		}
		sample("CPU", "s", cpu.Seconds())
		sample("resident grew by", "MiB", (resident-residentBefore)/kiB/kiB)
		sample("processes", "", float64(len(p.process().IDs())))
		f.mutex.Lock()
		f.ended = nil
		f.mutex.Unlock()
		// All must be there and get what is sent.
		answer, err := b.origin.do(order{Group: p.group, Do: "burst"})
		if err != nil {
			return err
		}
		if answer.Sent != n {
			return fmt.Errorf("%d streams are open after the reload, %d were before", answer.Sent, n)
		}
		_, err = f.collect(n)
		return err
	})
}

// densest is the largest number of times within any second. They are in order.
func densest(times []time.Time) (most int) {
	first := 0
	for last := range times {
		for times[last].Sub(times[first]) > time.Second {
			first++
		}
		most = max(most, last-first+1)
	}
	return most
}
