package caddysse_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
)

func TestAtMostSoManyRunsAreWithoutAClient(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "detached 2"), withAdmin())
	cl := c.client("h1")
	var calls []*upstreamCall
	for i := range 3 {
		res, _, call, _ := beginKept(t, cl, up, fmt.Sprintf("/%d", i))
		calls = append(calls, call)
		res.leave()
		c.waitForLog("stream closed", i)
		eventually(t, "its run is one without a client", func() bool {
			alone := 0
			for _, run := range c.runs("").Runs {
				if run.Clients == 0 {
					alone++
				}
			}
			return alone == min(i+1, 2)
		})
	}
	calls[0].expectGone() // it has been without a client for longest
	for i := 1; i < 3; i++ {
		select {
		case <-calls[i].left:
			t.Errorf("run %d has gone, too", i)
		default:
		}
	}
}

func TestRunsWithoutAClientGiveTheirPlacesToNewStreams(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	for _, limit := range []string{"max_streams 2", "max_streams_per_client 2"} {
		t.Run(limit, func(t *testing.T) {
			c := startCaddy(t, `
				sse {
					heartbeat off
					`+limit+`
					resume 1m
				}
				reverse_proxy `+up.addr, withAdmin())
			cl := c.client("h1")
			first, _, call, token := beginKept(t, cl, up, "/1")
			first.leave()
			c.waitForLog("stream closed", 0)
			_, two, second, other := beginKept(t, cl, up, "/2")
			// A client that comes back is never refused.
			back := cl.get(t, "/1", comingBack(asEventSource, token+".0")...)
			one := back.follow()
			call.send(plainEvent(1))
			one.expect(t, eventOf(token, 1))
			res := cl.get(t, "/3", asEventSource...)
			res.text()
			if res.StatusCode < 400 {
				t.Errorf("a third stream: %s", res.Status)
			}
			back.leave()
			c.waitForLog("stream closed", 1)
			third, _, next, _ := beginKept(t, cl, up, "/3")
			call.expectGone()
			second.send(plainEvent(1))
			two.expect(t, eventOf(other, 1))
			second.end()
			two.expectEnd(t)
			next.end()
			third.leave()
		})
	}
}

func TestWhatNobodyHasBeenSentHoldsTheUpstreamUp(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			heartbeat off
			upstream_timeout 300ms
			resume 1m {
				history 64KiB
			}
		}
		reverse_proxy `+up.addr, withAdmin())
	cl := c.client("h1")
	res, _, call, token := beginKept(t, cl, up, "/")
	res.leave()
	c.waitForRun("open", 0)
	const events = 500
	data := strings.Repeat("x", 100<<10/10)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range events {
			call.send("data: " + data + "\n\n")
		}
	}()
	// While nothing is read, the upstream is not silent. The test can only wait
	// and see that nothing happens.
	time.Sleep(600 * time.Millisecond)
	select {
	case <-sent:
		t.Fatal("the upstream was read on")
	default:
	}
	list := c.runs("")
	if list.Total != 1 || list.Runs[0].State != "open" {
		t.Fatalf("%+v", list)
	}
	back := cl.get(t, "/", comingBack(asEventSource, token+".0")...).follow()
	want := 0
	for n := 1; n <= events; n++ {
		want += len(fmt.Sprintf("data: %s\nid: %s.%d\n\n", data, token, n))
	}
	text, err := back.wait(func(unread string) bool { return len(unread) >= want })
	if len(text) != want || err != nil || !strings.HasSuffix(text, fmt.Sprintf("\nid: %s.%d\n\n", token, events)) {
		t.Errorf("%d bytes of %d, %v", len(text), want, err)
	}
	<-sent
	call.end()
	back.expectEndAfter(t)
}

// expectEndAfter waits for a clean end, whatever comes before it.
func (f *follower) expectEndAfter(t testing.TB) {
	t.Helper()
	if _, err := f.rest(); err != io.EOF {
		t.Fatalf("got %v, want the end", err)
	}
}

func TestAGapIsTold(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "history 16KiB"), withAdmin())
	cl := c.client("h1")
	res, one, call, token := beginKept(t, cl, up, "/")
	data := strings.Repeat("x", 1000)
	for n := 1; n <= 100; n++ {
		call.send("data: " + data + "\n\n")
		one.expect(t, fmt.Sprintf("data: %s\nid: %s.%d\n\n", data, token, n))
	}
	res.leave()
	c.waitForRun("open", 0)
	back := cl.get(t, "/", comingBack(asEventSource, token+".1")...)
	two := back.follow()
	got, _ := two.wait(func(unread string) bool { return strings.HasSuffix(unread, token+".100\n\n") })
	var missed int
	if _, err := fmt.Sscanf(got, "event: lost\ndata: {\"reason\":\"history\",\"events\":%d}\n", &missed); err != nil || missed < 70 || missed > 98 {
		t.Fatalf("%v: %.200q", err, got)
	}
	if want := fmt.Sprintf("id: %s.%d\n\ndata: %s\nid: %s.%d\n\n", token, missed+1, data, token, missed+2); !strings.Contains(got, want) {
		t.Errorf("%.300q", got)
	}
	back.leave()
	if entry := c.waitForLog("stream closed", 1); entry["missed"] != float64(missed) || entry["resumed"] != true {
		t.Errorf("%v", entry)
	}
	res = cl.do(t, cl.request(t, "DELETE", "/", nil, "Last-Event-ID: "+token+".100"))
	res.leave()
}

func TestAnEventAboveTheHistoryEndsTheKeeping(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "history 16KiB"), withAdmin())
	cl := c.client("h1")
	res, one, call, token := beginKept(t, cl, up, "/")
	large := "data: " + strings.Repeat("x", 1<<20) + "\n\n"
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	call.send(large + plainEvent(3))
	one.expect(t, large+plainEvent(3))
	res.leave()
	call.expectGone()
}

func TestAClientThatWasAwayIsToldOfWhatCouldNotBeKept(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "history 16KiB"), withAdmin())
	cl := c.client("h1")
	res, one, call, token := beginKept(t, cl, up, "/")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	res.leave()
	c.waitForRun("open", 0)
	call.send(plainEvent(2) + "data: " + strings.Repeat("x", 1<<20) + "\n\n")
	call.expectGone()
	two := cl.get(t, "/", comingBack(asEventSource, token+".1")...).follow()
	if got, err := two.rest(); err == nil || err == io.EOF || !strings.HasPrefix(got, eventOf(token, 2)) {
		t.Errorf("got %.100q, %v", got, err)
	}
	e, next := open(t, cl, up, "/", comingBack(asEventSource, token+".2")...)
	next.start("text/event-stream")
	f := e.headers(t).follow()
	next.send(plainEvent(1))
	if got, err := f.wait(func(unread string) bool {
		return strings.HasSuffix(unread, plainEvent(1)) || strings.Count(unread, "\n\n") > 1
	}); err != nil || !strings.HasPrefix(got, "event: lost\ndata: {\"reason\":\"unknown\"}\n") {
		t.Errorf("got %q, %v", got, err)
	}
	next.end()
	if _, err := f.rest(); err != io.EOF {
		t.Error(err)
	}
}

func TestWhereAllJournalsAreFullAStreamIsAsWithoutResume(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "history 8KiB 8KiB"), withAdmin())
	cl := c.client("h1")
	e, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	res := e.headers(t)
	f := res.follow()
	call.send(plainEvent(1))
	f.expect(t, plainEvent(1))
	res.leave()
	call.expectGone()
	if _, text := c.admin("GET", "/metrics"); !strings.Contains(text, `caddy_sse_streams_unprotected_total{cause="journal_full",name="sse"}`) {
		t.Error("it is not counted")
	}
}

func TestAStreamThatItsClientHasCancelledIsKeptForLess(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "cancel 50ms"), withAdmin())
	for _, proto := range []string{"h2", "h3"} {
		t.Run(proto, func(t *testing.T) {
			cl := c.client(proto)
			res, _, call, _ := beginKept(t, cl, up, "/"+proto)
			res.leave()
			call.expectGone()

			// A connection that breaks is not a cancellation.
			broken := c.client(proto)
			breakAll := broken.connections()
			_, one, call, token := beginKept(t, broken, up, "/"+proto)
			call.send(plainEvent(1))
			one.expect(t, eventOf(token, 1))
			breakAll()
			c.waitForRun("open", 0)
			// The test can only wait and see that nothing happens.
			time.Sleep(200 * time.Millisecond)
			c.waitForRun("open", 0)
			back := c.client("h1").do(t, hostOf(c.client("h1").request(t, "DELETE", "/"+proto, nil, "Last-Event-ID: "+token+".1"), broken))
			back.leave()
			if back.StatusCode != http.StatusNoContent {
				t.Error(back.Status)
			}
		})
	}
}

// hostOf gives a request the Host of another client's requests.
func hostOf(req *http.Request, cl *testClient) *http.Request {
	req.Host = strings.TrimPrefix(cl.url, "https://")
	return req
}

// connections makes breakAll close the client's connections without ending its
// streams first.
func (cl *testClient) connections() (breakAll func()) {
	switch tr := cl.Transport.(type) {
	case *http.Transport:
		var mu sync.Mutex
		var conns []net.Conn
		tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			mu.Lock()
			defer mu.Unlock()
			conns = append(conns, conn)
			return conn, err
		}
		return func() {
			mu.Lock()
			defer mu.Unlock()
			for _, conn := range conns {
				conn.Close()
			}
		}
	case io.Closer: // of HTTP/3
		return func() { tr.Close() }
	}
	panic("no such transport")
}

func TestBindTellsClientsApart(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "bind {http.request.cookie.session} {http.request.header.X-User}"), withAdmin())
	cl := c.client("h1")
	e, call := open(t, cl, up, "/", append(asEventSource, "Cookie: session=1", "X-User: me")...)
	call.start("text/event-stream")
	one := e.headers(t).follow()
	token := one.expectFirst(t, 0)
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	for _, other := range [][]string{
		nil,
		{"Cookie: session=1"},
		{"X-User: me"},
		{"Cookie: session=2", "X-User: me"},
		{"Cookie: session=", "X-User: 1me"},
	} {
		res := cl.do(t, cl.request(t, "POST", "/", nil, comingBack(other, token+".0")...))
		res.text()
		if res.StatusCode != http.StatusGone {
			t.Errorf("%q: %s", other, res.Status)
		}
	}
	host := cl.request(t, "POST", "/", nil, comingBack([]string{"Cookie: session=1", "X-User: me"}, token+".0")...)
	host.Host = "other.example"
	res := cl.do(t, host)
	res.text()
	if res.StatusCode != http.StatusGone {
		t.Errorf("another host: %s", res.Status)
	}
	two := cl.get(t, "/", comingBack(append(asEventSource, "Cookie: session=1; x=y", "X-User: me"), token+".0")...).follow()
	two.expect(t, eventOf(token, 1))
	one.expectEnd(t)
	call.end()
	two.expectEnd(t)
}

func TestRunForEndsAStreamForGood(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", "run_for 200ms"), withAdmin())
	cl := c.client("h1")
	_, one, call, _ := beginKept(t, cl, up, "/")
	one.expectEnd(t)
	call.expectGone()
	if entry := c.waitForLog("run ended", 0); entry["reason"] != "max_duration" {
		t.Errorf("%v", entry)
	}
	if entry := c.waitForLog("stream closed", 0); entry["reason"] != "max_duration" {
		t.Errorf("%v", entry)
	}
}

func TestTheAdminAPIEndsARunWithItsStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	cl := c.client("h1")
	_, one, call, _ := beginKept(t, cl, up, "/")
	c.listed(t, "/") // the stream must have started
	c.admin("DELETE", "/sse/streams?all=true")
	one.expectEnd(t)
	call.expectGone()
	if entry := c.waitForLog("run ended", 0); entry["reason"] != "admin" {
		t.Errorf("%v", entry)
	}

	_, one, call, _ = beginKept(t, cl, up, "/")
	c.admin("DELETE", "/sse/runs/"+c.runs("").Runs[0].ID)
	one.expectEnd(t)
	call.expectGone()
	if entry := c.waitForLog("stream closed", 1); entry["reason"] != "admin" {
		t.Errorf("%v", entry)
	}
}

func TestAClientComesBackThroughANewConfiguration(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := resumeSite(up, "1m", "")
	drained := strings.Replace(site, "heartbeat off", "heartbeat off\ndrain 1ms", 1)
	c := startCaddy(t, drained, withAdmin())
	cl := c.client("h1")
	_, one, call, token := beginKept(t, cl, up, "/")
	for n := 1; n <= 3; n++ {
		call.send(plainEvent(n))
		one.expect(t, eventOf(token, n))
		c.reload(drained)
		one.expectEnd(t) // it has been drained
		one = cl.get(t, "/", comingBack(asEventSource, fmt.Sprintf("%s.%d", token, n))...).follow()
	}
	call.send(plainEvent(4))
	one.expect(t, eventOf(token, 4))
	up.expectNoCall(t)

	// No client can come back through a configuration without resume.
	c.reload("respond 204")
	one.expectEnd(t)
	call.expectGone()
}

func TestRunsWithoutAClientEndWhereNobodyCanComeBack(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, resumeSite(up, "1m", ""), withAdmin())
	res, _, call, _ := beginKept(t, c.client("h1"), up, "/")
	res.leave()
	c.waitForRun("open", 0)
	c.reload(resumeSite(up, "1m", "")) // clients can still come back
	select {
	case <-call.left:
		t.Fatal("the run has gone with its configuration")
	default:
	}
	c.reload("sse {\nname other\nresume 1m\n}\nreverse_proxy " + up.addr)
	call.expectGone()
}

func TestAWaitingRunIsKept(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := strings.Replace(resumeSite(up, "1m any", ""), "heartbeat off", "heartbeat off\nearly_start 1ms any", 1)
	c := startCaddy(t, site, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		for _, answers := range []bool{true, false} {
			e, call := open(t, cl, up, path, asEventSource...)
			res := e.headers(t)
			token := res.follow().expectFirst(t, 0)
			res.leave()
			c.waitForRun("open", 0)
			if answers {
				call.start("text/event-stream", "X-Late: 1")
				call.send(plainEvent(1))
			} else {
				call.startWith(http.StatusServiceUnavailable)
				call.end()
				c.waitForRun("ended", 0)
			}
			back := cl.get(t, path, comingBack(asEventSource, token+".0")...)
			two := back.follow()
			if answers {
				two.expect(t, eventOf(token, 1))
				call.end()
			} else if got, _ := two.wait(func(unread string) bool { return strings.HasSuffix(unread, "\n\n") }); !strings.HasPrefix(got, "event: error\ndata: {\"status\":502,") {
				t.Errorf("%q", got)
			}
			two.expectEndAfter(t)
			res = cl.do(t, cl.request(t, "DELETE", path, nil, "Last-Event-ID: "+token+".1"))
			res.leave()
			if res.StatusCode != http.StatusNoContent {
				t.Error(res.Status)
			}
		}
	})
}

func TestAWaitingClientGetsTheLateAnswer(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := strings.Replace(resumeSite(up, "1m any", ""), "heartbeat off", "heartbeat off\nearly_start 1ms any", 1)
	c := startCaddy(t, site, withAdmin())
	e, call := post(t, c.client("h1"), up, "/", "body", "Accept: text/event-stream")
	f := e.headers(t).follow()
	call.startWith(http.StatusUnauthorized)
	call.end()
	f.expectEndAfter(t)
	entry := c.waitForLog("stream closed", 0)
	if entry["reason"] != "upstream_error" || entry["upstream_status"] != 401.0 {
		t.Errorf("%v", entry)
	}
	// The event that reports the error is not the upstream's.
	if entry["events"] != 0.0 || entry["bytes"] != 0.0 || entry["time_to_first_event"] != nil {
		t.Errorf("%v", entry)
	}
	c.waitForRun("ended", 0)
	if run := c.runs("").Runs[0]; run.Events != 0 || run.Bytes != 0 {
		t.Errorf("%+v", run)
	}
}

func TestRunsWithoutAClientEndWithTheProcess(t *testing.T) {
	t.Parallel()
	up := newUpstream(t)
	c := startCaddyProcess(t, resumeSite(up, "10m", ""), "grace_period 5s")
	cl := c.client("h1")
	res, _, call, _ := beginKept(t, cl, up, "/1")
	res.leave()
	_, two, second, _ := beginKept(t, cl, up, "/2")
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	call.expectGone()
	two.expectEnd(t) // it is drained
	second.expectGone()
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Fatal("the process goes on")
	}
}

func TestResumeAsksTheUpstreamAgain(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := strings.Replace(resumeSite(up, "1m", ""), "heartbeat off", "heartbeat off\nretry 100ms\nupstream_retry 1m live", 1)
	c := startCaddy(t, site, withAdmin())
	cl := c.client("h1")
	e, call := open(t, cl, up, "/", asEventSource...)
	call.start("text/event-stream")
	res := e.headers(t)
	one := res.follow()
	got, _ := one.wait(func(unread string) bool { return strings.HasSuffix(unread, ".0\n\n") })
	token, _, _ := strings.Cut(runIDPattern.FindString(got), ".")
	one.expect(t, "retry: 100\n\nevent: sse\ndata:\nid: "+token+".0\n\n")
	call.send(plainEvent(1))
	one.expect(t, eventOf(token, 1))
	call.abort()
	call = up.accept(t)
	call.start("text/event-stream")
	// In the middle of a stream, it is not a byte order mark.
	call.send("\xEF\xBB")
	call.send("\xBF" + plainEvent(2))
	one.expect(t, eventOf(token, 2))
	res.leave()
	c.waitForRun("open", 0)
	call.abort() // with or without a client
	call = up.accept(t)
	call.start("text/event-stream")
	call.send("\xEF")
	call.send(": no mark\n" + plainEvent(3))
	back := cl.get(t, "/", comingBack(asEventSource, token+".1")...)
	two := back.follow()
	two.expect(t, "retry: 100\n\n"+eventOf(token, 2)+"\xEF: no mark\n"+eventOf(token, 3))
	call.end()
	two.expectEnd(t)
}

// Events that pass through a run leave nothing in memory, however they are
// read.
func TestEventsThroughARunDoNotMakeTheHeapGrow(t *testing.T) {
	events := uint64(scaled(1_000_000))
	for name, config := range map[string]*caddysse.Handler{
		"resume": {Resume: &caddysse.Resume{Window: caddy.Duration(time.Second)}},
		"share":  {Share: &caddysse.Share{Linger: caddy.Duration(time.Millisecond)}},
	} {
		t.Run(name, func(t *testing.T) {
			config.Name = t.Name()
			h := provision(t, config)
			var before, after uint64
			w := &discard{header: make(http.Header)}
			err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				for n := range events {
					if _, err := w.Write(event); err != nil {
						t.Error(err)
						return
					}
					if n == events/10 {
						before = heapInUse()
					}
				}
				after = heapInUse()
			}))
			if err != nil {
				t.Fatal(err)
			}
			if w.bytes < int64(events)*int64(len(event)) {
				t.Errorf("the client got %d bytes", w.bytes)
			}
			t.Logf("%d KiB of heap after a tenth of %d events, %d KiB after all", before>>10, events, after>>10)
			if after > before+512<<10 {
				t.Errorf("the heap has grown from %d KiB to %d KiB", before>>10, after>>10)
			}
		})
	}
}

func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // this empties pools
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
