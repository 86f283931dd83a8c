package redis

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Three Caddys share one Redis, behind an nginx that sends requests to them in
// turn. Clients are cut off at random and come back to any node. Meanwhile the
// nodes are restarted one after the other, one is killed, and Redis is
// restarted twice.
//
// CADDYSSE_TEST_CLUSTER is the number of clients; the default is small.

// ledger records what the upstream knows about its streams.
type ledger struct {
	streams atomic.Int64
	mu      sync.Mutex
	nodes   map[int64]string    // the node that asked for a stream, by stream
	dead    map[string]struct{} // nodes that have been ended
	outages []outage            // of Redis
}

type outage struct{ from, to time.Time }

func (l *ledger) begin(node string) int64 {
	n := l.streams.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes[n] = node
	return n
}

// mayBeLost reports whether a client that came back at some time may have found
// nothing of a stream.
func (l *ledger) mayBeLost(stream int64, at time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, dead := l.dead[l.nodes[stream]]; dead {
		return true
	}
	for _, o := range l.outages {
		// A node treats the store as away until it tries it again.
		if at.After(o.from.Add(-time.Second)) && (o.to.IsZero() || at.Before(o.to.Add(3*time.Second))) {
			return true
		}
	}
	return false
}

// serve sends events at intervals, each with the number of the stream and its
// own.
func (l *ledger) serve(w http.ResponseWriter, r *http.Request) {
	stream := l.begin(r.Header.Get("X-Node"))
	w.Header().Set("Content-Type", "text/event-stream")
	for n := 1; ; n++ {
		if _, err := fmt.Fprintf(w, "data: %d %d\n\n", stream, n); err != nil {
			return
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(time.Duration(50+rand.IntN(100)) * time.Millisecond):
		}
	}
}

// node is a Caddy of the cluster.
type node struct {
	t          testing.TB
	caddy      string
	dir        string
	name       string
	generation int
	address    string
	process    *exec.Cmd
	l          *ledger
}

func (n *node) id() string { return fmt.Sprint(n.name, "-", n.generation) }

func (n *node) start() {
	n.t.Helper()
	n.generation++
	n.process = exec.Command(n.caddy, "run", "--config", filepath.Join(n.dir, n.name+".Caddyfile"), "--adapter", "caddyfile")
	n.process.Env = append(os.Environ(), "NODE="+n.id(), "XDG_DATA_HOME="+n.dir, "XDG_CONFIG_HOME="+n.dir)
	log, err := os.OpenFile(filepath.Join(n.dir, n.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.process.Stdout, n.process.Stderr = log, log
	if err := n.process.Start(); err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, n.name+" listens", func() error {
		conn, err := net.Dial("tcp", n.address)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// end ends the node, as a deployment or a crash does.
func (n *node) end(signal os.Signal) {
	n.l.mu.Lock()
	n.l.dead[n.id()] = struct{}{}
	n.l.mu.Unlock()
	_ = n.process.Process.Signal(signal)
	done := make(chan struct{})
	go func() {
		_ = n.process.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		_ = n.process.Process.Kill()
		<-done
		n.t.Errorf("%s has not ended within %v", n.id(), patience)
	}
}

// reader is a client that comes back again and again.
type reader struct {
	l      *ledger
	url    string
	client *http.Client

	id     string // the last one received
	stream int64
	last   int
	told   bool // it was told that it had lost something
	bare   bool // its stream has no ids, because it began while Redis was away
	opened time.Time

	events, returns, gaps, fresh int
}

// run reads until its context ends.
func (r *reader) run(ctx context.Context) error {
	for ctx.Err() == nil {
		cut, stop := context.WithTimeout(ctx, time.Duration(200+rand.IntN(3000))*time.Millisecond)
		err := r.read(cut)
		stop()
		if err != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(rand.IntN(300)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil
}

// read is one connection. It returns an error only for what must not happen.
func (r *reader) read(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Cache-Control", "no-cache")
	if r.id != "" {
		req.Header.Set("Last-Event-ID", r.id)
	}
	r.bare = r.stream != 0 && r.id == ""
	r.opened = time.Now()
	res, err := r.client.Do(req)
	if err != nil {
		return nil // cut off, or the node is gone
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil // from nginx, which found no node
	}
	r.returns++
	var event, data, id string
	hasID := false
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			event = value
		case "data":
			data = value
		case "id":
			id, hasID = value, true
		case "":
			if lines.Text() != "" {
				continue // a comment
			}
			if hasID {
				r.id = id
			}
			if err := r.dispatch(event, data); err != nil {
				return err
			}
			event, data, id, hasID = "", "", "", false
		}
	}
	return nil
}

func (r *reader) dispatch(event, data string) error {
	switch event {
	case "sse":
		return nil
	case "lost":
		r.told = true
		r.gaps++
		return nil
	}
	var stream int64
	var n int
	if _, err := fmt.Sscanf(data, "%d %d", &stream, &n); err != nil {
		return nil
	}
	r.events++
	switch {
	case stream == r.stream && n == r.last+1:
	case stream == r.stream && n > r.last && r.told:
	case stream == r.stream:
		return fmt.Errorf("stream %d: event %d after %d", stream, n, r.last)
	case r.stream == 0, r.bare:
	case !r.told:
		return fmt.Errorf("stream %d instead of %d, and nothing has been told", stream, r.stream)
	case !r.l.mayBeLost(r.stream, r.opened):
		return fmt.Errorf("stream %d instead of %d, whose node lives, at a time when Redis was there", stream, r.stream)
	default:
		r.fresh++
	}
	r.stream, r.last, r.told, r.bare = stream, n, false, false
	return nil
}

func TestThreeNodesAndOneRedisBehindABalancer(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("there is no nginx")
	}
	clients := 30
	if text := os.Getenv("CADDYSSE_TEST_CLUSTER"); text != "" {
		if clients, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	caddy := filepath.Join(dir, "program")
	if out, err := exec.Command("go", "build", "-o", caddy, "./cmd/caddy").CombinedOutput(); err != nil {
		t.Fatalf("building Caddy: %v\n%s", err, out)
	}
	l := &ledger{nodes: make(map[int64]string), dead: make(map[string]struct{})}
	upstream := httptest.NewServer(http.HandlerFunc(l.serve))
	defer upstream.Close()
	redis := startServer(t)

	var nodes []*node
	var servers strings.Builder
	for i := range 3 {
		n := &node{t: t, caddy: caddy, dir: dir, name: fmt.Sprint("node", i), address: freeAddress(t), l: l}
		nodes = append(nodes, n)
		fmt.Fprintf(&servers, "server %s max_fails=1 fail_timeout=1s;\n", n.address)
		_, port, _ := net.SplitHostPort(n.address)
		writeFile(t, filepath.Join(dir, n.name+".Caddyfile"), fmt.Sprintf(`
			{
				admin off
				grace_period 5s
			}
			http://:%s {
				bind 127.0.0.1
				sse {
					retry 100ms
					drain 1s 1s
					resume 30s {
						store redis {
							address %s
						}
					}
				}
				reverse_proxy %s {
					header_up X-Node {env.NODE}
				}
			}`, port, redis.address, upstream.Listener.Addr()))
		n.start()
		defer func() {
			if n.process.ProcessState == nil {
				n.end(os.Kill)
			}
			if t.Failed() {
				text, _ := os.ReadFile(filepath.Join(dir, n.name+".log"))
				t.Logf("%s: %s", n.name, text[max(0, len(text)-1500):])
			}
		}()
	}
	balancer := startNginx(t, nginx, dir, servers.String())

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	readers := make([]*reader, clients)
	var wg sync.WaitGroup
	for i := range readers {
		readers[i] = &reader{l: l, url: fmt.Sprintf("http://%s/stream/%d", balancer, i), client: client}
		wg.Go(func() {
			if err := readers[i].run(ctx); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	pause := func() { time.Sleep(3 * time.Second) }
	restart := func() {
		o := outage{from: time.Now()}
		l.mu.Lock()
		l.outages = append(l.outages, o)
		l.mu.Unlock()
		redis.stop()
		redis.start()
		l.mu.Lock()
		l.outages[len(l.outages)-1].to = time.Now()
		l.mu.Unlock()
	}
	pause()
	restart()
	pause()
	for _, n := range nodes {
		n.end(syscall.SIGTERM)
		n.start()
		pause()
	}
	nodes[1].end(os.Kill)
	pause()
	nodes[1].start()
	pause()
	restart()
	pause()
	pause()
	stop()
	wg.Wait()

	var events, returns, gaps, fresh int
	for i, r := range readers {
		events, returns, gaps, fresh = events+r.events, returns+r.returns, gaps+r.gaps, fresh+r.fresh
		if r.events < 20 {
			t.Errorf("client %d has got %d events", i, r.events)
		}
	}
	t.Logf("%d clients came back %d times and got %d events of %d streams; %d times a stream was gone with its node or Redis, and told %d times",
		clients, returns-clients, events, l.streams.Load(), fresh, gaps)
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// startNginx runs a load balancer that sends requests to the servers in turn.
func startNginx(t testing.TB, program, dir, servers string) (address string) {
	t.Helper()
	address = freeAddress(t)
	writeFile(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
		daemon off; master_process off; worker_rlimit_nofile 16384; pid %[1]s/nginx.pid; error_log %[1]s/nginx.log;
		events { worker_connections 8192; }
		http {
			access_log off;
			client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
			upstream nodes { %[2]s }
			server {
				listen %[3]s;
				location / {
					proxy_pass http://nodes;
					proxy_http_version 1.1;
					proxy_set_header Connection "";
					proxy_set_header Host localhost;
					proxy_buffering off;
					proxy_connect_timeout 1s;
				}
			}
		}`, dir, servers, address))
	process := exec.Command(program, "-c", filepath.Join(dir, "nginx.conf"), "-p", dir)
	process.Stdout, process.Stderr = io.Discard, io.Discard
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	eventually(t, "nginx listens", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	if process.ProcessState != nil {
		t.Fatal(errors.New("nginx has ended"))
	}
	return address
}
