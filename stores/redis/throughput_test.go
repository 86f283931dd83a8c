package redis

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the store adds to live delivery and costs, beside the journal in memory
// alone, in one run: as many streams as CADDYSSE_TEST_STREAMS says, each with ten
// events a second for ten seconds.
func TestWhatTheStoreCosts(t *testing.T) {
	streams, err := strconv.Atoi(os.Getenv("CADDYSSE_TEST_STREAMS"))
	if err != nil {
		t.Skip("CADDYSSE_TEST_STREAMS says how many streams there are")
	}
	dir := t.TempDir()
	caddy := filepath.Join(dir, "program")
	plain := filepath.Join(dir, "plain")
	for program, from := range map[string]string{caddy: ".", plain: "../.."} {
		build := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "./cmd/caddy")
		build.Dir = from
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("building Caddy: %v\n%s", err, out)
		}
	}
	with, without := size(t, caddy), size(t, plain)
	t.Logf("Caddy with sse: %.1f MB, and with the store: %.2f MB more", without/1e6, (with-without)/1e6)

	upstream := httptest.NewServer(http.HandlerFunc(stampedEvents))
	defer upstream.Close()
	redis := startServer(t, "--appendonly", "no")
	var readings [2][]measured
	for range 2 {
		for i, settings := range []string{"", "store redis {\naddress " + redis.address + "\n}"} {
			readings[i] = append(readings[i], measure(t, caddy, dir, upstream.Listener.Addr().String(), settings, streams, redis))
		}
	}
	for i, what := range []string{"in memory", "and in Redis"} {
		for _, m := range readings[i] {
			t.Logf("%-12s  %6.0f events/s  p50 %7.3f ms  p99 %7.3f ms  Caddy %5.1f %% of a core  Redis %5.1f %%",
				what, m.rate, m.p50, m.p99, m.caddyCPU, m.redisCPU)
		}
	}
}

type measured struct{ rate, p50, p99, caddyCPU, redisCPU float64 }

func size(t *testing.T, file string) float64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return float64(info.Size())
}

// stampedEvents sends ten events a second, each with the time at which it is sent.
func stampedEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	if http.NewResponseController(w).Flush() != nil {
		return
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
			if _, err := fmt.Fprintf(w, "data: %d %s\n\n", time.Now().UnixNano(), strings.Repeat("x", 80)); err != nil {
				return
			}
			if http.NewResponseController(w).Flush() != nil {
				return
			}
		}
	}
}

// measure runs a Caddy for a while.
func measure(t *testing.T, caddy, dir, upstream, settings string, streams int, redis *server) measured {
	t.Helper()
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	config := filepath.Join(dir, "measured.Caddyfile")
	writeFile(t, config, fmt.Sprintf(`
		{
			admin off
			log {
				output discard
			}
		}
		http://:%s {
			bind 127.0.0.1
			sse {
				resume 1m {
					%s
				}
			}
			reverse_proxy %s
		}`, port, settings, upstream))
	process := exec.Command(caddy, "run", "--config", config, "--adapter", "caddyfile")
	process.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	}()
	eventually(t, "Caddy listens", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})

	const warm, long = 5 * time.Second, 10 * time.Second
	from := time.Now().Add(warm)
	ctx, stop := context.WithDeadline(t.Context(), from.Add(long))
	defer stop()
	var (
		mu  sync.Mutex
		all []float64
		wg  sync.WaitGroup
	)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range streams {
		wg.Go(func() {
			delays := delaysOf(ctx, client, "http://"+address+"/", from)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, delays...)
		})
	}
	time.Sleep(time.Until(from))
	caddyBefore, redisBefore := cpu(t, process.Process.Pid), cpu(t, redis.process.Process.Pid)
	time.Sleep(long - 100*time.Millisecond)
	caddyAfter, redisAfter := cpu(t, process.Process.Pid), cpu(t, redis.process.Process.Pid)
	wg.Wait()
	if len(all) == 0 {
		t.Fatal("no event has come")
	}
	slices.Sort(all)
	of := func(part float64) float64 { return all[int(part*float64(len(all)-1))] }
	return measured{
		rate: float64(len(all)) / long.Seconds(), p50: of(.5), p99: of(.99),
		caddyCPU: 100 * (caddyAfter - caddyBefore) / long.Seconds(), redisCPU: 100 * (redisAfter - redisBefore) / long.Seconds(),
	}
}

// delaysOf reads a stream to its end and returns the delays of its events, in
// milliseconds.
func delaysOf(ctx context.Context, client *http.Client, url string, from time.Time) (delays []float64) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil
	}
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Cache-Control", "no-cache")
	res, err := client.Do(req)
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		stamp, found := strings.CutPrefix(lines.Text(), "data: ")
		at := time.Now()
		stamp, _, _ = strings.Cut(stamp, " ")
		sent, err := strconv.ParseInt(stamp, 10, 64)
		if found && err == nil && at.After(from) {
			delays = append(delays, float64(at.UnixNano()-sent)/1e6)
		}
	}
	return delays
}

// cpu is what a process has used, in seconds.
func cpu(t *testing.T, pid int) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Skip("the system does not tell what a process uses")
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100
}
