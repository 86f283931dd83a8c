package caddysse_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

const (
	// deadTimeout is the dead_client_timeout of these tests.
	deadTimeout = 2 * time.Second

	// deadGrace is how much later the end may come: the kernel counts from the
	// first retransmission, and the machine may be busy.
	deadGrace = 4 * time.Second
)

// transports are the ways to a server that connections can be dead on.
var transports = []string{"plain", "TLS", "h2"}

// watchedServer is a server of net/http alone, whose answers end when their
// client is gone, and tell how.
type watchedServer struct {
	*httptest.Server
	ends chan connectionEnd
}

type connectionEnd struct {
	fate string
	at   time.Time
}

// newWatchedServer starts a server that sends a beat at once and then one every
// interval.
func newWatchedServer(t *testing.T, transport string, interval time.Duration, keepAlive net.KeepAliveConfig) *watchedServer {
	t.Helper()
	s := &watchedServer{ends: make(chan connectionEnd, 10)}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		caddysse.WatchConnection(ctx, deadTimeout)
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for ctx.Err() == nil {
			io.WriteString(w, ":\n\n")
			http.NewResponseController(w).Flush()
			select {
			case <-ticker.C:
			case <-ctx.Done():
			}
		}
		s.ends <- connectionEnd{caddysse.LeaveConnection(ctx, deadTimeout), time.Now()}
	}))
	s.Config.ErrorLog = discardLog
	s.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if keepAlive.Enable {
			socket := c
			if wrapper, ok := c.(*tls.Conn); ok {
				socket = wrapper.NetConn()
			}
			if err := socket.(*net.TCPConn).SetKeepAliveConfig(keepAlive); err != nil {
				t.Error(err)
			}
		}
		return caddysse.WithConnection(ctx, c)
	}
	switch transport {
	case "plain":
		s.Start()
	case "TLS":
		s.StartTLS()
	case "h2":
		s.EnableHTTP2 = true
		s.StartTLS()
	}
	t.Cleanup(s.Close)
	return s
}

// watch opens an answer from a host and waits for its first beat.
func (s *watchedServer) watch(t *testing.T, host *clientHost) (leave context.CancelFunc, socket *net.TCPConn) {
	t.Helper()
	transport := s.Client().Transport.(*http.Transport).Clone()
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := host.dial(ctx, network, addr)
		socket, _ = conn.(*net.TCPConn)
		return conn, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		res.Body.Close()
	})
	if want := s.EnableHTTP2; (res.ProtoMajor == 2) != want {
		t.Fatalf("it speaks %s", res.Proto)
	}
	if line, err := bufio.NewReader(res.Body).ReadString('\n'); line != ":\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	return cancel, socket
}

// next waits for the next answer to end.
func (s *watchedServer) next(t *testing.T) connectionEnd {
	t.Helper()
	select {
	case end := <-s.ends:
		return end
	case <-time.After(patience):
		t.Fatalf("nothing has ended within %v", patience)
		return connectionEnd{}
	}
}

func TestAConnectionWhoseHostVanishesIsDead(t *testing.T) {
	checkLeaks(t)
	host := newClientHost(t)
	probing := net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 100}
	servers := make(map[string]*watchedServer)
	for _, transport := range transports {
		servers[transport+", beats"] = newWatchedServer(t, transport, 300*time.Millisecond, net.KeepAliveConfig{})
		servers[transport+", one beat"] = newWatchedServer(t, transport, 1500*time.Millisecond, net.KeepAliveConfig{})
		servers[transport+", nothing but keepalive probes"] = newWatchedServer(t, transport, time.Hour, probing)
	}
	for _, server := range servers {
		server.watch(t, host)
	}
	vanished := time.Now()
	host.vanish()
	for name, server := range servers {
		end := server.next(t)
		took := end.at.Sub(vanished)
		t.Logf("%s: %s after %v", name, end.fate, took)
		if end.fate != "dead" {
			t.Errorf("%s: it is %s, want dead", name, end.fate)
		}
		// The last thing to be acknowledged came a second before at most, the
		// first thing not to be 1.5 s behind.
		if took < deadTimeout-time.Second || took > deadTimeout+1500*time.Millisecond+deadGrace {
			t.Errorf("%s: it ended after %v", name, took)
		}
	}
}

// A client that went while its host was away, and whose host then answers with
// a reset, has closed, however late we learn of it.
func TestAConnectionThatAHostResetsOnComingBackIsNotDead(t *testing.T) {
	checkLeaks(t)
	host := newClientHost(t)
	servers := make(map[string]*watchedServer)
	var sockets []*net.TCPConn
	for _, transport := range transports {
		servers[transport] = newWatchedServer(t, transport, 100*time.Millisecond, net.KeepAliveConfig{})
		_, socket := servers[transport].watch(t, host)
		sockets = append(sockets, socket)
	}
	host.vanish()
	vanished := time.Now()
	for _, socket := range sockets {
		socket.SetLinger(0)
		socket.Close() // the reset gets lost
	}
	time.Sleep(deadTimeout / 2)
	host.comeBack()
	for name, server := range servers {
		end := server.next(t)
		took := end.at.Sub(vanished)
		t.Logf("%s: %s after %v", name, end.fate, took)
		switch {
		case took > deadTimeout:
			t.Logf("%s: too late to show something", name)
		case end.fate != "alive":
			t.Errorf("%s: it is %s, want alive: it was reset", name, end.fate)
		}
	}
}

// The HTTP/2 server may close the connection before a stream is told that its
// client is gone.
func TestTheFateOfAConnectionIsKnownBehindItsClose(t *testing.T) {
	checkLeaks(t)
	host := newClientHost(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	const resets = 3 // of the clients; as many vanish
	type result struct {
		want, got string
	}
	results := make(chan result)
	var clients []*net.TCPConn
	for i := range 2 * resets {
		client, err := host.dial(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client.(*net.TCPConn))
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		want := "dead"
		if i < resets {
			want = "alive"
		}
		ctx := caddysse.WithConnection(t.Context(), server)
		caddysse.WatchConnection(ctx, deadTimeout)
		go func() {
			server.Read(make([]byte, 1)) // to the end
			server.Close()
			time.Sleep(deadTimeout / 8) // a glance comes meanwhile, or none
			results <- result{want, caddysse.LeaveConnection(ctx, deadTimeout)}
		}()
		go func() {
			for began := time.Now(); time.Since(began) < deadTimeout; time.Sleep(200 * time.Millisecond) {
				if _, err := io.WriteString(server, ":\n\n"); err != nil {
					return
				}
			}
		}()
	}
	time.Sleep(deadTimeout / 4)
	for _, client := range clients[:resets] {
		client.SetLinger(0)
		client.Close()
	}
	host.vanish()
	for range clients {
		select {
		case r := <-results:
			if r.got != r.want {
				t.Errorf("it is %s, want %s", r.got, r.want)
			}
		case <-time.After(patience):
			t.Fatalf("nothing has ended within %v", patience)
		}
	}
}

func TestAHostThatWasAwayForLessThanTheTimeoutGoesOn(t *testing.T) {
	checkLeaks(t)
	host := newClientHost(t)
	server := newWatchedServer(t, "h2", 100*time.Millisecond, net.KeepAliveConfig{})
	leave, _ := server.watch(t, host)
	for range 3 {
		host.vanish()
		time.Sleep(deadTimeout * 2 / 5)
		host.comeBack()
		time.Sleep(deadTimeout * 3 / 5)
	}
	select {
	case end := <-server.ends:
		t.Fatalf("it has ended: %s", end.fate)
	default:
	}
	leave()
	if end := server.next(t); end.fate != "alive" {
		t.Errorf("it is %s, want alive: the client left", end.fate)
	}
}

// from has a client connect from a host.
func (cl *testClient) from(host *clientHost) *testClient {
	cl.Transport.(*http.Transport).DialContext = host.dial
	return cl
}

// overTLS makes HTTP/1.1 of an h2 client, with TLS still.
func (cl *testClient) overTLS() *testClient {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	cl.Transport.(*http.Transport).Protocols = protocols
	return cl
}

func TestAClientThatVanishesEndsAsDeadClient(t *testing.T) {
	for _, test := range []struct {
		name    string
		options []siteOption
	}{
		{"plain listeners", nil},
		{"wrapped listeners", []siteOption{
			withGlobal("servers :58080 {\nprotocols h1\n}"),
			withGlobal("servers :58443 {\nlistener_wrappers {\nhttp_redirect\ntls\n}\n}"),
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			checkLeaks(t)
			host := newClientHost(t)
			up := newUpstream(t)
			c := startCaddy(t, `
				sse {
					heartbeat 500ms
					dead_client_timeout 2s
					drain off
				}
				reverse_proxy `+up.addr, test.options...)

			type open struct {
				call *upstreamCall
				path string
			}
			var vanishing []open
			for path, client := range map[string]*testClient{
				"/plain": c.client("h1").from(host),
				"/tls":   c.client("h2").overTLS().from(host),
				"/h2":    c.client("h2").from(host),
			} {
				exchange := client.begin(client.request(t, "GET", path, nil))
				call := up.accept(t)
				call.start(eventStream)
				body := exchange.headers(t).follow()
				call.send("data: 1\n\n")
				body.expect(t, "data: 1\n\n")
				vanishing = append(vanishing, open{call, path})
			}
			staying := c.client("h2")
			exchange := staying.begin(staying.request(t, "GET", "/staying", nil))
			call := up.accept(t)
			call.start(eventStream)
			stays := exchange.headers(t)

			host.vanish()
			vanished := time.Now()
			for _, open := range vanishing {
				open.call.expectGone()
			}
			if took := time.Since(vanished); took < deadTimeout-500*time.Millisecond || took > deadTimeout+deadGrace {
				t.Errorf("they ended after %v", took)
			}
			for i := range vanishing {
				entry := c.waitForLog("stream closed", i)
				if entry["reason"] != "dead_client" || entry.level() != "info" {
					t.Errorf("%s of %s at %s, want dead_client at info", entry["reason"], entry["path"], entry.level())
				}
			}
			stays.leave()
			call.expectGone()
			entry := c.waitForLog("stream closed", len(vanishing))
			if entry["path"] != "/staying" || entry["reason"] != "client_closed" {
				t.Errorf("%s of %s, want client_closed of /staying", entry["reason"], entry["path"])
			}
		})
	}
}

func TestAClientThatTakesNothingIsNoDeadClient(t *testing.T) {
	for _, vanishes := range []bool{false, true} {
		for _, proto := range []string{"h1", "TLS"} {
			name := proto
			if vanishes {
				name += ", whose host vanishes"
			}
			t.Run(name, func(t *testing.T) {
				checkLeaks(t)
				host := newClientHost(t)
				up := newUpstream(t)
				c := startCaddy(t, `
					sse {
						heartbeat off
						write_timeout off
						dead_client_timeout 2s
						drain off
					}
					reverse_proxy `+up.addr)
				client := c.client("h1").from(host)
				if proto == "TLS" {
					client = c.client("h2").overTLS().from(host)
				}
				exchange := client.begin(client.request(t, "GET", "/", nil))
				call := up.accept(t)
				call.start(eventStream)
				stalls := exchange.headers(t)
				defer stalls.leave()
				call.floodUntilStuck()
				if vanishes {
					host.vanish()
				}
				call.expectGone()
				if entry := c.waitForLog("stream closed", 0); entry["reason"] != "write_timeout" {
					t.Errorf("it is %s, want write_timeout", entry["reason"])
				}
			})
		}
	}
}
