package caddysse_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// onceVariable sets the number of clients for a long run of the test below.
// Each client then gets 1,000 events over five reloads.
const onceVariable = "CADDYSSE_TEST_ONCE"

// countingUpstream answers each request with this many numbered events, without
// ids, and counts the requests.
func countingUpstream(t testing.TB, events int, pause time.Duration, asked *atomic.Int64) *testUpstream {
	return newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		asked.Add(1)
		w.Header().Set("Content-Type", "text/event-stream")
		rc := http.NewResponseController(w)
		rc.Flush()
		for n := 1; n <= events; n++ {
			// Some events come in pieces.
			fmt.Fprintf(w, "data: %d", n)
			if n%7 == 0 {
				rc.Flush()
			}
			io.WriteString(w, "\n\n")
			if rc.Flush() != nil {
				return
			}
			select {
			case <-time.After(rand.N(pause)):
			case <-r.Context().Done():
				return
			}
		}
	})
}

// onceClient follows one stream by the rules of an EventSource, or of a client
// that repeats its POST, over connections that break at any byte.
type onceClient struct {
	method string
	last   string // the last id
	seen   int    // the last number
	pauses time.Duration
}

// follow returns when the client has all events and the stream has ended.
func (o *onceClient) follow(ctx context.Context, addr, path string, events int) error {
	for tries := 0; ; tries++ {
		over, err := o.connect(ctx, addr, path, events)
		if err != nil || over {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %d of %d events after %d connections", path, o.seen, events, tries+1)
		}
		time.Sleep(rand.N(o.pauses))
	}
}

// connect reads one connection, which is cut after some bytes. over is true if
// the client has everything.
func (o *onceClient) connect(ctx context.Context, addr, path string, events int) (over bool, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false, nil // a reload
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: once\r\nAccept: text/event-stream\r\nConnection: close\r\n", o.method, path)
	if o.method == "POST" {
		io.WriteString(conn, "Content-Length: 5\r\n")
	} else {
		io.WriteString(conn, "Cache-Control: no-cache\r\n")
	}
	if o.last != "" {
		fmt.Fprintf(conn, "Last-Event-ID: %s\r\n", o.last)
	}
	io.WriteString(conn, "\r\n")
	if o.method == "POST" {
		io.WriteString(conn, "hello")
	}
	budget := 1 << 30
	if o.last != "" { // without an id, a client could not come back
		budget = 150 + rand.N(900)
	} else if o.method == "GET" {
		budget = 0 // cut directly after the first id, before an event
	}
	cut := &cutReader{r: conn, left: budget}
	if budget == 0 {
		cut.left = 1 << 30
	}
	res, err := http.ReadResponse(bufio.NewReader(cut), nil)
	if err != nil {
		return false, nil
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return false, fmt.Errorf("%s %s: %s", o.method, path, res.Status)
	}
	lines := bufio.NewReader(res.Body)
	var data, id, event string
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			// An EventSource that has everything would come back for more.
			return o.seen == events && (err == io.EOF || o.method == "GET"), nil
		}
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "data":
			data = value
		case "id":
			id = value
		case "event":
			event = value
		case "":
			if id != "" {
				o.last = id
			}
			if event == "lost" || event == "error" {
				return false, fmt.Errorf("%s %s: event %s: %s", o.method, path, event, data)
			}
			if n, err := strconv.Atoi(data); err == nil {
				if n != o.seen+1 {
					return false, fmt.Errorf("%s %s: event %d after %d", o.method, path, n, o.seen)
				}
				o.seen = n
				if o.method == "POST" && n == 1 {
					cut.left = rand.N(600)
				}
			} else if budget == 0 {
				return false, nil
			}
			data, event = "", ""
		}
	}
}

// cutReader ends after a number of bytes.
type cutReader struct {
	r    io.Reader
	left int
}

func (c *cutReader) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.r.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// Connections are cut at any byte, streams reach their age or are drained by
// reloads, and the upstream has neither ids nor a replay. Still each client
// gets each event once and in order, and the upstream sees each request once.
func TestEveryEventComesOnceWhateverBreaks(t *testing.T) {
	checkLeaks(t)
	// Only one reload, because reloads in a row spare clients that have just
	// come back.
	clients, events, reloads := 200, 60, 1
	if n, err := strconv.Atoi(os.Getenv(onceVariable)); err == nil {
		clients, events, reloads = n, 1000, 5
	}
	if raceEnabled {
		clients /= 2
	}
	var asked atomic.Int64
	up := countingUpstream(t, events, 40*time.Millisecond, &asked)
	site := `
		sse {
			name ` + fmt.Sprintf("once-%d", rand.Uint64()) + `
			heartbeat off
			drain 500ms
			max_duration 300ms 1s
			resume 1m any
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, site, withLogLevel("ERROR"))
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	failed := make(chan error, clients)
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			o := &onceClient{method: []string{"GET", "POST"}[i%2], pauses: 100 * time.Millisecond}
			if err := o.follow(ctx, c.addr, fmt.Sprintf("/%d", i), events); err != nil {
				failed <- err
			}
		})
	}
	for range reloads {
		time.Sleep(time.Duration(events) * 20 * time.Millisecond / time.Duration(reloads+1))
		c.reload(site)
	}
	all.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if got := asked.Load(); got != int64(clients) {
		t.Errorf("the upstream saw %d requests of %d clients", got, clients)
	}
}
