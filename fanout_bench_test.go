package caddysse_test

import (
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// audience is the clients of one shared stream, which discard what they get.
type audience struct {
	write func() // makes the upstream send an event, and waits until all have it
	leave func()
}

// listener is a client that counts the bytes that it gets.
type listener struct {
	discard
	whole *atomic.Int64
}

func (c *listener) Write(p []byte) (int, error) {
	c.whole.Add(int64(len(p)))
	return len(p), nil
}

func openAudience(t testing.TB, clients int) *audience {
	h := provision(t, &caddysse.Handler{
		Heartbeat: &caddysse.Heartbeat{Interval: -1},
		Share:     &caddysse.Share{Linger: caddy.Duration(time.Millisecond)},
	})
	var got atomic.Int64
	var serving sync.WaitGroup
	upstream := make(chan http.ResponseWriter, 1)
	over := make(chan struct{})
	for range clients {
		w := &listener{discard: discard{header: make(http.Header)}, whole: &got}
		serving.Go(func() {
			_ = h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				upstream <- w
				<-over
			}))
		})
	}
	w := <-upstream
	eventually(t, "all clients are there", func() bool { return caddysse.OpenStreams(h) == clients })
	// An event with an id gets no other, so its length does not change.
	withID := append([]byte("id: 1\n"), event...)
	sent := int64(0)
	return &audience{
		write: func() {
			_, _ = w.Write(withID)
			sent++
			for got.Load() < sent*int64(clients*len(withID)) {
				runtime.Gosched()
			}
		},
		leave: func() {
			close(over)
			serving.Wait()
		},
	}
}

func TestADeliveryToAClientOfASharedStreamAllocatesNothing(t *testing.T) {
	const clients, events = 200, 200
	a := openAudience(t, clients)
	defer a.leave()
	for range 20 {
		a.write()
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range events {
		a.write()
	}
	runtime.ReadMemStats(&after)
	// What an event costs once, for the journal and for the workers, is little
	// compared with so many clients.
	if allocations := float64(after.Mallocs-before.Mallocs) / (clients * events); allocations > 0.1 {
		t.Errorf("%.2f allocations for each event of each client", allocations)
	}
}

// BenchmarkFanOut measures what an event for 1,000 clients costs, without the
// writes: in total and for each client.
func BenchmarkFanOut(b *testing.B) {
	const clients = 1000
	a := openAudience(b, clients)
	defer a.leave()
	b.ReportAllocs()
	for b.Loop() {
		a.write()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*clients), "ns/client")
}
