package trial

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestWhatTheStoreCosts measures live delivery without a store, with one, with
// a slow one, and of streams of another node. CADDYSSE_TEST_LOAD is the number
// of streams, with ten events per second each.
func TestWhatTheStoreCosts(t *testing.T) {
	var streams int
	if _, err := fmt.Sscan(os.Getenv("CADDYSSE_TEST_LOAD"), &streams); err != nil {
		t.Skip("it measures; set CADDYSSE_TEST_LOAD=1000")
	}
	s := startServer(t)
	slow := startHop(t, s.addr, 50*time.Millisecond).addr
	for range 2 {
		for _, c := range []struct{ what, redis, reader string }{
			{"memory", "", ""},
			{"redis", s.addr, ""},
			{"redis, 50 ms away each way", slow, ""},
			{"redis, the clients on another node", s.addr, s.addr},
		} {
			up := newSource(t, 0, func() time.Duration { return 100 * time.Millisecond })
			a := startNode(t, "a", up.host(), c.redis, "1m", "history 256KiB 1GiB")
			var b *node
			if c.reader != "" {
				b = startNode(t, "b", up.host(), c.reader, "1m", "history 256KiB 1GiB")
				waitForIDs(t, b, site)
			}
			if c.redis != "" {
				waitForIDs(t, a, site)
			}
			t.Logf("%-36s %s", c.what, measure(t, s, a, b, streams))
			a.kill()
			if b != nil {
				b.kill()
			}
			up.CloseClientConnections()
		}
	}
}

// measure opens streams on a, makes their clients come back to b unless that is
// nil, and measures how long events take from the upstream to the client.
func measure(t *testing.T, s *server, a, b *node, streams int) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ctx, cancel := context.WithCancel(context.Background())
	var (
		work      sync.WaitGroup
		ready     sync.WaitGroup
		mu        sync.Mutex
		latencies []time.Duration
		from, to  time.Time
		begin     = make(chan struct{})
	)
	for i := range streams {
		ready.Add(1)
		work.Go(func() {
			opened := sync.OnceFunc(ready.Done)
			defer opened()
			url := fmt.Sprintf("/%d", i)
			stream, err := request(ctx, client, "GET", "http://"+a.addr+url, site, "")
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { stream.close() }()
			if b != nil {
				id := ""
				for id == "" || strings.HasSuffix(id, ".0") {
					m, err := stream.next()
					if err != nil {
						t.Error(err)
						return
					}
					id = m.id
				}
				stream.close()
				if stream, err = request(ctx, client, "GET", "http://"+b.addr+url, site, id); err != nil {
					t.Error(err)
					return
				}
			}
			var own []time.Duration
			for {
				m, err := stream.next()
				if err != nil {
					break
				}
				opened()
				select {
				case <-begin:
				default:
					continue
				}
				var incarnation, number, at int64
				if n, _ := fmt.Sscanf(m.data, "%d %d %d", &incarnation, &number, &at); n == 3 {
					if now := time.Now(); now.After(from) && now.Before(to) {
						own = append(own, now.Sub(time.Unix(0, at)))
					}
				}
			}
			mu.Lock()
			latencies = append(latencies, own...)
			mu.Unlock()
		})
	}
	ready.Wait()
	time.Sleep(2 * time.Second)
	from = time.Now()
	to = from.Add(8 * time.Second)
	close(begin)
	redis, caddy, reader := cpu(s.cmd.Process.Pid), cpu(a.cmd.Process.Pid), time.Duration(0)
	if b != nil {
		reader = cpu(b.cmd.Process.Pid)
	}
	time.Sleep(time.Until(to))
	took := time.Since(from)
	share := func(pid int, before time.Duration) float64 { return 100 * float64(cpu(pid)-before) / float64(took) }
	text := fmt.Sprintf("redis %3.0f %% CPU, Caddy %3.0f %%", share(s.cmd.Process.Pid, redis), share(a.cmd.Process.Pid, caddy))
	if b != nil {
		text += fmt.Sprintf(", the other one %3.0f %%", share(b.cmd.Process.Pid, reader))
	}
	cancel()
	work.Wait()
	slices.Sort(latencies)
	if len(latencies) == 0 {
		t.Fatal("no event has come")
	}
	at := func(part float64) time.Duration {
		return latencies[int(part*float64(len(latencies)-1))].Round(10 * time.Microsecond)
	}
	return fmt.Sprintf("%6.0f events/s, p50 %s, p99 %s, %s", float64(len(latencies))/took.Seconds(), at(0.5), at(0.99), text)
}

// cpu returns how much CPU time a process has used.
func cpu(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	var user, system int64
	_, _ = fmt.Sscan(fields[11], &user)
	_, _ = fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}
