package peer

import (
	"cmp"
	"context"
	"math"
	"net"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Conn is the TCP connection that a request came on. While streams with a
// dead_client_timeout live on it, its socket has the shortest of their timeouts
// as TCP_USER_TIMEOUT (tcp(7); the user timeout of RFC 9293, section 3.8.3, as
// RFC 5482 discusses it), and what the kernel tells of it is looked at now and
// then: when the client is gone it can be too late to ask, as the HTTP/2 server
// closes the socket when it gives the streams up.
//
// The kernel then ends the connection when sent data stays unacknowledged for
// that long, but also when the client's window stays zero for that long, and,
// instead of counting keepalive probes, when one goes unanswered on a
// connection where nothing was heard for that long. (Caddy's keepalive is on
// by default, with a probe every 15 s of silence: a vanished client is noticed
// where nothing is sent, too, at the first probe behind the timeout.)
//
// Its methods do nothing on nil, which stands for a connection that is not
// known or not TCP.
type Conn struct {
	socket syscall.Conn

	mu       sync.Mutex
	raw      syscall.RawConn
	watchers []watcher     // of the live streams, the shortest timeout first
	previous time.Duration // the socket's timeout before the first of them
	applied  time.Duration // the socket's timeout; 0: none of ours
	timer    *time.Timer   // runs tick
	last     glance
	settled  bool // the connection is over, and verdict is why
	verdict  Fate
}

// watcher is one timeout and the number of live streams that have it.
type watcher struct {
	timeout time.Duration
	streams int
}

// Fate is what the kernel knows of a connection whose client is gone.
type Fate uint8

const (
	Alive   Fate = iota // or it ended as connections do, or nobody knows
	Dead                // the kernel gave it up: the client's host acknowledged nothing
	Stalled             // it closed while the client's window was zero
)

func (f Fate) String() string {
	switch f {
	case Dead:
		return "dead"
	case Stalled:
		return "stalled"
	}
	return "alive"
}

type connKey struct{}

// WithConn gives the context of a connection's requests the connection.
// It is made for caddyhttp.Server.RegisterConnContext. Where it is registered
// several times, the first counts.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	if ctx.Value(connKey{}) != nil {
		return ctx
	}
	socket := tcpSocket(unwrapped(c))
	if socket == nil {
		return ctx
	}
	return context.WithValue(ctx, connKey{}, &Conn{socket: socket})
}

// FromContext returns the connection of a request, nil where it is not TCP
// (HTTP/3, Unix sockets) or not known.
func FromContext(ctx context.Context) *Conn {
	c, _ := ctx.Value(connKey{}).(*Conn)
	return c
}

type acceptedKey struct{}

// WithAccepted gives the context of a connection's requests what the system
// accepted. It is made for caddyhttp.Server.RegisterConnContext. It is for every
// connection, and so weighs little.
func WithAccepted(ctx context.Context, c net.Conn) context.Context {
	if ctx.Value(acceptedKey{}) != nil {
		return ctx
	}
	return context.WithValue(ctx, acceptedKey{}, unwrapped(c))
}

// Accepted returns what was accepted for a request, nil where that is not
// known. HTTP/3 has no such thing.
func Accepted(ctx context.Context) net.Conn {
	c, _ := ctx.Value(acceptedKey{}).(net.Conn)
	return c
}

// unsentLimit is what the kernel takes from a stream beyond what it can send:
// enough to keep a fast client busy. A writer that waits goes on when half of it
// has been sent, so who takes less than that within the write timeout looks like
// one that takes nothing.
const unsentLimit = 32 << 10

// LimitUnsent keeps the kernel from taking megabytes for a client that is slow,
// of which it lets the writer know only when a third has been taken: such a
// client would look like one that takes nothing. Where there is no such limit, it
// does look so. A connection that has had a stream stays that way.
func LimitUnsent(c net.Conn) {
	socket := tcpSocket(c)
	if socket == nil {
		return
	}
	if raw, err := socket.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = setUnsentLimit(int(fd), unsentLimit) })
	}
}

// Expire makes what is written to a connection fail, now and from now on.
func Expire(c net.Conn) {
	if c != nil {
		_ = c.SetWriteDeadline(time.Unix(1, 0))
	}
}

// HangUp tells the client that nothing follows on a connection. It does not wait
// for what is being written.
func HangUp(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// unwrapped returns what a listener accepted without the wrappers around it, as
// far as they can be looked into. Behind a proxy that speaks the PROXY protocol
// that is the connection to the proxy.
func unwrapped(c net.Conn) net.Conn {
	for range 16 { // nobody wraps deeper, and a wrapper could return itself
		if _, ok := c.(syscall.Conn); ok {
			return c
		}
		inner := wrapped(c)
		if inner == nil {
			return c
		}
		c = inner
	}
	return c
}

// tcpSocket returns an unwrapped connection's TCP socket, nil where it has none.
func tcpSocket(c net.Conn) syscall.Conn {
	socket, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	if _, ok := c.LocalAddr().(*net.TCPAddr); !ok {
		return nil
	}
	return socket
}

// wrapped returns the connection that a wrapper such as *tls.Conn is around.
func wrapped(c net.Conn) net.Conn {
	switch c := c.(type) {
	case interface{ NetConn() net.Conn }:
		return c.NetConn()
	case interface{ Raw() net.Conn }: // github.com/pires/go-proxyproto
		return c.Raw()
	}
	// Those of Caddy (http_redirect, single HTTP versions) and of many plugins
	// only embed it.
	v := reflect.Indirect(reflect.ValueOf(c))
	if v.Kind() != reflect.Struct {
		return nil
	}
	field, ok := v.Type().FieldByName("Conn")
	if !ok {
		return nil
	}
	v, err := v.FieldByIndexErr(field.Index)
	if err != nil || !v.CanInterface() {
		return nil
	}
	inner, _ := v.Interface().(net.Conn)
	return inner
}

// Watch notes that a stream with this timeout has begun on the connection.
func (c *Conn) Watch(timeout time.Duration) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	first := len(c.watchers) == 0
	i, found := c.findLocked(timeout)
	if !found {
		c.watchers = slices.Insert(c.watchers, i, watcher{timeout: timeout})
	}
	c.watchers[i].streams++
	if first {
		c.beginLocked()
	} else if !c.settled {
		c.applyLocked()
	}
}

// Leave notes that a stream that was watched has ended, and tells the fate of the
// connection. It reads what the kernel knows before it gives the socket back.
func (c *Conn) Leave(timeout time.Duration) Fate {
	if c == nil {
		return Alive
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	i, found := c.findLocked(timeout)
	if !found {
		return Alive
	}
	fate := c.lookLocked() // it depends on the timeout that has been in force
	if c.watchers[i].streams--; c.watchers[i].streams == 0 {
		c.watchers = slices.Delete(c.watchers, i, i+1)
	}
	switch {
	case len(c.watchers) == 0:
		c.endLocked()
	case !c.settled:
		c.applyLocked()
	}
	return fate
}

func (c *Conn) findLocked(timeout time.Duration) (int, bool) {
	return slices.BinarySearchFunc(c.watchers, timeout, func(w watcher, timeout time.Duration) int {
		return cmp.Compare(w.timeout, timeout)
	})
}

// beginLocked takes the socket over for the first stream.
func (c *Conn) beginLocked() {
	c.last, c.verdict = glance{at: now()}, Alive
	err := c.controlLocked(func(fd int) (err error) {
		if c.previous, err = userTimeout(fd); err != nil {
			return err
		}
		c.last.observation, err = observe(fd)
		return err
	})
	if err == nil {
		c.applyLocked()
	}
	// A socket that can't be asked or set is left alone: a closed one, or a
	// multipath one (MPTCP, RFC 8684), which Linux 6.18 has no user timeout for.
	if c.settled = c.applied == 0; c.settled {
		return
	}
	// Armed in a second step, as tick uses the field.
	c.timer = time.AfterFunc(time.Hour, c.tick)
	c.timer.Reset(c.last.pause(c.applied))
}

// endLocked gives the socket back behind the last stream.
func (c *Conn) endLocked() {
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if c.applied == 0 {
		return
	}
	c.applied = 0
	// Where this fails the socket is closed.
	_ = c.controlLocked(func(fd int) error { return setUserTimeout(fd, c.previous) })
}

// applyLocked sets the shortest timeout.
func (c *Conn) applyLocked() {
	shortest := c.watchers[0].timeout
	if shortest == c.applied {
		return
	}
	if err := c.controlLocked(func(fd int) error { return setUserTimeout(fd, shortest) }); err != nil {
		return
	}
	shorter := shortest < c.applied
	c.applied = shortest
	if shorter && c.timer != nil {
		c.timer.Reset(c.last.pause(c.applied))
	}
}

func (c *Conn) controlLocked(f func(fd int) error) error {
	if c.raw == nil {
		raw, err := c.socket.SyscallConn()
		if err != nil {
			return err
		}
		c.raw = raw
	}
	var failed error
	if err := c.raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err // the connection is closed
	}
	return failed
}

// tick runs on the timer's goroutine.
func (c *Conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer == nil {
		return
	}
	if c.lookLocked(); !c.settled {
		c.timer.Reset(c.last.pause(c.applied))
	}
}

// lookLocked has a glance at the connection, if it can still be had, and tells its
// fate.
func (c *Conn) lookLocked() Fate {
	if c.settled {
		return c.verdict
	}
	before := c.last
	at := now()
	var o observation
	err := c.controlLocked(func(fd int) (err error) {
		o, err = observe(fd)
		return err
	})
	if err != nil {
		c.settled, c.verdict = true, before.fateUnseen(at, c.applied)
		return c.verdict
	}
	c.last, c.verdict = before.seen(o, at, c.applied)
	c.settled = o.phase == phaseClosed
	return c.verdict
}

// roundUp returns timeout in units of unit, for a socket's option of 32 bits.
// What is not 0 does not become 0, which would switch the option off.
func roundUp(timeout, unit time.Duration) int {
	n := timeout / unit
	if timeout%unit > 0 {
		n++
	}
	return int(min(n, math.MaxInt32))
}

// instant is a moment on the monotonic clock.
type instant time.Duration

// clockStart is where instants count from.
var clockStart = time.Now()

func now() instant { return instant(time.Since(clockStart)) }

// phase is how far a connection is in its life.
type phase uint8

const (
	phaseOpen    phase = iota
	phaseLeaving       // a side has said that it sends no more
	phaseClosed        // reset by the client, or given up by the kernel
)

// observation is what the kernel tells of a connection at one moment.
type observation struct {
	phase   phase
	waiting bool // there is something to send, or sent, that is not acknowledged
	probing bool // there is not, but a keepalive probe has no answer
	shut    bool // the client's window is zero

	acked    uint64        // grows with what is acknowledged
	received uint64        // grows with every segment, a reset included
	busy     time.Duration // how long there has been something to be acknowledged, in all
	heard    time.Duration // since the client's last acknowledgement
}

// glance is an observation, and what it means together with those before it.
type glance struct {
	observation
	at instant

	// silence is how long the client's host has acknowledged nothing although
	// there was something to acknowledge: never less than what the kernel
	// compares with the timeout, and more only by what fits between two
	// acknowledgements.
	silence time.Duration

	// stalled says that the client's window is zero and that it has taken
	// nothing since the glance before: a fast stream fills a window for a moment.
	stalled bool
}

// clockSlack is how much the kernel's clocks, which may tick every 10 ms, and
// ours can differ.
const clockSlack = 25 * time.Millisecond

// followedBy returns the glance that this observation makes behind g.
func (g glance) followedBy(o observation, at instant) glance {
	elapsed := time.Duration(at - g.at)
	followed := glance{observation: o, at: at, stalled: o.shut && o.acked == g.acked}
	switch {
	case o.waiting && g.waiting && o.acked == g.acked && o.shut == g.shut,
		o.phase == phaseClosed && g.waiting && o.acked == g.acked: // which has dropped what was waiting
		followed.silence = g.silence + elapsed
	case o.probing && (o.phase == phaseClosed || g.probing && o.received == g.received):
		followed.silence = o.heard
	case o.waiting, o.phase == phaseClosed:
		followed.silence = min(elapsed, o.busy-g.busy)
		if o.acked != g.acked {
			followed.silence = min(followed.silence, o.heard)
		}
	}
	return followed
}

// seen returns the glance that this observation makes behind g, and the fate
// of the connection.
func (g glance) seen(o observation, at instant, timeout time.Duration) (glance, Fate) {
	after := g.followedBy(o, at)
	switch {
	case o.phase == phaseOpen:
		return after, Alive
	case after.stalled:
		return after, Stalled
	case o.phase == phaseLeaving:
		return after, Alive
	}
	// A reset is a segment that acknowledges nothing.
	reset := o.received != g.received && o.heard > time.Duration(at-g.at)+clockSlack
	if reset || after.silence < timeout-clockSlack {
		return after, Alive
	}
	return after, Dead
}

// fateUnseen is the fate of a connection that can't be asked any more.
func (g glance) fateUnseen(at instant, timeout time.Duration) Fate {
	elapsed := time.Duration(at - g.at)
	switch {
	case elapsed > timeout/2: // somebody stopped the clocks: too much may have happened
		return Alive
	case g.stalled:
		return Stalled
	case g.silence > 0 && g.silence+elapsed >= timeout-clockSlack:
		return Dead
	}
	return Alive
}

// pause is how long to wait for the next glance: short when the end is near, so
// that it is told from what comes close to it.
func (g glance) pause(timeout time.Duration) time.Duration {
	if g.shut || g.silence >= timeout/2 {
		return max(timeout/32, 10*time.Millisecond)
	}
	return max(timeout/4, 10*time.Millisecond)
}
