package redis

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	// mostUnsent is how many bytes may wait for a server that does not read.
	mostUnsent = 16 << 20

	// sendPiece is how many bytes are written at a time. The server has
	// connPatience for each piece.
	sendPiece = 64 << 10

	// mostPending is how many calls may wait for their replies. Those of callers
	// that have left count, too: a server that replies only now and then keeps
	// its connection.
	mostPending = 100_000
)

// conn is one connection, shared by many goroutines. Their commands are sent in
// one order, and the server replies in the same order. Commands that are posted
// during a write are sent together after it.
type conn struct {
	net     net.Conn
	address string // to which it was dialled
	in      *bufio.Reader
	made    time.Time
	unsent  chan struct{} // holds one element while out may not be empty
	broken  chan struct{} // closed when the connection can't be used any more

	mu      sync.Mutex
	out     []byte
	pending []*call       // oldest first
	err     error         // why it is broken
	lived   time.Duration // how long it was usable
}

// call is the commands that one caller sends together.
type call struct {
	replies []any
	left    int           // replies that have not arrived
	done    chan struct{} // closed when all have arrived
}

var (
	errBroken = errors.New("redis: the connection broke")

	// errBehind is what callers get while the server reads or replies too slowly.
	errBehind = errors.New("redis: the server does not keep up with what it is sent")
)

func newConn(c net.Conn) *conn {
	return &conn{
		net:    c,
		in:     bufio.NewReaderSize(c, 32<<10),
		made:   time.Now(),
		unsent: make(chan struct{}, 1),
		broken: make(chan struct{}),
	}
}

// fail closes the connection. Calls in progress get the error.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err, c.lived = err, time.Since(c.made)
	c.out = nil
	close(c.broken)
	if secured, ok := c.net.(*tls.Conn); ok {
		_ = secured.NetConn().Close() // its own Close waits 5 s for a server that does not read
	} else {
		_ = c.net.Close()
	}
}

func (c *conn) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// do sends commands together and returns the replies, each a string, an int64, a
// []any, nil or a replyError.
func (c *conn) do(ctx context.Context, commands ...[]string) ([]any, error) {
	if len(commands) == 0 {
		return nil, nil
	}
	k := &call{replies: make([]any, 0, len(commands)), left: len(commands), done: make(chan struct{})}
	if err := c.post(k, commands); err != nil {
		return nil, err
	}
	select {
	case <-k.done:
		return k.replies, nil
	case <-c.broken:
		return nil, c.failure()
	case <-ctx.Done():
		return nil, ctx.Err() // the replies will be read and dropped
	}
}

// post queues commands for send. k gets the replies; nil if no call waits for
// them.
func (c *conn) post(k *call, commands [][]string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return c.err
	case len(c.out) > mostUnsent, len(c.pending) >= mostPending:
		return errBehind
	}
	for _, command := range commands {
		c.out = appendCommand(c.out, command)
	}
	if k != nil {
		if len(c.pending) == 0 {
			c.expectLocked()
		}
		c.pending = append(c.pending, k)
	}
	select {
	case c.unsent <- struct{}{}:
	default:
	}
	return nil
}

// expectLocked gives the server a limited time for the next reply.
func (c *conn) expectLocked() { _ = c.net.SetReadDeadline(time.Now().Add(connPatience)) }

// send writes what was posted, until the connection breaks.
func (c *conn) send() {
	var p []byte
	for {
		select {
		case <-c.unsent:
		case <-c.broken:
			return
		}
		c.mu.Lock()
		p, c.out = c.out, p[:0]
		c.mu.Unlock()
		if err := c.write(p); err != nil {
			c.fail(fmt.Errorf("%w: %w", errBroken, err))
			return
		}
		if cap(p) > 4*sendPiece {
			p = nil // a quiet connection does not need it
		}
	}
}

func (c *conn) write(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), sendPiece)
		_ = c.net.SetWriteDeadline(time.Now().Add(connPatience))
		if _, err := c.net.Write(p[:n]); err != nil {
			return err
		}
		p = p[n:]
		if len(p) > 0 {
			c.stillOwes()
		}
	}
	return nil
}

// stillOwes gives the server more time, because it has not yet received
// everything.
func (c *conn) stillOwes() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) > 0 {
		c.expectLocked()
	}
}

// receive reads replies until the connection breaks.
func (c *conn) receive() {
	for {
		reply, err := readReply(c.in)
		if err == nil && !c.hand(reply) {
			err = errProtocol
		}
		if err != nil {
			c.fail(fmt.Errorf("%w: %w", errBroken, err))
			return
		}
	}
}

// hand gives a reply to the oldest call.
func (c *conn) hand(reply any) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) == 0 {
		return false
	}
	k := c.pending[0]
	k.replies = append(k.replies, reply)
	if k.left--; k.left == 0 {
		c.pending[0] = nil
		c.pending = c.pending[1:]
		close(k.done)
	}
	if len(c.pending) > 0 {
		c.expectLocked()
	} else {
		_ = c.net.SetReadDeadline(time.Time{})
	}
	return true
}
