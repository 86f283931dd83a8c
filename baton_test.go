package caddysse_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// TestWhatHandlersWriteReachesTheirClientAsItIs has chunks written directly to
// connections, if the handlers' goroutine is the only writer, for clients that
// begin a run and clients that come back to it.
func TestWhatHandlersWriteReachesTheirClientAsItIs(t *testing.T) {
	checkLeaks(t)
	for _, test := range []struct {
		name, proto, around string
		chunks              int
	}{
		{"HTTP/1.1", "h1", "", 1},
		{"HTTP/2", "h2", "", 0},
		{"an access log, whose size must be true", "h1", "log {\n output discard\n }", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			up := newUpstream(t)
			site := resumeSite(up, "1m", "history 256KiB")
			c := startCaddy(t, test.around+strings.Replace(site, "heartbeat off", "heartbeat 100ms", 1), withAdmin())
			cl := c.client(test.proto)
			_, client, call, token := beginKept(t, cl, up, "/")
			number := 0
			for round := range 2 {
				eventually(t, "it is there, and nobody else", func() bool {
					open, chunks := caddysse.OpenAndChunked()
					return open == 1 && chunks == test.chunks
				})
				// Short events, long events, and heartbeats between them.
				for _, size := range []int{1, 200, 4000, 4096, 4097, 20_000, 1} {
					number++
					text := strings.Repeat("x", size)
					call.send("data: " + text + "\n\n")
					client.expectBetweenHeartbeats(t, fmt.Sprintf("data: %s\nid: %s.%d\n\n", text, token, number))
				}
				if round == 0 {
					client = cl.get(t, "/", comingBack(asEventSource, fmt.Sprintf("%s.%d", token, number))...).follow()
				}
			}
			call.end()
			if got, err := client.rest(); strings.ReplaceAll(got, beat, "") != "" || err != io.EOF {
				t.Errorf("got %.200q and %v, want the end", got, err)
			}
		})
	}
}

// The handlers' goroutine writes to a client that keeps up. A client that does
// not read must not block it: what follows goes to the journal.
func TestAClientThatDoesNotReadDoesNotHoldItsHandlersUp(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "history 128KiB"), withAdmin())
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n", c.addr)
	call := up.accept(t)
	call.start("text/event-stream")
	c.waitForRun("open", 1)
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		call.do(func(w http.ResponseWriter) {
			for n := 1; ; n++ {
				_, err := fmt.Fprintf(w, "data: %d %s\n\n", n, strings.Repeat("x", 1000))
				if err != nil || http.NewResponseController(w).Flush() != nil {
					return
				}
				// So that the client has everything, as long as it reads.
				time.Sleep(200 * time.Microsecond)
			}
		})
	}()
	const enough = 64 // events of 1 KB that are in the journal and have not been sent
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		events := c.runs("").Runs[0].Events
		var list struct{ Streams []struct{ Events uint64 } }
		_, text := c.admin("GET", "/sse/streams")
		if err := json.Unmarshal([]byte(text), &list); err != nil || len(list.Streams) != 1 {
			t.Fatalf("%s: %v", text, err)
		}
		if events >= list.Streams[0].Events+enough {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the run has %d events, its client has been sent %d", events, list.Streams[0].Events)
		}
	}
	conn.Close()
	c.stopRuns()
	call.expectGone()
	<-flooded
}
