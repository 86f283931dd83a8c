//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// One stream that all clients request: the module sends one request to the
// upstream, the other systems one per client.

// sharedQuiet measures the memory of a client while nothing happens.
func (b *bench) sharedQuiet() error {
	n := b.settings.SharedStreams
	return b.each(fmt.Sprintf("one stream for %d quiet clients", n), way{shared: true}, func(p *proxy, sample func(string, string, float64)) error {
		return b.quietStreams(p, n, "client", false, sample)
	})
}

// sharedEvents measures the cost of an event that goes to all clients.
func (b *bench) sharedEvents() error { return b.sharedEventsOver(way{shared: true}, "HTTP/1.1") }

func (b *bench) sharedEventsTLS() error {
	return b.sharedEventsOver(way{shared: true, tls: true}, "HTTP/2 with TLS")
}

func (b *bench) sharedEventsOver(as way, protocol string) error {
	return b.eventsOf(as, fmt.Sprintf("one stream for %d clients, %d events/s to each, %s",
		b.settings.Streams, b.settings.Rate/b.settings.Streams, protocol))
}

// sharedBurst is one event for all clients, while nothing else happens.
func (b *bench) sharedBurst() error {
	n := b.settings.SharedStreams
	return b.burstOf(way{shared: true}, n, fmt.Sprintf("one event of one stream to %d clients", n))
}

const (
	// What a client that reads nothing must be sent until a write to it blocks: the
	// kernel's buffers take this much.
	fillers    = 24
	fillerSize = 16 << 10

	// While events are measured, one goes to all clients at this interval.
	stalledInterval = 500 * time.Millisecond
)

// sharedStalled measures whether clients of a shared stream that read nothing, or
// vanish, delay the others. It measures only the module: in the other systems
// each client has a stream of its own.
func (b *bench) sharedStalled() error {
	bad := b.settings.SharedStreams / 3
	good := b.settings.SharedStreams - bad
	title := fmt.Sprintf("one stream for %d clients, and %d that stall or vanish", good, bad)
	return b.each(title, way{shared: true}, func(p *proxy, sample func(string, string, float64)) error {
		if p.name != "sse" {
			return nil
		}
		f := b.newFleet(p, "/events")
		defer f.close()
		if err := f.openAll(b.context, good); err != nil {
			return err
		}
		time.Sleep(2 * time.Second)
		without, err := b.tail(p, f, good)
		if err != nil {
			return err
		}
		stalled := &stalledFleet{addr: p.addr, path: "/events"}
		defer stalled.close()
		if err := sideBySide(b.context, 50, bad-bad/2, stalled.open); err != nil {
			return err
		}
		leaving := b.newFleet(p, "/events")
		defer leaving.close()
		if err := leaving.openAll(b.context, bad/2); err != nil {
			return err
		}
		if err := b.fill(p, f, good); err != nil {
			return err
		}
		var vanishing sync.WaitGroup
		over, stop := context.WithCancel(b.context)
		vanishing.Go(func() { leaving.vanish(over, b.tailTakes()) })
		with, err := b.tail(p, f, good)
		stop()
		vanishing.Wait()
		if err != nil {
			return err
		}
		milliseconds := func(d time.Duration) float64 { return microseconds(d) / 1000 }
		sample("p99 without them", "ms", milliseconds(without))
		sample("p99 with them", "ms", milliseconds(with))
		sample("p99 with them / without", "", float64(with)/float64(without))
		return nil
	})
}

func (b *bench) tailTakes() time.Duration {
	return time.Duration(b.settings.StalledEvents) * stalledInterval
}

// tail is the time within which 99 % of some events reach a fleet's clients.
func (b *bench) tail(p *proxy, f *fleet, clients int) (time.Duration, error) {
	_, err := b.origin.do(order{Group: p.group, Do: "broadcast", Rounds: b.settings.StalledEvents, Interval: stalledInterval})
	if err != nil {
		return 0, err
	}
	took, err := f.collect(b.settings.StalledEvents * clients)
	return quantile(took, 0.99), err
}

// fill sends comments until the kernel takes no more for clients that do not
// read, and waits until the others have them.
func (b *bench) fill(p *proxy, f *fleet, clients int) error {
	want := f.counts().Heartbeats + fillers*clients
	if _, err := b.origin.do(order{Group: p.group, Do: "fill", Rounds: fillers}); err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); f.counts().Heartbeats < want; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("of %d comments %d have arrived", want, f.counts().Heartbeats)
		}
	}
	return nil
}

// vanish resets the connections of the fleet's clients one after the other,
// spread over a time.
func (f *fleet) vanish(ctx context.Context, within time.Duration) {
	all := f.all()
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	ticks := time.NewTicker(max(within/time.Duration(len(all)+1), time.Microsecond))
	defer ticks.Stop()
	for _, s := range all {
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
		if conn, ok := s.conn.(*net.TCPConn); ok {
			conn.SetLinger(0)
		}
		s.close()
	}
}

// stalledFleet are clients that read the answer's headers, and then nothing.
type stalledFleet struct {
	addr, path string

	mutex sync.Mutex
	conns []net.Conn
}

func (f *stalledFleet) open() error {
	conn, err := net.DialTimeout("tcp", f.addr, 30*time.Second)
	if err != nil {
		return err
	}
	f.mutex.Lock()
	f.conns = append(f.conns, conn)
	f.mutex.Unlock()
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET "+f.path+" HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n"); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 256))
	return err
}

func (f *stalledFleet) close() {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	for _, conn := range f.conns {
		conn.Close()
	}
}
