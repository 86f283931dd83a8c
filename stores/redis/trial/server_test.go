package trial

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience limits every wait for something that must happen. A test that passes
// does not wait that long, but the machine and its disk can be busy.
const patience = 90 * time.Second

// server is a redis-server for a test.
type server struct {
	t       testing.TB
	program string
	addr    string
	args    []string

	mu  sync.Mutex
	cmd *exec.Cmd
	out *bytes.Buffer
}

// startServer starts a redis-server on its own port, with more arguments.
func startServer(t testing.TB, args ...string) *server {
	t.Helper()
	s := newServer(t, args...)
	s.start()
	return s
}

// newServer returns a redis-server that has not been started.
// CADDYSSE_TEST_REDIS names another program, such as valkey-server.
func newServer(t testing.TB, args ...string) *server {
	t.Helper()
	program := os.Getenv("CADDYSSE_TEST_REDIS")
	if program == "" {
		program = "redis-server"
	}
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("CADDY_SSE_REQUIRE_REDIS") != "" {
			t.Fatalf("there is no %s, and CADDY_SSE_REQUIRE_REDIS says that there must be one", program)
		}
		t.Skipf("there is no %s; on Debian, apt-get install redis-server", program)
	}
	s := &server{t: t, program: program, addr: freeAddress(t)}
	_, port, _ := net.SplitHostPort(s.addr)
	s.args = append([]string{
		"--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir(),
	}, args...)
	t.Cleanup(s.stop)
	return s
}

// freeAddress returns an address on which nothing listens, and whose port no
// outgoing connection gets: most systems take ports from 32768 on for these.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(22_000))
		if _, taken := addresses.LoadOrStore(addr, true); taken {
			continue
		}
		// Not by listening there: a process that is being started would share the
		// socket, and keep the address taken.
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return addr
		}
		conn.Close()
	}
	t.Fatal("no port is free")
	return ""
}

// addresses are those that freeAddress has returned.
var addresses sync.Map

func (s *server) start() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = new(bytes.Buffer)
	s.cmd = exec.Command(s.program, s.args...)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if answer, err := s.ask("PING"); err == nil && strings.HasPrefix(answer, "+") || strings.HasPrefix(answer, "-NOAUTH") {
			return
		}
		if time.Now().After(deadline) {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
			s.t.Fatalf("%s does not answer:\n%s", s.program, s.out)
		}
	}
}

// stop ends the server if it runs.
func (s *server) stop() { s.end(syscall.SIGTERM) }

// kill ends the server as a crash does.
func (s *server) kill() { s.end(syscall.SIGKILL) }

func (s *server) end(signal syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(signal)
	timer := time.AfterFunc(patience, func() { _ = s.cmd.Process.Kill() })
	_ = s.cmd.Wait()
	timer.Stop()
	s.cmd = nil
}

// pause stops the server's process, or lets it continue.
func (s *server) pause(paused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	signal := syscall.SIGCONT
	if paused {
		signal = syscall.SIGSTOP
	}
	_ = s.cmd.Process.Signal(signal)
}

// ask sends a command and returns the first line of the answer, or all of it if
// it is a bulk string.
func (s *server) ask(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	fmt.Fprintf(conn, "*%d\r\n", len(args))
	for _, arg := range args {
		fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(arg), arg)
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	line = strings.TrimSpace(line)
	var n int
	if _, bulk := fmt.Sscanf(line, "$%d", &n); err == nil && bulk == nil && n >= 0 {
		text := make([]byte, n)
		if _, err := readFull(r, text); err != nil {
			return "", err
		}
		return string(text), nil
	}
	return line, err
}

// must is ask for commands that must succeed.
func (s *server) must(args ...string) string {
	s.t.Helper()
	answer, err := s.ask(args...)
	if err != nil || strings.HasPrefix(answer, "-") {
		s.t.Fatalf("%s: %q, %v", args[0], answer, err)
	}
	return answer
}

func readFull(r *bufio.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}
