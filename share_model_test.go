package caddysse_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// source is an upstream that counts. With ids, it replays what follows
// Last-Event-ID. Without ids, each stream gets only new events.
type source struct {
	ids bool

	mu      sync.Mutex
	n       int
	changed chan struct{}
	killed  chan struct{} // closed and replaced to break off all streams

	away  atomic.Bool // it answers 503
	calls atomic.Int64
}

func newSource(ids bool) *source {
	return &source{ids: ids, changed: make(chan struct{}), killed: make(chan struct{})}
}

func (s *source) at() (n int, changed, killed chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n, s.changed, s.killed
}

// add sends some more events.
func (s *source) add(count int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n += count
	close(s.changed)
	s.changed = make(chan struct{})
}

// kill breaks off all streams.
func (s *source) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.killed)
	s.killed = make(chan struct{})
}

func (s *source) event(n int) string {
	text := fmt.Sprintf("data: %d %s\n\n", n, strings.Repeat("x", n%50))
	if s.ids {
		return fmt.Sprintf("id: %d\n%s", n, text)
	}
	return text
}

func (s *source) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.calls.Add(1)
	if s.away.Load() {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	sent, _, killed := s.at()
	if last, err := strconv.Atoi(r.Header.Get("Last-Event-ID")); err == nil && s.ids {
		sent = last
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	io.WriteString(w, "retry: 100\n\n")
	for {
		var n int
		var changed <-chan struct{}
		for n, changed, _ = s.at(); sent < n; {
			sent++
			if _, err := io.WriteString(w, s.event(sent)); err != nil {
				return
			}
		}
		http.NewResponseController(w).Flush()
		select {
		case <-changed:
		case <-killed:
			io.WriteString(w, "data: half of an event\n")
			panic(http.ErrAbortHandler)
		case <-r.Context().Done():
			return
		}
	}
}

// counting is a client that comes back again and again, and checks what it
// gets: every event once and in order, unless it was told of a loss.
type counting struct {
	t        *testing.T
	cl       *testClient
	id       string
	last     int  // 0: none yet
	mayMiss  bool // it was told of a loss
	returned int
	resumed  int
	enough   func() // called after each event; may be nil
}

// visit opens a stream and reads until the context is done or the stream ends.
func (c *counting) visit(ctx context.Context) {
	headers := asEventSource
	if c.id != "" {
		headers = append(headers[:len(headers):len(headers)], "Last-Event-ID: "+c.id)
		c.returned++
	}
	res, err := c.cl.Do(c.cl.request(c.t, "GET", "/", nil, headers...).WithContext(ctx))
	if err != nil {
		return
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return
	}
	lines := bufio.NewReader(res.Body)
	var name, data, id string
	first := true
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch field {
		case "event":
			name = value
		case "data":
			data = value
		case "id":
			id = value
		case "":
			if id != "" {
				c.id = id
			}
			switch name {
			case "lost":
				c.mayMiss = true
			case "":
				if data != "" {
					c.take(data, first)
					first = false
				}
			}
			name, data = "", ""
		}
	}
}

func (c *counting) take(data string, first bool) {
	number, _, _ := strings.Cut(data, " ")
	n, err := strconv.Atoi(number)
	switch {
	case err != nil:
		c.t.Errorf("it got %q", data)
	case n <= c.last && !c.mayMiss: // another run may be a little behind
		c.t.Errorf("it got %d again, after %d (with id %s)", n, c.last, c.id)
	case c.last > 0 && n != c.last+1 && !c.mayMiss:
		c.t.Errorf("it got %d after %d, and was told nothing (with id %s, first: %v)", n, c.last, c.id, first)
	case first && n == c.last+1 && c.last > 0:
		c.resumed++
	}
	c.last, c.mayMiss = n, false
	if c.enough != nil {
		c.enough()
	}
}

// TestEveryClientHasEveryEventOrIsTold lets clients come and go while the
// upstream breaks off, the configuration is replaced and runs are ended, and
// checks what each client got.
func TestEveryClientHasEveryEventOrIsTold(t *testing.T) {
	t.Parallel()
	for _, ids := range []bool{true, false} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("ids %v, seed %d", ids, seed), func(t *testing.T) {
				if apart(t) {
					return
				}
				everyClientHasEveryEvent(t, ids, rand.New(rand.NewPCG(seed, 16)))
			})
		}
	}
}

func everyClientHasEveryEvent(t *testing.T, ids bool, rng *rand.Rand) {
	checkLeaks(t)
	src := newSource(ids)
	up := newUpstreamFunc(t, src.ServeHTTP)
	site := `
		sse {
			name model
			heartbeat 100ms
			upstream_retry 20s
			drain off
			share {
				history 4KiB
				linger 50ms
			}
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, site, withAdmin())
	over, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var all []*counting
	for i := range 8 {
		client := &counting{t: t, cl: c.client([]string{"h1", "h2"}[i%2])}
		all = append(all, client)
		stays := rand.New(rand.NewPCG(rng.Uint64(), 1))
		clients.Go(func() {
			for over.Err() == nil {
				ctx, leave := context.WithTimeout(over, time.Duration(20+stays.IntN(600))*time.Millisecond)
				client.visit(ctx)
				leave()
			}
		})
	}
	for range 60 {
		src.add(1 + rng.IntN(5))
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		switch rng.IntN(20) {
		case 0, 1:
			src.kill()
		case 2:
			src.away.Store(true)
			src.kill()
			time.Sleep(150 * time.Millisecond)
			src.away.Store(false)
		case 3:
			c.reload(site, withAdmin())
		case 4:
			c.stopRuns()
		case 5:
			src.add(60) // more than a journal can hold
		}
	}
	stop()
	clients.Wait()
	// A client that comes back now continues where it was.
	ticks := time.NewTicker(10 * time.Millisecond)
	defer ticks.Stop()
	var last sync.WaitGroup
	gone := make(chan struct{})
	for _, client := range all {
		last.Go(func() {
			before := client.last
			ctx, leave := context.WithTimeout(t.Context(), patience)
			defer leave()
			client.enough = func() {
				if client.last > before {
					leave()
				}
			}
			for client.last <= before && ctx.Err() == nil {
				client.visit(ctx)
			}
			if client.last <= before {
				t.Errorf("a client that comes back after event %d (id %s) gets nothing", before, client.id)
			}
		})
	}
	go func() {
		last.Wait()
		close(gone)
	}()
	for waiting := true; waiting; {
		select {
		case <-ticks.C:
			src.add(1)
		case <-gone:
			waiting = false
		}
	}
	resumed, returned := 0, 0
	for _, client := range all {
		resumed += client.resumed
		returned += client.returned
	}
	t.Logf("%d events, %d calls of the upstream, %d returns, %d went on where they were", src.n, src.calls.Load(), returned, resumed)
	goOnUndisturbed(t, c, src, all)
}

// goOnUndisturbed makes each client leave and come back while another client of
// its protocol stays, so that the run stays. No event may be missing, reported
// or not.
func goOnUndisturbed(t *testing.T, c *testCaddy, src *source, all []*counting) {
	for _, client := range all {
		// A connection from before a reload may still lead to a server that was
		// replaced and has other runs.
		client.cl = c.client(client.cl.proto)
	}
	ctx, leave := context.WithTimeout(t.Context(), patience)
	defer leave()
	var staying sync.WaitGroup
	until := func(done <-chan struct{}) {
		for {
			src.add(1)
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	for _, client := range all[:2] {
		there := make(chan struct{})
		client.enough = sync.OnceFunc(func() { close(there) })
		staying.Go(func() { client.visit(ctx) })
		until(there)
	}
	for _, client := range all[2:] {
		before := client.resumed
		seen := client.visitOnce(ctx)
		until(seen)
		src.add(1)
		<-client.visitOnce(ctx)
		if client.resumed != before+1 && client.resumed != before+2 {
			t.Errorf("a client that comes back after event %d (id %s) has not gone on where it was", client.last, client.id)
		}
	}
	leave()
	staying.Wait()
}

// visitOnce opens a stream and leaves at the first event. The channel is closed
// then.
func (c *counting) visitOnce(ctx context.Context) <-chan struct{} {
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		ctx, leave := context.WithCancel(ctx)
		defer leave()
		c.enough = leave
		c.visit(ctx)
	}()
	return seen
}
