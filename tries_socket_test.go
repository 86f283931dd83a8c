package caddysse_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const noCache = "Cache-Control: no-cache"

func TestAStreamSurvivesItsUpstreamOverEveryProtocol(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		log
		vars backend `+up.addr+`
		sse 1h {
			name survivor
			prelude off
			retry 100ms
			upstream_retry 1m
		}
		handle_path /a/* {
			rewrite * /rewritten{uri}
			request_header X-Path {uri}
			reverse_proxy {vars.backend}
		}
		handle {
			respond 404
		}`, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/a/" + cl.proto
		before := c.scrape(t)
		e := cl.begin(cl.request(t, "GET", path, nil, acceptStream, noCache))
		o := c.opened(t, path, e, up.accept(t)) // the upstream sees another path
		o.body.expect(t, "")
		o.call.send("id: 1\ndata: 1\n\n")
		o.body.expect(t, "retry: 100\n\nid: 1\ndata: 1\n\n")
		first := o.call.Header.Clone()
		o.call.abort()

		failing := up.accept(t)
		if s := c.listed(t, path); s["state"] != "retrying" {
			t.Errorf("it is listed as %v", s["state"])
		}
		failing.startWith(503)
		failing.end()

		again := up.accept(t)
		if got := again.URL.String(); got != o.call.URL.String() || got != "/rewritten/"+cl.proto {
			t.Errorf("it was asked for %s, and at first for %s", got, o.call.URL)
		}
		first.Set("Last-Event-ID", "1")
		for name, want := range first {
			if got := again.Header[name]; !slices.Equal(got, want) {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
		again.start(eventStream, "Set-Cookie: a=b")
		again.send("\ufeffid: 2\ndata: 2\n\n")
		o.body.expect(t, "id: 2\ndata: 2\n\n")
		if s := c.listed(t, path); s["state"] != "open" {
			t.Errorf("it is listed as %v", s["state"])
		}
		again.end()
		o.body.expectEnd(t)

		line := c.closedLine(t, path)
		expectEnd(t, line, "upstream_closed", "info")
		if line["retries"] != 2.0 || line["events"] != 2.0 || line["last_event_id"] != "2" {
			t.Errorf("told: %v", line)
		}
		figures := c.accessLog(t, path)["sse"].(map[string]any)
		if figures["retries"] != 2.0 {
			t.Errorf("the access log has %v", figures)
		}
		after := c.scrape(t)
		for result, want := range map[string]float64{"resumed": 1, "failed": 1, "refused": 0} {
			label := fmt.Sprintf("result=%q", result)
			if got := after.sum("upstream_retries_total", "survivor", label) - before.sum("upstream_retries_total", "survivor", label); got != want {
				t.Errorf("%s: %v, want %v", result, got, want)
			}
		}
	})
}

// Clients that reconnect by themselves do so after an abort.
func TestAStreamThatGivesUpEndsCleanlyForAnEventSourceOnly(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			prelude off
			retry 100ms
			upstream_retry 1m
		}
		reverse_proxy `+up.addr, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, cacheControl := range []string{noCache, notEventSource} {
			path := fmt.Sprintf("/%s/%d", cl.proto, len(cacheControl))
			o := c.open(t, cl, up, path, acceptStream, cacheControl)
			o.call.send("id: 1\n\n")
			o.body.expect(t, "retry: 100\n\nid: 1\n\n")
			o.call.abort()
			again := up.accept(t)
			again.startWith(401)
			again.end()
			if cacheControl == noCache {
				o.body.expectEnd(t)
			} else {
				o.body.expectAbort(t)
			}
			line := c.closedLine(t, path)
			expectEnd(t, line, "upstream_error", "warn")
			if line["error"] != "upstream_retry: the upstream answered 401 Unauthorized, no type" {
				t.Errorf("told: %v", line)
			}
		}
	})
}

func TestAReloadDuringAWaitEndsTheStreamWhenItsTryIsDue(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	site := `
		sse 1h {
			prelude off
			drain off
			upstream_retry 1m
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, site, withAdmin())
	o := c.open(t, c.client("h1"), up, "/", acceptStream, noCache)
	o.call.send("id: 1\nretry: 2000\n\n")
	o.body.expect(t, "id: 1\nretry: 2000\n\n")
	o.call.abort()
	c.waitForStream(t, "/", func(s map[string]any) bool { return s["state"] == "retrying" })
	c.reload(site + "\nheader X-New yes")
	o.body.expectEnd(t)
	line := c.closedLine(t, "/")
	expectEnd(t, line, "upstream_error", "warn")
	if line["retries"] != 0.0 || line["error"] != "upstream_retry: the configuration has been replaced" {
		t.Errorf("told: %v", line)
	}
}

func TestAClientThatLeavesDuringAWaitIsGoneAtOnce(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			prelude off
			upstream_retry 10m
		}
		reverse_proxy `+up.addr, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		o := c.open(t, cl, up, path, acceptStream, noCache)
		o.call.send("id: 1\nretry: 600000\n\n")
		o.body.expect(t, "id: 1\nretry: 600000\n\n")
		o.call.abort()
		c.waitForStream(t, path, func(s map[string]any) bool { return s["state"] == "retrying" })
		o.leave()
		expectEnd(t, c.closedLine(t, path), "client_closed", "info")
		c.waitForStreams(t, 0)
	})
}

// replayUpstream sends numbered events to each client, starting after its
// Last-Event-ID. It can be killed and started again at its address.
type replayUpstream struct {
	t    *testing.T
	addr string

	mu      sync.Mutex
	changed sync.Cond
	last    int // the newest event
	final   bool
	server  *http.Server
	again   int // how many clients have come back
}

func newReplayUpstream(t *testing.T) *replayUpstream {
	up := &replayUpstream{t: t, addr: "127.0.0.1:0"}
	up.changed.L = &up.mu
	up.start()
	t.Cleanup(up.kill)
	return up
}

func (up *replayUpstream) start() {
	up.t.Helper()
	var ln net.Listener
	eventually(up.t, "no process that is being started shares the closed listener", func() (ok bool) {
		var err error
		ln, err = net.Listen("tcp", up.addr)
		return err == nil
	})
	server := &http.Server{Handler: up, ErrorLog: discardLog}
	up.mu.Lock()
	defer up.mu.Unlock()
	up.addr, up.server = ln.Addr().String(), server
	go func() { _ = server.Serve(ln) }()
}

// kill breaks off every stream.
func (up *replayUpstream) kill() {
	up.mu.Lock()
	defer up.mu.Unlock()
	_ = up.server.Close()
	up.server = nil
	up.changed.Broadcast()
}

func (up *replayUpstream) publish(final bool) {
	up.mu.Lock()
	defer up.mu.Unlock()
	up.last++
	up.final = final
	up.changed.Broadcast()
}

// cameBack reports whether n clients have come back since it last returned
// true.
func (up *replayUpstream) cameBack(n int) bool {
	up.mu.Lock()
	defer up.mu.Unlock()
	if up.again < n {
		return false
	}
	up.again = 0
	return true
}

func (up *replayUpstream) lastEvent() int {
	up.mu.Lock()
	defer up.mu.Unlock()
	return up.last
}

func (up *replayUpstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sent, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
	w.Header().Set("Content-Type", eventStream)
	_ = http.NewResponseController(w).Flush()
	up.mu.Lock()
	defer up.mu.Unlock()
	mine := up.server
	if sent > 0 {
		up.again++
	}
	for {
		for sent == up.last && up.server == mine && !up.final {
			up.changed.Wait()
		}
		switch {
		case up.server != mine:
			panic(http.ErrAbortHandler)
		case sent == up.last:
			return
		}
		sent++
		event := fmt.Sprintf("id: %d\ndata: %d\n\n", sent, sent)
		up.mu.Unlock()
		_, err := io.WriteString(w, event)
		_ = http.NewResponseController(w).Flush()
		up.mu.Lock()
		if err != nil {
			return
		}
	}
}

func TestNobodysConnectionEndsWhenAnUpstreamIsRestarted(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	clients, kills := 80, 2 // more clients than may come back in one second
	if testing.Short() {
		kills = 1
	}
	up := newReplayUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
			name restarts
			retry 100ms 500ms
			upstream_retry 1m
		}
		reverse_proxy `+up.addr, withAdmin())
	up.publish(false)
	var all, ready sync.WaitGroup
	ready.Add(clients)
	failures := make(chan error, clients)
	protocols := []*testClient{c.client("h1"), c.client("h2"), c.client("h3")}
	for i := range clients {
		cl := protocols[i%len(protocols)]
		all.Go(func() {
			body := cl.get(t, "/", acceptStream, noCache).Body
			defer body.Close()
			var begun sync.Once
			defer begun.Do(ready.Done)
			want := 1
			lines := bufio.NewScanner(body)
			for lines.Scan() {
				data, isEvent := strings.CutPrefix(lines.Text(), "data: ")
				if !isEvent {
					continue
				}
				if data != strconv.Itoa(want) {
					failures <- fmt.Errorf("%s: event %s instead of %d", cl.proto, data, want)
					return
				}
				want++
				begun.Do(ready.Done)
			}
			if up.lastEvent() != want-1 || lines.Err() != nil {
				failures <- fmt.Errorf("%s: ended after event %d: %v", cl.proto, want-1, lines.Err())
			}
		})
	}
	ready.Wait()
	for range kills {
		up.kill()
		up.publish(false)
		time.Sleep(300 * time.Millisecond) // some tries find no upstream
		up.start()
		eventually(t, "all clients are back", func() bool { return up.cameBack(clients) })
		up.publish(false)
	}
	up.publish(true)
	all.Wait()
	close(failures)
	for err := range failures {
		t.Error(err)
	}
	s := c.scrape(t)
	if ended := s.sum("streams_closed_total", "restarts"); ended != s.sum("streams_closed_total", "restarts", `reason="upstream_closed"`) {
		t.Errorf("%v streams ended, some otherwise than with their upstream", ended)
	}
	if resumed := s.sum("upstream_retries_total", "restarts", `result="resumed"`); resumed < float64(clients*kills) {
		t.Errorf("%v tries resumed, want %d", resumed, clients*kills)
	}
}
