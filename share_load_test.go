package caddysse_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func TestAnUpstreamMayBeginWithMoreThanAJournalHolds(t *testing.T) {
	checkLeaks(t)
	const events = 3000
	dump := func(w http.ResponseWriter, r *http.Request) {
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
	c := startCaddy(t, sharedSite(up, ""))
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

// eachEvent calls on the data of each event until it returns false or the body
// ends.
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
