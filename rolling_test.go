package caddysse_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rollingVariable makes the rolling reload as large as issues of production
// are: two minutes, 2,000 clients.
const rollingVariable = "CADDYSSE_TEST_ROLLING"

// rolling is the size of a rolling reload.
type rolling struct {
	clients            int
	reloads            int
	every              time.Duration // from reload to reload
	window             time.Duration // of the drain
	retryMin, retryMax time.Duration
	down               time.Duration // how long the upstream is gone
	period             time.Duration // from event to event
	unevenness         float64       // how many times an even spread is too much
}

func TestEveryClientGetsEveryEventOnceOverReloadsAndAKilledUpstream(t *testing.T) {
	checkLeaks(t)
	size := rolling{
		clients: 100, reloads: 3, every: 1200 * time.Millisecond, window: time.Second,
		retryMin: 100 * time.Millisecond, retryMax: time.Second,
		down: 300 * time.Millisecond, period: 20 * time.Millisecond,
		unevenness: 1.9, // of a hundred clients, half of whom are half a window's
	}
	if os.Getenv(rollingVariable) != "" {
		size = rolling{
			clients: 2000, reloads: 5, every: 15 * time.Second, window: 10 * time.Second,
			retryMin: time.Second, retryMax: 10 * time.Second,
			down: 2 * time.Second, period: 500 * time.Millisecond,
			unevenness: 2,
		}
	}
	started := time.Now()
	addr, kill := replayProcess(t, "127.0.0.1:0", started, size.period)
	site := fmt.Sprintf(`
		sse {
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
		since := time.Now()
		c.reload(site + fmt.Sprintf("\n# %d", i)) // a comment: the same site again
		time.Sleep(size.every)                    // the schedule of this test, not a wait for something
		fleet.checkSpread(t, fmt.Sprintf("reload %d", i+1), since, size, size.window)
	}

	since := time.Now()
	kill()
	time.Sleep(size.down)
	replayProcess(t, addr, started, size.period)
	last := int(time.Since(started)/size.period) + 1
	eventually(t, "every client has what was sent until the upstream came back", func() bool { return fleet.behind(last) == 0 })
	fleet.checkSpread(t, "the kill", since, size, size.retryMax-size.retryMin)

	for i, client := range fleet.clients {
		if err := client.problem.Load(); err != nil {
			t.Errorf("client %d: %s", i, *err)
		}
	}
	t.Logf("%d clients, %d reconnects, %d events each", size.clients, len(fleet.reconnects), last)
}

// eventually waits for a condition of the whole fleet.
func eventually(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !reached(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// fleet is many clients that behave as EventSource does.
type fleet struct {
	clients []*eventSource

	mu         sync.Mutex
	reconnects []time.Time
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

// behind counts the clients that do not have an event yet.
func (f *fleet) behind(event int) int {
	n := 0
	for _, client := range f.clients {
		if client.last.Load() < int64(event) && client.problem.Load() == nil {
			n++
		}
	}
	return n
}

// checkSpread wants no half second to have many more reconnects than an even
// spread over a time would give it.
func (f *fleet) checkSpread(t *testing.T, what string, since time.Time, size rolling, over time.Duration) {
	t.Helper()
	const slice = 500 * time.Millisecond
	f.mu.Lock()
	defer f.mu.Unlock()
	most, from := 0, 0
	recent := f.reconnects[slices.IndexFunc(append(f.reconnects, time.Now()), func(at time.Time) bool { return at.After(since) }):]
	for to := range recent {
		for recent[to].Sub(recent[from]) > slice {
			from++
		}
		most = max(most, to-from+1)
	}
	even := float64(size.clients) * float64(slice) / float64(max(over, slice))
	t.Logf("%s: %d reconnects, at most %d in %s; evenly it would be %.1f", what, len(recent), most, slice, even)
	if limit := size.unevenness * even; float64(most) > limit {
		t.Errorf("%s: %d reconnects within %s, want at most %.1f", what, most, slice, limit)
	}
}

// eventSource is as much of HTML Standard, section 9.2, as decides who gets
// which event: it goes on from its last event ID, after the reconnection time,
// and gives up at a status other than 200.
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
			e.fleet.mu.Lock()
			e.fleet.reconnects = append(e.fleet.reconnects, time.Now())
			e.fleet.mu.Unlock()
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
		case "":
			if hasData && id != e.last.Add(1) {
				e.fail("event %d where %d was next", id, e.last.Load())
			}
			hasData = false
		}
	}
}

// replayVariable makes a test binary an upstream whose events depend on the
// time alone, so that one that was killed can be replaced.
const replayVariable = "CADDYSSE_TEST_REPLAY"

// playReplay sends event n at n periods behind the start, and to each client
// first what it has missed, if this process was started for that.
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
	io.Copy(io.Discard, os.Stdin) // ends with the process that started this one
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
