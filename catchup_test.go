package caddysse_test

import (
	"fmt"
	"strings"
	"testing"
)

func withID(n int) string { return fmt.Sprintf("id: u%d\ndata: %d\n\n", n, n) }

func withIDs(from, to int) string {
	var all strings.Builder
	for n := from; n <= to; n++ {
		all.WriteString(withID(n))
	}
	return all.String()
}

func TestAClientThatTheJournalHasNothingForCatchesUp(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream", "X-Run: yes")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withIDs(50, 60))
	one.expect(t, withIDs(50, 60))

	back := cl.begin(cl.request(t, "GET", "/", nil, append(asEventSource, "Last-Event-ID: u40", "X-Client: 2")...))
	res := back.headers(t)
	if res.Header.Get("X-Run") != "yes" {
		t.Error("the headers are not the run's")
	}
	two := res.follow()
	own := up.accept(t)
	if own.Header.Get("Last-Event-ID") != "u40" || own.Header.Get("X-Client") != "" {
		t.Errorf("it catches up with %v", own.Header)
	}
	// Whoever brings the same id uses the same stream.
	three := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u40")...).follow()
	own.start("text/event-stream", "X-Run: no")
	own.send(withIDs(41, 49))
	two.expect(t, withIDs(41, 49))
	three.expect(t, withIDs(41, 49))
	own.send(withIDs(50, 55))
	two.expect(t, withIDs(50, 60)) // what comes after 55 is the journal's
	three.expect(t, withIDs(50, 60))
	own.expectGone()
	run.send(withID(61))
	for _, f := range []*follower{one, two, three} {
		f.expect(t, withID(61))
	}
	run.end()
	for _, f := range []*follower{one, two, three} {
		f.expectEnd(t)
	}
}

func TestTheJournalMayComeToWhereAClientHasCaughtUpTo(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withID(50))
	one.expect(t, withID(50))
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u48")...).follow()
	own := up.accept(t)
	own.start("text/event-stream")
	own.send(withIDs(49, 52)) // it is ahead of the run
	two.expect(t, withIDs(49, 52))
	run.send(withIDs(51, 53))
	two.expect(t, withID(53))
	own.expectGone()
	run.end()
	two.expectEnd(t)
}

func TestAnIDThatComesInTimeNeedsNoCatchingUp(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u2")...).follow()
	run.send(withIDs(1, 3))
	two.expect(t, withID(3))
	run.end()
	two.expectEnd(t)
}

func TestAClientEndsWithTheStreamThatItCatchesUpBy(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withID(50))
	one.expect(t, withID(50))
	ends := []func(own *upstreamCall, f *follower){
		func(own *upstreamCall, f *follower) { // it is none
			own.startWith(404)
			own.end()
			f.expectAbort(t)
		},
		func(own *upstreamCall, f *follower) {
			own.start("text/event-stream")
			own.send(withID(31))
			f.expect(t, withID(31))
			own.end()
			f.expectEnd(t)
		},
		func(own *upstreamCall, f *follower) {
			own.start("text/event-stream")
			own.abort()
			f.expectAbort(t)
		},
	}
	for i, end := range ends {
		f := cl.get(t, "/", append(asEventSource, fmt.Sprintf("Last-Event-ID: other%d", i))...).follow()
		end(up.accept(t), f)
	}
	run.end()
	one.expectEnd(t)
}

func TestWhoFindsNoPlaceToCatchUpIsToldAfterAWhile(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for 10 s")
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withID(50))
	one.expect(t, withID(50))
	var busy []*follower
	for i := range 8 {
		busy = append(busy, cl.get(t, "/", append(asEventSource, fmt.Sprintf("Last-Event-ID: busy%d", i))...).follow())
		up.accept(t).start("text/event-stream")
	}
	late := cl.get(t, "/", append(asEventSource, "Last-Event-ID: late")...).follow()
	late.expect(t, "event: lost\ndata: {\"reason\":\"unknown\"}\nid: u50\n\n")
	run.send(withID(51))
	late.expect(t, withID(51))
	run.end()
	late.expectEnd(t)
	for _, f := range busy {
		f.expectEnd(t)
	}
}
