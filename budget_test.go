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
// Half of it is what keeps handlers that outlive their request apart from it: a
// request, a header map, a Replacer and a context of their own.
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
	// A stack that is larger is so by 2 KiB or more. What is below comes from
	// the stacks that the runtime keeps for goroutines to come.
	if more := sse.stack - plain.stack; more >= 2<<10 {
		t.Errorf("%.0f bytes more stack than plain, want none", more)
	}
}

// A quiet stream that outlives its client may cost this much more than one through
// reverse_proxy alone: it has a goroutine more, with the stack of the handlers.
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

// BenchmarkQuietStreams tells what one stream costs while nothing happens, and
// what of it is this module's.
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

// cost is what the process holds. Clients and upstreams live in it too, but
// have no goroutine of their own and hold the same in each case.
type cost struct {
	heap, stack float64 // bytes
	goroutines  float64
}

func (c cost) String() string {
	return fmt.Sprintf("heap %6.0f B, stack %6.0f B, goroutines %.2f", c.heap, c.stack, c.goroutines)
}

// measureQuietStreams opens streams through reverse_proxy alone and through
// sse with some settings in front of it, several rounds of each in turn, and returns the medians
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

	// The runtime keeps stacks and other things for next time.
	measureOnce(t, c, up, "/sse", streams)
	nothing := settledCost()
	var plains, sses []cost
	for range rounds {
		plains = append(plains, measureOnce(t, c, up, "/plain", streams))
		sses = append(sses, measureOnce(t, c, up, "/sse", streams))
	}
	return nothing.perStream(plains, streams), nothing.perStream(sses, streams)
}

// perStream returns the medians of what costs are above nothing.
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

// browserRequest has the Accept-Encoding that every browser sends. Without
// one, reverse_proxy would add its own, which is memory for plain alone.
const browserRequest = "GET %s HTTP/1.1\r\nHost: localhost\r\n" +
	"Accept: text/event-stream\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n\r\n"

// measureOnce returns what the process holds with streams open. Each has had
// its first heartbeat then, where it gets any, and one event after it; with
// the default interval the next heartbeat is 11 seconds away.
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
	for deadline := time.Now().Add(patience); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines before, %d after", goroutines, runtime.NumGoroutine())
		}
	}
	return held
}

// settledCost is that of the whole process after several collections: two
// empty the pools, and each halves the stacks that have become too large.
func settledCost() cost {
	for range 4 {
		runtime.GC()
	}
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return cost{float64(stats.HeapAlloc), float64(stats.StackInuse), float64(runtime.NumGoroutine())}
}

// readBuffer is one for all, so that clients and upstreams need no memory.
var readBuffer [8 << 10]byte

// readUntil reads to where text has passed. What it returns is good until the
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

// accept takes a connection and the request on it.
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

// fileLimit is how many files the process may have open.
func fileLimit(t testing.TB) int {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	return int(min(limit.Cur, 1<<20))
}
