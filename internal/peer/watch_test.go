package peer

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// needUserTimeout skips tests of what this platform has not.
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

// newConn returns a connection, and the sockets at both its ends.
func newConn(t testing.TB) (c *Conn, server, client *net.TCPConn) {
	t.Helper()
	s, cl := acceptOne(t, listen(t))
	c = FromContext(WithConn(t.Context(), s))
	if c == nil {
		t.Fatal("no connection found")
	}
	return c, s.(*net.TCPConn), cl.(*net.TCPConn)
}

// timeoutOf reads the timeout that a socket has.
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

func TestASocketHasTheShortestTimeoutOfItsStreams(t *testing.T) {
	needUserTimeout(t)
	for _, before := range []time.Duration{0, 9 * time.Second} {
		for _, test := range []struct {
			name  string
			steps []int // seconds; below zero: a stream with that timeout ends
			want  []int // seconds on the socket behind each; -1: what it had before
		}{
			{"one stream", []int{5, -5}, []int{5, -1}},
			{"one after the other", []int{5, -5, 3, -3}, []int{5, -1, 3, -1}},
			{"shorter, then longer", []int{5, 3, 20, -3, -20, -5}, []int{5, 3, 3, 5, 5, -1}},
			{"the longer one stays", []int{20, 5, -5, -20}, []int{20, 5, 20, -1}},
			{"two alike", []int{3, 3, 5, -3, -3, -5}, []int{3, 3, 3, 3, 5, -1}},
			{"one that never began", []int{-4, 5, -4, -5, -5}, []int{-1, 5, 5, -1, -1}},
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
					t.Errorf("left behind: timer %v, watchers %v", c.timer, c.watchers)
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

// The wrappers that a listener can put around a connection.
type (
	withNetConn  struct{ inner net.Conn }
	withRaw      struct{ net.Conn }
	embedding    struct{ net.Conn }
	embeddingTCP struct{ *net.TCPConn }
	embeddingPtr struct{ *embedding }
	selfish      struct{ net.Conn }
)

func (c withNetConn) NetConn() net.Conn { return c.inner }
func (c withRaw) Raw() net.Conn         { return c.Conn }
func (c selfish) NetConn() net.Conn     { return c }

func (withNetConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (withNetConn) Write([]byte) (int, error)        { return 0, io.EOF }
func (withNetConn) Close() error                     { return nil }
func (withNetConn) LocalAddr() net.Addr              { return nil }
func (withNetConn) RemoteAddr() net.Addr             { return nil }
func (withNetConn) SetDeadline(time.Time) error      { return nil }
func (withNetConn) SetReadDeadline(time.Time) error  { return nil }
func (withNetConn) SetWriteDeadline(time.Time) error { return nil }

func TestTheSocketIsFoundInWhatWrapsIt(t *testing.T) {
	needUserTimeout(t)
	server, _ := acceptOne(t, listen(t))
	tcp := server.(*net.TCPConn)

	// Not t.TempDir: a path to a Unix socket has to be short.
	dir, err := os.MkdirTemp("", "sse")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	unix, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	overUnix, _ := acceptOne(t, unix)
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()

	for name, test := range map[string]struct {
		conn net.Conn
		want bool
	}{
		"TCP":                             {tcp, true},
		"TLS":                             {tls.Server(tcp, nil), true},
		"TLS in a wrapper":                {embedding{tls.Server(tcp, nil)}, true},
		"TLS around a wrapper":            {tls.Server(&embedding{tcp}, nil), true},
		"NetConn":                         {withNetConn{tcp}, true},
		"Raw, as proxyproto has it":       {&withRaw{tcp}, true},
		"an embedded interface":           {embedding{tcp}, true},
		"an embedded socket":              {embeddingTCP{tcp}, true},
		"embedded in what is embedded":    {embeddingPtr{&embedding{withNetConn{tcp}}}, true},
		"Unix socket":                     {overUnix, false},
		"TLS around a Unix socket":        {tls.Server(overUnix, nil), false},
		"no socket":                       {pipe, false},
		"nothing":                         {nil, false},
		"a wrapper around nothing":        {embedding{}, false},
		"a wrapper around a nil one":      {embeddingPtr{}, false},
		"a wrapper that says nothing":     {withNetConn{}, false},
		"a wrapper that is around itself": {selfish{tcp}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := FromContext(WithConn(t.Context(), test.conn))
			if (c != nil) != test.want {
				t.Fatalf("found: %v, want %v", c != nil, test.want)
			}
			c.Watch(5 * time.Second)
			if test.want {
				if got := timeoutOf(t, c.socket); got != 5*time.Second {
					t.Errorf("%v on the socket, want 5s", got)
				}
			}
			if f := c.Leave(5 * time.Second); f != Alive {
				t.Errorf("it is %v, want alive", f)
			}
		})
	}
}

func TestOnlyTheFirstToRegisterAddsTheConnection(t *testing.T) {
	server, _ := acceptOne(t, listen(t))
	ctx := WithConn(t.Context(), server)
	if again := WithConn(ctx, server); again != ctx {
		t.Error("it was added twice")
	}
	if FromContext(t.Context()) != nil {
		t.Error("there is a connection where nobody has registered")
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
		t.Errorf("left behind: timer %v, watchers %v", c.timer, c.watchers)
	}
}

// Listeners of Go accept MPTCP where the system has it.
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
		t.Errorf("left behind: timer %v, watchers %v", c.timer, c.watchers)
	}
}

func TestStreamsOfOneConnectionComeAndGoTogether(t *testing.T) {
	needUserTimeout(t)
	c, server, _ := newConn(t)
	var streams sync.WaitGroup
	for i := range 16 {
		streams.Go(func() {
			timeout := time.Duration(40+i%5) * time.Millisecond // ticks come meanwhile
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
		t.Errorf("left behind: timer %v, watchers %v", c.timer, c.watchers)
	}
}

// flood writes until the client's window and the buffers on the way are full.
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

// A connection ends in many ways, and the HTTP/2 server has closed it before
// its streams are told, so every one is tried in both states.
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
			server.Write([]byte(":\n\n")) // which is answered by a reset
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
		{"resets with data in flight", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
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
		{"takes nothing", brief, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			flood(t, server)
			readToEnd(t, server, syscall.ETIMEDOUT)
		}, Stalled},
		{"takes nothing and resets", time.Minute, func(t *testing.T, c *Conn, server, client *net.TCPConn) {
			flood(t, server)
			for !c.looked().stalled {
				time.Sleep(time.Millisecond)
			}
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
					server.Close()
				}
				if got := c.Leave(test.timeout); got != test.want {
					t.Errorf("it is %v, want %v (%+v)", got, test.want, c.last)
				}
			})
		}
	}
}

// brief is a timeout that kernels can keep.
const brief = 150 * time.Millisecond

// looked has a glance at the connection.
func (c *Conn) looked() glance {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lookLocked()
	return c.last
}

// readToEnd reads until the connection ends, in the way it should.
func readToEnd(t *testing.T, conn net.Conn, want error) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := conn.Read(make([]byte, 1))
	if !errors.Is(err, want) {
		t.Fatalf("reading ended with %v, want %v", err, want)
	}
}

// The last timeout to be in force counts, also for those who ask behind the
// stream that brought it.
func TestTheFateHoldsWhenTheShortestTimeoutHasGone(t *testing.T) {
	needUserTimeout(t)
	c, server, _ := newConn(t)
	c.Watch(time.Hour)
	c.Watch(brief)
	flood(t, server)
	readToEnd(t, server, syscall.ETIMEDOUT)
	server.Close()
	for _, timeout := range []time.Duration{brief, time.Hour} {
		if got := c.Leave(timeout); got != Stalled {
			t.Errorf("leaving with %v: it is %v, want stalled", timeout, got)
		}
	}
}

func TestWhatGlancesTell(t *testing.T) {
	const (
		timeout = 4 * time.Second
		gone    = -1 // the socket is closed
	)
	s, ms := time.Second, time.Millisecond
	healthy := observation{acked: 100, received: 10}
	with := func(changes ...func(*observation)) observation {
		o := healthy
		for _, change := range changes {
			change(&o)
		}
		return o
	}
	busy := func(d time.Duration) func(*observation) { return func(o *observation) { o.busy = d } }
	heard := func(d time.Duration) func(*observation) { return func(o *observation) { o.heard = d } }
	waiting := func(o *observation) { o.waiting = true }
	probing := func(o *observation) { o.probing = true }
	shut := func(o *observation) { o.shut = true }
	acked := func(o *observation) { o.acked += 50; o.received++ }
	segment := func(o *observation) { o.received++ }
	closed := func(o *observation) { o.phase = phaseClosed }
	leaving := func(o *observation) { o.phase = phaseLeaving }

	type step struct {
		after time.Duration // since the one before; below zero: the socket is closed, after that
		o     observation
	}
	for _, test := range []struct {
		name  string
		steps []step // behind a healthy one
		want  Fate
	}{
		{"given up", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{1200 * ms, with(closed, busy(4100*ms), heard(4200*ms))},
		}, Dead},
		{"given up and closed", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{-1100 * ms, observation{}},
		}, Dead},
		{"given up, though segments come", []step{
			{1 * s, with(waiting, busy(900*ms))},
			{1 * s, with(waiting, busy(1900*ms), segment)},
			{1 * s, with(waiting, busy(2900*ms), segment, segment)},
			{1200 * ms, with(closed, busy(4100*ms), segment, segment, segment)},
		}, Dead},
		{"given up, with no glance between", []step{
			{5 * s, with(closed, busy(4100*ms), heard(5*s))},
		}, Dead},
		{"given up behind a keepalive probe", []step{
			{1 * s, with(probing, heard(2*s))},
			{1 * s, with(probing, heard(3*s))},
			{1 * s, with(probing, closed, heard(4*s))},
		}, Dead},
		{"given up behind a keepalive probe and closed", []step{
			{1 * s, with(probing, heard(2*s))},
			{1 * s, with(probing, heard(3*s))},
			{-1 * s, observation{}},
		}, Dead},
		{"given up between two glances, behind a keepalive probe", []step{
			{1 * s, with(heard(9 * s))},
			{1 * s, with(probing, closed, heard(10*s))},
		}, Dead},
		{"reset in answer to a keepalive probe", []step{
			{1 * s, with(heard(9 * s))},
			{1 * s, with(probing, closed, segment, heard(10*s))},
		}, Alive},
		{"reset in answer to a retransmission", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{900 * ms, with(closed, segment, busy(3800*ms), heard(3900*ms))},
		}, Alive},
		{"reset in the last moment", []step{
			{1 * s, with(waiting, busy(1*s), heard(1*s))},
			{2 * s, with(waiting, busy(3*s), heard(3*s))},
			{999 * ms, with(closed, segment, busy(3999*ms), heard(3999*ms))},
		}, Alive},
		{"reset and closed", []step{
			{1 * s, with(waiting, busy(200*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1200*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2200*ms), heard(3*s))},
			{-1 * s, observation{}},
		}, Alive},
		{"reset of a stream that never rests, and closed", []step{
			{1 * s, with(waiting, busy(1*s), acked, heard(10*ms))},
			{1 * s, with(waiting, busy(2*s), acked, acked, heard(10*ms))},
			{1 * s, with(waiting, busy(3*s), acked, acked, acked, heard(10*ms))},
			{-1 * s, observation{}},
		}, Alive},
		{"reset while quiet", []step{
			{1 * s, with(heard(20 * s))},
			{1 * s, with(closed, segment, heard(21*s))},
		}, Alive},
		{"reset while quiet and closed", []step{
			{1 * s, with(heard(20 * s))},
			{-1 * s, observation{}},
		}, Alive},
		{"acknowledged in time", []step{
			{1 * s, with(waiting, busy(1*s))},
			{2 * s, with(waiting, busy(3*s))},
			{900 * ms, with(acked, busy(3900*ms))},
			{200 * ms, with(acked, closed, segment, busy(3900*ms), heard(200*ms))},
		}, Alive},
		{"half closed, with data in flight", []step{
			{1 * s, with(waiting, busy(1*s))},
			{1 * s, with(waiting, leaving, busy(2*s))},
		}, Alive},
		{"still open", []step{
			{1 * s, with(waiting, busy(1*s))},
			{5 * s, with(waiting, busy(6*s))},
		}, Alive},
		{"still open, with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
		}, Alive},
		{"given up with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{3 * s, with(closed, shut, busy(4*s))},
		}, Stalled},
		{"closed with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{-1 * s, observation{}},
		}, Stalled},
		{"reset of a fast stream, with a zero window", []step{
			{1 * s, with(waiting, shut, acked, busy(1*s), heard(1*ms))},
			{1 * ms, with(waiting, shut, acked, acked, closed, segment, busy(1001*ms))},
		}, Alive},
		{"half closed with a zero window", []step{
			{1 * s, with(leaving, waiting, shut, busy(1*s))},
		}, Stalled},
		{"reset behind a window that opened again", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{2 * s, with(waiting, shut, busy(3*s))},
			{500 * ms, with(waiting, busy(3500*ms))},
			{-500 * ms, observation{}},
		}, Alive},
		{"the clocks stood still", []step{
			{1 * s, with(waiting, busy(1*s))},
			{2 * s, with(waiting, busy(3*s))},
			{-time.Hour, observation{}},
		}, Alive},
	} {
		t.Run(test.name, func(t *testing.T) {
			var at instant
			last, got := glance{observation: healthy}, Alive
			for _, step := range test.steps {
				if step.after < 0 {
					got = last.fateUnseen(at+instant(-step.after), timeout)
					continue
				}
				at += instant(step.after)
				last, got = last.seen(step.o, at, timeout)
			}
			if got != test.want {
				t.Errorf("it is %v, want %v (silence %v)", got, test.want, last.silence)
			}
		})
	}
}

// BenchmarkAGlance is what a watched connection costs four times in each
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
