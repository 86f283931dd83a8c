//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// crowd are the clients. Each has one stream at a time, one after the other,
// until it is told to stop.
type crowd struct {
	proxy *proxy
	book  *ledger

	open     atomic.Int64 // streams at this moment
	opened   atomic.Int64
	unopened atomic.Int64 // requests without an answer, of clients that waited for one
	refused  atomic.Int64
}

// perConnection is how many clients share the connections of HTTP/2 and HTTP/3.
const perConnection = 50

// run keeps n streams open until ctx is done, and returns when all have ended.
func (c *crowd) run(ctx context.Context, n int, seed uint64) {
	var group sync.WaitGroup
	var transports []*transport
	shared := make(map[string]*transport)
	for i := range n {
		proto := []string{"h1", "h1", "h1", "h1", "h1", "h2", "h2", "h2", "h2", "h3"}[i%10]
		if i%(10*perConnection) < 10 {
			shared[proto] = c.newTransport(proto)
			transports = append(transports, shared[proto])
		}
		member := &client{crowd: c, random: rand.New(rand.NewPCG(seed, uint64(i))), shared: shared[proto]}
		group.Go(func() {
			// They do not all start at once.
			if pause(ctx, time.Duration(member.random.Int64N(int64(5*time.Second)))) {
				for ctx.Err() == nil {
					member.stream(ctx)
				}
			}
		})
	}
	group.Wait()
	for _, t := range transports {
		t.close()
	}
}

// transport is how clients reach the proxy.
type transport struct {
	proto string
	base  string
	http  http.RoundTripper
	close func()
}

func (c *crowd) newTransport(proto string) *transport {
	insecure := &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}
	open := &connections{set: make(map[io.Closer]struct{})}
	if proto == "h3" {
		h3 := &http3.Transport{
			TLSClientConfig: insecure, DisableCompression: true,
			Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
				conn, err := quic.DialAddrEarly(ctx, c.proxy.secure, tlsConfig, config)
				if err != nil {
					return nil, err
				}
				closer := quicConnection{conn}
				open.add(closer)
				context.AfterFunc(conn.Context(), func() { open.remove(closer) })
				return conn, nil
			},
		}
		return &transport{proto: proto, base: "https://localhost", http: h3, close: open.close}
	}
	addr, base := c.proxy.plain, "http://localhost"
	if proto == "h2" {
		addr, base = c.proxy.secure, "https://localhost"
	}
	t := &http.Transport{
		TLSClientConfig: insecure, DisableCompression: true, MaxIdleConnsPerHost: perConnection,
		Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			// Addresses of their own, so that ports do not run out.
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(rand.IntN(250)), byte(1+rand.IntN(250)))}}
			conn, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			c := &connection{conn, open}
			open.add(c)
			return c, nil
		},
	}
	if proto == "h2" {
		t.Protocols.SetHTTP2(true)
	} else {
		t.Protocols.SetHTTP1(true)
	}
	return &transport{proto: proto, base: base, http: t, close: open.close}
}

// connections are those of a transport. In the end all must be closed, even those
// that were dialed for a client that did not wait, and those that HTTP/2 does not
// consider idle yet.
type connections struct {
	mu     sync.Mutex
	set    map[io.Closer]struct{}
	closed bool
}

func (cs *connections) add(c io.Closer) {
	cs.mu.Lock()
	closed := cs.closed
	if !closed {
		cs.set[c] = struct{}{}
	}
	cs.mu.Unlock()
	if closed {
		c.Close()
	}
}

func (cs *connections) remove(c io.Closer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.set, c)
}

func (cs *connections) close() {
	cs.mu.Lock()
	cs.closed = true
	all := slices.Collect(maps.Keys(cs.set))
	cs.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}

// connection is a connection of HTTP/1.1 or HTTP/2.
type connection struct {
	net.Conn
	of *connections
}

func (c *connection) Close() error {
	c.of.remove(c)
	return c.Conn.Close()
}

// quicConnection is a connection of HTTP/3.
type quicConnection struct{ *quic.Conn }

func (c quicConnection) Close() error {
	return c.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
}

// client is a member of the crowd.
type client struct {
	crowd  *crowd
	random *rand.Rand
	shared *transport
}

// stream makes one request and reads its answer in one of several ways.
func (c *client) stream(ctx context.Context) {
	s := &sighting{
		site: sites[c.random.IntN(len(sites))], kind: "script", seed: c.random.Uint64(),
		method: http.MethodGet, proto: c.shared.proto,
	}
	if s.site.early && c.random.IntN(2) == 0 {
		s.kind = "late"
	}
	if c.random.IntN(8) == 0 {
		s.method = http.MethodPost
	}
	over := c.shared
	var stay, stall time.Duration // 0: to the end, not at all
	switch dice := c.random.IntN(200); {
	case dice == 0:
		// On a connection of its own, because over HTTP/3 a client that reads nothing
		// stalls all streams on its connection.
		s.kind, stall = "flood", 8*time.Second
		over = c.crowd.newTransport(over.proto)
		defer over.close()
	case dice < 80:
		stay = time.Duration(c.random.ExpFloat64() * float64(5*time.Second))
	}
	path := fmt.Sprintf("/%s/%s/%d", s.site.name, s.kind, s.seed)
	c.crowd.follow(ctx, over, path, s, stay, stall)
	if s.ending == refused || s.ending == unopened {
		pause(ctx, time.Duration(500+c.random.IntN(4500))*time.Millisecond)
	}
}

// follow makes the request and records the result in the ledger.
func (c *crowd) follow(ctx context.Context, over *transport, path string, s *sighting, stay, stall time.Duration) {
	defer c.book.saw(path, s)
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	if stay > 0 {
		timer := time.AfterFunc(stay, func() { leave(errLeft) })
		defer timer.Stop()
	}
	request, err := http.NewRequestWithContext(ctx, s.method, over.base+path, strings.NewReader(""))
	if err != nil {
		panic(err)
	}
	if s.method == http.MethodPost {
		request.Body = io.NopCloser(strings.NewReader(`{"stream":true}`))
	}
	request.Header.Set("Accept", "text/event-stream")
	request.Header.Set("Cache-Control", "no-cache") // as an EventSource
	response, err := over.http.RoundTrip(request)
	if err != nil {
		s.ending, s.err = unopened, err
		if ctx.Err() == nil {
			c.unopened.Add(1)
		}
		return
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		s.ending = refused
		c.refused.Add(1)
		if response.StatusCode != http.StatusBadGateway {
			c.book.problem("%s: status %d", path, response.StatusCode)
		}
		return
	}
	c.opened.Add(1)
	c.open.Add(1)
	defer c.open.Add(-1)
	if stall > 0 && !pause(ctx, stall) {
		s.ending = left
		return
	}
	s.body, err = io.ReadAll(response.Body)
	switch {
	case err == nil:
		s.ending = complete
	case ctx.Err() != nil:
		s.ending = left
	default:
		s.ending, s.err = aborted, err
	}
}

var errLeft = errors.New("the client leaves")

// pause returns false if ctx was done first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
