package caddysse_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// noBody is the handler `test_no_body`, which removes a request's body. Over
// HTTP/3, a GET has a body of unknown length, which the reverse_proxy of 2.11.9
// reads from two goroutines if the machine is so busy that the end of the body
// takes longer than 200 ms.
type noBody struct{}

func init() {
	caddy.RegisterModule(noBody{})
	httpcaddyfile.RegisterHandlerDirective("test_no_body", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return noBody{}, nil
	})
}

func (noBody) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_no_body", New: func() caddy.Module { return new(noBody) }}
}

func (noBody) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	r.Body, r.ContentLength = http.NoBody, 0
	return next.ServeHTTP(w, r)
}

// Streams are opened over every protocol. When all are open, they end in all
// possible ways at the same time, while they are scraped, listed and deleted.
func TestEveryStreamIsAccountedForInAStorm(t *testing.T) {
	checkLeaks(t)
	streams := 1000
	switch {
	case testing.Short():
		streams = 200
	case raceEnabled:
		streams = 500
	}
	name := uniqueName("storm")
	all := make(chan struct{}) // closed when all are open: then the upstream acts
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		if strings.HasPrefix(r.URL.Path, "/short/") {
			w.Header().Set("Content-Length", "1000")
		}
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		select {
		case <-all:
		case <-r.Context().Done():
			return
		}
		for range rand.IntN(5) {
			io.WriteString(w, "data: 2\n\n")
			w.(http.Flusher).Flush()
		}
		switch way, _, _ := strings.Cut(r.URL.Path[1:], "/"); way {
		case "end":
		case "abort", "short":
			panic(http.ErrAbortHandler)
		case "reset":
			if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
		case "middle":
			io.WriteString(w, "data: ha")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case "flood":
			for r.Context().Err() == nil {
				io.WriteString(w, "data: 3\n\n")
			}
		default:
			<-r.Context().Done()
		}
	})
	c := startCaddy(t, `
		sse 1s {
			name `+name+`
			prelude 10ms
		}
		route {
			test_no_body
			reverse_proxy `+up.addr+`
		}`, withAdmin())

	// How a stream ends, and the reasons that may be reported. If both sides
	// end it, either may be first.
	ways := map[string][]string{
		"end":    {"upstream_closed", "admin"},
		"abort":  {"upstream_error", "admin"},
		"short":  {"upstream_error", "admin"},
		"reset":  {"upstream_error", "admin"},
		"leave":  {"client_closed", "admin"},
		"flood":  {"client_closed", "admin"},
		"middle": {"admin"},
		"delete": {"admin"},
		"both":   {"upstream_closed", "client_closed", "admin"},
	}
	var names []string
	for way := range ways {
		names = append(names, way)
	}

	// Use a connection for about a hundred streams.
	clients := make(map[string]*testClient)
	clientOf := func(proto string, i int) *testClient {
		key := fmt.Sprint(proto, i/240)
		if clients[key] == nil {
			clients[key] = c.client(proto)
		}
		return clients[key]
	}
	gate := make(chan struct{}, 100) // limits how many are being opened at a time
	var opening, running sync.WaitGroup
	var failed atomic.Int64
	for i := range streams {
		way, proto := names[i%len(names)], clientProtocols[i/len(names)%3]
		upstreamWay := way
		if way == "both" {
			upstreamWay = "end"
		}
		cl := clientOf(proto, i)
		req := cl.request(t, "GET", fmt.Sprintf("/%s/%s/%d", upstreamWay, way, i), nil)
		ctx, leave := context.WithCancel(req.Context())
		t.Cleanup(leave)
		opening.Add(1)
		running.Go(func() {
			gate <- struct{}{}
			res, err := cl.Do(req.WithContext(ctx))
			if err == nil {
				_, err = io.ReadFull(res.Body, make([]byte, 1))
			}
			<-gate
			opening.Done()
			if err != nil {
				if failed.Add(1) < 5 {
					t.Errorf("%s: %v", req.URL, err)
				}
				return
			}
			defer res.Body.Close()
			<-all
			switch way {
			case "leave", "both":
				leave()
			case "flood":
				io.ReadFull(res.Body, make([]byte, 1000))
				leave()
			}
			io.Copy(io.Discard, res.Body)
		})
	}
	ready := make(chan struct{})
	go func() { opening.Wait(); close(ready) }()

	var before samples
	scrapes := 0
	scrape := func() (live float64) {
		s := c.scrape(t)
		s.expectNoneBackwards(t, before)
		live = s.expectAccounted(t, name)
		before = s
		scrapes++
		if t.Failed() {
			t.FailNow()
		}
		return live
	}
	tooLate := time.After(6 * patience)
	for opened := false; !opened; {
		select {
		case <-ready:
			opened = true
		case <-tooLate:
			t.Fatalf("only %v streams are open", scrape())
		case <-time.After(5 * time.Millisecond):
		}
		scrape()
		c.streams(t, "?limit=10")
	}
	if live := scrape(); live != float64(streams) {
		t.Fatalf("%v streams are live, want %d", live, streams)
	}
	close(all)
	c.adminJSON(t, "DELETE", "/sse/streams?path=/delete/", 202)
	c.adminJSON(t, "DELETE", "/sse/streams?path=/middle/", 202)
	for deadline := time.Now().Add(3 * patience); ; {
		list, _ := c.streams(t, "?limit=20")
		for _, s := range list[:min(len(list), 3)] {
			c.admin("DELETE", "/sse/streams/"+s["id"].(string)) // it may be gone
		}
		if live := scrape(); live == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%v streams are still live: %v", live, list)
		}
	}
	running.Wait()

	ids := make(map[any]int)
	reasons := make(map[any]int)
	for _, line := range c.logs() {
		if line.message() != "stream closed" {
			continue
		}
		ids[line["id"]]++
		reasons[line["reason"]]++
		way := strings.Split(line["path"].(string), "/")[2]
		allowed := false
		for _, reason := range ways[way] {
			allowed = allowed || reason == line["reason"]
		}
		if !allowed {
			t.Errorf("%s was told as %v", way, line)
		}
		if (line["reason"] == "upstream_error") != (line.level() == "warn") {
			t.Errorf("told at %s: %v", line.level(), line)
		}
	}
	for id, times := range ids {
		if times != 1 {
			t.Errorf("%v was told %d times", id, times)
		}
	}
	if len(ids) != streams {
		t.Errorf("%d streams were told, want %d", len(ids), streams)
	}
	for reason, n := range reasons {
		if counted := before.sum("streams_closed_total", name, fmt.Sprintf("reason=%q", reason)); counted != float64(n) {
			t.Errorf("%v: %d in the log, %v in the metrics", reason, n, counted)
		}
	}
	if list, total := c.streams(t, ""); total != 0 {
		t.Errorf("left in the registry: %v", list)
	}
	t.Logf("%d scrapes; %v", scrapes, reasons)
}
