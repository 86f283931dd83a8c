package trial

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

const warning = "the store has failed"

// viewer is a client that reads one stream and lets a test wait for its events.
type viewer struct {
	t        testing.TB
	stream   *stream
	messages chan message
	tab      tab
}

// view opens a stream on a node.
func view(t testing.TB, n *node, host, lastID string) *viewer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	s, err := request(ctx, http.DefaultClient, "GET", "http://"+n.addr+"/", host, lastID)
	if err != nil {
		t.Fatal(err)
	}
	if s.res.StatusCode != 200 {
		t.Fatalf("%s answers %d", n.name, s.res.StatusCode)
	}
	v := &viewer{t: t, stream: s, messages: make(chan message, 10_000), tab: tab{lastID: lastID}}
	go func() {
		defer close(v.messages)
		for {
			m, err := s.next()
			if err != nil {
				return
			}
			v.messages <- m
		}
	}()
	t.Cleanup(s.close)
	return v
}

// until checks events up to the first one for which f returns true.
func (v *viewer) until(what string, f func(message) bool) {
	v.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for {
		select {
		case m, open := <-v.messages:
			if !open {
				v.t.Fatalf("the stream ends before %s", what)
			}
			if err := v.tab.take(m); err != nil {
				v.t.Fatal(err)
			}
			if m.data != "" && f(m) {
				return
			}
		case <-deadline.C:
			v.t.Fatalf("no sign of %s; the last event was %d", what, v.tab.seen)
		}
	}
}

// more waits for n more events.
func (v *viewer) more(n int) {
	v.t.Helper()
	want := v.tab.seen + n
	v.until(fmt.Sprint(n, " more events"), func(message) bool { return v.tab.seen >= want })
}

// withID and withoutID wait for an event with an id, and for one without.
func (v *viewer) withID() {
	v.t.Helper()
	v.until("an event with an id", func(m message) bool { return m.id != "" })
}

func (v *viewer) withoutID() {
	v.t.Helper()
	v.until("an event without an id", func(m message) bool { return m.id == "" })
}

// stored waits until the server has the stream, so that it can lose it. A write that
// is under way does not count.
func (v *viewer) stored(n *node) {
	v.t.Helper()
	writes := func() float64 { return n.metric("caddy_sse_store_duration_seconds_count", `op="write"`) }
	for before := writes(); writes() < before+2; {
		v.more(1)
	}
}

// waitForIDs waits until new streams of a node have ids.
func waitForIDs(t testing.TB, n *node, host string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		v := view(t, n, host, "")
		m := <-v.messages
		v.stream.close()
		if m.id != "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("new streams of %s have no ids", n.name)
		}
	}
}

func often() time.Duration { return 20 * time.Millisecond }

const site = "nodes.test"

// host is the site's Host, the same for every node.
func host(n *node) string { return site + ":" + portOf(n.addr) }

func TestAServerThatIsAwayHarmsNoStream(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	up := newSource(t, 0, often)
	n := startNode(t, "a", up.host(), s.addr, "1m", "")
	one := view(t, n, host(n), "")
	one.more(20) // Caddy starts and works without it
	n.reload()
	one.more(20)
	s.start()
	waitForIDs(t, n, host(n))
	two := view(t, n, host(n), "")
	two.withID()
	two.stored(n)
	for range 2 {
		s.kill()
		s.start()
		two.more(20)
	}
	two.withoutID() // what the server had of it was lost
	two.more(20)
	one.more(20)
	waitForIDs(t, n, host(n))
	three := view(t, n, host(n), "")
	three.withID()
	three.stored(n)
	s.kill()
	three.withoutID()
	three.more(20)
	if lines := n.logs.count(warning); lines < 1 || lines > 2 {
		t.Errorf("%d warnings", lines)
	}
	if n.metric("caddy_sse_store_errors_total") == 0 {
		t.Error("no error is counted")
	}
	start := time.Now()
	n.stop()
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("an exit without the server takes %s", took)
	}
}

func TestAServerThatIsFullHarmsNoStream(t *testing.T) {
	t.Parallel()
	s := startServer(t, "--maxmemory-policy", "noeviction")
	up := newSource(t, 0, often)
	a := startNode(t, "a", up.host(), s.addr, "1m", "")
	waitForIDs(t, a, host(a))
	one := view(t, a, host(a), "")
	one.withID()
	s.must("CONFIG", "SET", "maxmemory", "1")
	one.withoutID()
	one.more(20)
	// The lease is still renewed.
	if answer := s.must("DBSIZE"); answer == ":0" {
		t.Fatal("nothing is there")
	}
	leases := s.must("EVAL", "local n = 0 for _, k in ipairs(redis.call('KEYS', '*node:*')) do if redis.call('PTTL', k) > 0 then n = n + 1 end end return n", "0")
	if leases != ":1" {
		t.Errorf("%s leases are there", leases)
	}
	s.must("CONFIG", "SET", "maxmemory", "0")
	waitForIDs(t, a, host(a))
	one.more(20)
	if lines := a.logs.count(warning); lines != 1 || !strings.Contains(a.logs.String(), "OOM") {
		t.Errorf("%d warnings, OOM told: %v", lines, strings.Contains(a.logs.String(), "OOM"))
	}
	if a.metric("caddy_sse_store_errors_total", `op="write"`) == 0 {
		t.Error("no error of a write is counted")
	}
}

func TestAServerThatIsFlushedHarmsNoStream(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	up := newSource(t, 0, often)
	a := startNode(t, "a", up.host(), s.addr, "1m", "")
	waitForIDs(t, a, host(a))
	one := view(t, a, host(a), "")
	one.withID()
	one.stored(a)
	s.must("FLUSHALL")
	one.withoutID()
	one.more(20)
	waitForIDs(t, a, host(a))
	two := view(t, a, host(a), "")
	two.more(20)
	two.withID()
	s.must("SCRIPT", "FLUSH") // this alone does no harm
	for range 50 {
		two.withID()
	}
}

func TestAServerThatHangsHarmsNoStream(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	up := newSource(t, 0, often)
	a := startNode(t, "a", up.host(), s.addr, "1m", "")
	waitForIDs(t, a, host(a))
	one := view(t, a, host(a), "")
	one.withID()
	s.pause(true)
	defer s.pause(false)
	one.withoutID()
	one.more(20)
	s.pause(false)
	waitForIDs(t, a, host(a))
	one.more(20)
	if lines := a.logs.count(warning); lines < 1 || lines > 2 {
		t.Errorf("%d warnings", lines)
	}
}

func TestAServerThatIsSlowAddsNothingToWhatIsLive(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	slow := startHop(t, s.addr, 50*time.Millisecond).addr
	up := newSource(t, 0, often)
	a := startNode(t, "a", up.host(), slow, "1m", "")
	waitForIDs(t, a, host(a))
	one := view(t, a, host(a), "")
	for range 200 { // for 4 seconds
		one.withID()
	}
	if lines := a.logs.count(warning); lines != 0 {
		t.Errorf("%d warnings of a server that is just slow", lines)
	}
}
