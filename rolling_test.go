package caddysse_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rollingVariable makes the rolling reload as large as in production: two
// minutes, 2,000 clients.
const rollingVariable = "CADDYSSE_TEST_ROLLING"

// rolling is the size of a rolling reload.
type rolling struct {
	clients            int
	reloads            int
	every              time.Duration // between reloads
	window             time.Duration // of the drain
	retryMin, retryMax time.Duration
	down               time.Duration // how long the upstream is away
	period             time.Duration // between events
}

func TestEveryClientGetsEveryEventOnceOverReloadsAndAKilledUpstream(t *testing.T) {
	checkLeaks(t)
	size := rolling{
		clients: 100, reloads: 3, every: 700 * time.Millisecond, window: 500 * time.Millisecond,
		retryMin: 100 * time.Millisecond, retryMax: 600 * time.Millisecond,
		down: 300 * time.Millisecond, period: 20 * time.Millisecond,
	}
	if os.Getenv(rollingVariable) != "" {
		size = rolling{
			clients: 2000, reloads: 5, every: 15 * time.Second, window: 10 * time.Second,
			retryMin: time.Second, retryMax: 10 * time.Second,
			down: 2 * time.Second, period: 500 * time.Millisecond,
		}
	}
	started := time.Now()
	addr, kill := replayProcess(t, "127.0.0.1:0", started, size.period)
	site := fmt.Sprintf(`
		sse {
			prelude off
			drain %s
			retry %s %s
			reconnect_on 502
		}
		reverse_proxy %s`, size.window, size.retryMin, size.retryMax, addr)
	c := startCaddy(t, site)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	fleet := newFleet(c.url, size.clients)
	var running sync.WaitGroup
	for _, client := range fleet.clients {
		running.Go(func() { client.run(ctx) })
	}
	defer running.Wait()
	defer cancel()
	eventually(t, "every client is there", func() bool { return fleet.behind(1) == 0 })

	for i := range size.reloads {
		c.reload(site + fmt.Sprintf("\n# %d", i)) // the site differs only by a comment
		time.Sleep(size.every)                    // this is the test's schedule; it waits for nothing
	}

	kill()
	time.Sleep(size.down)
	replayProcess(t, addr, started, size.period)
	last := int(time.Since(started)/size.period) + 1
	eventually(t, "every client has what was sent until the upstream came back", func() bool { return fleet.behind(last) == 0 })
	fleet.checkSpread(t, size)

	for i, client := range fleet.clients {
		if err := client.problem.Load(); err != nil {
			t.Errorf("client %d: %s", i, *err)
		}
	}
	t.Logf("%d clients, %d reconnection times, %d events each", size.clients, len(fleet.told), last)
}

// fleet is many clients that behave like an EventSource.
type fleet struct {
	clients []*eventSource

	mu   sync.Mutex
	told []time.Duration // the reconnection times
}

func newFleet(url string, n int) *fleet {
	f := new(fleet)
	transport := &http.Transport{DisableKeepAlives: true}
	for range n {
		f.clients = append(f.clients, &eventSource{
			url: url, fleet: f, client: &http.Client{Transport: transport}, reconnectIn: 3 * time.Second,
		})
	}
	return f
}

// behind counts the clients that have not received an event yet.
func (f *fleet) behind(event int) int {
	n := 0
	for _, client := range f.clients {
		if client.last.Load() < int64(event) && client.problem.Load() == nil {
			n++
		}
	}
	return n
}

// checkSpread expects the reconnection times to be spread evenly over their
// range: of clients that lost their streams together, a tenth comes back in
// each tenth of it. When they really come back depends on the machine.
func (f *fleet) checkSpread(t *testing.T, size rolling) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.told) < 2*size.clients {
		t.Errorf("%d clients were told %d reconnection times, want one with each stream", size.clients, len(f.told))
	}
	var tenths [10]int
	for _, told := range f.told {
		if told < size.retryMin || told > size.retryMax {
			t.Errorf("a client was told to come back in %v", told)
			continue
		}
		tenths[min(9, 10*(told-size.retryMin)/(size.retryMax-size.retryMin))]++
	}
	// Seven standard deviations from the expected number.
	even := float64(len(f.told)) / 10
	for tenth, n := range tenths {
		if off := math.Abs(float64(n) - even); off > 7*math.Sqrt(even) {
			t.Errorf("%d of %d reconnection times are in tenth %d of their range: %v", n, len(f.told), tenth, tenths)
		}
	}
}

// eventSource implements the part of HTML Standard, section 9.2, that decides
// which client gets which event: it continues from its last event ID, after the
// reconnection time, and gives up at a status other than 200.
type eventSource struct {
	url         string
	fleet       *fleet
	client      *http.Client
	reconnectIn time.Duration

	last    atomic.Int64 // the last event ID
	problem atomic.Pointer[string]
}

func (e *eventSource) run(ctx context.Context) {
	for ctx.Err() == nil && e.problem.Load() == nil {
		e.follow(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(e.reconnectIn):
		}
	}
}

func (e *eventSource) fail(format string, args ...any) {
	problem := fmt.Sprintf(format, args...)
	e.problem.CompareAndSwap(nil, &problem)
}

// follow reads one response to its end.
func (e *eventSource) follow(ctx context.Context) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.url, nil)
	if err != nil {
		e.fail("%v", err)
		return
	}
	req.Header.Set("Accept", eventStream)
	req.Header.Set("Cache-Control", "no-cache")
	if last := e.last.Load(); last > 0 {
		req.Header.Set("Last-Event-ID", strconv.FormatInt(last, 10))
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return // a connection that fails is tried again
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e.fail("status %d, which is final", resp.StatusCode)
		return
	}
	var id int64
	hasData := false
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		field, value, _ := strings.Cut(lines.Text(), ": ")
		switch field {
		case "id":
			id, _ = strconv.ParseInt(value, 10, 64)
		case "data":
			hasData = true
		case "retry":
			ms, _ := strconv.Atoi(value)
			e.reconnectIn = time.Duration(ms) * time.Millisecond
			e.fleet.mu.Lock()
			e.fleet.told = append(e.fleet.told, e.reconnectIn)
			e.fleet.mu.Unlock()
		case "":
			if hasData && id != e.last.Add(1) {
				e.fail("event %d where %d was next", id, e.last.Load())
			}
			hasData = false
		}
	}
}

// replayVariable makes a test binary an upstream whose events depend only on
// the time, so that another process can replace one that was killed.
const replayVariable = "CADDYSSE_TEST_REPLAY"

// If this process was started for that, playReplay sends event n when n periods
// have passed since the start. Each client first gets what it has missed.
func playReplay() {
	config := strings.Fields(os.Getenv(replayVariable))
	if len(config) != 3 {
		return
	}
	startNanos, _ := strconv.ParseInt(config[1], 10, 64)
	started := time.Unix(0, startNanos)
	period, _ := time.ParseDuration(config[2])
	listener, err := net.Listen("tcp", config[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		last, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
		for n := last + 1; r.Context().Err() == nil; n++ {
			select {
			case <-r.Context().Done():
			case <-time.After(time.Until(started.Add(time.Duration(n) * period))):
				fmt.Fprintf(w, "id: %d\ndata: %d\n\n", n, n)
				w.(http.Flusher).Flush()
			}
		}
	}))
	fmt.Println(listener.Addr())
	io.Copy(io.Discard, os.Stdin) // it ends with the process that started this one
	os.Exit(0)
}

// replayProcess starts such an upstream.
func replayProcess(t testing.TB, listen string, started time.Time, period time.Duration) (addr string, kill func()) {
	t.Helper()
	return startProcess(t, fmt.Sprintf("%s=%s %d %s", replayVariable, listen, started.UnixNano(), period))
}

// startProcess runs this binary again with one more environment variable, and
// returns the first line that it prints.
func startProcess(t testing.TB, variable string) (line string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), variable)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // SIGKILL
		stdin.Close()
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	line, err = bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return strings.TrimSpace(line), kill
}
