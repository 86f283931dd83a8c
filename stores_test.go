package caddysse_test

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/store"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

func init() {
	caddy.RegisterModule(new(testStore))
}

// testStore is the configuration of a store in memory. Each node of a test has
// its own handle.
type testStore struct {
	Memory string `json:"memory"`
	Node   string `json:"node"`
}

func (*testStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: store.Namespace + ".test", New: func() caddy.Module { return new(testStore) }}
}

// UnmarshalCaddyfile reads `store test { <memory> <node> }`.
func (s *testStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	for d.Next() {
		for d.NextBlock(0) {
			s.Memory = d.Val()
			if !d.AllArgs(&s.Node) {
				return d.ArgErr()
			}
		}
	}
	return nil
}

func (s *testStore) Identity() string { return s.Memory + " " + s.Node }

// testMemories are the stores of tests by name, and the handles of their nodes.
var testMemories = struct {
	sync.Mutex
	memories map[string]*storetest.Memory
	handles  map[string]*storetest.Handle
}{memories: make(map[string]*storetest.Memory), handles: make(map[string]*storetest.Handle)}

func (s *testStore) Open() (store.Store, error) {
	testMemories.Lock()
	defer testMemories.Unlock()
	memory := testMemories.memories[s.Memory]
	if memory == nil {
		return nil, fmt.Errorf("there is no store %q", s.Memory)
	}
	handle := memory.Open()
	testMemories.handles[s.Identity()] = handle
	return handle, nil
}

// cluster is one Caddy that acts as two nodes, a and b. A request says which
// one gets it.
type cluster struct {
	*testCaddy
	*storetest.Memory
	up     *testUpstream
	cl     *testClient
	memory string
	site   string
}

const (
	// longLease is so long that a node does not lose it because the machine is
	// loaded.
	longLease = 3 * patience

	// shortLease is for tests that wait until a lease has expired.
	shortLease = 3 * time.Second
)

// startNodes starts both nodes.
func startNodes(t testing.TB, window, settings string) *cluster {
	return startNodesOn(t, storetest.NewMemory(), longLease, window, settings)
}

// startNodesOn starts both nodes on a store.
func startNodesOn(t testing.TB, memory *storetest.Memory, lease time.Duration, window, settings string) *cluster {
	t.Cleanup(caddysse.SetStoreLease(lease))
	n := &cluster{Memory: memory, up: newUpstream(t), memory: uniqueName("memory")}
	testMemories.Lock()
	testMemories.memories[n.memory] = n.Memory
	testMemories.Unlock()
	n.site = nodesSite(n.memory, n.up, window, settings)
	n.testCaddy = startCaddy(t, n.site, withAdmin())
	n.cl = n.client("h1")
	return n
}

func nodesSite(memory string, up *testUpstream, window, settings string) string {
	var site strings.Builder
	name := uniqueName("nodes")
	for _, node := range []string{"a", "b"} {
		fmt.Fprintf(&site, `
			@%[1]s header X-Node %[1]s
			sse @%[1]s {
				name %[2]s
				heartbeat off
				drain 200ms
				resume %[3]s {
					store test {
						%[4]s %[1]s
					}
					%[5]s
				}
			}`, node, name, window, memory, settings)
	}
	return site.String() + "\nreverse_proxy " + up.addr
}

// handlerName returns the name of both handlers.
func (n *cluster) handlerName() string {
	_, rest, _ := strings.Cut(n.site, "name ")
	name, _, _ := strings.Cut(rest, "\n")
	return name
}

// handle returns a node's handle of the store.
func (n *cluster) handle(node string) *storetest.Handle {
	testMemories.Lock()
	defer testMemories.Unlock()
	return testMemories.handles[n.memory+" "+node]
}

// begin opens an EventSource's stream on a node.
func (n *cluster) begin(t testing.TB, node, path string) (*reply, *follower, *upstreamCall, string) {
	t.Helper()
	e, call := open(t, n.cl, n.up, path, append(asEventSource, "X-Node: "+node)...)
	call.start("text/event-stream", "X-Of-Upstream: yes")
	res := e.headers(t)
	f := res.follow()
	return res, f, call, f.expectFirst(t, 0)
}

// beginStored opens a stream on node a, and returns when its client and the store have
// the first events.
func (n *cluster) beginStored(t testing.TB, count int) (*reply, *follower, *upstreamCall, string) {
	t.Helper()
	res, f, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, count))
	f.expect(t, events(token, 1, count))
	n.waitForEvents(t, uint64(count))
	return res, f, call, token
}

// back comes back to a node.
func (n *cluster) back(t testing.TB, node, path, id string, header ...string) *reply {
	t.Helper()
	if header == nil {
		header = asEventSource
	}
	return n.cl.get(t, path, append(comingBack(header, id), "X-Node: "+node)...)
}

// waitForEvents waits until the store has this many events of its only run.
func (n *cluster) waitForEvents(t testing.TB, want uint64) {
	t.Helper()
	handle := n.Open()
	defer handle.Close()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		for _, key := range n.Runs() {
			if run, err := handle.Find(t.Context(), key); err == nil && run.Last == want {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the store does not have %d events", want)
		}
	}
}

// waitForRuns waits until the store has this many runs.
func (n *cluster) waitForRuns(t testing.TB, want int) {
	t.Helper()
	for deadline := time.Now().Add(patience); len(n.Runs()) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the store has %d runs, want %d", len(n.Runs()), want)
		}
	}
}

func events(token string, first, last int) string {
	var all strings.Builder
	for n := first; n <= last; n++ {
		all.WriteString(eventOf(token, n))
	}
	return all.String()
}

func plainEvents(first, last int) string {
	var all strings.Builder
	for n := first; n <= last; n++ {
		all.WriteString(plainEvent(n))
	}
	return all.String()
}

func TestAClientComesBackToAnotherNode(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 3))
	one.expect(t, events(token, 1, 3))
	res.leave()
	n.waitForRun("open", 0)
	call.send(plainEvents(4, 5))

	back := n.back(t, "b", "/", token+".1")
	if got := back.Header; back.StatusCode != 200 || got.Get("X-Of-Upstream") != "yes" || got.Get("X-Accel-Buffering") != "no" {
		t.Errorf("who comes back gets %d %v", back.StatusCode, got)
	}
	two := back.follow()
	two.expect(t, events(token, 2, 5))
	n.waitForRun("open", 1)
	call.send(plainEvent(6))
	two.expect(t, eventOf(token, 6))
	call.send(": comment\n\ndata: 7\r\n")
	call.send("\r\n")
	seven := "data: 7\r\nid: " + token + ".7\r\n\r\n" // comments between events reach only the first client
	two.expect(t, seven)
	call.end()
	two.expectEnd(t)
	n.up.expectNoCall(t)

	// It has everything, and asks for what follows.
	e, next := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".7"), "X-Node: b")...)
	if got := next.Header.Get("Last-Event-ID"); got != "" {
		t.Errorf("the upstream gets the id %q", got)
	}
	next.start("text/event-stream")
	if other := e.headers(t).follow().expectFirst(t, 0); other == token {
		t.Error("the new request has the old run")
	}
	next.end()
	// Its connection may have broken before it got the end.
	again := n.back(t, "b", "/", token+".5").follow()
	again.expect(t, eventOf(token, 6)+seven)
	again.expectEnd(t)
}

func TestAReconnectionTimeReachesAnotherNodeWithTheNextEvent(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	res, one, call, token := n.begin(t, "a", "/")
	sent := "retry: 3000\n\n: a\n\nretry: 4000\n\n: b\n\n"
	call.send(sent)
	one.expect(t, sent)
	call.send(plainEvent(1) + ": c\n\n" + plainEvent(2))
	one.expect(t, eventOf(token, 1)+": c\n\n"+eventOf(token, 2))
	res.leave()
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, "retry: 4000\n\n"+events(token, 1, 2))
	call.end()
	two.expectEnd(t)
}

func TestWhoComesBackTakesOverOnWhateverNode(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))

	// Node a has not noticed that its client has left.
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, eventOf(token, 1))
	one.expectEnd(t)
	call.send(plainEvent(2))
	two.expect(t, eventOf(token, 2))

	three := n.back(t, "b", "/", token+".1").follow()
	three.expect(t, eventOf(token, 2))
	two.expectEnd(t)

	four := n.back(t, "a", "/", token+".2").follow()
	three.expectEnd(t)
	call.send(plainEvent(3))
	four.expect(t, eventOf(token, 3))

	// Clients that are not an EventSource are aborted.
	five := n.back(t, "b", "/", token+".2", "Accept: text/event-stream", notEventSource).follow()
	five.expect(t, eventOf(token, 3))
	four.expectEnd(t)
	six := n.back(t, "a", "/", token+".3").follow()
	five.expectAbort(t)
	reasons := make(map[any]int)
	for i := range 5 {
		line := n.waitForLog("stream closed", i)
		reasons[line["reason"]]++
		if line["run"] != token[:len("sse1-")+4]+"…" {
			t.Errorf("the line of a stream names the run %v", line["run"])
		}
	}
	if reasons["taken_over"] != 5 {
		t.Errorf("the streams ended as %v", reasons)
	}
	call.end()
	six.expectEnd(t)
}

func TestAnErrorOfAnEarlyStartIsNoEventOfTheUpstreamOnWhateverNode(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	n.reload(strings.ReplaceAll(n.site, "heartbeat off", "heartbeat off\nearly_start 1ms any"))
	e, call := open(t, n.cl, n.up, "/", append(asEventSource, "X-Node: a")...)
	one := e.headers(t).follow()
	token := one.expectFirst(t, 0)
	waiting := n.back(t, "b", "/", token+".0").follow()
	one.expectEnd(t)
	n.waitForRun("open", 1)
	call.startWith(503)
	call.end()
	for i := range 2 {
		f := waiting
		if i > 0 { // it may have lost or ignored the event
			f = n.back(t, "b", "/", token+".0").follow()
		}
		if got, err := f.rest(); !strings.HasPrefix(got, "event: error\ndata: {\"status\":502,") || err != io.EOF {
			t.Errorf("%q, %v", got, err)
		}
		line := n.waitForLog("stream closed", 1+i)
		if line["resumed"] != true || line["events"] != 0.0 || line["bytes"] != 0.0 || line["time_to_first_event"] != nil {
			t.Errorf("%v", line)
		}
	}
}

func TestAnotherNodeKnowsWhoseARunIs(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodes(t, "1m", "bind {http.request.header.X-User}")
	e, call := open(t, n.cl, n.up, "/", append(asEventSource, "X-Node: a", "X-User: me")...)
	call.start("text/event-stream")
	res := e.headers(t)
	one := res.follow()
	token := one.expectFirst(t, 0)
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	n.waitForEvents(t, 1)
	for path, header := range map[string][]string{
		"/":      append(asEventSource, "X-User: you"),
		"/?":     asEventSource,
		"/other": append(asEventSource, "X-User: me"),
	} {
		e, other := open(t, n.cl, n.up, path, append(comingBack(header, token+".0"), "X-Node: b")...)
		other.start("text/event-stream")
		e.headers(t).follow().expectUnknown(t, 0)
		other.end()
		res, err := n.cl.Do(n.cl.request(t, "DELETE", path, nil, append(comingBack(header, token+".0"), "X-Node: b")...))
		if err != nil {
			t.Fatal(err)
		}
		if res.Body.Close(); res.StatusCode != 404 {
			t.Errorf("somebody else's DELETE is answered with %d", res.StatusCode)
		}
	}
	mine := n.back(t, "b", "/", token+".0", append(asEventSource, "X-User: me")...).follow()
	mine.expect(t, eventOf(token, 1))
	call.end()
	mine.expectEnd(t)
}

func TestAnIDThatTheStoreDoesNotHaveYetIsWaitedFor(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	res, one, call, token := n.beginStored(t, 1)

	n.SetFull(true) // so that the store lacks what the client has
	call.send(plainEvent(2))
	one.expect(t, eventOf(token, 2))
	res.leave()
	n.waitForRun("open", 0)
	waiting := n.cl.begin(n.cl.request(t, "GET", "/", nil, append(comingBack(asEventSource, token+".2"), "X-Node: b")...))
	n.waitForRun("open", 1)
	call.send(plainEvent(3))
	n.SetFull(false)
	two := waiting.headers(t).follow()
	two.expect(t, eventOf(token, 3))
	n.up.expectNoCall(t)
	call.end()
	two.expectEnd(t)
	n.waitForEnds(t)

	// A place that the run has not reached is unknown.
	res, one, call, token = n.begin(t, "a", "/")
	e, other := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".4"), "X-Node: b")...)
	other.start("text/event-stream")
	e.headers(t).follow().expectUnknown(t, 0)
	other.end()
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
}

func TestARunThatTheStoreDoesNotHaveYetIsWaitedFor(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	n.SetDelay(50 * time.Millisecond)
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 2))
	one.expect(t, events(token, 1, 2))
	n.SetDelay(0) // a write that is under way is still slow
	res.leave()
	waiting := n.cl.begin(n.cl.request(t, "GET", "/", nil, append(comingBack(asEventSource, token+".1"), "X-Node: b")...))
	two := waiting.headers(t).follow()
	two.expect(t, eventOf(token, 2))
	call.end()
	two.expectEnd(t)
	n.up.expectNoCall(t)
}

func TestOneWhoIsOvertakenBeforeItsHeadersGetsAStreamThatEnds(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	_, one, call, token := n.beginStored(t, 1)
	n.SetFull(true)
	call.send(plainEvent(2))
	one.expect(t, eventOf(token, 2))
	waiting := n.cl.begin(n.cl.request(t, "GET", "/", nil, append(comingBack(asEventSource, token+".2"), "X-Node: b")...))
	one.expectEnd(t)
	back := n.back(t, "a", "/", token+".1").follow()
	back.expect(t, eventOf(token, 2))
	overtaken := waiting.headers(t)
	if overtaken.StatusCode != 200 || overtaken.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("who is overtaken gets %d %v", overtaken.StatusCode, overtaken.Header)
	}
	overtaken.follow().expectEnd(t)
	for i := range 2 {
		if line := n.waitForLog("stream closed", i); line["reason"] != "taken_over" {
			t.Errorf("a stream that is overtaken ends as %v", line["reason"])
		}
	}
	n.SetFull(false)
	call.end()
	back.expectEnd(t)
}

func TestAnyNodeStopsARun(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	stop := func(node, id string, want int) {
		t.Helper()
		res, err := n.cl.Do(n.cl.request(t, "DELETE", "/", nil, "X-Node: "+node, "Last-Event-ID: "+id))
		if err != nil {
			t.Fatal(err)
		}
		if res.Body.Close(); res.StatusCode != want {
			t.Errorf("DELETE of %s on %s is answered with %d, want %d", id, node, res.StatusCode, want)
		}
	}
	_, one, call, token := n.beginStored(t, 1)
	stop("b", token+".1", 204)
	call.expectGone()
	one.expectEnd(t)
	n.waitForRuns(t, 0)
	stop("b", token+".1", 404)
	if line := n.waitForLog("stream closed", 0); line["reason"] != "client_closed" {
		t.Errorf("the stream ended as %v", line["reason"])
	}

	// A run whose client is on another node.
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	n.waitForRun("open", 0) // so that the next client is not mistaken for it
	two := n.back(t, "b", "/", token+".0").follow()
	two.expect(t, eventOf(token, 1))
	n.waitForRun("open", 1)
	stop("a", token+".1", 204)
	call.expectGone()
	two.expectEnd(t)
	n.waitForRuns(t, 0)

	// A run that has ended.
	res, one, call, token = n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	call.end()
	n.waitForRun("ended", 0)
	stop("b", token+".1", 204)
	n.waitForRuns(t, 0)
	n.up.expectNoCall(t)
}

func TestTheWindowOfARunDoesNotMindWhereItsClientIs(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1500ms", "")
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	n.waitForRun("open", 0)
	back := n.back(t, "b", "/", token+".1")
	two := back.follow()
	n.waitForRun("open", 1)
	time.Sleep(4 * time.Second) // longer than the window, and than a lease
	call.send(plainEvent(2))
	two.expect(t, eventOf(token, 2))
	back.leave()
	n.waitForRun("open", 0)
	call.expectGone()
	n.waitForRuns(t, 0)
	n.waitForNoRun()
}

func TestTheClientsOfADeadNodeGetWhatThereIsAndThenAnAbort(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	n := startNodesOn(t, storetest.NewMemory(), shortLease, "1s", "")
	_, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 3))
	one.expect(t, events(token, 1, 3))
	res, gone, called, other := n.begin(t, "a", "/")
	called.send(plainEvent(1))
	gone.expect(t, eventOf(other, 1))
	res.leave()
	two := n.back(t, "b", "/", token+".1", "Accept: text/event-stream", notEventSource).follow()
	two.expect(t, events(token, 2, 3))
	one.expectEnd(t)
	n.waitForEvents(t, 1)
	n.handle("a").Die()
	two.expectAbort(t)

	// A client that has everything is told "unknown". One that has missed
	// something gets that first.
	e, next := open(t, n.cl, n.up, "/", append(comingBack(asEventSource, token+".3"), "X-Node: b")...)
	next.start("text/event-stream")
	e.headers(t).follow().expectUnknown(t, 0)
	next.end()
	three := n.back(t, "b", "/", other+".0").follow()
	three.expect(t, eventOf(other, 1))
	three.expectAbort(t)
	res2 := n.cl.do(t, n.cl.request(t, "POST", "/", strings.NewReader("{}"), append(comingBack(asEventSource, other+".1"), "X-Node: b")...))
	if text, err := res2.text(); res2.StatusCode != 200 || !strings.Contains(text, "stream_lost") || err != nil {
		t.Errorf("a POST to what is lost is answered with %d %q, %v", res2.StatusCode, text, err)
	}
	n.up.expectNoCall(t)
	n.waitForRuns(t, 0) // after their windows
}

func TestKeysHoldAHashAndNothingHoldsTheToken(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	res, _, call, token := n.beginStored(t, 3)
	contents := n.Contents()
	if !strings.Contains(contents, "data: 2") || strings.Contains(contents, strings.TrimPrefix(token, "sse1-")) {
		t.Errorf("the store has %q", contents)
	}
	if list := n.runs(""); list.Total != 1 {
		t.Errorf("%d runs are listed", list.Total)
	}
	res.leave()
	call.end()
}

func TestAWindowMayBeAsLongAsCanBe(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "2562047h47m16s", "")
	res, _, call, token := n.beginStored(t, 2)
	res.leave()
	two := n.back(t, "b", "/", token+".1").follow()
	two.expect(t, eventOf(token, 2))
	call.end()
	two.expectEnd(t)
}
