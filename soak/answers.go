//go:build linux

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// answersWindow is short, because some clients come back after it.
const answersWindow = 15 * time.Second

func answersSite(_ size, upstream string) string {
	return fmt.Sprintf(`
	sse {
		name answers
		resume %v any
	}
	reverse_proxy %s
`, answersWindow, upstream)
}

// One in lateClients clients comes back after the window.
const lateClients = 25

// answers is a trial: clients request short answers by POST, are cut off, and
// repeat the same POST with the last id, as fetch-event-source does. The upstream
// gets each request once. A client that comes back after the window gets an event
// that says that its answer is lost, and stops.
func (s *stage) answers() error {
	ctx, cancel := context.WithTimeout(s.ctx, s.length*2+3*time.Minute)
	defer cancel()
	var late, cuts atomic.Int64
	s.visitors(func(i int, random *rand.Rand) {
		want := numbers{last: 5 + random.IntN(60), pace: time.Duration(10+random.IntN(80)) * time.Millisecond, size: random.IntN(20)}
		f := &follower{visitor: visitor{
			hop: s.hop.addr, method: "POST", secure: i%4 == 3, random: random,
			target: fmt.Sprintf("/numbered/%d?%s", i, want.query()),
		}}
		pause(ctx, time.Duration(random.Int64N(int64(s.length))))
		var err error
		if i%lateClients == 0 {
			late.Add(1)
			err = s.comeTooLate(ctx, f, want)
		} else {
			err = s.readAnswer(ctx, f, want)
		}
		if err != nil {
			s.problems.add("client %d (HTTP/2: %t), connection %d: %v", i, f.secure, f.connections, err)
		}
		s.connections.Add(int64(f.connections))
		s.events.Add(int64(f.seen))
		cuts.Add(int64(f.connections - 1))
	})
	if err := s.awaitNoRuns(answersWindow); err != nil {
		return err
	}
	told, err := s.upstream.requests()
	if err != nil {
		return err
	}
	if told.Requests != s.clients || told.Most != 1 || told.Foreign != 0 {
		s.problems.add("the upstream of %d clients has had %+v", s.clients, told)
	}
	s.say("%d answers, %d events; %d connections, %d cut; %d came too late, were told and stopped; the upstream had %d requests, %d at most for one answer",
		s.clients, s.events.Load(), s.connections.Load(), cuts.Load(), late.Load(), told.Requests, told.Most)
	s.resources()
	return nil
}

// repeat continues over connections that may be cut, until on returns that it is
// done.
func (f *follower) repeat(ctx context.Context, c cut, on func(message) bool) (end visitEnd, wrong, err error) {
	end, err = f.visit(ctx, c, nil, func(event message) bool {
		wrong = f.take(event)
		return wrong == nil && on(event)
	})
	return end, wrong, err
}

// firstCut cuts the first connection after its first id.
func (f *follower) firstCut() (c cut, leaveAt int) {
	if f.secure { // the hop can't see ids in TLS: the client cancels
		return never, 1 + f.random.IntN(10)
	}
	c = f.cutSomewhere(500)
	c.afterID = true
	return c, 0
}

func (s *stage) readAnswer(ctx context.Context, f *follower, want numbers) error {
	for {
		c, leaveAt := f.firstCut()
		if f.token != "" {
			if c = never; f.random.IntN(2) == 0 {
				c = f.cutSomewhere(500)
			}
			leaveAt = 0
		}
		end, wrong, err := f.repeat(ctx, c, func(event message) bool { return event.number != leaveAt })
		switch {
		case wrong != nil:
			return wrong
		case err != nil:
			return err
		case end == clean && f.seen == want.last:
			return nil
		case end == clean:
			return fmt.Errorf("a clean end after %d of %d events", f.seen, want.last)
		case ctx.Err() != nil || !f.comeBack(ctx):
			return fmt.Errorf("%d of %d events in time", f.seen, want.last)
		}
	}
}

// comeTooLate repeats the request after its run has ended.
func (s *stage) comeTooLate(ctx context.Context, f *follower, want numbers) error {
	for f.token == "" {
		c, leaveAt := f.firstCut()
		_, wrong, err := f.repeat(ctx, c, func(event message) bool { return event.number != leaveAt })
		if wrong != nil || err != nil {
			return fmt.Errorf("%w %w", wrong, err)
		}
	}
	// The window also begins when the upstream has ended.
	longest := time.Duration(want.last) * 2 * want.pace
	if !pause(ctx, answersWindow+longest+10*time.Second) {
		return ctx.Err()
	}
	var told []message
	end, err := f.visit(ctx, never, nil, func(event message) bool {
		told = append(told, event)
		return true
	})
	isLost := len(told) == 1 && told[0].name == "error" && told[0].id == "" && strings.Contains(told[0].data, `"stream_lost"`)
	if err != nil || end != clean || !isLost || f.id != "" {
		return fmt.Errorf("too late, it gets %+v and end %v (%v), and keeps the id %q", told, end, err, f.id)
	}
	return nil
}
