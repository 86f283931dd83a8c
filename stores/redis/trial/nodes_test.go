package trial

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// startBalancer runs an nginx that sends requests to the nodes in turn.
func startBalancer(t *testing.T, nodes ...*node) (addr string) {
	t.Helper()
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		if os.Getenv("CADDY_SSE_REQUIRE_REDIS") != "" {
			t.Fatal("there is no nginx, and CADDY_SSE_REQUIRE_REDIS says that there must be one")
		}
		t.Skip("there is no nginx; on Debian, apt-get install nginx-light")
	}
	dir := t.TempDir()
	addr = freeAddress(t)
	var servers strings.Builder
	for _, n := range nodes {
		fmt.Fprintf(&servers, "server %s max_fails=0;\n", n.addr)
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`
daemon off;
worker_processes 1;
worker_rlimit_nofile 8192;
pid %[1]s/pid;
error_log stderr crit;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	upstream nodes { %[2]s }
	server {
		listen %[3]s;
		location / {
			proxy_pass http://nodes;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host $http_host;
			proxy_read_timeout 5m;
		}
	}
}
`, dir, servers.String(), addr)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out := new(lines)
	cmd := exec.Command(nginx, "-p", dir, "-e", "stderr", "-c", conf)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		res, err := http.Get("http://" + addr + "/favicon.ico")
		if err == nil {
			res.Body.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("nginx does not answer: %v\n%s", err, out.String())
		}
	}
}

// span is a period in which something was not available.
type span struct {
	from, to time.Time
	what     string
}

// history records what happened to the nodes and the server.
type history struct {
	mu    sync.Mutex
	nodes map[string][]span
	redis []span
}

// gone records that a node, with its runs, is gone while f runs.
func (h *history) gone(n *node, what string, f func()) {
	from := time.Now()
	f()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nodes[n.name] = append(h.nodes[n.name], span{from, time.Now(), what})
}

// outage records that the server loses its data and is away while f runs. New
// streams may have no ids for some time after that.
func (h *history) outage(f func()) {
	from := time.Now()
	f()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.redis = append(h.redis, span{from, time.Now().Add(12 * time.Second), "restarted"})
}

// excuse returns why a stream of a node need not have been delivered
// completely; "" if there is no reason.
func (h *history) excuse(call *incarnation) (what string, at time.Time) {
	call.mu.Lock()
	ended := call.ended
	call.mu.Unlock()
	if ended.IsZero() {
		ended = time.Now()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// The last events before an end may not have been read or written yet.
	for _, s := range h.redis {
		if call.begun.Before(s.to) && ended.Add(5*time.Second).After(s.from) {
			return "redis", s.from
		}
	}
	for _, s := range h.nodes[call.node] {
		if call.begun.Before(s.to) && ended.Add(2*time.Second).After(s.from) {
			return s.what, s.from
		}
	}
	return "", time.Time{}
}

// TestThreeNodesLoseNothing lets clients that are cut off at random read
// through three nodes, which are restarted in turn. One node is killed, and the
// server loses all its data twice. CADDYSSE_TEST_NODES is how long this takes,
// such as 5m.
func TestThreeNodesLoseNothing(t *testing.T) {
	total, clients := 110*time.Second, 500
	if testing.Short() {
		total, clients = 45*time.Second, 100
	}
	if text := os.Getenv("CADDYSSE_TEST_NODES"); text != "" {
		var err error
		if total, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	s := startServer(t)
	up := newSource(t, 40, func() time.Duration { return time.Duration(100+rand.IntN(400)) * time.Millisecond })
	var nodes []*node
	for _, name := range []string{"a", "b", "c"} {
		nodes = append(nodes, startNode(t, name, up.host(), s.addr, "1m", ""))
	}
	for _, n := range nodes {
		waitForIDs(t, n, host(n))
	}
	balancer := startBalancer(t, nodes...)
	h := &history{nodes: make(map[string][]span)}

	var (
		work      sync.WaitGroup
		failures  atomic.Int64
		visits    atomic.Int64
		finishing atomic.Bool
		tabs      = make([]*abiding, clients)
	)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for i := range tabs {
		tabs[i] = &abiding{tab: tab{url: fmt.Sprintf("http://%s/%d", balancer, i), host: site, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}}
		work.Go(func() {
			err := tabs[i].abide(ctx, &visits, &finishing)
			if err != nil && failures.Add(1) <= 20 {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	at := func(part float64) time.Duration { return time.Duration(part * float64(total)) }
	start := time.Now()
	sleepUntil := func(part float64) { time.Sleep(time.Until(start.Add(at(part)))) }
	// In turn, as a deployment does.
	for i, n := range nodes {
		sleepUntil(0.10 + 0.06*float64(i))
		h.gone(n, "stopped", func() { n.stop(); n.start() })
	}
	sleepUntil(0.32)
	h.gone(nodes[1], "killed", func() { nodes[1].kill(); time.Sleep(2 * time.Second); nodes[1].start() })
	for i := range 2 {
		sleepUntil(0.60 + 0.12*float64(i))
		h.outage(func() { s.kill(); time.Sleep(time.Second); s.start() })
	}
	sleepUntil(1)
	finishing.Store(true)
	finished := make(chan struct{})
	go func() { work.Wait(); close(finished) }()
	select {
	case <-finished:
	case <-time.After(patience):
		stuck := 0
		for i, c := range tabs {
			if !c.finished.Load() {
				if stuck++; stuck <= 5 {
					t.Errorf("client %d has not finished", i)
				}
			}
		}
		cancel()
		<-finished
		t.Errorf("%d clients have not finished", stuck)
	}

	whole, excused, resumed := 0, make(map[string]int), 0
	for i, c := range tabs {
		resumed += c.resumed
		for _, o := range c.outcomes {
			call := up.call(o.incarnation)
			why, since := h.excuse(call)
			switch {
			case o.done:
				whole++
			case why == "":
				t.Errorf("client %d got %d events of stream %d, whose node %s lived from %s on", i, o.seen, o.incarnation, call.node, call.begun.Format(time.TimeOnly))
			default:
				excused[why]++
				if why == "killed" {
					// Everything must have been sent to the store, except the
					// events of the last moments.
					call.mu.Lock()
					for n, sent := range call.sent {
						if sent.Before(since.Add(-2*time.Second)) && n+1 > o.seen {
							t.Errorf("client %d got %d events of stream %d, and event %d was sent %s before its node was killed", i, o.seen, o.incarnation, n+1, since.Sub(sent))
							break
						}
					}
					call.mu.Unlock()
				}
			}
		}
	}
	t.Logf("%d streams, %d whole, others: %v; %d visits, %d of them went on where they were", up.last.Load(), whole, excused, visits.Load(), resumed)
	if excused["killed"] == 0 || excused["stopped"] == 0 || excused["redis"] == 0 || resumed < clients {
		t.Error("the test has not tried everything")
	}
	for _, n := range nodes {
		if strings.Contains(n.logs.String(), "panic") {
			t.Errorf("node %s panicked", n.name)
		}
	}
}

// abiding is a tab that keeps coming back, and records what happened to each
// stream.
type abiding struct {
	tab
	outcomes []outcome
	finished atomic.Bool
}

type outcome struct {
	incarnation int64
	seen        int
	done        bool
}

// abide comes back again and again, cut off at random. Once the test is
// finishing, it returns at the end of its stream.
func (c *abiding) abide(ctx context.Context, visits *atomic.Int64, finishing *atomic.Bool) error {
	defer c.finished.Store(true)
	c.turn = func() { c.outcomes = append(c.outcomes, outcome{c.incarnation, c.seen, c.done}) }
	for ctx.Err() == nil {
		visits.Add(1)
		cut, stop := context.WithTimeout(ctx, time.Duration(rand.ExpFloat64()*float64(6*time.Second)))
		if finishing.Load() {
			stop()
			cut, stop = context.WithTimeout(ctx, 20*time.Second)
		}
		err := c.visit(cut)
		stop()
		if err != nil {
			return err
		}
		if c.done && finishing.Load() {
			break
		}
		select {
		case <-time.After(time.Duration(rand.IntN(300)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	if c.done {
		c.turn()
	}
	return nil
}
