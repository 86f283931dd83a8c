package caddysse_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// Whatever happens at the same time, a stream has one reason, and its response
// is either complete or aborted. In a bubble, everything happens at exactly the
// same instant.
func TestAllEndsInOneInstantGiveOneEnd(t *testing.T) {
	seeds := 400
	if raceEnabled {
		seeds = 150
	}
	reasons := make(map[string]int)
	for seed := range seeds {
		random := rand.New(rand.NewPCG(uint64(seed), 0))
		chance := func(n int) bool { return random.IntN(n) == 0 }
		synctest.Test(t, func(t *testing.T) {
			config := heartbeat(time.Second, -1)
			config.Name = "instant"
			config.MaxStreams, config.MaxStreamsPerClient = 3, 3
			if chance(2) {
				config.UpstreamTimeout = caddy.Duration(10 * time.Second)
			}
			if chance(2) {
				config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(10 * time.Second)}
			}
			if chance(2) {
				config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Duration(1+random.IntN(10)) * time.Second)}
			}
			h := provision(t, config)
			c := newClient(t)
			if chance(4) {
				c.stall = make(chan struct{})
				time.AfterFunc(10*time.Second, func() { close(c.stall) })
			}
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			if chance(2) {
				time.AfterFunc(10*time.Second, leave)
			}
			admin := chance(2)
			if admin {
				time.AfterFunc(10*time.Second, func() { deleteStreams(t, "name=instant") })
			}
			method := "GET"
			if chance(3) {
				method = "POST"
			}
			early, answers, tail, how := chance(4), !chance(4), "data: ha"[:8*random.IntN(2)], random.IntN(5)
			r := get("text/event-stream").WithContext(ctx)
			r.Method = method
			done := make(chan struct{})
			var err error
			var panicked any
			go func() {
				defer close(done)
				panicked, err = serveRecovering(h, c, r, func(w http.ResponseWriter, r *http.Request) error {
					if early {
						time.Sleep(10 * time.Second)
					}
					if answers {
						w.Header().Set("Content-Type", "text/event-stream")
						w.WriteHeader(200)
						io.WriteString(w, "data: 1\n\n"+tail)
					}
					select {
					case <-r.Context().Done():
						if how == 4 {
							return r.Context().Err()
						}
						panic(http.ErrAbortHandler)
					case <-time.After(10*time.Second - time.Since(c.start)):
					}
					switch how {
					case 0:
						panic(http.ErrAbortHandler)
					case 1:
						return errors.New("it failed")
					case 2:
						io.WriteString(w, "lf\n\ndata: 2\n\n")
					case 3:
						<-r.Context().Done()
						panic(http.ErrAbortHandler)
					}
					return nil
				})
			}()
			select {
			case <-done:
			case <-time.After(time.Minute):
				// Some of them do not end by themselves.
				leave()
				<-done
			}
			synctest.Wait()
			if panicked != nil && panicked != http.ErrAbortHandler {
				t.Errorf("seed %d: %v", seed, panicked)
			}
			list := callAdmin(t, "/sse/streams?name=instant").Body.String()
			if !strings.Contains(list, `"total":0`) {
				t.Errorf("seed %d: still listed: %s", seed, list)
			}
			end := "complete"
			if panicked != nil {
				end = "aborted"
			} else if err != nil {
				end = "error"
			}
			reasons[end]++
			// All places are free again.
			for range 2 {
				if again := play(t, h, func(w http.ResponseWriter) {}); !isStream(again) {
					t.Errorf("seed %d: a place is lost", seed)
				}
			}
		})
	}
	t.Logf("%d seeds: %v", seeds, reasons)
}

// deleteStreams calls the admin API without a network.
func deleteStreams(t testing.TB, query string) {
	module, err := caddy.GetModule("admin.api.sse")
	if err != nil {
		t.Error(err)
		return
	}
	r := httptest.NewRequest(http.MethodDelete, "/sse/streams?"+query, nil)
	for _, route := range module.New().(caddy.AdminRouter).Routes() {
		if route.Pattern == r.URL.Path {
			if err := route.Handler.ServeHTTP(httptest.NewRecorder(), r); err != nil {
				t.Error(err)
			}
		}
	}
}

// The same over sockets, with a reload among the ends.
func TestAllEndsAtOnceGiveEachStreamOneEnd(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	rounds := 4
	if raceEnabled {
		rounds = 2
	}
	const streams = 60
	abrupt := map[string]bool{ // whether the client sees an abort; without an entry, it has left and can't tell
		"upstream_closed": false, "drained": false, "max_duration": false, "admin": false,
		"upstream_error": true, "dead_client": true, "server_closed": true,
	}
	for seed := range rounds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			all := make(chan struct{})
			up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
				random := rand.New(rand.NewPCG(uint64(seed), uint64(len(r.URL.Path))+uint64(r.URL.Path[len(r.URL.Path)-1])))
				w.Header().Set("Content-Type", eventStream)
				io.WriteString(w, "data: 1\n\n")
				if random.IntN(3) == 0 {
					io.WriteString(w, "data: ha")
				}
				w.(http.Flusher).Flush()
				select {
				case <-all:
				case <-r.Context().Done():
					return
				}
				switch random.IntN(6) {
				case 0:
					panic(http.ErrAbortHandler)
				case 1:
					if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
						conn.(*net.TCPConn).SetLinger(0)
						conn.Close()
					}
				case 2:
					io.WriteString(w, "lf\n\ndata: 2\n\n")
				case 3:
					for range 100_000 { // more than all buffers to a client that does not read
						if _, err := io.WriteString(w, "data: 3\n\n"); err != nil {
							return
						}
					}
					<-r.Context().Done()
				case 4:
				default:
					<-r.Context().Done()
				}
			})
			name := uniqueName("ends")
			site := func(more string) string {
				return `
				sse 1s {
					name ` + name + `
					prelude 10ms
					drain 1ms
					upstream_timeout 600ms
					write_timeout 4s
					max_duration 600ms
					max_streams_per_client 1000
					` + more + `
				}
				route {
					test_no_body
					reverse_proxy ` + up.addr + `
				}`
			}
			c := startCaddy(t, site(""), withAdmin())
			random := rand.New(rand.NewPCG(uint64(seed), 1))
			type stream struct {
				path  string
				res   *reply
				body  *follower // nil: the client reads nothing
				leave bool
			}
			clients := map[string]*testClient{}
			for _, proto := range clientProtocols {
				clients[proto] = c.client(proto)
			}
			var open []*stream
			for i := range streams {
				method := "GET"
				if random.IntN(3) == 0 {
					method = "POST"
				}
				cl := clients[clientProtocols[i%3]]
				s := &stream{path: fmt.Sprintf("/%s/%d", name, i), leave: random.IntN(4) == 0}
				s.res = cl.do(t, cl.request(t, method, s.path, nil, acceptStream))
				if random.IntN(5) > 0 {
					s.body = s.res.follow()
				}
				open = append(open, s)
			}
			began := time.Now()
			var ending sync.WaitGroup
			close(all)
			for _, s := range open {
				if s.leave {
					ending.Go(s.res.leave)
				}
			}
			ending.Go(func() {
				c.admin("DELETE", "/sse/streams?path=/"+name+"/1")
				c.reload(site("retry 1s")) // the new configuration has its own admin API
			})
			ending.Wait()

			ended := make(map[string]int)
			for _, s := range open {
				line := c.closedLine(t, s.path)
				reason := line["reason"].(string)
				ended[reason]++
				if s.body == nil || s.leave {
					continue
				}
				_, err := s.body.rest()
				want, known := abrupt[reason]
				if reason == "upstream_timeout" || reason == "admin" {
					want, known = line["method"] == "POST", true // clean for an EventSource
				}
				// On a very slow machine, an event or a write can take longer
				// than an early end waits for it, and is broken off.
				if late := seconds(line["duration"]) > 800*time.Millisecond; late && err != io.EOF {
					continue
				}
				if !known || (err == io.EOF) == want {
					t.Errorf("%s ended with %v for the client: %v", s.path, err, line)
				}
			}
			for _, s := range open {
				s.res.leave()
				if s.body == nil {
					s.res.Body.Close()
				}
			}
			c.waitForStreams(t, 0)
			s := c.scrape(t)
			if live := s.expectAccounted(t, name); live != 0 {
				t.Errorf("%v are live", live)
			}
			t.Logf("%v after %v", ended, time.Since(began))
		})
	}
}

func TestHandlersThatDoNotLeaveAreNotWaitedForLong(t *testing.T) {
	for took, aborts := range map[time.Duration]bool{4 * time.Second: false, 6 * time.Second: true} {
		synctest.Test(t, func(t *testing.T) {
			config := silent()
			config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(time.Minute)}
			panicked, err := serveRecovering(provision(t, config), newClient(t), get("text/event-stream"), stream(func(w http.ResponseWriter) {
				write(t, w, "data: 1\n\n")
				time.Sleep(time.Minute + took)
			}))
			if aborted := panicked == http.ErrAbortHandler; aborted != aborts || err != nil {
				t.Errorf("handlers that took %v: %v, %v", took, panicked, err)
			}
		})
	}
}

// HTTP/1.0 has no chunks: the end of the connection is the end of the stream.
func TestAStreamOverHTTP10(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 100ms {
			prelude off
		}
		reverse_proxy `+up.addr)
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET /old HTTP/1.0\r\n%s\r\nCache-Control: no-cache\r\n\r\n", acceptStream)
	call := up.accept(t)
	call.start(eventStream)
	call.send("data: 1\n\n")
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != 200 || len(res.TransferEncoding) > 0 || res.Header.Get("X-Accel-Buffering") != "no" {
		t.Errorf("answered %s, %v, %v", res.Status, res.TransferEncoding, res.Header)
	}
	want := "data: 1\n\n:heartbeat\n\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
	call.end()
	if rest, err := io.ReadAll(res.Body); err != nil || strings.ReplaceAll(string(rest), ":heartbeat\n\n", "") != "" {
		t.Errorf("after that came %q, %v", rest, err)
	}
	line := c.closedLine(t, "/old")
	expectEnd(t, line, "upstream_closed", "info")
	if line["proto"] != "HTTP/1.1" || line["events"] != 1.0 {
		t.Errorf("told: %v", line)
	}
}

// For the server, a client that has closed its side has left.
func TestAClientThatHasLeftIsNotToldOfAnEnd(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, "sse\nreverse_proxy "+up.addr)
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(conn, "GET /left HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n")
	call := up.accept(t)
	call.start(eventStream)
	call.send("data: 1\n\n")
	reader := bufio.NewReader(conn)
	for line := ""; line != "data: 1\n"; {
		if line, err = reader.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(reader)
	if string(rest) != "\n\r\n" || err != nil {
		t.Errorf("got %q, %v; want the rest of the event and no last chunk", rest, err)
	}
	expectEnd(t, c.closedLine(t, "/left"), "client_closed", "info")
}
