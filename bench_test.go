package caddysse_test

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// event has 200 bytes, like an event of a language model's answer.
var event = append(append([]byte("data: "), bytes.Repeat([]byte("x"), 192)...), "\n\n"...)

func prepared(w http.ResponseWriter) *http.Request {
	return caddyhttp.PrepareRequest(get("text/event-stream"), caddy.NewReplacer(), w, new(caddyhttp.Server))
}

// BenchmarkHandlerWrite measures one write of one event: without the module,
// with only a lock around it, and with the module.
func BenchmarkHandlerWrite(b *testing.B) {
	b.Run("bare", func(b *testing.B) { benchmarkWrite(b, absent{}, true) })
	b.Run("lock", func(b *testing.B) { benchmarkWrite(b, locking{}, true) })
	b.Run("sse", func(b *testing.B) { benchmarkWrite(b, provision(b, &caddysse.Handler{}), false) })
	b.Run("sse that asks again", func(b *testing.B) {
		retry := &caddysse.UpstreamRetry{Window: caddy.Duration(time.Minute), Live: true}
		benchmarkWrite(b, provision(b, &caddysse.Handler{UpstreamRetry: retry}), false)
	})
	b.Run("sse with a handler that flushes", func(b *testing.B) { benchmarkWrite(b, provision(b, &caddysse.Handler{}), true) })
}

func benchmarkWrite(b *testing.B, h caddyhttp.MiddlewareHandler, flush bool) {
	b.ReportAllocs()
	w := &discard{header: make(http.Header)}
	err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
		flusher := w.(interface{ FlushError() error })
		for b.Loop() {
			if _, err := w.Write(event); err != nil {
				b.Fatal(err)
			}
			if flush {
				_ = flusher.FlushError()
			}
		}
	}))
	if err != nil {
		b.Fatal(err)
	}
}

// locking does the minimum for a handler that has something else to write to
// the same client.
type locking struct{}

func (locking) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(&lockedWriter{ResponseWriterWrapper: caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, rc: http.NewResponseController(w)}, r)
}

type lockedWriter struct {
	caddyhttp.ResponseWriterWrapper
	mu sync.Mutex
	rc *http.ResponseController
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ResponseWriter.Write(p)
}

func (w *lockedWriter) FlushError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rc.Flush()
}

func TestAWriteAllocatesNothing(t *testing.T) {
	h := provision(t, &caddysse.Handler{Retry: &caddysse.Retry{Min: caddy.Duration(time.Second)}})
	w := &discard{header: make(http.Header)}
	err := h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
		withID := append([]byte("id: 1\nevent: x\n"), event...)
		for name, text := range map[string][]byte{"an event": event, "an event with an ID": withID} {
			if allocs := testing.AllocsPerRun(1000, func() { _, _ = w.Write(text) }); allocs != 0 {
				t.Errorf("%s: %v allocations per write", name, allocs)
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkWriteInTurn measures a write to a stream that has left the
// processor's caches since its last write: it writes to each of 10,000 streams
// in turn. Plain is a handler that writes and flushes, as reverse_proxy does.
func BenchmarkWriteInTurn(b *testing.B) {
	const streams = 10_000
	plain := openInTurn(b, absent{}, streams)
	sse := openInTurn(b, provision(b, silent()), streams)
	// The rounds alternate, so that both run under the same conditions.
	var plainTook, sseTook time.Duration
	rounds := 0
	for b.Loop() {
		began := time.Now()
		for _, w := range plain {
			_, _ = w.Write(event)
			_ = w.(interface{ FlushError() error }).FlushError()
		}
		middle := time.Now()
		for _, w := range sse {
			_, _ = w.Write(event)
		}
		plainTook += middle.Sub(began)
		sseTook += time.Since(middle)
		rounds++
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(plainTook.Nanoseconds())/float64(rounds*streams), "plain-ns/write")
	b.ReportMetric(float64(sseTook.Nanoseconds())/float64(rounds*streams), "sse-ns/write")
	b.ReportMetric(float64((sseTook-plainTook).Nanoseconds())/float64(rounds*streams), "more-ns/write")
}

// openInTurn opens streams whose handlers wait for the end of the benchmark,
// and returns their writers.
func openInTurn(b *testing.B, h caddyhttp.MiddlewareHandler, streams int) []http.ResponseWriter {
	b.Helper()
	stop := make(chan struct{})
	opened := make(chan http.ResponseWriter)
	var serving sync.WaitGroup
	writers := make([]http.ResponseWriter, streams)
	for i := range writers {
		serving.Go(func() {
			w := &discard{header: make(http.Header)}
			_ = h.ServeHTTP(w, prepared(w), stream(func(w http.ResponseWriter) {
				_, _ = w.Write(event)
				opened <- w
				<-stop
			}))
		})
		writers[i] = <-opened
	}
	b.Cleanup(func() {
		close(stop)
		serving.Wait()
	})
	// In memory they are in the order in which they were opened, which the
	// processor would predict.
	rand.New(rand.NewPCG(1, 2)).Shuffle(streams, func(i, j int) { writers[i], writers[j] = writers[j], writers[i] })
	return writers
}
