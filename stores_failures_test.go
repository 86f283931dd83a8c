package caddysse_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

// waitForStore waits until new streams of a node have ids again, and returns
// the first one that has.
func (n *cluster) waitForStore(t testing.TB, node string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		e, call := open(t, n.cl, n.up, "/probe", append(asEventSource, "X-Node: "+node)...)
		call.start("text/event-stream")
		f := e.headers(t).follow()
		call.send("data: probe\n\n")
		got, _ := f.wait(func(unread string) bool {
			return strings.HasSuffix(unread, "data: probe\n\n") || strings.Contains(unread, ".1\n\n")
		})
		call.end()
		if _, err := f.rest(); err == nil {
			t.Fatal("a probe does not end")
		}
		if strings.Contains(got, "id: sse1-") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("new streams have no ids")
		}
	}
}

func TestAStoreThatIsAwayHarmsNoStream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	_, one, call, token := n.beginStored(t, 1)
	n.SetAway(true)
	call.send(plainEvent(2))
	one.expect(t, eventOf(token, 2)) // the store may be back in a moment
	number := 2
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		number++
		call.send(plainEvent(number))
		got, err := one.wait(func(unread string) bool { return strings.HasSuffix(unread, "\n\n") })
		if err != nil {
			t.Fatalf("event %d: %q, %v", number, got, err)
		}
		if got == plainEvent(number) {
			one.expect(t, got)
			break
		}
		one.expect(t, eventOf(token, number))
		if time.Now().After(deadline) {
			t.Fatal("a stream that the store does not take still has ids")
		}
	}

	// Clients that come back while the store is away. Only a GET reaches the
	// upstream.
	e, other := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".1"), "X-Node: b")...)
	other.start("text/event-stream")
	f := e.headers(t).follow()
	other.send(plainEvent(1))
	f.expect(t, "event: lost\ndata: {\"reason\":\"unknown\"}\nid:\n\n"+plainEvent(1))
	other.end()
	for _, method := range []string{"POST", "DELETE"} {
		res := n.cl.do(t, n.cl.request(t, method, "/", nil, append(comingBack(asEventSource, token+".1"), "X-Node: b")...))
		if _, err := res.text(); err != nil || res.StatusCode != 503 || res.Header.Get("Retry-After") != "5" {
			t.Errorf("%s is answered with %d, Retry-After %q, %v", method, res.StatusCode, res.Header.Get("Retry-After"), err)
		}
	}
	n.up.expectNoCall(t)
	n.SetAway(false)
	n.waitForStore(t, "a")
	n.waitForStore(t, "b")
	call.send(plainEvent(99))
	one.expect(t, plainEvent(99))
	call.end()
	one.expectEnd(t)
	if lines := n.linesWith("the store has failed"); lines != 2 {
		t.Errorf("%d lines warn of the store, want one for each node", lines)
	}
}

// linesWith counts log lines whose message contains a text.
func (c *testCaddy) linesWith(text string) (n int) {
	for _, line := range c.logs() {
		if message, _ := line["msg"].(string); strings.Contains(message, text) {
			n++
		}
	}
	return n
}

func TestAStoreThatIsBackInAMomentHasLostNothing(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	two := n.back(t, "b", "/", token+".1").follow()
	one.expectEnd(t)
	n.SetAway(true)
	call.send(plainEvents(2, 4))
	n.waitForLog("resume: the store has failed; streams go on, but those that it does not take in time are as without resume", 0)
	n.SetAway(false)
	two.expect(t, events(token, 2, 4))
	call.send(plainEvent(5))
	two.expect(t, eventOf(token, 5))
	res.leave()
	call.end()
	two.expectEnd(t)
}

func TestAStreamThatOutrunsTheStoreHasNoMoreIDs(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "history 16KiB")
	res, one, call, token := n.begin(t, "a", "/")
	n.SetFull(true)
	event := "data: " + strings.Repeat("x", 8<<10) + "\n\n"
	without := 0
	for i := 1; without == 0; i++ {
		if i > 1000 {
			t.Fatal("8 MB wait for the store")
		}
		call.send(event)
		got, err := one.wait(func(unread string) bool { return strings.HasSuffix(unread, "\n\n") })
		if err != nil {
			t.Fatal(err)
		}
		one.expect(t, got)
		if got == event {
			without = i
		} else if !strings.Contains(got, fmt.Sprintf("\nid: %s.%d\n", token, i)) {
			t.Fatalf("event %d: %.100q", i, got[len(got)-60:])
		}
	}
	if waited := (without - 1) * len(event); waited < 1<<20 {
		t.Errorf("%d bytes waited for the store", waited)
	}
	call.send(plainEvent(1))
	one.expect(t, plainEvent(1))
	n.SetFull(false)
	res.leave() // its stream is like one without resume
	call.expectGone()
	n.waitForRuns(t, 0)
}

func TestAStoreThatHasLostEverythingEndsWhatIsReadElsewhere(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	two := n.back(t, "b", "/", token+".1", "Accept: text/event-stream", notEventSource).follow()
	one.expectEnd(t)
	n.waitForRun("open", 1)
	_, three, called, other := n.begin(t, "a", "/")
	called.send(plainEvent(1))
	three.expect(t, eventOf(other, 1))
	n.waitForRuns(t, 2)
	n.Flush()
	call.send(plainEvent(2))
	two.expectAbort(t)
	// A run with a client on this node continues without ids.
	for number := 2; ; number++ {
		called.send(plainEvent(number))
		got, err := three.wait(func(unread string) bool { return strings.HasSuffix(unread, "\n\n") })
		if err != nil || number > 10_000 {
			t.Fatalf("event %d: %q, %v", number, got, err)
		}
		three.expect(t, got)
		if got == plainEvent(number) {
			break
		}
	}
	call.send(plainEvent(3)) // this can't be kept for a client that is away
	call.expectGone()
	called.end()
	three.expectEnd(t)
}

func TestNobodyWaitsForASlowStore(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1m", "")
	n.SetDelay(patience)
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 3))
	one.expect(t, events(token, 1, 3)) // long before the store has them
	n.SetDelay(0)
	call.end()
	one.expectEnd(t)
}

func TestASlowStoreHasEverythingInTheEnd(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	n.SetDelay(50 * time.Millisecond)
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 500))
	one.expect(t, events(token, 1, 500))
	res.leave()
	two := n.back(t, "b", "/", token+".400").follow()
	two.expect(t, events(token, 401, 500))
	call.send(plainEvents(501, 600))
	two.expect(t, events(token, 501, 600))
	call.end()
	two.expectEnd(t)
}

func TestAServerStartsReloadsAndStopsWithoutItsStore(t *testing.T) {
	checkLeaks(t)
	memory := storetest.NewMemory()
	memory.SetAway(true)
	n := startNodesOn(t, memory, longLease, "1m", "")
	n.reload(n.site)
	n.reload(strings.ReplaceAll(n.site, "heartbeat off", "heartbeat 15s"))
	e, call := open(t, n.cl, n.up, "/", append(asEventSource, "X-Node: a")...)
	call.start("text/event-stream")
	one := e.headers(t).follow()
	call.send(plainEvent(1))
	got, _ := one.wait(func(unread string) bool {
		return strings.HasSuffix(unread, "\n\n") && strings.Contains(unread, "data: 1")
	})
	if !strings.Contains(got, "data: 1") {
		t.Errorf("got %q", got)
	}
	n.reload("respond ok")
	call.end()
}

func TestARunHoldsItsStoreWhateverReloads(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	n.reload(n.site) // the same store
	one.expectEnd(t) // drained
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, eventOf(token, 1))
	call.send(plainEvent(2))
	two.expect(t, eventOf(token, 2))
	call.end()
	two.expectEnd(t)
}

func TestAnExitLeavesWhatItHasToTheOtherNodes(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	t.Cleanup(func() { caddysse.SeemToExit(false) })
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1s", "")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 2))
	one.expect(t, events(token, 1, 2))
	done, ended, over, other := n.begin(t, "a", "/")
	over.send(plainEvent(1))
	ended.expect(t, eventOf(other, 1))
	done.leave()
	over.end()
	n.waitForRun("ended", 0)
	caddysse.SeemToExit(true)
	res.leave()
	call.expectGone() // an exit ends a run that loses its client
	n.waitForNoEventLost(t)
	caddysse.SeemToExit(false)
	two := n.back(t, "b", "/", token+".1", "Accept: text/event-stream", notEventSource).follow()
	two.expect(t, eventOf(token, 2))
	two.expectAbort(t)
	three := n.back(t, "b", "/", other+".0").follow()
	three.expect(t, eventOf(other, 1))
	three.expectEnd(t)
	n.waitForRuns(t, 0) // after their windows
}

func TestAnExitLeavesWhatItIsAboutToWriteToTheOtherNodes(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	t.Cleanup(func() { caddysse.SeemToExit(false) })
	n := startNodes(t, "5s", "")
	res, one, call, token := n.beginStored(t, 1)
	n.SetDelay(time.Second)
	call.send(plainEvent(2))
	one.expect(t, eventOf(token, 2))
	eventually(t, "the event is being written", func() bool {
		waiting, written := caddysse.WaitingForStores()
		return waiting == 1 && written == 1
	})
	call.send(plainEvents(3, 4))
	one.expect(t, events(token, 3, 4))
	eventually(t, "the others wait meanwhile", func() bool { // the client may get them a moment before that
		waiting, written := caddysse.WaitingForStores()
		return waiting == 3 && written == 1
	})
	caddysse.SeemToExit(true)
	res.leave()
	call.expectGone()
	n.waitForNoEventLost(t) // its journal has no more
	n.SetDelay(0)
	caddysse.SeemToExit(false)
	n.waitForEvents(t, 4)
	two := n.back(t, "b", "/", token+".1", "Accept: text/event-stream", notEventSource).follow()
	two.expect(t, events(token, 2, 4))
	two.expectAbort(t)
}

// waitForNoEventLost waits until all runs of the nodes have ended.
func (n *cluster) waitForNoEventLost(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		open := 0
		for _, run := range n.runs("").Runs {
			if run.State != "ended" {
				open++
			}
		}
		if open == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("runs are left: %+v", n.runs(""))
		}
	}
}

func TestAClientOfANodeThatDiesLeavesItsRunToTheWindow(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1s", "")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	n.waitForRun("open", 0)
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, eventOf(token, 1))
	n.waitForRun("open", 1)
	n.handle("b").Die()
	call.expectGone()
	n.waitForRuns(t, 0)
	if _, err := two.rest(); err == nil {
		t.Error("a stream whose node has lost the store goes on")
	}
}

func TestTheUpstreamIsReadAsFastAsAClientElsewhereReads(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "history 64KiB")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	n.waitForRun("open", 0)
	back := n.back(t, "b", "/", token+".1")
	sent := make(chan struct{})
	const last = 2000
	go func() {
		defer close(sent)
		for i := 2; i <= last; i++ {
			call.send(fmt.Sprintf("data: %d %s\n\n", i, strings.Repeat("x", 2000)))
		}
	}()
	time.Sleep(100 * time.Millisecond) // nothing is read during this time
	two := back.follow()
	got, err := two.wait(func(unread string) bool { return strings.HasSuffix(unread, fmt.Sprintf("id: %s.%d\n\n", token, last)) })
	if err != nil {
		t.Fatal(err)
	}
	<-sent
	blocks := strings.SplitAfter(got, "\n\n")
	for i := 2; i <= last; i++ {
		if want := fmt.Sprintf("id: %s.%d\n\n", token, i); !strings.HasSuffix(blocks[i-2], want) {
			t.Fatalf("block %d is %.60q", i, blocks[i-2])
		}
	}
	two.expect(t, got)
	call.end()
	two.expectEnd(t)
}

// Clients are cut off at random and come back to any node, while messages
// between nodes are sometimes lost. Each event comes once, and in order.
func TestWhoeverComesBackToAnyNodeGetsEveryEventOnceAndInOrder(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	const clients, last = 8, 150
	stop := make(chan struct{})
	var wg, losing sync.WaitGroup
	losing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				n.LoseMessages()
			}
		}
	})
	for i := range clients {
		path := "/" + strconv.Itoa(i)
		_, one, call, token := n.begin(t, []string{"a", "b"}[i%2], path)
		wg.Go(func() {
			for number := 1; number <= last; number++ {
				call.send(plainEvent(number))
				time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
			}
			call.end()
		})
		wg.Go(func() {
			if err := n.comeBackAtRandom(t, one, path, token, last); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	close(stop)
	losing.Wait()
	n.up.expectNoCall(t)
	n.stopRuns() // the message that a client has everything may be lost, too
	n.waitForNoRun()
}

// comeBackAtRandom reads a run to its end, on one node after the other.
func (n *cluster) comeBackAtRandom(t testing.TB, f *follower, path, token string, last int) error {
	seen := 0
	random := rand.New(rand.NewPCG(1, uint64(len(path))+uint64(path[1])))
	var res *reply
	for {
		want := seen + 1 + random.IntN(60)
		got, err := f.wait(func(unread string) bool { return strings.Count(unread, "\n\n") >= want-seen })
		blocks := strings.SplitAfter(got, "\n\n")
		for _, block := range blocks[:len(blocks)-1] {
			if strings.HasPrefix(block, "event: sse\n") {
				continue
			}
			if block != eventOf(token, seen+1) {
				return fmt.Errorf("after event %d: %q", seen, block)
			}
			seen++
		}
		if seen == last {
			return nil
		}
		if err == errNothingMore {
			return fmt.Errorf("after event %d: %w", seen, err)
		}
		if res != nil && random.IntN(2) == 0 {
			res.leave() // otherwise the connection before is taken over
		}
		node := []string{"a", "b"}[random.IntN(2)]
		header := append(comingBack(asEventSource, token+"."+strconv.Itoa(seen)), "X-Node: "+node)
		res, err = n.cl.begin(n.cl.request(t, http.MethodGet, path, nil, header...)).outcome()
		if err != nil {
			return err
		}
		if res.StatusCode != 200 {
			return fmt.Errorf("status %d", res.StatusCode)
		}
		f = res.follow()
	}
}

// The client does not come back, and the run would continue until the end of
// its window.
func TestAStreamThatIsEndedByAnAdminWhileTheStoreIsAwayEndsItsRunElsewhere(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, eventOf(token, 1))
	one.expectEnd(t)
	n.waitForRun("open", 1)
	n.SetAway(true)
	n.adminJSON(t, "DELETE", "/sse/streams?all=true", 202)
	two.expectEnd(t)
	n.waitForFailures(t, "send", 1)
	n.SetAway(false)
	call.expectGone()
	n.waitForRuns(t, 0)
}

// waitForFailures waits until this many calls of a kind have failed.
func (n *cluster) waitForFailures(t testing.TB, op string, want float64) {
	t.Helper()
	eventually(t, "a failure is counted", func() bool {
		return n.scrape(t).values[fmt.Sprintf("caddy_sse_store_errors_total{name=%q,op=%q}", n.handlerName(), op)] >= want
	})
}

func TestFailuresOfAStoreAreCounted(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	n.waitForStore(t, "a")
	name := n.handlerName()
	find := func(metric, op string) float64 {
		metric, part, _ := strings.Cut(metric, "/")
		return n.scrape(t).values[fmt.Sprintf("caddy_sse_store_%s{name=%q,op=%q}%s", metric, name, op, part)]
	}
	before := n.scrape(t).values
	for _, op := range []string{"write", "touch", "find", "read", "renew", "lives", "send", "receive"} {
		if value, there := before[fmt.Sprintf("caddy_sse_store_errors_total{name=%q,op=%q}", name, op)]; !there || value != 0 {
			t.Errorf("errors of %s are %v, %v", op, value, there)
		}
	}
	if find("duration_seconds/_count", "write") == 0 || find("duration_seconds/_count", "renew") == 0 {
		t.Error("no time is observed")
	}
	n.SetAway(true)
	for deadline := time.Now().Add(patience); find("errors_total", "renew") == 0 || find("errors_total", "receive") == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no failure is counted")
		}
	}
	n.SetAway(false)
}
