package caddysse_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// The handlers' goroutine writes to a client that keeps up. One that does not read
// must not hold it up: what comes next goes into the journal.
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
				// So that the client has all that there is, as long as it takes it.
				time.Sleep(200 * time.Microsecond)
			}
		})
	}()
	const enough = 64 // events of 1 KB that are in the journal and not with the client
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
	for _, run := range c.runs("").Runs {
		c.admin("DELETE", "/sse/runs/"+run.ID)
	}
	call.expectGone()
	<-flooded
}
