package harness

import (
	"bytes"
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

// Process is a program that runs until the test ends, in its own process group.
type Process struct {
	Name string

	command *exec.Cmd
	ended   chan struct{} // closed when the process has ended and its output has been read

	mutex  sync.Mutex
	output bytes.Buffer
	err    error // of Wait
}

// Setting changes a command before it starts.
type Setting func(*exec.Cmd)

// Settings combines several settings.
func Settings(all ...Setting) Setting {
	return func(c *exec.Cmd) {
		for _, set := range all {
			set(c)
		}
	}
}

// In sets the working directory.
func In(dir string) Setting {
	return func(c *exec.Cmd) { c.Dir = dir }
}

// Env adds variables in the form "NAME=value".
func Env(variables ...string) Setting {
	return func(c *exec.Cmd) { c.Env = append(c.Environ(), variables...) }
}

// Command returns its arguments, to make an argument list readable:
// Command("node", "server.js").
func Command(words ...string) []string { return words }

// Start runs a program in the background. At the end of the test it gets
// SIGTERM, and SIGKILL if it does not end. Its output is shown if the test
// failed.
func Start(t testing.TB, command []string, settings ...Setting) *Process {
	t.Helper()
	p := &Process{
		Name:    filepath.Base(command[0]),
		command: exec.Command(command[0], command[1:]...),
		ended:   make(chan struct{}),
	}
	p.command.Stdout = writerFunc(p.write)
	p.command.Stderr = p.command.Stdout
	p.command.SysProcAttr = processGroup()
	// Children that have left the process group would keep the output open
	// forever.
	p.command.WaitDelay = 2 * time.Second
	for _, set := range settings {
		set(p.command)
	}
	if err := p.command.Start(); err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	groups.add(p.PID())
	go func() {
		err := p.command.Wait()
		// Children may have outlived their leader.
		syscall.Kill(-p.PID(), syscall.SIGKILL)
		groups.remove(p.PID())
		p.mutex.Lock()
		p.err = err
		p.mutex.Unlock()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.Stop(t)
		if t.Failed() {
			t.Logf("output of %s:\n%s", p.Name, lastLines(p.Output(), 200))
		}
	})
	return p
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func (p *Process) write(b []byte) (int, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.output.Write(b)
}

// Output returns what the process has printed so far, to stdout and stderr.
func (p *Process) Output() string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.output.String()
}

// PID returns the process id, which is also that of its group.
func (p *Process) PID() int { return p.command.Process.Pid }

// Signal sends a signal to the whole process group.
func (p *Process) Signal(signal syscall.Signal) {
	select {
	case <-p.ended: // the id may belong to another process by now
	default:
		syscall.Kill(-p.PID(), signal)
	}
}

// Stop ends the process with SIGTERM, or after five seconds with SIGKILL.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	p.Signal(syscall.SIGTERM)
	if !p.endsWithin(5 * time.Second) {
		p.Signal(syscall.SIGKILL)
		// A process that waits for the disk ends only after that wait.
		if !p.endsWithin(Patience) {
			t.Errorf("%s (%d) did not end after SIGKILL", p.Name, p.PID())
		}
	}
}

func (p *Process) endsWithin(d time.Duration) bool {
	select {
	case <-p.ended:
		return true
	case <-time.After(d):
		return false
	}
}

// Running reports whether the process is still running.
func (p *Process) Running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Wait waits until the process ends by itself and returns its output. The test
// fails if that takes longer than Patience, or if the exit status is not 0.
func (p *Process) Wait(t testing.TB) string {
	t.Helper()
	if !p.endsWithin(Patience) {
		t.Fatalf("%s did not end within %v", p.Name, Patience)
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.err != nil {
		t.Fatalf("%s: %v", p.Name, p.err)
	}
	return p.output.String()
}

// AwaitOutput waits until the process has printed the text.
func (p *Process) AwaitOutput(t testing.TB, text string) {
	t.Helper()
	p.await(t, "print "+text, func() bool { return strings.Contains(p.Output(), text) })
}

// AwaitPort waits until something listens on the address.
func (p *Process) AwaitPort(t testing.TB, addr string) {
	t.Helper()
	p.await(t, "listen on "+addr, func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// AwaitHTTP waits until a GET of the URL is answered with 200.
func (p *Process) AwaitHTTP(t testing.TB, url string) {
	t.Helper()
	client := &http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	p.await(t, "answer at "+url, func() bool {
		response, err := client.Get(url)
		if err != nil {
			return false
		}
		defer response.Body.Close()
		io.Copy(io.Discard, response.Body)
		return response.StatusCode == http.StatusOK
	})
}

func (p *Process) await(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); ; time.Sleep(20 * time.Millisecond) {
		running := p.Running()
		if holds() {
			return
		}
		if !running {
			t.Fatalf("%s ended before it did %s", p.Name, what)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not %s within %v", p.Name, what, Patience)
		}
	}
}

// Run runs a program to its end and returns its output. An exit status other
// than 0 fails the test.
func Run(t testing.TB, command []string, settings ...Setting) string {
	t.Helper()
	return Start(t, command, settings...).Wait(t)
}

// run is like Run, but returns failures as errors. It is for installs.
func run(t testing.TB, command []string, settings ...Setting) error {
	t.Helper()
	t.Logf("%s", strings.Join(command, " "))
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = processGroup()
	for _, set := range settings {
		set(cmd)
	}
	kill := time.AfterFunc(15*time.Minute, func() {
		if cmd.Process != nil {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	defer kill.Stop()
	output, err := cmd.CombinedOutput()
	if err != nil {
		return &installError{strings.Join(command, " "), err, lastLines(string(output), 40)}
	}
	return nil
}

type installError struct {
	command string
	cause   error
	output  string
}

func (e *installError) Error() string {
	return e.command + ": " + e.cause.Error() + "\n" + e.output
}

func (e *installError) Unwrap() error { return e.cause }

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

var _ io.Writer = writerFunc(nil)

// isRoot reports whether Debian packages can be installed without sudo.
func isRoot() bool { return os.Geteuid() == 0 }
