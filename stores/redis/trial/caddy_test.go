// Package trial tests several real Caddys with a real Redis while one of them
// fails.
package trial

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// caddyBinary is the path of a Caddy with the store: the one that
// CADDY_SSE_CADDY names, or one that is built here.
var caddyBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("CADDY_SSE_CADDY"); path != "" {
		return filepath.Abs(path)
	}
	var err error
	if buildDir, err = os.MkdirTemp("", "caddy-sse-redis"); err != nil {
		return "", err
	}
	path := filepath.Join(buildDir, "caddy")
	built := exec.Command("go", "build", "-buildvcs=false", "-o", path, "../cmd/caddy")
	built.Stdout, built.Stderr = os.Stderr, os.Stderr
	return path, built.Run()
})

func TestMain(m *testing.M) {
	status := m.Run()
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(status)
}

// buildDir is the folder of the Caddy that was built here; "" if none was.
var buildDir string

// node is a Caddy of a test, in its own process.
type node struct {
	t              testing.TB
	name           string
	addr, admin    string
	config, binary string

	mu   sync.Mutex
	cmd  *exec.Cmd
	logs lines
}

// lines holds what a process has written.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// count returns how many lines contain a text.
func (l *lines) count(text string) (n int) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// newNode returns a Caddy that has not been started. If redis is "", it has no
// store. Its upstream gets its name as X-Node.
func newNode(t testing.TB, name, upstream, redis, window, settings string) *node {
	t.Helper()
	binary, err := caddyBinary()
	if err != nil {
		t.Fatalf("no Caddy to test with: %v", err)
	}
	if redis != "" {
		settings = "store redis {\naddress " + redis + "\n}\n" + settings
	}
	dir := t.TempDir()
	n := &node{t: t, name: name, addr: freeAddress(t), admin: freeAddress(t), binary: binary}
	n.config = filepath.Join(dir, "Caddyfile")
	config := fmt.Sprintf(`{
	admin %[1]s
	auto_https off
	persist_config off
	grace_period 2s
	storage file_system %[2]s
	log {
		format json
	}
}
http://localhost:%[3]s, http://127.0.0.1:%[3]s, http://nodes.test:%[3]s {
	bind 127.0.0.1
	sse {
		heartbeat off
		drain off
		resume %[4]s {
			%[5]s
		}
	}
	reverse_proxy %[6]s {
		header_up X-Node %[7]s
	}
}
`, n.admin, dir, portOf(n.addr), window, settings, upstream, name)
	if err := os.WriteFile(n.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.stop)
	return n
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func startNode(t testing.TB, name, upstream, redis, window, settings string) *node {
	t.Helper()
	n := newNode(t, name, upstream, redis, window, settings)
	n.start()
	return n
}

func (n *node) start() {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cmd = exec.Command(n.binary, "run", "--config", n.config, "--adapter", "caddyfile")
	n.cmd.Stdout, n.cmd.Stderr = &n.logs, &n.logs
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("tcp", n.addr, time.Second)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			_ = n.cmd.Process.Kill()
			_ = n.cmd.Wait()
			n.t.Fatalf("a Caddy does not answer:\n%s", n.logs.String())
		}
	}
}

func (n *node) stop() { n.end(syscall.SIGTERM) }
func (n *node) kill() { n.end(syscall.SIGKILL) }

func (n *node) end(signal syscall.Signal) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return
	}
	_ = n.cmd.Process.Signal(signal)
	timer := time.AfterFunc(patience, func() { _ = n.cmd.Process.Kill() })
	_ = n.cmd.Wait()
	timer.Stop()
	n.cmd = nil
}

// reload makes the node load its configuration again.
func (n *node) reload() {
	n.t.Helper()
	out, err := exec.Command(n.binary, "reload", "--force", "--address", n.admin, "--config", n.config, "--adapter", "caddyfile").CombinedOutput()
	if err != nil {
		n.t.Fatalf("a reload: %v\n%s", err, out)
	}
}

// metric returns the sum of the samples of a metric whose lines contain all of
// these texts.
func (n *node) metric(name string, texts ...string) (sum float64) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+n.admin+"/metrics", nil)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	defer res.Body.Close()
	all, err := io.ReadAll(res.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(all)) {
		if !strings.HasPrefix(line, name+"{") {
			continue
		}
		matches := true
		for _, text := range texts {
			matches = matches && strings.Contains(line, text)
		}
		if matches {
			var value float64
			_, _ = fmt.Sscan(line[strings.LastIndex(line, " "):], &value)
			sum += value
		}
	}
	return sum
}

// hop is an address in front of a server, with a delay in each direction. It
// can be moved to another server, like a virtual IP address or a DNS name:
// existing connections stay with the old one.
type hop struct {
	addr string

	mu     sync.Mutex
	target string
}

func (h *hop) moveTo(target string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.target = target
}

func startHop(t testing.TB, target string, delay time.Duration) *hop {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hop{addr: l.Addr().String(), target: target}
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		l.Close()
		work.Wait()
	})
	work.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			h.mu.Lock()
			to, err := net.Dial("tcp", h.target)
			h.mu.Unlock()
			if err != nil {
				from.Close()
				continue
			}
			stop := context.AfterFunc(ctx, func() { from.Close(); to.Close() })
			work.Go(func() { defer stop(); delayed(to, from, delay) })
			work.Go(func() { delayed(from, to, delay) })
		}
	})
	return h
}

// delayed passes data on, each piece after the delay.
func delayed(to, from net.Conn, delay time.Duration) {
	type piece struct {
		data []byte
		due  time.Time
	}
	pieces := make(chan piece, 10_000)
	go func() {
		defer close(pieces)
		for {
			data := make([]byte, 64<<10)
			n, err := from.Read(data)
			if n > 0 {
				pieces <- piece{data[:n], time.Now().Add(delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			break
		}
	}
	to.Close()
	from.Close()
	for range pieces {
		continue
	}
}
