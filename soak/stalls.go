//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

func stallsSite(_ size, upstream string) string {
	return fmt.Sprintf(`
	sse {
		name stalls
		resume %v {
			history 64KiB
		}
	}
	reverse_proxy %s
`, resumeWindow, upstream)
}

const (
	// stallFor is how long a client reads slowly, or nothing, before its
	// connection is cut.
	stallFor = 20 * time.Second
	slowRate = 20 << 10 // bytes per second
)

// gaps is what clients were told of lost events.
type gaps struct {
	mu     sync.Mutex
	told   int
	events int
	missed map[string]int // as the log tells it: by path and user agent
}

// stalls is a trial: clients read 20 KiB a second, or nothing for 20 seconds, and
// are then cut off. The kernel has accepted more for them than the journal holds;
// each client is told exactly how many events it has lost.
func (s *stage) stalls() error {
	// 200 KiB a second.
	want := numbers{pace: 5 * time.Millisecond, size: 1000}
	want.last = int(s.length / want.pace)
	ctx, cancel := context.WithTimeout(s.ctx, s.length*3+3*time.Minute)
	defer cancel()
	g := &gaps{missed: make(map[string]int)}
	s.visitors(func(i int, random *rand.Rand) {
		path := fmt.Sprintf("/numbered/%d", i)
		f := &follower{visitor: visitor{
			hop: s.hop.addr, method: "GET", secure: i%4 == 3, random: random, target: path + "?" + want.query(),
		}}
		if err := s.followStalling(ctx, f, want, path, g); err != nil {
			s.problems.add("client %d (HTTP/2: %t), connection %d: %v", i, f.secure, f.connections, err)
		}
		s.connections.Add(int64(f.connections))
		s.events.Add(int64(f.seen - f.lost))
	})
	if err := s.awaitNoRuns(resumeWindow); err != nil {
		return err
	}
	told, err := s.upstream.requests()
	if err != nil {
		return err
	}
	if told.Requests != s.clients {
		s.problems.add("the upstream of %d clients has had %+v", s.clients, told)
	}
	s.tally.mu.Lock()
	for connection, events := range g.missed {
		if s.tally.missed[connection] != events {
			s.problems.add("%s was told that %d events are lost, and %d are logged", connection, events, s.tally.missed[connection])
		}
	}
	s.tally.mu.Unlock()
	if g.told == 0 {
		s.problems.add("nobody has lost anything, so nothing was shown")
	}
	s.say("%d events came once and in order, %d were told to be lost, in %d gaps; %d + %d are all of %d clients × %d; %d connections",
		s.events.Load(), g.events, g.told, s.events.Load(), g.events, s.clients, want.last, s.connections.Load())
	s.resources()
	return nil
}

// followStalling returns when the client has all that is not lost.
func (s *stage) followStalling(ctx context.Context, f *follower, want numbers, path string, g *gaps) error {
	for visit := 0; ; visit++ {
		// Every other connection is a slow one, as long as there is time.
		var pace func()
		on, leave := context.WithCancel(ctx)
		if visit%2 == 0 && visit < 2*s.times {
			pace = stalling(on, f.random.IntN(2) == 0)
			time.AfterFunc(stallFor, leave)
		} else if visit < 2*s.times {
			time.AfterFunc(5*time.Second, leave)
		}
		var wrong error
		_, err := f.visit(on, never, pace, func(event message) bool {
			if event.name == "lost" {
				wrong = f.takeLost(event, path, g)
			} else {
				wrong = f.take(event)
			}
			return wrong == nil && f.seen < want.last
		})
		leave()
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

// stalling reads slowly, or stops after a while.
func stalling(ctx context.Context, slowly bool) func() {
	start, read := time.Now(), 0
	return func() {
		read++
		switch {
		case slowly:
			pause(ctx, time.Until(start.Add(time.Duration(read)*time.Second*1100/slowRate)))
		case time.Since(start) > time.Second:
			<-ctx.Done()
		}
	}
}

// takeLost checks that a gap begins after the last event.
func (f *follower) takeLost(event message, path string, g *gaps) error {
	var lost struct {
		Reason string
		Events int
	}
	if err := json.Unmarshal([]byte(event.data), &lost); err != nil {
		return err
	}
	if want := fmt.Sprintf("%s.%d", f.token, f.seen+lost.Events); lost.Reason != "history" || lost.Events < 1 || event.id != want {
		return errors.New("after number " + fmt.Sprint(f.seen) + " it is told " + strings.TrimSpace(event.data) + " with the id " + event.id)
	}
	f.seen += lost.Events
	f.lost += lost.Events
	g.mu.Lock()
	defer g.mu.Unlock()
	g.told++
	g.events += lost.Events
	g.missed[path+" "+f.userAgent()] = lost.Events
	return nil
}
