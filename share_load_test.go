package caddysse_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestAnUpstreamMayBeginWithMoreThanAJournalHolds(t *testing.T) {
	checkLeaks(t)
	const events = 3000
	ready := make(chan struct{}) // a client that joins after the dump gets nothing of it
	begin := sync.OnceFunc(func() { close(ready) })
	defer begin()
	dump := func(w http.ResponseWriter, r *http.Request) {
		<-ready
		w.Header().Set("Content-Type", "text/event-stream")
		for n := 1; n <= events; n++ {
			if _, err := fmt.Fprintf(w, "data: %d %s\n\n", n, strings.Repeat("x", 1000)); err != nil {
				return
			}
		}
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	up := newUpstreamFunc(t, dump)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	const clients = 20
	whole, lagged := 0, 0
	results := make(chan error, clients)
	for range clients {
		go func() {
			res, err := cl.Do(cl.request(t, "GET", "/", nil, asEventSource...))
			if err != nil {
				results <- err
				return
			}
			defer res.Body.Close()
			var last int
			err = eachEvent(res.Body, func(data string) bool {
				var n int
				fmt.Sscanf(data, "%d", &n)
				if n != last+1 && last > 0 {
					t.Errorf("%d after %d", n, last)
				}
				last = n
				return n < events
			})
			if last == events {
				err = nil
			} else if err == nil {
				err = io.EOF
			}
			results <- err
		}()
	}
	eventually(t, "all clients wait", func() bool {
		runs := c.runs("").Runs
		return len(runs) == 1 && runs[0].Clients == clients
	})
	begin()
	for range clients {
		switch err := <-results; err {
		case nil:
			whole++
		case io.EOF: // the clean end of an EventSource that has fallen behind
			lagged++
		default:
			t.Error(err)
		}
	}
	t.Logf("%d of %d have all of it, %d have fallen behind", whole, clients, lagged)
	if whole == 0 {
		t.Error("nobody has all of it")
	}
}

// eachEvent calls on with the data of each event until it returns false or the
// body ends.
func eachEvent(body io.Reader, on func(data string) bool) error {
	buf := make([]byte, 32<<10)
	var rest string
	for {
		n, err := body.Read(buf)
		rest += string(buf[:n])
		for {
			block, after, found := strings.Cut(rest, "\n\n")
			if !found {
				break
			}
			rest = after
			for line := range strings.SplitSeq(block, "\n") {
				if data, ok := strings.CutPrefix(line, "data: "); ok && !on(data) {
					return nil
				}
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func TestAClientThatDoesNotReadDelaysNobodyAndIsLagging(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, "history 64KiB"), withAdmin())
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n", c.addr)
	call := up.accept(t)
	call.start("text/event-stream")
	reader := c.client("h1").get(t, "/", asEventSource...).follow()
	token := reader.expectFirst(t, 0)
	text := strings.Repeat("x", 10_000)
	for n := 1; n <= 1000; n++ {
		call.send("data: " + text + "\n\n")
		reader.expect(t, fmt.Sprintf("data: %s\nid: %s.%d\n\n", text, token, n))
	}
	entry := c.waitForLog("stream closed", 0)
	if entry["reason"] != "lagged" {
		t.Errorf("%v", entry)
	}
	call.end()
	reader.expectEnd(t)
}

func TestWhoComesBackTooLateIsToldHowMuchIsGone(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, "history 4KiB"))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	token := one.expectFirst(t, 0)
	for n := 1; n <= 500; n++ {
		call.send(plainEvent(n))
		one.expect(t, eventOf(token, n))
	}
	for _, kind := range [][]string{asEventSource, {"Accept: text/event-stream", notEventSource}} {
		two := cl.get(t, "/", append(kind[:2:2], "Last-Event-ID: "+token+".1")...).follow()
		got, _ := two.wait(func(unread string) bool { return strings.Contains(unread, eventOf(token, 500)) })
		var gone, from int
		if kind[1] != notEventSource {
			lost, after, _ := strings.Cut(got, "\n\n")
			if _, err := fmt.Sscanf(strings.ReplaceAll(lost, "\n", " "), `event: lost data: {"reason":"history","events":%d} id: `+token+".%d", &gone, &from); err != nil {
				t.Fatalf("%.100q: %v", got, err)
			}
			got = after
		} else {
			fmt.Sscanf(got, "data: %d", &from)
			from--
			gone = from - 1
		}
		if from != gone+1 || !strings.HasPrefix(got, eventOf(token, from+1)) {
			t.Errorf("%d are gone, the first is after %d: %.100q", gone, from, got)
		}
	}
	call.end()
	if entry := c.waitForLog("stream closed", 1); entry["resumed"] == true && entry["missed"] == 0.0 {
		t.Errorf("%v", entry)
	}
}

func TestAnEventLargerThanAJournalMayHoldEndsTheRun(t *testing.T) {
	if testing.Short() {
		t.Skip("it sends 16 MiB")
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	first, call := open(t, c.client("h1"), up, "/", asEventSource...)
	call.start("text/event-stream")
	one := first.headers(t).follow()
	token := one.expectFirst(t, 0)
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	call.send("data: " + strings.Repeat("x", 17<<20))
	one.expectEnd(t)
	if entry := c.waitForLog("stream closed", 0); entry["reason"] != "upstream_error" {
		t.Errorf("%v", entry)
	}
}

func TestABodyThatIsNoEventStreamEndsTheRunAndIsRemembered(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, call := open(t, cl, up, "/", "Accept: text/event-stream", notEventSource, "X-Client: 1")
	call.start("text/event-stream")
	one := first.headers(t).follow()
	call.send(`{"error": "no"}`)
	call.end()
	one.expectAbort(t)
	second, own := open(t, cl, up, "/", append(asEventSource, "X-Client: 2")...)
	if own.Header.Get("X-Client") != "2" {
		t.Error("it is shared again")
	}
	own.start("text/event-stream")
	own.end()
	second.headers(t).follow().expectEnd(t)
}

// dumpClient is an EventSource on an upstream that begins with a dump.
type dumpClient struct {
	tierClient
	lost int // events that it was told to have lost
}

// An upstream begins with 3 MB and continues with single events. The streams of
// clients that can't keep up are ended; the clients come back, and are told
// exactly how many events are lost. In the end all have the latest event, from
// one stream.
func TestWhoFallsBehindADumpIsToldAndSharesAgain(t *testing.T) {
	checkLeaks(t)
	const clients, dump = 20, 3000
	var calls atomic.Int64
	enough := make(chan struct{})
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		rc := http.NewResponseController(w)
		for n := 1; ; n++ {
			if _, err := fmt.Fprintf(w, "data: %d %s\n\n", n, strings.Repeat("x", 1000)); err != nil {
				return
			}
			if n <= dump {
				continue
			}
			rc.Flush()
			select {
			case <-time.After(10 * time.Millisecond):
			case <-enough:
				return
			case <-r.Context().Done():
				return
			}
		}
	})
	c := startCaddy(t, `
		sse {
			heartbeat off
			retry 100ms
			share {
				history 256KiB
				linger 10s
			}
		}
		reverse_proxy `+up.addr, withAdmin(), withLogLevel("ERROR"))
	results := make(chan error, clients)
	var lost, visits, lastOfAll atomic.Int64
	var there sync.WaitGroup
	there.Add(clients)
	for i := range clients {
		go func() {
			client := new(dumpClient)
			var arrived sync.Once
			err := client.followDump(t, c, i%2 == 0, dump, func() {
				visits.Add(1)
			}, func() { arrived.Do(there.Done) })
			arrived.Do(there.Done)
			lost.Add(int64(client.lost))
			lastOfAll.Store(int64(client.seen))
			results <- err
		}()
	}
	there.Wait()
	close(enough)
	for range clients {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if got := calls.Load(); got != 1 {
		t.Errorf("the upstream has had %d requests, want 1", got)
	}
	t.Logf("%d visits of %d clients, who were told to have lost %d events, up to %d", visits.Load(), clients, lost.Load(), lastOfAll.Load())
	if lost.Load() == 0 {
		t.Error("nobody has fallen behind, so nothing was shown")
	}
}

// followDump connects again and again until the client has events from after
// the dump, and the stream ends. A slow client pauses at first.
func (d *dumpClient) followDump(t *testing.T, c *testCaddy, slow bool, dump int, visits, caughtUp func()) error {
	for visit := 1; visit < 100; visit++ {
		visits()
		req, err := http.NewRequestWithContext(t.Context(), "GET", c.url+"/", nil)
		if err != nil {
			return err
		}
		req.Header = http.Header{"Accept": {"text/event-stream"}, "Cache-Control": {"no-cache"}}
		if d.last != "" {
			req.Header.Set("Last-Event-ID", d.last)
		}
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
		if err != nil {
			return err
		}
		err = eachBlock(res.Body, func(fields map[string]string) error {
			if id := fields["id"]; id != "" {
				d.last = id
			}
			var gone int
			n, _ := strconv.Atoi(fields["data"][:max(strings.IndexByte(fields["data"], ' '), 0)])
			switch {
			case fields["event"] == "lost":
				if _, err := fmt.Sscanf(fields["data"], `{"reason":"history","events":%d}`, &gone); err != nil {
					return fmt.Errorf("after %d: %v", d.seen, fields)
				}
				d.seen += gone
				d.lost += gone
				if _, number, _ := strings.Cut(d.last, "."); number != strconv.Itoa(d.seen) {
					return fmt.Errorf("%d events are gone after %d, and the id is %s", gone, d.seen-gone, d.last)
				}
			case fields["event"] == "sse": // the place where it has joined
				_, number, _ := strings.Cut(d.last, ".")
				d.seen, _ = strconv.Atoi(number)
			case fields["event"] != "":
				return fmt.Errorf("after %d: %v", d.seen, fields)
			case n == 0:
			case n != d.seen+1:
				return fmt.Errorf("%d after %d, and nothing was told", n, d.seen)
			default:
				if d.seen = n; slow && visit == 1 && n < dump/2 {
					time.Sleep(time.Millisecond)
				}
				if n > dump+20 {
					caughtUp()
				}
			}
			return nil
		})
		res.Body.Close()
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		if d.seen > dump+20 {
			return nil
		}
	}
	return fmt.Errorf("it comes back again and again, and has %d events", d.seen)
}

// eachBlock calls on with the fields of each block until it returns an error or
// the body ends.
func eachBlock(body io.Reader, on func(fields map[string]string) error) error {
	lines := bufio.NewScanner(body)
	fields := make(map[string]string)
	for lines.Scan() {
		if lines.Text() != "" {
			field, value, _ := strings.Cut(lines.Text(), ":")
			fields[field] = strings.TrimPrefix(value, " ")
			continue
		}
		if err := on(fields); err != nil {
			return err
		}
		clear(fields)
	}
	return lines.Err()
}

// An upstream with ids ignores Last-Event-ID, and sends only new events. A
// client that comes back with an id that is gone gets its own upstream stream,
// until that stream and the run have sent the same id; then it shares again.
func TestAnUpstreamThatIgnoresLastEventIDIsSharedAgain(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withIDs(50, 60))
	one.expect(t, withIDs(50, 60))
	back, own := open(t, cl, up, "/", append(asEventSource, "Last-Event-ID: u40")...)
	if got := own.Header.Get("Last-Event-ID"); got != "u40" {
		t.Errorf("Last-Event-ID %q", got)
	}
	two := back.headers(t).follow()
	own.start("text/event-stream")
	run.send(withID(61))
	own.send(withID(61))
	one.expect(t, withID(61))
	two.expect(t, withID(61))
	own.expectGone()
	run.send(withID(62))
	one.expect(t, withID(62))
	two.expect(t, withID(62))
	if list := c.runs(""); list.Total != 1 || list.Runs[0].Clients != 2 {
		t.Errorf("%+v", list)
	}
	run.end()
	one.expectEnd(t)
	two.expectEnd(t)
}

func TestAnExitDoesNotWaitForLingeringRuns(t *testing.T) {
	if apart(t) {
		return
	}
	up := newUpstream(t)
	c := startCaddyProcess(t, `
		sse {
			heartbeat off
			share {
				linger 1h
			}
		}
		reverse_proxy `+up.addr, "grace_period 30s")
	cl := c.client("h1")
	first, call := open(t, cl, up, "/lingers", asEventSource...)
	call.start("text/event-stream")
	res := first.headers(t)
	res.follow().expectFirst(t, 0)
	res.leave()
	second, has := open(t, cl, up, "/client", asEventSource...)
	has.start("text/event-stream")
	two := second.headers(t).follow()
	two.expectFirst(t, 0)
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	call.expectGone()
	two.expectEnd(t) // it is drained
	has.expectGone()
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Fatal("the process goes on")
	}
}
