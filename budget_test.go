//go:build unix

package caddysse_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
)

// A quiet stream may cost this much more than one through reverse_proxy alone.
// Half of that separates the handlers from the request, which they may outlive:
// a request, a header map, a Replacer and a context of their own.
const heapBudget = 2600 // bytes

func TestAQuietStreamStaysWithinItsBudget(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has memory figures of its own")
	}
	checkLeaks(t)
	const streams = 500
	plain, sse := measureQuietStreams(t, streams, 3, "")
	t.Logf("per stream, of %d:\nplain %v\nsse   %v", streams, plain, sse)
	if more := sse.heap - plain.heap; more > heapBudget {
		t.Errorf("%.0f bytes more heap than plain, want at most %d", more, heapBudget)
	}
	if more := sse.goroutines - plain.goroutines; more > 0.01 {
		t.Errorf("%.2f more goroutines than plain, want none", more)
	}
	// A larger stack is larger by at least 2 KiB. Smaller differences come from
	// the stacks that the runtime keeps for future goroutines.
	if more := sse.stack - plain.stack; more >= 2<<10 {
		t.Errorf("%.0f bytes more stack than plain, want none", more)
	}
}

// A quiet stream that outlives its client may cost this much more than one
// through reverse_proxy alone, because it has one more goroutine, with the
// stack of the handlers.
const keptBudget = 24 << 10 // bytes

func TestAQuietKeptStreamStaysWithinItsBudget(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has memory figures of its own")
	}
	checkLeaks(t)
	const streams = 500
	plain, kept := measureQuietStreams(t, streams, 3, "resume 10ms")
	t.Logf("per stream, of %d:\nplain  %v\nresume %v", streams, plain, kept)
	if more := kept.heap + kept.stack - plain.heap - plain.stack; more > keptBudget {
		t.Errorf("%.0f bytes more than plain, want at most %d", more, keptBudget)
	}
	if more := kept.goroutines - plain.goroutines; more > 1.01 {
		t.Errorf("%.2f more goroutines than plain, want one", more)
	}
}

// BenchmarkQuietStreams measures what one quiet stream costs, and how much of
// that is caused by this module.
func BenchmarkQuietStreams(b *testing.B) {
	streams := min(5000, (fileLimit(b)-500)/4)
	var plain, sse cost
	for b.Loop() {
		plain, sse = measureQuietStreams(b, streams, 1, "")
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(streams), "streams")
	b.ReportMetric(sse.heap-plain.heap, "heap-B/stream")
	b.ReportMetric(sse.stack-plain.stack, "stack-B/stream")
	b.ReportMetric(sse.goroutines-plain.goroutines, "goroutines/stream")
	b.ReportMetric(plain.heap, "plain-heap-B/stream")
	b.ReportMetric(plain.stack, "plain-stack-B/stream")
	b.ReportMetric(plain.goroutines, "plain-goroutines/stream")
}

// cost is what the process uses. This includes clients and upstreams, but they
// have no goroutines, and use the same in each case.
type cost struct {
	heap, stack float64 // bytes
	goroutines  float64
}

func (c cost) String() string {
	return fmt.Sprintf("heap %6.0f B, stack %6.0f B, goroutines %.2f", c.heap, c.stack, c.goroutines)
}

// measureQuietStreams opens streams through reverse_proxy alone, and through
// sse with some settings, in several alternating rounds. It returns the medians
// per stream.
func measureQuietStreams(t testing.TB, streams, rounds int, settings string) (plain, sse cost) {
	up := newQuietUpstream(t)
	c := startCaddy(t, `
		handle /plain {
			reverse_proxy `+up.Addr().String()+`
		}
		handle /sse {
			sse {
				prelude 200ms
				`+settings+`
			}
			reverse_proxy `+up.Addr().String()+`
		}`, withoutLogs())

	// This first round fills the runtime's pools.
	measureOnce(t, c, up, "/sse", streams)
	nothing := settledCost()
	var plains, sses []cost
	for range rounds {
		plains = append(plains, measureOnce(t, c, up, "/plain", streams))
		sses = append(sses, measureOnce(t, c, up, "/sse", streams))
	}
	return nothing.perStream(plains, streams), nothing.perStream(sses, streams)
}

// perStream returns the medians of costs minus nothing, per stream.
func (nothing cost) perStream(costs []cost, streams int) cost {
	median := func(figure func(cost) float64) float64 {
		var figures []float64
		for _, c := range costs {
			figures = append(figures, figure(c))
		}
		slices.Sort(figures)
		return (figures[len(figures)/2] - figure(nothing)) / float64(streams)
	}
	return cost{
		heap:       median(func(c cost) float64 { return c.heap }),
		stack:      median(func(c cost) float64 { return c.stack }),
		goroutines: median(func(c cost) float64 { return c.goroutines }),
	}
}

// browserRequest has the Accept-Encoding that every browser sends. Without it,
// reverse_proxy would add its own, which would cost memory in the plain case
// only.
const browserRequest = "GET %s HTTP/1.1\r\nHost: localhost\r\n" +
	"Accept: text/event-stream\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n\r\n"

// measureOnce returns what the process uses with streams open. By then, each
// has had its first heartbeat, if it gets any, and one event after it. With the
// default interval, the next heartbeat is 11 seconds away.
func measureOnce(t testing.TB, c *testCaddy, up quietUpstream, path string, streams int) cost {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	clients := make([]net.Conn, streams)
	upstreams := make([]net.Conn, streams)
	heartbeats := make([]bool, streams)
	for i := range clients {
		var err error
		if clients[i], err = net.Dial("tcp", c.addr); err != nil {
			t.Fatal(err)
		}
		defer clients[i].Close()
		writeString(t, clients[i], fmt.Sprintf(browserRequest, path))
		upstreams[i] = up.accept(t)
		defer upstreams[i].Close()
		writeString(t, upstreams[i], "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
		got := readUntil(t, clients[i], "\r\n\r\n")
		heartbeats[i] = bytes.HasSuffix(got, []byte(":heartbeat\n\n\r\n"))
	}
	for i, conn := range clients {
		if path == "/sse" && !heartbeats[i] {
			readUntil(t, conn, ":heartbeat\n\n\r\n")
		}
		writeString(t, upstreams[i], "d\r\ndata: hello\n\n\r\n")
		readUntil(t, conn, "data: hello\n")
	}

	held := settledCost()

	for i, conn := range clients {
		conn.Close()
		upstreams[i].Close()
	}
	eventually(t, "the goroutines are gone", func() bool { return runtime.NumGoroutine() <= goroutines })
	return held
}

// settledCost returns the cost of the whole process after several collections:
// two of them empty the pools, and each halves the stacks that have become too
// large.
func settledCost() cost {
	for range 4 {
		runtime.GC()
	}
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return cost{float64(stats.HeapAlloc), float64(stats.StackInuse), float64(runtime.NumGoroutine())}
}

// readBuffer is shared by all, so that clients and upstreams need no memory.
var readBuffer [8 << 10]byte

// readUntil reads until text has arrived. What it returns is valid until the
// next call.
func readUntil(t testing.TB, conn net.Conn, text string) []byte {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	n := 0
	for !bytes.Contains(readBuffer[:n], []byte(text)) {
		got, err := conn.Read(readBuffer[n:])
		if err != nil {
			t.Fatalf("after %q: %v", readBuffer[:n], err)
		}
		n += got
	}
	conn.SetReadDeadline(time.Time{})
	return readBuffer[:n]
}

func writeString(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// quietUpstream is an upstream without goroutines.
type quietUpstream struct{ *net.TCPListener }

func newQuietUpstream(t testing.TB) quietUpstream {
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return quietUpstream{listener}
}

// accept accepts a connection and reads its request.
func (up quietUpstream) accept(t testing.TB) net.Conn {
	t.Helper()
	up.SetDeadline(time.Now().Add(patience))
	conn, err := up.Accept()
	if err != nil {
		t.Fatal(err)
	}
	readUntil(t, conn, "\r\n\r\n")
	return conn
}

// fileLimit returns how many files the process may have open.
func fileLimit(t testing.TB) int {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	return int(min(limit.Cur, 1<<20))
}
