package caddysse_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// TestWhatIsFramedOnceReachesEachClientAsItIs has clients with and without
// other writers around the server's. Only without them are chunks written
// directly to the connection.
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
			// Short events, long events, and heartbeats between them.
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

// expectBetweenHeartbeats expects any number of heartbeats, then text, and one
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

// TestAConnectionStaysWholeWhateverIsWrittenPastTheServer sends several
// requests on a connection, one after the other. Each must get its stream's
// events and an end. Heartbeats are sent in between, through the server.
func TestAConnectionStaysWholeWhateverIsWrittenPastTheServer(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	const events = 40
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		random := rand.New(rand.NewPCG(1, uint64(len(r.URL.Path))))
		time.Sleep(time.Duration(random.IntN(30)) * time.Millisecond) // before or after early_start
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", eventStream)
		w.Header().Set("Trailer", "X-Trailer")
		for i := range events {
			fmt.Fprintf(w, "data: %d %s %s\n\n", i, body, strings.Repeat("y", random.IntN(1<<random.IntN(14))))
			if random.IntN(3) > 0 {
				w.(http.Flusher).Flush()
			}
			if random.IntN(4) == 0 {
				time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
			}
		}
		w.Header().Set("X-Trailer", "there")
	})
	for _, way := range []string{
		"", "early_start 10ms any", "early_start 10ms any\nupstream_retry 5s", "resume 1m any", "resume 1m any\nearly_start 10ms any", "share",
	} {
		t.Run(way, func(t *testing.T) {
			c := startCaddy(t, "sse 20ms {\nprelude 10ms\n"+way+"\n}\nreverse_proxy "+up.addr)
			t.Run("connections", func(t *testing.T) {
				for i := range 8 {
					t.Run(strconv.Itoa(i), func(t *testing.T) {
						t.Parallel()
						conn, err := net.Dial("tcp", c.addr)
						if err != nil {
							t.Fatal(err)
						}
						if i%2 == 1 {
							conn.Close()
							if conn, err = tls.Dial("tcp", c.tlsAddr, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: []string{"http/1.1"}}); err != nil {
								t.Fatal(err)
							}
						}
						defer conn.Close()
						conn.SetDeadline(time.Now().Add(patience))
						in := bufio.NewReader(conn)
						for n := range 6 {
							headers := fmt.Sprintf("/%s HTTP/1.1\r\nHost: localhost\r\n%s\r\nCache-Control: no-cache\r\n", strings.Repeat("x", i), acceptStream)
							what := ""
							if n%2 == 0 {
								io.WriteString(conn, "GET "+headers+"\r\n")
							} else {
								what = "hello"
								io.WriteString(conn, "POST "+headers+"Content-Length: 5\r\nExpect: 100-continue\r\n\r\nhello")
							}
							res := expectNumberedEvents(t, in, events, what)
							if way == "" && res.Trailer.Get("X-Trailer") != "there" {
								t.Errorf("trailers: %v", res.Trailer)
							}
							if res.Close {
								return // its headers were sent before its body had been read
							}
						}
					})
				}
			})
		})
	}
}

// expectNumberedEvents reads a response with this many events, numbered from 0,
// and what this module adds.
func expectNumberedEvents(t *testing.T, in *bufio.Reader, events int, what string) *http.Response {
	t.Helper()
	res, err := http.ReadResponse(in, nil)
	for err == nil && res.StatusCode == http.StatusContinue {
		res, err = http.ReadResponse(in, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%v after %d bytes", err, len(text))
	}
	next := 0
	for line := range strings.Lines(string(text)) {
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		switch {
		case field == "data" && strings.HasPrefix(value, fmt.Sprintf(" %d %s ", next, what)):
			next++
		case field == "data" && value != "":
			t.Fatalf("after %d events came %.80q", next, line)
		case field != "" && field != "data" && field != "id" && field != "event" && field != "retry":
			t.Fatalf("after %d events came %.80q", next, line)
		}
	}
	if next != events {
		t.Errorf("%d events, want %d", next, events)
	}
	return res
}
