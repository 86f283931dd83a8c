package caddysse_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// callAdmin calls the admin API without a network.
func callAdmin(t testing.TB, target string) *httptest.ResponseRecorder {
	t.Helper()
	module, err := caddy.GetModule("admin.api.sse")
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodGet, target, nil)
	// The routes go into a mux, as in Caddy, whatever the order of the
	// patterns.
	mux := http.NewServeMux()
	w := httptest.NewRecorder()
	for _, route := range module.New().(caddy.AdminRouter).Routes() {
		mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := route.Handler.ServeHTTP(w, r); err != nil {
				t.Error(err)
			}
		})
	}
	mux.ServeHTTP(w, r)
	return w
}

// gather scrapes the metrics without a network.
func gather(t testing.TB) {
	t.Helper()
	if _, err := configRegistry.Gather(); err != nil {
		t.Error(err)
	}
}

// configRegistry is the registry of configContext.
var configRegistry prometheus.Gatherer = configContext.GetMetricsRegistry()

// quietStreams opens streams without a network that are quiet until the test
// ends.
func quietStreams(t testing.TB, h *caddysse.Handler, n int) {
	t.Helper()
	end := make(chan struct{})
	var opening, running sync.WaitGroup
	opening.Add(n)
	for range n {
		running.Go(func() {
			w := &discard{header: make(http.Header)}
			err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				_, _ = w.Write(event)
				opening.Done()
				<-end
			}))
			if err != nil {
				t.Error(err)
			}
		})
	}
	opening.Wait()
	t.Cleanup(func() { close(end); running.Wait() })
}

// writers opens streams that write without a pause until stop is called. stop
// returns how often each has written.
func writers(t testing.TB, h *caddysse.Handler, n int) (stop func() []int64) {
	t.Helper()
	var stopped atomic.Bool
	var running sync.WaitGroup
	writes := make([]int64, n)
	for i := range n {
		running.Go(func() {
			w := &discard{header: make(http.Header)}
			err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				for !stopped.Load() {
					if _, err := w.Write(event); err != nil {
						t.Error(err)
					}
					writes[i]++
				}
			}))
			if err != nil {
				t.Error(err)
			}
		})
	}
	return sync.OnceValue(func() []int64 {
		stopped.Store(true)
		running.Wait()
		return writes
	})
}

type listAnswer struct {
	Streams []struct {
		ID     string
		Name   string
		Events uint64
	}
	Total int
}

func TestTenThousandStreamsAreListedWhileOthersWrite(t *testing.T) {
	quietOnes, writing := 10_000, 4
	if testing.Short() || raceEnabled {
		quietOnes = 1000
	}
	name := "ten thousand"
	h := provision(t, &caddysse.Handler{Name: name, Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	quietStreams(t, h, quietOnes)
	stop := writers(t, h, writing)
	defer stop()

	list := func(query string) (answer listAnswer) {
		t.Helper()
		w := callAdmin(t, "/sse/streams?name=ten+thousand"+query)
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		return answer
	}
	eventually(t, "all streams are listed", func() bool { return list("&limit=0").Total >= quietOnes+writing })
	for range 5 {
		if answer := list(""); answer.Total != quietOnes+writing || len(answer.Streams) != min(1000, answer.Total) {
			t.Fatalf("%d of %d streams are listed", len(answer.Streams), answer.Total)
		}
		ids := make(map[string]bool)
		answer := list("&limit=1000000")
		for i, s := range answer.Streams {
			ids[s.ID] = true
			if s.Name != name || i < quietOnes && s.Events != 1 {
				t.Fatalf("stream %d is listed as %v", i, s)
			}
		}
		if len(ids) != quietOnes+writing {
			t.Errorf("%d different streams are listed", len(ids))
		}
		last := answer.Streams[len(answer.Streams)-1].ID
		if w := callAdmin(t, "/sse/streams/"+last); !strings.Contains(w.Body.String(), last) {
			t.Errorf("%s is shown as %s", last, w.Body)
		}
		gather(t)
	}
	for i, n := range stop() {
		if n == 0 {
			t.Errorf("writer %d has not written", i)
		}
	}
	eventually(t, "no stream is listed that has ended", func() bool { return list("&limit=0").Total <= quietOnes })
}

func TestAStreamThatIsScrapedAndListedAllocatesNothingPerWrite(t *testing.T) {
	h := provision(t, &caddysse.Handler{Name: "scraped"})
	w := &discard{header: make(http.Header)}
	err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
		for range 20 {
			gather(t)
			callAdmin(t, "/sse/streams?name=scraped")
			if allocs := testing.AllocsPerRun(100, func() { _, _ = w.Write(event) }); allocs != 0 {
				t.Fatalf("%v allocations per write", allocs)
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkWriteWhileObserved measures a write while 10,000 other streams are
// live and are listed and scraped without a pause.
func BenchmarkWriteWhileObserved(b *testing.B) {
	for _, observer := range []struct {
		name    string
		observe func(testing.TB)
	}{
		{"by nobody", nil},
		{"by a list", func(t testing.TB) { callAdmin(t, "/sse/streams") }},
		{"by a scrape", gather},
	} {
		b.Run(observer.name, func(b *testing.B) {
			h := provision(b, &caddysse.Handler{Name: "observed", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
			quietStreams(b, h, 10_000)
			var stopped atomic.Bool
			var observing sync.WaitGroup
			observations := 0
			if observer.observe != nil {
				observing.Go(func() {
					for !stopped.Load() {
						observer.observe(b)
						observations++
					}
				})
			}
			began := time.Now()
			w := &discard{header: make(http.Header)}
			longest := time.Duration(0)
			err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				for b.Loop() {
					began := time.Now()
					_, _ = w.Write(event)
					longest = max(longest, time.Since(began))
				}
			}))
			if err != nil {
				b.Fatal(err)
			}
			stopped.Store(true)
			took := time.Since(began)
			observing.Wait()
			b.ReportMetric(float64(longest.Microseconds()), "longest-µs")
			if observations > 0 {
				b.ReportMetric(float64(took.Microseconds())/float64(observations), "µs/observation")
			}
		})
	}
}

// A stream that is deleted at the moment when it ends by itself has one reason,
// and the caller that deletes it does not wait.
func TestAnEndHasOneReasonWhoeverAsksForIt(t *testing.T) {
	name := uniqueName("one-reason")
	h := provision(t, &caddysse.Handler{Name: name})
	for i := range 200 {
		w := &discard{header: make(http.Header)}
		running := make(chan struct{})
		var ending sync.WaitGroup
		for range 3 {
			ending.Go(func() {
				<-running
				module, _ := caddy.GetModule("admin.api.sse")
				r := httptest.NewRequest(http.MethodDelete, "/sse/streams?name="+name, nil)
				if err := module.New().(caddy.AdminRouter).Routes()[0].Handler.ServeHTTP(httptest.NewRecorder(), r); err != nil {
					t.Error(err)
				}
			})
		}
		err := h.ServeHTTP(w, prepared(w), caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", eventStream)
			_, _ = w.Write(event)
			close(running)
			for j := range 100 {
				if _, err := w.Write(event); err != nil && r.Context().Err() == nil {
					t.Errorf("write %d failed and nobody was told: %v", j, err)
				}
			}
			return nil
		}))
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		ending.Wait()
	}
	var answer struct {
		Handlers []struct {
			Name   string
			Open   int
			Opened uint64
			Closed map[string]uint64
		}
	}
	if err := json.Unmarshal(callAdmin(t, "/sse/handlers").Body.Bytes(), &answer); err != nil {
		t.Fatal(err)
	}
	for _, handler := range answer.Handlers {
		if handler.Name != name {
			continue
		}
		if handler.Open != 0 || handler.Opened != 200 || handler.Closed["upstream_closed"]+handler.Closed["admin"] != 200 {
			t.Errorf("accounted for as %v", handler)
		}
		return
	}
	t.Error(fmt.Errorf("%s is not shown", name))
}
