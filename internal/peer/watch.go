package peer

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Conn is a TCP connection whose client may be watched. While it is, its socket
// has the shortest timeout that was asked for as TCP_USER_TIMEOUT (tcp(7); the user
// timeout of RFC 9293, section 3.8.3, which RFC 5482 discusses), and what the
// kernel knows of it is read at least four times in each timeout: once the client is
// gone it can be too late, as a server may close the socket before it tells its
// handlers.
//
// With that timeout the kernel ends the connection
//   - when data that was sent stays unacknowledged for that long,
//   - when the client's window stays zero for that long,
//   - and when a keepalive probe goes unanswered on a connection where nothing was
//     heard for that long, instead of counting probes. So a host that vanished is
//     noticed even if nothing is sent, at the first probe after the timeout.
//
// On macOS it does so in the first case only.
//
// Its methods may be called from several goroutines. They do nothing on nil, which
// stands for a connection that is not known or not TCP.
type Conn struct {
	socket syscall.Conn

	mu       sync.Mutex
	raw      syscall.RawConn
	watchers []watcher     // the shortest timeout first
	previous time.Duration // the socket's timeout before the first Watch
	applied  time.Duration // the timeout that we have set; 0: none
	timer    *time.Timer   // runs tick
	last     glance
	settled  bool // verdict is final, or the socket can't be watched
	verdict  Fate
}

// watcher is a timeout, and how many calls of Watch with it still need a Leave.
type watcher struct {
	timeout time.Duration
	count   int
}

// Watch makes the kernel end the connection if the client's host acknowledges
// nothing for this long, until Leave is called with the same timeout. The timeout
// must be positive; it is rounded up to the socket's unit, a millisecond on Linux
// and a second on macOS. The shortest of several timeouts counts. A socket that
// can't be watched is left alone: a closed one, or a multipath one (MPTCP, RFC
// 8684), for which Linux 6.18 has no user timeout.
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
	c.watchers[i].count++
	if first {
		c.beginLocked()
	} else if !c.settled {
		c.applyLocked()
	}
}

// Leave undoes one Watch with this timeout, and returns the fate of the
// connection. It reads what the kernel knows before it changes the socket's
// timeout, because afterwards the answer would be wrong. After the last Leave the
// socket has the same timeout as before the first Watch.
//
// It must be called once for each Watch. Without a Watch it does nothing and
// returns Alive, as on a socket that can't be watched.
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
	fate := c.lookLocked()
	if c.watchers[i].count--; c.watchers[i].count == 0 {
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

// beginLocked takes control of the socket for the first Watch.
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
	if c.settled = c.applied == 0; c.settled {
		return
	}
	// tick uses the field, so the timer must not fire before it is set.
	c.timer = time.AfterFunc(time.Hour, c.tick)
	c.timer.Reset(c.last.pause(c.applied))
}

// endLocked restores the socket after the last Leave.
func (c *Conn) endLocked() {
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if c.applied == 0 {
		return
	}
	c.applied = 0
	// If this fails, the socket is closed.
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

// lookLocked reads what the kernel knows, unless the fate is settled, and returns
// the fate.
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

// roundUp returns timeout in units of unit, for a socket option of 32 bits. It
// rounds up because 0 would switch the option off.
func roundUp(timeout, unit time.Duration) int {
	n := timeout / unit
	if timeout%unit > 0 {
		n++
	}
	return int(min(n, math.MaxInt32))
}

// instant is a moment on the monotonic clock, since clockStart.
type instant time.Duration

var clockStart = time.Now()

func now() instant { return instant(time.Since(clockStart)) }
