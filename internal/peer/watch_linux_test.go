package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/peer/peertest"
)

const (
	// deadTimeout is the timeout with which these tests watch connections.
	deadTimeout = 2 * time.Second

	// deadGrace is how much later the end may come: the kernel counts from the
	// first retransmission, and the machine may be busy.
	deadGrace = 4 * time.Second

	// mayStop is how long the process may be stopped without missing what the kernel
	// did.
	mayStop = deadTimeout / 8
)

// transports are the protocols whose connections can be dead.
var transports = []string{"plain", "TLS", "h2"}

// watchedServer is a plain net/http server. It reports the fate of each
// connection whose client is gone.
type watchedServer struct {
	*httptest.Server
	ends chan connectionEnd
}

type connectionEnd struct {
	fate Fate
	at   time.Time
}

// newWatchedServer starts a server that sends a beat at once, and then one at
// each interval.
func newWatchedServer(t *testing.T, transport string, interval time.Duration, keepAlive net.KeepAliveConfig) *watchedServer {
	t.Helper()
	s := &watchedServer{ends: make(chan connectionEnd, 10)}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		FromContext(ctx).Watch(deadTimeout)
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
		s.ends <- connectionEnd{FromContext(ctx).Leave(deadTimeout), time.Now()}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
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
		return WithConn(ctx, c)
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

// open requests an answer from a host and waits for its first beat.
func (s *watchedServer) open(t *testing.T, host *peertest.Host) (leave context.CancelFunc, socket *net.TCPConn) {
	t.Helper()
	transport := s.Client().Transport.(*http.Transport).Clone()
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := host.Dial(ctx, network, addr)
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
	stopped := peertest.WatchStops(t)
	host := peertest.NewHost(t)
	probing := net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 100}
	servers := make(map[string]*watchedServer)
	for _, transport := range transports {
		servers[transport+", beats"] = newWatchedServer(t, transport, 300*time.Millisecond, net.KeepAliveConfig{})
		servers[transport+", one beat"] = newWatchedServer(t, transport, 1500*time.Millisecond, net.KeepAliveConfig{})
		servers[transport+", nothing but keepalive probes"] = newWatchedServer(t, transport, time.Hour, probing)
	}
	for _, server := range servers {
		server.open(t, host)
	}
	vanished := time.Now()
	host.Vanish()
	for name, server := range servers {
		end := server.next(t)
		took := end.at.Sub(vanished)
		t.Logf("%s: %s after %v", name, end.fate, took)
		if end.fate != Dead {
			peertest.SkipIfStopped(t, stopped, mayStop)
			t.Errorf("%s: it is %s, want dead", name, end.fate)
		}
		// The last acknowledged data was sent at most a second before, and the
		// first unacknowledged data at most 1.5 s after. The rest is for a busy
		// machine.
		if took < deadTimeout-time.Second || took > deadTimeout+1500*time.Millisecond+deadGrace+10*time.Second {
			t.Errorf("%s: it ended after %v", name, took)
		}
	}
}

// If a client left while its host was away, and the host answers with a reset
// when it is back, then the client has closed, however late that is noticed.
func TestAConnectionThatAHostResetsOnComingBackIsNotDead(t *testing.T) {
	stopped := peertest.WatchStops(t)
	host := peertest.NewHost(t)
	servers := make(map[string]*watchedServer)
	var sockets []*net.TCPConn
	for _, transport := range transports {
		servers[transport] = newWatchedServer(t, transport, 100*time.Millisecond, net.KeepAliveConfig{})
		_, socket := servers[transport].open(t, host)
		sockets = append(sockets, socket)
	}
	host.Vanish()
	vanished := time.Now()
	for _, socket := range sockets {
		socket.SetLinger(0)
		socket.Close() // the reset gets lost
	}
	time.Sleep(deadTimeout / 2)
	host.ComeBack()
	for name, server := range servers {
		end := server.next(t)
		took := end.at.Sub(vanished)
		t.Logf("%s: %s after %v", name, end.fate, took)
		switch {
		case took > deadTimeout:
			t.Logf("%s: too late to show something", name)
		case end.fate != Alive:
			peertest.SkipIfStopped(t, stopped, mayStop)
			t.Errorf("%s: it is %s, want alive: it was reset", name, end.fate)
		}
	}
}

// The HTTP/2 server may close the connection before a stream learns that its
// client is gone.
func TestTheFateOfAConnectionIsKnownAfterItsClose(t *testing.T) {
	stopped := peertest.WatchStops(t)
	host := peertest.NewHost(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	const resets = 3 // this many clients reset, and as many vanish
	type result struct {
		want, got Fate
	}
	results := make(chan result)
	var clients []*net.TCPConn
	for i := range 2 * resets {
		client, err := host.Dial(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client.(*net.TCPConn))
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		want := Dead
		if i < resets {
			want = Alive
		}
		ctx := WithConn(t.Context(), server)
		FromContext(ctx).Watch(deadTimeout)
		go func() {
			server.Read(make([]byte, 1)) // wait for the end
			server.Close()
			time.Sleep(deadTimeout / 8) // with or without a glance in the meantime
			results <- result{want, FromContext(ctx).Leave(deadTimeout)}
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
	host.Vanish()
	for range clients {
		select {
		case r := <-results:
			if r.got != r.want {
				peertest.SkipIfStopped(t, stopped, mayStop)
				t.Errorf("it is %s, want %s", r.got, r.want)
			}
		case <-time.After(patience):
			t.Fatalf("nothing has ended within %v", patience)
		}
	}
}

func TestAHostThatWasAwayForLessThanTheTimeoutGoesOn(t *testing.T) {
	stopped := peertest.WatchStops(t)
	host := peertest.NewHost(t)
	server := newWatchedServer(t, "h2", 100*time.Millisecond, net.KeepAliveConfig{})
	leave, _ := server.open(t, host)
	for range 3 {
		host.Vanish()
		time.Sleep(deadTimeout * 2 / 5)
		host.ComeBack()
		time.Sleep(deadTimeout * 3 / 5)
	}
	select {
	case end := <-server.ends:
		peertest.SkipIfStopped(t, stopped, mayStop)
		t.Fatalf("it has ended: %s", end.fate)
	default:
	}
	leave()
	if end := server.next(t); end.fate != Alive {
		t.Errorf("it is %s, want alive: the client left", end.fate)
	}
}
