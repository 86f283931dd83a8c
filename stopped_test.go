//go:build unix

package caddysse_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// While a process is stopped (SIGSTOP, a machine that sleeps, a container that
// is frozen), it reads nothing; its upstreams are not silent. When it
// continues, timers fire before sockets are read.
func TestATimeInWhichTheProcessWasStoppedIsNoSilenceOfItsUpstreams(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second // for a busy machine
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, "data: 1\n\n"); err != nil || strings.HasPrefix(r.URL.Path, "/silent") {
				break
			}
			w.(http.Flusher).Flush()
			time.Sleep(100 * time.Millisecond)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	c := startCaddyProcess(t, `
		sse 1h {
			prelude off
			drain off
			upstream_timeout `+timeout.String()+`
		}
		reverse_proxy `+up.addr, "grace_period 100ms")
	var bodies []*follower
	for i := range 60 {
		cl := c.client(clientProtocols[i%3])
		body := cl.get(t, fmt.Sprint("/", i), acceptStream).follow()
		body.wait(func(unread string) bool { return unread != "" })
		bodies = append(bodies, body)
	}
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * timeout) // the stop itself
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// Each stream continues: it gets more than the kernel can have buffered
	// during the stop.
	var all sync.WaitGroup
	for i, body := range bodies {
		before := len(body.all())
		all.Go(func() {
			body.wait(func(string) bool { return len(body.all()) > before+15 })
			if n := len(body.all()); n <= before+15 {
				_, err := body.rest()
				t.Errorf("stream %d ended after %d pieces with %v", i, n-before, err)
			}
		})
	}
	all.Wait()

	// The limit itself still applies.
	silent := c.client("h1").get(t, "/silent", acceptStream).follow()
	silent.expect(t, "data: 1\n\n")
	if _, err := silent.rest(); err == errNothingMore {
		t.Error("nobody is ended for a silence any more")
	}
	c.stop("SIGTERM")
	if reasons := c.closedReasons(); reasons["upstream_timeout"] != 1 || reasons["upstream_timeout"]+reasons["server_closed"] != 61 {
		t.Errorf("told: %v", reasons)
	}
}

// While the process was stopped, the kernel continued to send, and the client
// may have read everything.
func TestATimeInWhichTheProcessWasStoppedEndsNobodysWrite(t *testing.T) {
	t.Parallel()
	const timeout = 2 * time.Second
	up := newUpstreamFunc(t, flood)
	c := startCaddyProcess(t, `
		sse 1h {
			prelude off
			drain off
			write_timeout `+timeout.String()+`
		}
		reverse_proxy `+up.addr, "grace_period 100ms")
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /slow HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n", acceptStream)
	c.waitForStream(t, "/slow", func(s map[string]any) bool { return s["idle_seconds"].(float64) > 0.3 && s["bytes"].(float64) > 0 })
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	for err == nil {
		conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, err = io.CopyN(io.Discard, conn, 64<<10)
	}
	time.Sleep(time.Until(stopped.Add(timeout + time.Second))) // the stop itself
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// The stream continues: it gets more than the kernel can have buffered.
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.CopyN(io.Discard, conn, 16<<20); err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	conn.Close()
	if line := c.closedLine(t, "/slow"); line["reason"] != "client_closed" {
		t.Errorf("it ended as %v", line)
	}
	c.stop("SIGTERM")
}

func TestACheckThatIsStoppedForAWhileFindsNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a check")
	}
	t.Parallel()
	c := startCaddyProcess(t, probeSite, "")
	cmd := checkCommand([]string{"--for", "10s", "--token", "sesame", "--json", c.url + "/probe"})
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	_ = cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(2 * time.Second)
	_ = cmd.Process.Signal(syscall.SIGCONT)
	_ = cmd.Wait()
	var r struct{ Findings []json.RawMessage }
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || len(r.Findings) > 0 {
		t.Errorf("%v, %s", err, out.String())
	}
}
