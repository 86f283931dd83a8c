package harness

import (
	"io"
	"net"
	"sync"
	"testing"
)

// Hop is a network between a client and a server that can be cut. It passes
// bytes on, TLS or not.
type Hop struct {
	Addr string // "127.0.0.1:…"

	target   string
	listener net.Listener

	mutex  sync.Mutex
	joined chan struct{} // closed, except while the network is cut
	over   bool          // the test has ended
	open   map[net.Conn]bool
}

// StartHop starts a hop in front of an address.
func StartHop(t testing.TB, target string) *Hop {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	joined := make(chan struct{})
	close(joined)
	h := &Hop{Addr: listener.Addr().String(), target: target, listener: listener, joined: joined, open: make(map[net.Conn]bool)}
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			passing.Go(func() { h.pass(client) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		h.mutex.Lock()
		h.over = true
		h.mutex.Unlock()
		h.Rejoin()
		h.reset()
		passing.Wait()
	})
	return h
}

// Port returns the port of the address.
func (h *Hop) Port() int { return h.listener.Addr().(*net.TCPAddr).Port }

// Cut breaks off every connection. Connections that clients open after that get
// no answer until Rejoin.
func (h *Hop) Cut() {
	h.mutex.Lock()
	select {
	case <-h.joined:
		h.joined = make(chan struct{})
	default:
	}
	h.mutex.Unlock()
	h.reset()
}

// Rejoin ends a cut.
func (h *Hop) Rejoin() {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	select {
	case <-h.joined:
	default:
		close(h.joined)
	}
}

func (h *Hop) reset() {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	for conn := range h.open {
		abort(conn)
	}
	clear(h.open)
}

// abort closes a connection with a reset.
func abort(conn net.Conn) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

func (h *Hop) pass(client net.Conn) {
	for {
		h.mutex.Lock()
		joined := h.joined
		h.mutex.Unlock()
		<-joined
		server, err := net.Dial("tcp", h.target)
		if err != nil {
			abort(client)
			return
		}
		h.mutex.Lock()
		switch {
		case h.over:
			h.mutex.Unlock()
			server.Close()
			abort(client)
			return
		case h.joined != joined: // it was cut again in the meantime
			h.mutex.Unlock()
			server.Close()
			continue
		}
		h.open[client], h.open[server] = true, true
		h.mutex.Unlock()
		h.copyBoth(client, server)
		return
	}
}

func (h *Hop) copyBoth(client, server net.Conn) {
	var copying sync.WaitGroup
	for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
		copying.Go(func() {
			io.Copy(pair[0], pair[1])
			pair[0].(*net.TCPConn).CloseWrite()
		})
	}
	copying.Wait()
	h.mutex.Lock()
	defer h.mutex.Unlock()
	for _, conn := range []net.Conn{client, server} {
		delete(h.open, conn)
		conn.Close()
	}
}
