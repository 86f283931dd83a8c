package caddysse_test

import (
	"fmt"
	"io"
	"strings"
	"testing"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// TestWhatIsFramedOnceReachesEachClientAsItIs has clients with and without writers
// around the server's: only where there is none are chunks written past it.
func TestWhatIsFramedOnceReachesEachClientAsItIs(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	for _, test := range []struct {
		name, proto, around string
		chunks              int
	}{
		{"HTTP/1.1", "h1", "", 2},
		{"HTTP/2", "h2", "", 0},
		{"an access log, whose size must be true", "h1", "log {\n output discard\n }", 0},
		{"deferred header operations", "h1", "header >X-Site yes", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			up := newUpstream(t)
			c := startCaddy(t, strings.Replace(test.around+sharedSite(up, ""), "heartbeat off", "heartbeat 100ms", 1))
			cl := c.client(test.proto)
			first, call := open(t, cl, up, "/", asEventSource...)
			call.start("text/event-stream")
			one := first.headers(t).follow()
			token := one.expectFirst(t, 0)
			two := cl.get(t, "/", asEventSource...).follow()
			two.expectFirst(t, 0)
			clients := []*follower{one, two}
			eventually(t, "both are there", func() bool {
				open, chunks := caddysse.OpenAndChunked()
				return open == 2 && chunks == test.chunks
			})
			// Short ones, long ones, and heartbeats between them.
			for n, size := range []int{1, 200, 4000, 4096, 4097, 100_000, 1} {
				text := strings.Repeat("x", size)
				call.send("data: " + text + "\n\n")
				for _, client := range clients {
					client.expectBetweenHeartbeats(t, fmt.Sprintf("data: %s\nid: %s.%d\n\n", text, token, n+1))
				}
			}
			call.end()
			for _, client := range clients {
				if got, err := client.rest(); strings.ReplaceAll(got, beat, "") != "" || err != io.EOF {
					t.Errorf("got %.200q and %v, want the end", got, err)
				}
			}
		})
	}
}

const beat = ":heartbeat\n\n"

// expectBetweenHeartbeats expects text, after any number of heartbeats, and one
// heartbeat after it.
func (f *follower) expectBetweenHeartbeats(t testing.TB, want string) {
	t.Helper()
	want += beat
	without := func(unread string) string {
		for strings.HasPrefix(unread, beat) {
			unread = unread[len(beat):]
		}
		return unread
	}
	got, err := f.wait(func(unread string) bool { return len(without(unread)) >= len(want) })
	if got = without(got); !strings.HasPrefix(got, want) {
		t.Fatalf("got %.200q (%v), want %.200q", got, err, want)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unread = without(f.unread)[len(want):]
}
