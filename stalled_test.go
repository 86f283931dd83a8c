package caddysse_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A third of the clients read nothing, and their upstream sends as fast as it
// can. The others must not be affected.
func TestStalledClientsDelayNobodyElse(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	clients, ticks := 60, 20
	if os.Getenv(rollingVariable) != "" {
		clients, ticks = 2000, 200
	}
	const period = 50 * time.Millisecond
	var flooded atomic.Int64
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		w.(http.Flusher).Flush()
		if r.URL.Path == "/flood" {
			piece := []byte("data: " + strings.Repeat("x", 16<<10) + "\n\n")
			for {
				n, err := w.Write(piece)
				if err != nil {
					return
				}
				flooded.Add(int64(n))
			}
		}
		for range ticks {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(period):
			}
			fmt.Fprintf(w, "data: %d\n\n", time.Now().UnixNano())
			w.(http.Flusher).Flush()
		}
	})
	c := startCaddy(t, `
		sse {
			prelude off
			write_timeout 5m
			drain off
		}
		reverse_proxy `+up.addr, withAdmin())

	without := p99Latency(t, c, clients-clients/3)

	var stalled []net.Conn
	for range clients / 3 {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(4 << 10)
		io.WriteString(conn, "GET /flood HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
		stalled = append(stalled, conn)
	}
	for last := int64(-1); last != flooded.Load(); time.Sleep(300 * time.Millisecond) {
		last = flooded.Load() // until nothing more can be sent
	}
	with := p99Latency(t, c, clients-clients/3)

	t.Logf("%d clients, a third of them stalled: p99 %v without these, %v with them", clients, without, with)
	// The latencies vary with the load of the machine. A stream that waited for
	// a stalled client would wait for minutes.
	if limit := without*3/2 + 10*time.Second; with > limit {
		t.Errorf("p99 %v with stalled clients, %v without them", with, without)
	}
	if _, listed := c.admin("GET", "/sse/streams?path=/flood&limit=0"); !strings.Contains(listed, fmt.Sprintf(`"total":%d`, len(stalled))) {
		t.Errorf("the stalled streams: %s", listed)
	}
}

// p99Latency opens streams and returns the 99th percentile of how late events
// come.
func p99Latency(t *testing.T, c *testCaddy, clients int) time.Duration {
	t.Helper()
	var (
		mu        sync.Mutex
		latencies []time.Duration
		reading   sync.WaitGroup
	)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for range clients {
		reading.Go(func() {
			req, err := http.NewRequest(http.MethodGet, c.url+"/ticks", nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Accept", eventStream)
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			var own []time.Duration
			for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
				if sent, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
					nanos, _ := strconv.ParseInt(sent, 10, 64)
					own = append(own, time.Since(time.Unix(0, nanos)))
				}
			}
			mu.Lock()
			latencies = append(latencies, own...)
			mu.Unlock()
		})
	}
	reading.Wait()
	if len(latencies) == 0 {
		t.Fatal("no events came")
	}
	slices.Sort(latencies)
	return latencies[len(latencies)*99/100]
}
