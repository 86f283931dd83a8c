//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

// downTime is how long a deployed upstream is down.
const downTime = 5 * time.Second

// triesPerSecond is the most requests that the module may send an upstream in a
// second. If one of the processes has to wait for the CPU, evenly sent requests
// arrive in clumps, so half a second's more are allowed.
const (
	triesPerSecond = 64
	clumped        = triesPerSecond / 2
)

func deploysSite(_ size, upstream string) string {
	return fmt.Sprintf(`
	sse {
		name deploys
		upstream_retry 5m
	}
	reverse_proxy %s
`, upstream)
}

// urls is how many streams there are if many clients share one.
const urls = 10

func sharedDeploysSite(_ size, upstream string) string {
	return fmt.Sprintf(`
	sse {
		name shared
		drain 5s 1s
		upstream_retry 5m
		share
	}
	reverse_proxy %s
`, upstream)
}

// deploys is a trial: an upstream with ids and replay is killed and comes back.
// No client sees its connection end, each gets every event once and in order, and
// the upstream never gets more than 64 requests a second.
func (s *stage) deploys() error { return s.deploy(s.clients, false) }

// sharedDeploys is deploys with clients that share the upstream's streams, and
// with reloads.
func (s *stage) sharedDeploys() error { return s.deploy(urls, true) }

func (s *stage) deploy(streams int, shared bool) error {
	want := numbers{pace: time.Second, size: 20, ids: true, from: time.Now()}
	ctx, cancel := context.WithTimeout(s.ctx, s.length+3*time.Minute)
	defer cancel()
	cycle := s.length / time.Duration(s.times)
	// After the last deploy, all clients are back within this time.
	want.last = int((s.length + downTime + time.Duration(s.clients)*time.Second/triesPerSecond) / want.pace)
	var told requestsTold
	troubles := make(chan error, 1)
	go func() { troubles <- s.kills(ctx, cycle, shared, &told) }()
	ends := make(chan visitEnd, 1000*s.clients)
	s.visitors(func(i int, random *rand.Rand) {
		f := &follower{visitor: visitor{
			hop: s.hop.addr, method: "GET", secure: i%4 == 3, random: random,
			target: fmt.Sprintf("/numbered/%d?%s", i%streams, want.query()),
		}}
		pause(ctx, time.Duration(random.Int64N(int64(min(10*time.Second, cycle/4)))))
		if err := s.followDeploys(ctx, f, want, shared, ends); err != nil {
			s.problems.add("client %d (HTTP/2: %t), connection %d: %v", i, f.secure, f.connections, err)
		}
		s.connections.Add(int64(f.connections))
	})
	if err := <-troubles; err != nil {
		return err
	}
	now, err := s.upstream.requests()
	if err != nil {
		return err
	}
	told.add(now)
	endings := map[visitEnd]int{}
	for len(ends) > 0 {
		endings[<-ends]++
	}
	if told.InASecond > triesPerSecond+clumped || told.InTenSeconds > 10*triesPerSecond+clumped {
		s.problems.add("the upstream was asked again %d times in a second, %d times in ten", told.InASecond, told.InTenSeconds)
	}
	// A request without an answer does not count as a stream that ended: Caddy may
	// not have its certificate yet, and while a reload replaces a listener, the
	// system resets connections that were not accepted.
	if endings[broken] > 0 || !shared && endings[clean] > 0 {
		s.problems.add("clients saw their connections end: %d cleanly, %d broken", endings[clean], endings[broken])
	}
	// A retrying run makes no tries through a configuration that has been replaced,
	// and ends.
	if ended := s.tally.closed("drained") + s.tally.closed("upstream_error"); ended < endings[clean] {
		s.problems.add("clients saw %d clean ends, and %d streams were ended by reloads", endings[clean], ended)
	}
	s.say("%d events, each client has every one once and in order; %d kills, %d reloads; clients saw %d clean ends and %d broken ones, and %d requests were not answered",
		s.events.Load(), s.times, s.proxy.reloads, endings[clean], endings[broken], endings[unanswered])
	s.say("the upstream had %d requests, %d of them with an id, at most %d in a second and %d in ten", told.Requests, told.Returns, told.InASecond, told.InTenSeconds)
	if err := s.awaitNoRuns(10 * time.Second); err != nil {
		return err
	}
	s.retries()
	s.resources()
	return nil
}

// add adds what the upstream reported before it was killed.
func (t *requestsTold) add(more requestsTold) {
	t.Requests += more.Requests
	t.Returns += more.Returns
	t.InASecond = max(t.InASecond, more.InASecond)
	t.InTenSeconds = max(t.InTenSeconds, more.InTenSeconds)
	t.Foreign += more.Foreign
}

// kills kills the upstream in the middle of each cycle, and reloads at the end of
// every second one.
func (s *stage) kills(ctx context.Context, cycle time.Duration, reloads bool, told *requestsTold) error {
	for i := range s.times {
		if !pause(ctx, cycle/2) {
			return nil
		}
		now, err := s.upstream.requests()
		if err != nil {
			return err
		}
		told.add(now)
		s.upstream.kill()
		if !pause(ctx, downTime) {
			return nil
		}
		if err := s.upstream.start(); err != nil {
			return err
		}
		if !pause(ctx, cycle/2-downTime) {
			return nil
		}
		if reloads && i%2 == 0 {
			if err := s.proxy.reload(); err != nil {
				return fmt.Errorf("reload: %w", err)
			}
		}
	}
	return nil
}

// followDeploys returns when the client has the last event. A client of a shared
// stream begins with what comes from then on.
func (s *stage) followDeploys(ctx context.Context, f *follower, want numbers, shared bool, ends chan<- visitEnd) error {
	for {
		var wrong error
		end, err := f.visit(ctx, never, nil, func(event message) bool {
			if event.name == "sse" && f.seen == 0 {
				return true
			}
			first := f.seen == 0 && shared
			if event.name != "" || event.id != strconv.Itoa(event.number) || event.number != f.seen+1 && !first {
				wrong = fmt.Errorf("event %q, number %d with the id %s after number %d: %s", event.name, event.number, event.id, f.seen, event.data)
				return false
			}
			f.seen = event.number
			s.events.Add(1)
			return f.seen < want.last
		})
		switch {
		case wrong != nil:
			return wrong
		case err != nil:
			return err
		case f.seen == want.last:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%d of %d events in time", f.seen, want.last)
		}
		ends <- end
		if !f.comeBack(ctx) {
			return fmt.Errorf("%d of %d events in time", f.seen, want.last)
		}
	}
}

// retries reports the metrics about tries.
func (s *stage) retries() {
	if answer, err := s.proxy.ask(http.MethodGet, "/metrics", "", nil); err != nil {
		s.problems.add("%v", err)
	} else {
		s.say("tries: %s", metricByLabel(string(answer), "caddy_sse_upstream_retries_total", "result"))
	}
}
