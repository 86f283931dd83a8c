//go:build interop

package clients

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// counter is an upstream that counts ten events a second. On each connection it
// continues after Last-Event-ID, so a client that reconnects correctly misses
// no event and gets none twice.
type counter struct {
	addr string

	failing  atomic.Bool  // answer 502
	failures atomic.Int64 // requests answered with 502

	mutex  sync.Mutex
	server *http.Server
}

func serveCounter(t *testing.T) *counter {
	c := &counter{addr: harness.FreeAddr(t)}
	c.up(t)
	t.Cleanup(c.down)
	return c
}

func (c *counter) up(t *testing.T) {
	t.Helper()
	listener := harness.Listen(t, c.addr)
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.server = &http.Server{Handler: c}
	server := c.server
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
}

// down simulates a crash: every stream breaks off, and new connections are
// refused.
func (c *counter) down() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.server.Close()
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.failing.Load() {
		c.failures.Add(1)
		http.Error(w, "starting", http.StatusBadGateway)
		return
	}
	harness.Begin(w)
	n, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
	for {
		n++
		harness.Send(w, fmt.Sprintf("id: %d\ndata: %[1]d\n\n", n))
		select {
		case <-r.Context().Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// TestAPageSurvives has one page go through everything that ends a stream.
func TestAPageSurvives(t *testing.T) {
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			upstream := serveCounter(t)
			site := page + `
	handle /unprotected {
		sse {
			name unprotected
			retry 100ms 300ms
			drain 500ms
		}
		reverse_proxy ` + upstream.addr + `
	}
	handle {
		sse {
			name page
			retry 100ms 300ms
			reconnect_on 502
			drain 500ms
		}
		reverse_proxy ` + upstream.addr + `
	}`
			plain, tls := harness.FreeAddr(t), harness.FreePort(t)
			caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, site))
			base, proto := "http://"+plain, "HTTP/1.1"
			if protocol == "HTTP/2" {
				base, proto = fmt.Sprintf("https://localhost:%d", tls), "HTTP/2.0"
			}
			awaitTLS(t, fmt.Sprintf("https://localhost:%d", tls))
			names := []string{"one", "two", "three"}
			streams := []string{"unprotected=" + base + "/unprotected"}
			for _, name := range names {
				streams = append(streams, name+"="+base+"/"+name)
			}
			browser := startBrowser(t, base+"/page", streams...)
			browser.awaitCount(t, "event", 5, append(names, "unprotected")...)
			t.Logf("Chromium %s", of(browser.reports(), "page", "loaded")[0].Data)

			// opened returns how often each stream has been opened so far.
			opened := func() map[string]int {
				counts := make(map[string]int)
				for _, name := range append(names, "unprotected") {
					counts[name] = len(of(browser.reports(), name, "open"))
				}
				return counts
			}
			awaitBack := func(what string, before map[string]int, names ...string) {
				t.Helper()
				seen := make(map[string]int)
				for _, name := range names {
					seen[name] = len(of(browser.reports(), name, "event"))
				}
				begin := time.Now()
				browser.await(t, "back after "+what, func(all []report) bool {
					for _, name := range names {
						if len(of(all, name, "open")) <= before[name] || len(of(all, name, "event")) < seen[name]+5 {
							return false
						}
					}
					return true
				})
				t.Logf("%s: all are back and have five more events after %v", what, time.Since(begin).Round(time.Millisecond))
			}

			before := opened()
			harness.Run(t, harness.Command(harness.CaddyBinary(t), "sse", "close", "--all", "--address", caddy.AdminAddress))
			awaitBack("caddy sse close --all", before, append(names, "unprotected")...)
			awaitReasons(t, caddy, "admin", 4, proto)

			before = opened()
			caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+site))
			awaitBack("a reload", before, append(names, "unprotected")...)
			awaitReasons(t, caddy, "drained", 4, proto)

			// The upstream crashes, and after it is back it answers 502 for a
			// while.
			before = opened()
			upstream.down()
			harness.Eventually(t, harness.Patience, "502 while nobody listens has been answered for the streams", func() bool {
				return reconnectsAnswered(t, caddy) >= 3
			})
			upstream.failing.Store(true)
			upstream.up(t)
			harness.Eventually(t, harness.Patience, "the upstream has answered 502 nine times", func() bool {
				return upstream.failures.Load() >= 9
			})
			upstream.failing.Store(false)
			awaitBack("a crash of the upstream and 502s", before, names...)
			awaitReasons(t, caddy, "upstream_error", 4, proto)

			all := browser.reports()
			for _, name := range names {
				for i, e := range of(all, name, "event") {
					if want := strconv.Itoa(i + 1); e.Data != want || e.ID != want {
						t.Errorf("%s: event %s with id %s, want %s", name, e.Data, e.ID, want)
						break
					}
				}
				for _, e := range of(all, name, "error") {
					if e.State == closedForGood {
						t.Errorf("%s: closed for good", name)
					}
				}
			}
			// This is what reconnect_on is for: without it, the first 502 is
			// final.
			final := of(all, "unprotected", "error")
			if len(final) == 0 || final[len(final)-1].State != closedForGood {
				t.Errorf("the stream without reconnect_on was not closed for good by a 502: %v", final)
			}
			if failures := of(all, "page", "failure"); len(failures) > 0 {
				t.Errorf("the page: %v", failures)
			}
		})
	}
}

func awaitReasons(t *testing.T, caddy *harness.Caddy, reason string, count int, proto string) {
	t.Helper()
	harness.Eventually(t, harness.Patience, fmt.Sprintf("%d streams closed as %s", count, reason), func() bool {
		found := 0
		for _, closed := range caddy.ClosedStreams() {
			if closed.Reason == reason && closed.Proto == proto {
				found++
			}
		}
		return found == count
	})
}

// reconnectsAnswered returns the sum of caddy_sse_reconnects_answered_total.
func reconnectsAnswered(t *testing.T, caddy *harness.Caddy) int {
	t.Helper()
	_, metrics := caddy.Admin(t, http.MethodGet, "/metrics", "")
	sum := 0
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, "caddy_sse_reconnects_answered_total{") {
			n, err := strconv.Atoi(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]))
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}

// Over HTTP/1.1, browsers open at most six connections to a host, so the
// seventh EventSource waits forever. Over HTTP/2 all share one connection.
func TestManyStreamsInOnePage(t *testing.T) {
	for _, test := range []struct {
		protocol string
		open     int // of twelve streams
	}{
		{"HTTP/1.1", 6},
		{"HTTP/2", 12},
	} {
		t.Run(test.protocol, func(t *testing.T) {
			t.Parallel()
			upstream := harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
				harness.Begin(w)
				harness.Send(w, "id: 1\ndata: hello "+r.URL.Path+"\n\n")
				<-r.Context().Done()
			})
			caddy := harness.StartSite(t, page+"\nhandle {\nsse 1s\nreverse_proxy "+upstream+"\n}")
			awaitTLS(t, caddy.TLSURL)
			base := caddy.URL
			if test.protocol == "HTTP/2" {
				base = caddy.TLSURL
			}
			var streams, names []string
			for i := range 12 {
				names = append(names, fmt.Sprint(i))
				streams = append(streams, fmt.Sprintf("%d=%s/%[1]d", i, base))
			}
			browser := startBrowser(t, base+"/page", streams...)
			greeted := func(all []report) int {
				count := 0
				for _, name := range names {
					if len(of(all, name, "event")) > 0 {
						count++
					}
				}
				return count
			}
			browser.await(t, fmt.Sprintf("%d streams open", test.open), func(all []report) bool { return greeted(all) == test.open })
			time.Sleep(2 * time.Second) // time for heartbeats, and for more streams to open
			if n := greeted(browser.reports()); n != test.open {
				t.Errorf("%d streams are open, want %d", n, test.open)
			}
			if n := len(caddy.OpenStreams(t)); n != test.open {
				t.Errorf("Caddy has %d streams open, want %d", n, test.open)
			}
			t.Logf("%s: %d of 12 EventSources of a page are open", test.protocol, test.open)
			browser.Stop(t)
			for range test.open {
				if closed := caddy.AwaitClosed(t); closed.Reason != "client_closed" || closed.Heartbeats < 1 {
					t.Errorf("%+v", closed)
				}
			}
			caddy.CheckNoErrors(t)
		})
	}
}
