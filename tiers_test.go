package caddysse_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// middle is a hop in front of an address that can break off its connections.
type middle struct {
	net.Listener
	mu   sync.Mutex
	to   string
	open []net.Conn
	cuts int
}

// newMiddle starts a hop, which passes connections on to its target.
func newMiddle(t testing.TB) *middle {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &middle{Listener: ln}
	var all sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		m.cut()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			m.mu.Lock()
			to := m.to
			m.mu.Unlock()
			next, err := net.Dial("tcp", to)
			if err != nil {
				conn.Close()
				continue
			}
			m.mu.Lock()
			m.open = append(m.open, conn, next)
			m.mu.Unlock()
			for _, pair := range [2][2]net.Conn{{conn, next}, {next, conn}} {
				all.Go(func() {
					io.Copy(pair[1], pair[0])
					pair[0].Close()
					pair[1].Close()
				})
			}
		}
	})
	return m
}

func (m *middle) leadTo(addr string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.to = addr
}

// cut breaks off the open connections.
func (m *middle) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, conn := range m.open {
		conn.Close()
	}
	m.open = nil
	m.cuts++
}

// tierClient is an EventSource with connections that break.
type tierClient struct {
	last string // id
	seen int    // the last number; 0: none yet
}

// visit reads one connection until the client has the last number, or until the
// context is done. It calls joined when there is an id.
func (tc *tierClient) visit(ctx context.Context, addr, path string, last int, joined func()) error {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+addr+path, nil)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Accept": {"text/event-stream"}, "Cache-Control": {"no-cache"}}
	if tc.last != "" {
		req.Header.Set("Last-Event-ID", tc.last)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", res.Status)
	}
	lines := bufio.NewScanner(res.Body)
	var name, data, id string
	for lines.Scan() {
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			name = value
		case "data":
			data = value
		case "id":
			id = value
		case "":
			if id != "" {
				tc.last = id
			}
			switch n, err := strconv.Atoi(data); {
			case name != "" && name != "sse":
				return fmt.Errorf("event %s: %s after %d", name, data, tc.seen)
			case err == nil && tc.seen > 0 && n != tc.seen+1:
				return fmt.Errorf("%d after %d (id %s)", n, tc.seen, id)
			case err == nil:
				tc.seen = n
			}
			if id != "" {
				joined()
			}
			if tc.seen == last {
				return nil
			}
			name, data = "", ""
		}
	}
	return nil
}

// Two tiers of this module follow each other. The connections between them
// break, and so do those of the clients.
func TestThroughTwoTiersEveryEventComesOnce(t *testing.T) {
	if apart(t) {
		return
	}
	for _, test := range []struct {
		name, outer, inner string
		shared             bool
	}{
		{"share before share", "upstream_retry 20s\nshare", "share", true},
		{"share before resume", "upstream_retry 20s\nshare", "resume 20s", true},
		{"upstream_retry before resume", "upstream_retry 20s", "resume 20s", false},
		{"resume before resume", "resume 20s", "resume 20s", false},
		{"nothing before resume", "", "resume 20s", false},
	} {
		t.Run(test.name, func(t *testing.T) { throughTwoTiers(t, test.outer, test.inner, test.shared) })
	}
}

func throughTwoTiers(t *testing.T, outer, inner string, shared bool) {
	checkLeaks(t)
	const clients, last = 8, 80
	var asked atomic.Int64
	// Wait until all clients have joined the shared stream, or have an event of
	// their own: a client without an id of the inner tier could not come back
	// to its place.
	ready := make(chan struct{})
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Content-Type", "text/event-stream")
		rc := http.NewResponseController(w)
		rc.Flush()
		for n := 1; n <= last; n++ {
			if n == 1 && shared || n == 2 && !shared {
				select {
				case <-ready:
				case <-r.Context().Done():
					return
				}
			}
			fmt.Fprintf(w, "data: %d\n\n", n)
			if rc.Flush() != nil {
				return
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
		<-r.Context().Done()
	})
	way := newMiddle(t)
	c := startCaddy(t, `
		@inner header X-Tier inner
		handle @inner {
			sse {
				name inner
				retry 100ms
				`+inner+`
			}
			reverse_proxy `+up.addr+`
		}
		handle {
			sse {
				name outer
				retry 100ms
				reconnect_on 502 # a request that is cut, too
				`+outer+`
			}
			reverse_proxy `+way.Addr().String()+` {
				header_up X-Tier inner
			}
		}`, withAdmin(), withLogLevel("ERROR"))
	way.leadTo(c.addr)
	ctx, stop := context.WithTimeout(t.Context(), 2*patience)
	defer stop()

	var there, all sync.WaitGroup
	there.Add(clients)
	// Before its first event, the outer tier has no place in the inner one's stream
	// to come back to, so nothing is cut.
	var placed sync.WaitGroup
	placed.Add(clients)
	failed := make(chan error, clients)
	for i := range clients {
		path := "/"
		if !shared {
			path = fmt.Sprint("/", i)
		}
		all.Go(func() {
			tc := new(tierClient)
			var once sync.Once
			place := sync.OnceFunc(placed.Done)
			defer place()
			for ctx.Err() == nil && tc.seen < last {
				on, cut := context.WithCancel(ctx)
				if tc.seen > 0 {
					time.AfterFunc(time.Duration(50+10*i)*time.Millisecond, cut)
				}
				err := tc.visit(on, c.addr, path, last, func() {
					if shared || tc.seen > 0 {
						once.Do(there.Done)
					}
					if tc.seen > 0 {
						place()
					}
				})
				cut()
				if err != nil {
					failed <- fmt.Errorf("client %d: %w", i, err)
					once.Do(there.Done)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			if tc.seen < last {
				failed <- fmt.Errorf("client %d has %d of %d events", i, tc.seen, last)
			}
			once.Do(there.Done)
		})
	}
	there.Wait()
	close(ready)
	placed.Wait()
	finished := make(chan struct{})
	go func() {
		all.Wait()
		close(finished)
	}()
	cuts := time.NewTicker(150 * time.Millisecond)
	defer cuts.Stop()
	for over := false; !over; {
		select {
		case <-cuts.C:
			way.cut()
		case <-finished:
			over = true
		}
	}
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	want := int64(clients)
	if shared {
		want = 1
	}
	if got := asked.Load(); got != want {
		t.Errorf("the upstream has had %d requests, want %d", got, want)
	}
	t.Logf("the way between the tiers was cut %d times", way.cuts)
	c.stopRuns()
}

// A load balancer ends TLS, and says so in its headers. Clients share one
// stream, come back to their place, and the upstream gets the scheme and the
// host that they asked for.
func TestBehindALoadBalancerThatEndsTLS(t *testing.T) {
	for _, setting := range []string{"share", "resume 20s"} {
		t.Run(setting, func(t *testing.T) {
			checkLeaks(t)
			up := newUpstream(t)
			c := startCaddy(t, "sse {\n heartbeat off\n "+setting+"\n}\nreverse_proxy "+up.addr,
				withGlobal("servers {\n trusted_proxies static private_ranges \n}"), withAdmin())
			target, err := url.Parse(c.url)
			if err != nil {
				t.Fatal(err)
			}
			transport := &http.Transport{DisableKeepAlives: true}
			balancer := httptest.NewUnstartedServer(&httputil.ReverseProxy{
				Transport: transport, FlushInterval: -1, ErrorLog: discardLog,
				Rewrite: func(r *httputil.ProxyRequest) {
					r.SetURL(target)
					r.SetXForwarded()
				},
			})
			balancer.Config.ErrorLog = discardLog
			balancer.StartTLS()
			t.Cleanup(balancer.Close)
			browser := &testClient{proto: "h1", url: balancer.URL, Client: balancer.Client()}
			t.Cleanup(browser.CloseIdleConnections)

			first, call := open(t, browser, up, "/", asEventSource...)
			if got := call.Header.Get("X-Forwarded-Proto") + " " + call.Header.Get("X-Forwarded-Host"); got != "https "+balancer.Listener.Addr().String() {
				t.Errorf("the upstream is told %q", got)
			}
			call.start("text/event-stream")
			res := first.headers(t)
			one := res.follow()
			token := one.expectFirst(t, 0)
			call.send(plainEvent(1))
			one.expect(t, eventOf(token, 1))
			if setting == "share" {
				two := browser.get(t, "/", asEventSource...).follow()
				if other := two.expectFirst(t, 1); other != token {
					t.Errorf("two clients are in the runs %s and %s", token, other)
				}
			}
			res.leave()
			c.waitForLog("stream closed", 0)
			call.send(plainEvent(2))
			back := browser.get(t, "/", comingBack(asEventSource, token+".1")...).follow()
			back.expect(t, eventOf(token, 2))
			call.send(plainEvent(3))
			back.expect(t, eventOf(token, 3))
			up.expectNoCall(t)
			call.end()
			back.expectEnd(t)
		})
	}
}

// During a deployment, an upstream answers 503 for a while. 50 clients of a run
// stay, and 50 new ones come again and again until it is back. Then all share
// one stream.
func TestAnUpstreamThatIsAwayForAWhileIsSharedAgain(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	const clients = 50
	var away atomic.Bool
	var refused, streams atomic.Int64
	kill, events := make(chan struct{}), make(chan struct{})
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		if away.Load() {
			refused.Add(1)
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		isKilled := kill
		if streams.Add(1) > 1 {
			isKilled = nil
		}
		w.Header().Set("Content-Type", "text/event-stream")
		if r.Header.Get("Last-Event-ID") == "" {
			io.WriteString(w, "id: 1\ndata: 1\n\n")
		}
		http.NewResponseController(w).Flush()
		select {
		case <-isKilled:
			panic(http.ErrAbortHandler)
		case <-events:
			io.WriteString(w, "id: 2\ndata: 2\n\n")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		case <-r.Context().Done():
		}
	})
	c := startCaddy(t, `
		sse {
			heartbeat off
			retry 100ms
			reconnect_on 503
			upstream_retry 20s
			share {
				join last 10
			}
		}
		reverse_proxy `+up.addr, withAdmin(), withLogLevel("ERROR"))
	var all sync.WaitGroup
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	failed := make(chan error, 4*clients)
	var there sync.WaitGroup // clients that have their first event
	follow := func() {
		tc := new(tierClient)
		var once sync.Once
		for ctx.Err() == nil && tc.seen < 2 {
			if err := tc.visit(ctx, c.addr, "/", 2, func() { once.Do(there.Done) }); err != nil {
				failed <- err
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		once.Do(there.Done)
		if tc.seen < 2 {
			failed <- fmt.Errorf("a client has seen %d", tc.seen)
		}
	}
	there.Add(clients)
	for range clients {
		all.Go(follow)
	}
	there.Wait()
	away.Store(true)
	close(kill)
	for refused.Load() == 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	there.Add(clients)
	for range clients {
		all.Go(follow)
	}
	before := refused.Load()
	for refused.Load() < before+2 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	away.Store(false)
	there.Wait()
	if list := c.runs(""); list.Total != 1 || list.Runs[0].Clients != 2*clients {
		t.Errorf("%+v", list)
	}
	close(events)
	all.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if got := streams.Load(); got != 2 {
		t.Errorf("the upstream has had %d streams, want 2", got)
	}
	if i := slices.IndexFunc(c.logs(), func(e logEntry) bool {
		return e.message() == "stream closed" && e["reason"] != "client_closed"
	}); i >= 0 {
		t.Errorf("%v", c.logs()[i])
	}
}
