package trial

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// waitFor waits until the server's replication status contains a text.
func (s *server) waitFor(text string) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		said, err := s.ask("INFO", "replication")
		if err == nil && strings.Contains(said, text) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server does not say %q: %v\n%s", text, err, said)
		}
	}
}

// hop makes a tab come back to nodes chosen at random, cut off at random, until
// ctx ends.
func (c *tab) hop(ctx context.Context, path string, nodes ...*node) error {
	for ctx.Err() == nil {
		c.url = "http://" + nodes[rand.IntN(len(nodes))].addr + path
		cut, stop := context.WithTimeout(ctx, time.Duration(200+rand.IntN(1500))*time.Millisecond)
		err := c.visit(cut)
		stop()
		if err != nil {
			return err
		}
	}
	return nil
}

// ends reads to the end of a stream.
func (v *viewer) ends(what string) {
	v.t.Helper()
	for deadline := time.After(patience); ; {
		select {
		case m, open := <-v.messages:
			if !open {
				return
			}
			if err := v.tab.take(m); err != nil {
				v.t.Fatal(err)
			}
		case <-deadline:
			v.t.Fatalf("%s goes on", what)
		}
	}
}

func TestAFailoverHarmsNoStream(t *testing.T) {
	t.Parallel()
	first := startServer(t)
	_, port, _ := net.SplitHostPort(first.addr)
	second := startServer(t, "--replicaof", "127.0.0.1", port)
	second.waitFor("master_link_status:up")
	at := startHop(t, first.addr, 0)
	up := newSource(t, 0, often)
	a := startNode(t, "a", up.host(), at.addr, "1m", "")
	b := startNode(t, "b", up.host(), at.addr, "1m", "")
	waitForIDs(t, a, site)
	waitForIDs(t, b, site)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var work sync.WaitGroup
	tabs := make([]*tab, 20)
	for i := range tabs {
		tabs[i] = &tab{host: site, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
		work.Go(func() {
			if err := tabs[i].hop(ctx, fmt.Sprint("/", i), a, b); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	one := view(t, a, site, "")
	one.withID()
	begun := view(t, a, site, "")
	begun.more(5)
	elsewhere := view(t, b, site, begun.tab.lastID)
	elsewhere.tab = begun.tab
	elsewhere.more(20)

	// A planned failover: the replica has everything. Old connections stay with
	// the server that was demoted.
	first.must("FAILOVER")
	second.waitFor("role:master")
	at.moveTo(second.addr)
	elsewhere.more(100) // it continues through the store
	back := view(t, b, site, one.tab.lastID)
	back.tab = one.tab
	back.more(100)
	for range 50 {
		back.withID()
		elsewhere.withID()
	}

	// A crash: the replica lacks the last events.
	first.waitFor("master_link_status:up")
	first.must("REPLICAOF", "127.0.0.1", portOf(freeAddress(t)))
	kept := view(t, a, site, "")
	kept.more(50)
	elsewhere.more(50)
	second.kill()
	first.must("REPLICAOF", "NO", "ONE")
	at.moveTo(first.addr)
	kept.withoutID()
	kept.more(20)
	elsewhere.ends("a stream that the server has lost events of")
	waitForIDs(t, a, site)
	waitForIDs(t, b, site)
	last := view(t, a, site, "")
	last.more(5)
	moved := view(t, b, site, last.tab.lastID)
	moved.tab = last.tab
	moved.more(50)
	cancel()
	work.Wait()
	resumed := 0
	for i, c := range tabs {
		if resumed += c.resumed; c.incarnation == 0 {
			t.Errorf("client %d has got nothing", i)
		}
	}
	if resumed < len(tabs) {
		t.Errorf("%d clients have gone on %d times where they were", len(tabs), resumed)
	}
	for _, n := range []*node{a, b} {
		if lines := n.logs.count(warning); lines < 1 || lines > 2 {
			t.Errorf("node %s warns %d times", n.name, lines)
		}
		if strings.Contains(n.logs.String(), "panic") {
			t.Errorf("node %s panicked", n.name)
		}
	}
}
