package peer

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience limits every wait for something that must happen.
const patience = time.Minute

// needUserTimeout skips a test on platforms that can't watch a connection.
func needUserTimeout(t *testing.T) {
	t.Helper()
	if err := CheckUserTimeout(); err != nil {
		t.Skip(err)
	}
}

// acceptOne returns both ends of a connection to a listener.
func acceptOne(t testing.TB, ln net.Listener) (server, client net.Conn) {
	t.Helper()
	defer ln.Close()
	client, err := net.Dial(ln.Addr().Network(), ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server, client
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// newConn returns a connection and the sockets at both of its ends.
func newConn(t testing.TB) (c *Conn, server, client *net.TCPConn) {
	t.Helper()
	s, cl := acceptOne(t, listen(t))
	c = FromContext(WithConn(t.Context(), s))
	if c == nil {
		t.Fatal("no connection found")
	}
	return c, s.(*net.TCPConn), cl.(*net.TCPConn)
}

// timeoutOf returns the timeout that a socket has.
func timeoutOf(t *testing.T, socket syscall.Conn) time.Duration {
	t.Helper()
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var timeout time.Duration
	if cerr := raw.Control(func(fd uintptr) { timeout, err = userTimeout(int(fd)) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return timeout
}

func TestASocketHasTheShortestOfItsTimeouts(t *testing.T) {
	needUserTimeout(t)
	for _, before := range []time.Duration{0, 9 * time.Second} {
		for _, test := range []struct {
			name  string
			steps []int // seconds; a negative one ends the watch with that timeout
			want  []int // seconds on the socket after each step; -1: the value that it had before
		}{
			{"one", []int{5, -5}, []int{5, -1}},
			{"one after the other", []int{5, -5, 3, -3}, []int{5, -1, 3, -1}},
			{"shorter, then longer", []int{5, 3, 20, -3, -20, -5}, []int{5, 3, 3, 5, 5, -1}},
			{"the longer one stays", []int{20, 5, -5, -20}, []int{20, 5, 20, -1}},
			{"two alike", []int{3, 3, 5, -3, -3, -5}, []int{3, 3, 3, 3, 5, -1}},
			{"one that was never watched", []int{-4, 5, -4, -5, -5}, []int{-1, 5, 5, -1, -1}},
		} {
			t.Run(fmt.Sprintf("%s, %v before", test.name, before), func(t *testing.T) {
				c, server, _ := newConn(t)
				if before > 0 {
					err := c.controlLocked(func(fd int) error { return setUserTimeout(fd, before) })
					if err != nil {
						t.Fatal(err)
					}
				}
				for i, step := range test.steps {
					if step > 0 {
						c.Watch(time.Duration(step) * time.Second)
					} else {
						c.Leave(time.Duration(-step) * time.Second)
					}
					want := time.Duration(test.want[i]) * time.Second
					if test.want[i] < 0 {
						want = before
					}
					if got := timeoutOf(t, server); got != want {
						t.Errorf("step %d: %v on the socket, want %v", i+1, got, want)
					}
				}
				if c.timer != nil || len(c.watchers) != 0 {
					t.Errorf("left over: timer %v, watchers %v", c.timer, c.watchers)
				}
			})
		}
	}
}

func TestATimeoutOfLessThanTheSocketsUnitDoesNotSwitchItOff(t *testing.T) {
	needUserTimeout(t)
	c, server, _ := newConn(t)
	for timeout, want := range map[time.Duration]func(time.Duration) bool{
		time.Nanosecond: func(d time.Duration) bool { return d > 0 },
		math.MaxInt64:   func(d time.Duration) bool { return d > 24*24*time.Hour },
	} {
		c.Watch(timeout)
		if got := timeoutOf(t, server); !want(got) {
			t.Errorf("%v became %v on the socket", timeout, got)
		}
		c.Leave(timeout)
	}
}

func TestAConnectionThatIsClosedAlreadyIsLeftAlone(t *testing.T) {
	c, server, _ := newConn(t)
	server.Close()
	c.Watch(time.Second)
	c.Watch(2 * time.Second)
	for _, timeout := range []time.Duration{time.Second, 2 * time.Second} {
		if f := c.Leave(timeout); f != Alive {
			t.Errorf("it is %v, want alive", f)
		}
	}
	if c.timer != nil || len(c.watchers) != 0 {
		t.Errorf("left over: timer %v, watchers %v", c.timer, c.watchers)
	}
}

// Go's listeners accept MPTCP if the system has it.
func TestAMultipathConnectionIsLeftAloneOrWatched(t *testing.T) {
	needUserTimeout(t)
	ln := listen(t)
	defer ln.Close()
	dialer := new(net.Dialer)
	dialer.SetMultipathTCP(true)
	client, err := dialer.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c := FromContext(WithConn(t.Context(), server))
	c.Watch(time.Second)
	if watched := c.timer != nil; watched != (c.applied == time.Second) || watched == c.settled {
		t.Errorf("neither: timer %v, %v on the socket, settled %v", c.timer, c.applied, c.settled)
	}
	if f := c.Leave(time.Second); f != Alive {
		t.Errorf("it is %v, want alive", f)
	}
	if c.timer != nil || len(c.watchers) != 0 {
		t.Errorf("left over: timer %v, watchers %v", c.timer, c.watchers)
	}
}

func TestStreamsOfOneConnectionComeAndGoTogether(t *testing.T) {
	needUserTimeout(t)
	c, server, _ := newConn(t)
	var streams sync.WaitGroup
	for i := range 16 {
		streams.Go(func() {
			timeout := time.Duration(40+i%5) * time.Millisecond // so that ticks come in the meantime
			for range 200 {
				c.Watch(timeout)
				if f := c.Leave(timeout); f != Alive {
					t.Errorf("it is %v, want alive", f)
				}
			}
		})
	}
	streams.Go(func() {
		time.Sleep(5 * time.Millisecond)
		for range 100 {
			if _, err := server.Write([]byte(":\n\n")); err != nil {
				t.Error(err)
			}
		}
	})
	streams.Wait()
	if got := timeoutOf(t, server); got != 0 {
		t.Errorf("%v left on the socket", got)
	}
	if c.timer != nil || len(c.watchers) != 0 {
		t.Errorf("left over: timer %v, watchers %v", c.timer, c.watchers)
	}
}

func TestTheKernelIsAskedWhileAConnectionIsWatched(t *testing.T) {
	needUserTimeout(t)
	c, _, _ := newConn(t)
	c.Watch(brief)
	defer c.Leave(brief)
	glancedAt := func() instant {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.last.at
	}
	began := time.Now()
	for range 2 {
		for last := glancedAt(); glancedAt() == last; time.Sleep(time.Millisecond) {
			if time.Since(began) > patience {
				t.Fatalf("it was not asked within %v", patience)
			}
		}
	}
}

// flood writes until the client's window and all buffers on the way are full.
func flood(t *testing.T, server *net.TCPConn) {
	t.Helper()
	server.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for {
		if _, err := server.Write(make([]byte, 64<<10)); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			return
		}
	}
}

// A connection can end in many ways, and the HTTP/2 server may have closed it
// before its streams learn that. So each way is tested in both states.
func TestAClientThatClosesIsNotDead(t *testing.T) {
	needUserTimeout(t)
	for _, test := range []struct {
		name    string
		timeout time.Duration
		leave   func(t *testing.T, c *Conn, server, client *net.TCPConn)
		want    Fate
	}{
		{"stays", brief, func(*testing.T, *Conn, *net.TCPConn, *net.TCPConn) {}, Alive},
		{"closes", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			client.Close()
			readToEnd(t, server, io.EOF)
		}, Alive},
		{"closes, and is written to", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			client.Close()
			readToEnd(t, server, io.EOF)
			server.Write([]byte(":\n\n")) // it is answered with a reset
			for c.looked().phase != phaseClosed {
				time.Sleep(time.Millisecond)
			}
		}, Alive},
		{"closes one way", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			client.CloseWrite()
			readToEnd(t, server, io.EOF)
		}, Alive},
		{"resets", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			client.SetLinger(0)
			client.Close()
			readToEnd(t, server, syscall.ECONNRESET)
		}, Alive},
		{"resets with data in flight", unhurried, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			var written sync.WaitGroup
			written.Go(func() {
				for {
					if _, err := server.Write(make([]byte, 16<<10)); err != nil {
						return
					}
				}
			})
			io.CopyN(io.Discard, client, 1<<20)
			client.SetLinger(0)
			client.Close()
			written.Wait()
		}, Alive},
		{"resets after a long silence", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			time.Sleep(600 * time.Millisecond) // several times the timeout
			client.SetLinger(0)
			client.Close()
			readToEnd(t, server, syscall.ECONNRESET)
		}, Alive},
		{"takes nothing", unhurried, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			stall(t, c, server)
			readToEnd(t, server, syscall.ETIMEDOUT)
		}, Stalled},
		{"takes nothing and resets", time.Minute, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			stall(t, c, server)
			client.SetLinger(0)
			client.Close()
			readToEnd(t, server, syscall.ECONNRESET)
		}, Stalled},
	} {
		for _, closed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, closed %v", test.name, closed), func(t *testing.T) {
				t.Parallel()
				c, server, client := newConn(t)
				c.Watch(test.timeout)
				if _, err := server.Write([]byte("data: 1\n\n")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(client, make([]byte, 9)); err != nil {
					t.Fatal(err)
				}
				test.leave(t, c, server, client)
				if closed {
					c.freshen()
					server.Close()
				}
				if got := c.Leave(test.timeout); got != test.want {
					t.Errorf("it is %v, want %v (%+v)", got, test.want, c.last)
				}
			})
		}
	}
}

const (
	// brief is a short timeout that kernels still keep.
	brief = 150 * time.Millisecond

	// unhurried is for steps that must take less time than the timeout, even on
	// a busy machine: a client that reads, or half of the time from freshen to
	// Leave.
	unhurried = time.Second
)

// stall floods a connection until a glance finds it stalled.
func stall(t *testing.T, c *Conn, server *net.TCPConn) {
	t.Helper()
	flood(t, server)
	for !c.looked().stalled {
		time.Sleep(time.Millisecond)
	}
}

// freshen sets the time of the last glance to now. Without it, a machine that
// pauses the test would make the fate unknown.
func (c *Conn) freshen() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last.at = now()
}

// looked takes a glance at the connection and returns it.
func (c *Conn) looked() glance {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lookLocked()
	return c.last
}

// readToEnd reads until the connection ends, and expects the error want.
func readToEnd(t *testing.T, conn net.Conn, want error) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	_, err := conn.Read(make([]byte, 1))
	if !errors.Is(err, want) {
		t.Fatalf("reading ended with %v, want %v", err, want)
	}
}

// The last timeout that was in force counts, even for streams that leave after
// the one that set it.
func TestTheFateHoldsWhenTheShortestTimeoutHasGone(t *testing.T) {
	needUserTimeout(t)
	t.Parallel()
	c, server, _ := newConn(t)
	c.Watch(time.Hour)
	c.Watch(unhurried)
	stall(t, c, server)
	readToEnd(t, server, syscall.ETIMEDOUT)
	c.freshen()
	server.Close()
	for _, timeout := range []time.Duration{unhurried, time.Hour} {
		if got := c.Leave(timeout); got != Stalled {
			t.Errorf("leaving with %v: it is %v, want stalled", timeout, got)
		}
	}
}

// BenchmarkAGlance measures what a watched connection costs four times in each
// timeout.
func BenchmarkAGlance(b *testing.B) {
	if err := CheckUserTimeout(); err != nil {
		b.Skip(err)
	}
	c, _, _ := newConn(b)
	c.Watch(time.Hour)
	defer c.Leave(time.Hour)
	b.ReportAllocs()
	for b.Loop() {
		c.looked()
	}
}
