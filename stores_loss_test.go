package caddysse_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

// waitForEnds waits until the store has the end of every run that it has, and until
// the nodes know of it: after a failed write, they keep no new run in the store until
// a write has succeeded.
func (n *cluster) waitForEnds(t testing.TB) {
	t.Helper()
	handle := n.Open()
	defer handle.Close()
	eventually(t, "the store has the ends of its runs", func() bool {
		for _, key := range n.Runs() {
			if run, err := handle.Find(t.Context(), key); err != nil || run.End == nil {
				return false
			}
		}
		return caddysse.StoresAreIdle()
	})
}

// expectLossTold comes back to node b twice: one event before the newest one
// that the store has, and as an EventSource that has all of them.
func (n *cluster) expectLossTold(t testing.TB, token string, newest int) {
	t.Helper()
	f := n.back(t, "b", "/", fmt.Sprintf("%s.%d", token, newest-1), "Accept: text/event-stream", notEventSource).follow()
	f.expect(t, eventOf(token, newest))
	f.expectAbort(t)
	n.waitForEnds(t)
	e, other := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, fmt.Sprintf("%s.%d", token, newest)), "X-Node: b")...)
	other.start("text/event-stream")
	e.headers(t).follow().expectUnknown(t, 0)
	other.end()
	n.waitForEnds(t)
}

func TestAnEndAfterALossIsNoCleanOneOnAnotherNode(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	for i, endsFirst := range []bool{true, false} {
		last := 2 + i
		_, one, call, token := n.begin(t, "a", "/")
		call.send(plainEvents(1, last))
		one.expect(t, events(token, 1, last))
		n.waitForEvents(t, uint64(last))
		n.SetFull(true)
		call.send(plainEvent(last + 1))
		one.expect(t, eventOf(token, last+1))
		if endsFirst {
			call.end()
			one.expectEnd(t)
		}
		eventually(t, "what waits for the store is given up", func() bool {
			waiting, _ := caddysse.WaitingForStores()
			return waiting == 0
		})
		if !endsFirst {
			call.end()
			one.expectEnd(t)
		}
		n.SetFull(false)
		n.waitForEnds(t)
		n.expectLossTold(t, token, last)
		n.Flush() // only the other run must be waited for
	}
}

// A replica that lacks the newest events may replace a server before or after
// the end of a stream.
func TestAStreamIsNotWholeWhereTheStoreHasLostItsLastEvents(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	for i, endsFirst := range []bool{false, true} {
		last := 3 + i
		_, one, call, token := n.begin(t, "a", "/")
		call.send(plainEvents(1, last))
		one.expect(t, events(token, 1, last))
		n.waitForEvents(t, uint64(last))
		if endsFirst {
			call.end()
			one.expectEnd(t)
			n.waitForEnds(t)
		}
		eventually(t, "the store has confirmed all", func() bool {
			waiting, _ := caddysse.WaitingForStores()
			return waiting == 0
		})
		n.LoseNewest(1)
		if !endsFirst {
			call.end()
			one.expectEnd(t)
			n.waitForEnds(t)
		}
		n.expectLossTold(t, token, last-1)
		n.Flush()
	}
}

// The upstream sends no more, and no node renews its lease meanwhile, so
// nothing else tells the client.
func TestAClientElsewhereThatHasAllOfAStreamIsToldOfALossAtOnce(t *testing.T) {
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), 30*patience, "1m", "")
	for what, lose := range map[string]func(call *upstreamCall){
		"a replica that lacks an event": func(call *upstreamCall) {
			n.LoseNewest(1)
			call.send(plainEvent(4)) // it follows events that are not there
		},
		"a replica that lacks all events": func(call *upstreamCall) {
			n.LoseNewest(3)
			call.send(plainEvent(4))
		},
		"a store that is empty": func(*upstreamCall) { n.Flush() },
	} {
		_, one, call, token := n.begin(t, "a", "/")
		call.send(plainEvents(1, 3))
		one.expect(t, events(token, 1, 3))
		two := n.back(t, "b", "/", token+".2").follow()
		two.expect(t, eventOf(token, 3))
		one.expectEnd(t)
		n.waitForRun("open", 1)
		lose(call)
		if _, err := two.rest(); err == io.EOF || err == errNothingMore {
			t.Errorf("%s: the stream elsewhere: %v", what, err)
		}
		e, other := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".3"), "X-Node: b")...)
		other.start("text/event-stream")
		e.headers(t).follow().expectUnknown(t, 0)
		other.end()
		// The node with the run still has its events, as long as its upstream
		// sends nothing.
		back := n.back(t, "a", "/", token+".2").follow()
		call.end()
		if got, err := back.rest(); !strings.HasPrefix(got, eventOf(token, 3)) || err != io.EOF {
			t.Errorf("%s: the stream where it began: %q, %v", what, got, err)
		}
		n.Flush() // only the other run must be waited for
	}
}

// While the store was full, the loss could not be recorded in it.
func TestALossThatTheStoreCouldNotBeToldOfIsToldToWhoComesBack(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	_, one, call, token := n.beginStored(t, 1)
	n.SetFull(true)
	call.send(plainEvent(2))
	one.expect(t, eventOf(token, 2))
	eventually(t, "the event waits for the store", func() bool {
		waiting, _ := caddysse.WaitingForStores()
		return waiting == 1
	})
	eventually(t, "the event is given up, and so is telling the store", caddysse.StoresAreIdle)
	n.SetFull(false)
	two := n.back(t, "b", "/", token+".1", "Accept: text/event-stream", notEventSource).follow()
	two.expectAbort(t)
	n.waitForEnds(t)
	e, other := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".1"), "X-Node: b")...)
	other.start("text/event-stream")
	e.headers(t).follow().expectUnknown(t, 0)
	other.end()
	call.end()
	one.rest()
}

// A store that has lost everything has also lost the leases of the nodes, until
// they renew them. No connection breaks.
func TestANodeIsNotDeadBecauseTheStoreHasLostItsLease(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	time.Sleep(shortLease) // what nodes know about the store's return is outdated after this
	for range 3 {
		n.Flush()
		res, _, call, token := n.beginStored(t, 2)
		res.leave()
		two := n.back(t, "b", "/", token+".1").follow()
		two.expect(t, eventOf(token, 2))
		call.send(plainEvent(3))
		two.expect(t, eventOf(token, 3))
		call.end()
		two.expectEnd(t)
		time.Sleep(shortLease / 4)
	}
	n.up.expectNoCall(t)
}
