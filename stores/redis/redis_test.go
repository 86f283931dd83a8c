package redis

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/store"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

// patience limits every wait for something that must happen.
const patience = time.Minute

// server is a Redis server for a test.
type server struct {
	t       testing.TB
	dir     string
	address string
	options []string

	password string
	process  *exec.Cmd
}

// startServer runs a server on a loopback port. CADDYSSE_TEST_REDIS names
// another program than redis-server.
func startServer(t testing.TB, options ...string) *server {
	t.Helper()
	program := os.Getenv("CADDYSSE_TEST_REDIS") // for example Valkey's
	if program == "" {
		program = "redis-server"
	}
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("CADDY_SSE_REQUIRE_REDIS") != "" {
			t.Fatalf("there is no %s, and CADDY_SSE_REQUIRE_REDIS says that there must be one", program)
		}
		t.Skipf("there is no %s", program)
	}
	s := &server{t: t, dir: t.TempDir(), address: freeAddress(t), options: append([]string{program}, options...)}
	s.start()
	t.Cleanup(s.stop)
	return s
}

// start starts the server and waits until it answers. It has the data that is
// on its disk.
func (s *server) start() {
	s.t.Helper()
	_, port, _ := net.SplitHostPort(s.address)
	s.process = exec.Command(s.options[0], append([]string{
		"--bind", "127.0.0.1", "--port", port, "--dir", s.dir, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
	}, s.options[1:]...)...)
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.process.Stdout, s.process.Stderr = log, log
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", s.address)
		if err == nil {
			_, _ = fmt.Fprint(conn, "PING\r\n")
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			answer := make([]byte, 5)
			n, _ := conn.Read(answer)
			conn.Close()
			if n > 0 && (answer[0] == '+' || strings.HasPrefix(string(answer[:n]), "-NOA")) {
				return
			}
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			s.t.Fatalf("Redis does not answer: %v\n%s", err, text)
		}
	}
}

func (s *server) stop() {
	if s.process != nil {
		_ = s.process.Process.Kill()
		_ = s.process.Wait()
		s.process = nil
	}
}

// pause makes the server hang until resume.
func (s *server) pause()  { _ = s.process.Process.Signal(syscall.SIGSTOP) }
func (s *server) resume() { _ = s.process.Process.Signal(syscall.SIGCONT) }

// do sends a command to the server and returns its answer as text.
func (s *server) do(t testing.TB, command ...string) string {
	t.Helper()
	r := &Redis{Address: []string{s.address}, Password: s.password}
	if err := r.prepare(); err != nil {
		t.Fatal(err)
	}
	c, err := r.dial(t.Context(), s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.fail(errClosed)
	go c.send()
	go c.receive()
	replies, err := c.do(t.Context(), command)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if refused, ok := replies[0].(replyError); ok {
		t.Fatalf("%s: %v", command, refused)
	}
	return fmt.Sprint(replies[0])
}

// open opens a store on the server, as a node does.
func (s *server) open(t testing.TB) store.Store {
	t.Helper()
	r := &Redis{Address: []string{s.address}}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	if err := r.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	opened, err := r.Open()
	if err != nil {
		t.Fatal(err)
	}
	return opened
}

func TestRedisIsAStore(t *testing.T) {
	s := startServer(t)
	storetest.Run(t, func(t *testing.T) store.Store { return s.open(t) })
}
