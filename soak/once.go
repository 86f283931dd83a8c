//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// resumeWindow is the window of `resume` in short trials.
const resumeWindow = 20 * time.Second

// window is for trials of any length. On an overloaded machine, thousands of
// clients can take a while to come back.
func (s size) window() time.Duration { return max(resumeWindow, min(s.length/4, time.Minute)) }

func onceSite(s size, upstream string) string {
	return fmt.Sprintf(`
	sse {
		name once
		drain 4s 1s
		retry 100ms 1s
		max_duration %v %v
		resume %v
	}
	reverse_proxy %s
`, s.length/20+2*time.Second, s.length/10, s.window(), upstream)
}

// follower checks what a client gets of a numbered stream.
type follower struct {
	visitor
	seen  int    // the last number
	token string // of the run
	lost  int    // events that it was told are gone
}

// take checks the next event, which must have a matching id.
func (f *follower) take(event message) error {
	switch {
	case event.name == "sse" && f.token == "":
		f.token, _, _ = strings.Cut(event.id, ".")
		return nil
	case event.name != "":
		return fmt.Errorf("event %s after number %d (id %s): %s", event.name, f.seen, f.id, event.data)
	case event.number != f.seen+1:
		return fmt.Errorf("number %d after %d, with the id %s", event.number, f.seen, event.id)
	}
	if f.token == "" { // not an EventSource
		f.token, _, _ = strings.Cut(event.id, ".")
	}
	if want := fmt.Sprintf("%s.%d", f.token, event.number); event.id != want || !strings.HasPrefix(want, "sse1-") {
		return fmt.Errorf("number %d has the id %s, not %s", event.number, event.id, want)
	}
	f.seen = event.number
	return nil
}

// cutSomewhere cuts a connection at random: in its headers, in an event, or
// between two.
func (f *follower) cutSomewhere(mean int) cut {
	c := cut{bytes: int(f.random.ExpFloat64() * float64(mean)), reset: f.random.IntN(2) == 0}
	if f.random.IntN(3) == 0 {
		c.bytes = f.random.IntN(700)
	}
	if f.random.IntN(4) == 0 {
		c.gone = time.Duration(f.random.IntN(4000)) * time.Millisecond
	}
	return c
}

// once is a trial: connections are cut at any byte, streams reach max_duration
// and are drained by reloads. The upstream has neither ids nor a replay, and gets
// one request from each client, which gets each event once and in order.
func (s *stage) once() error {
	want := numbers{pace: max(s.length/1200, 100*time.Millisecond), size: 20}
	want.last = int(s.length / want.pace)
	ctx, cancel := context.WithTimeout(s.ctx, s.length*3/2+2*time.Minute)
	defer cancel()
	reloaded := make(chan error, 1)
	go func() { reloaded <- s.reloads(ctx) }()
	s.visitors(func(i int, random *rand.Rand) {
		f := &follower{visitor: visitor{
			hop: s.hop.addr, method: "GET", secure: i%4 == 3, random: random,
			target: fmt.Sprintf("/numbered/%d?%s", i, want.query()),
		}}
		if err := s.followOnce(ctx, f, want); err != nil {
			s.problems.add("client %d (HTTP/2: %t), connection %d: %v", i, f.secure, f.connections, err)
		}
		s.connections.Add(int64(f.connections))
		s.events.Add(int64(f.seen))
	})
	if err := <-reloaded; err != nil {
		return err
	}
	if err := s.awaitNoRuns(s.window()); err != nil {
		return err
	}
	told, err := s.upstream.requests()
	if err != nil {
		return err
	}
	if told.Requests != s.clients || told.Most != 1 || told.Foreign != 0 {
		s.problems.add("the upstream of %d clients has had %+v", s.clients, told)
	}
	s.say("%d events, each of %d clients has %d of them once and in order; %d connections, %d reloads; the upstream had %d requests, %d at most of one client",
		s.events.Load(), s.clients, want.last, s.connections.Load(), s.proxy.reloads, told.Requests, told.Most)
	s.resources()
	return nil
}

// followOnce returns when the client has all of its stream.
func (s *stage) followOnce(ctx context.Context, f *follower, want numbers) error {
	// They do not all start at once.
	pause(ctx, time.Duration(f.random.Int64N(int64(s.length/20))))
	mean := 100 * int(15*time.Second/want.pace) // about 15 seconds of events
	for {
		c := f.cutSomewhere(mean)
		leaves := false
		if f.token == "" {
			// Before its first id a client can't come back.
			c.bytes, c.afterID = f.random.IntN(300), true
			if f.secure {
				c, leaves = never, f.random.IntN(2) == 0 // the hop can't see ids in TLS
			}
		}
		var wrong error
		_, err := f.visit(ctx, c, nil, func(event message) bool {
			wrong = f.take(event)
			return wrong == nil && f.seen < want.last && !leaves
		})
		switch {
		case wrong != nil:
			return wrong
		case err != nil:
			return err
		case f.seen == want.last:
			return nil
		case ctx.Err() != nil || !f.comeBack(ctx):
			return fmt.Errorf("%d of %d events in time", f.seen, want.last)
		}
	}
}
