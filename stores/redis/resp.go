package redis

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"
)

// conn is one connection, over which many goroutines call at a time: what they
// ask goes out in one order, and the server answers in the same (RESP2,
// https://redis.io/docs/latest/develop/reference/protocol-spec/).
type conn struct {
	net     net.Conn
	in      *bufio.Reader
	writing chan struct{} // holds one while somebody writes
	broken  chan struct{} // closed when the connection is of no use any more

	mu      sync.Mutex
	pending []*call // oldest first
	err     error   // why it is broken
}

// call is some commands of one caller.
type call struct {
	replies []any
	left    int           // replies that have not come
	done    chan struct{} // closed when none is left
}

// replyError is an error that the server replied with.
type replyError string

func (e replyError) Error() string { return "redis: " + string(e) }

// errProtocol is what a server that speaks something else is met with.
var errProtocol = errors.New("redis: the server does not speak RESP")

func newConn(c net.Conn) *conn {
	return &conn{net: c, in: bufio.NewReaderSize(c, 32<<10), writing: make(chan struct{}, 1), broken: make(chan struct{})}
}

// fail closes the connection. Calls that are under way get the error.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.broken)
	_ = c.net.Close()
}

func (c *conn) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// do sends commands at once and returns the replies, each a string, an int64, a
// []any, nil or a replyError.
func (c *conn) do(ctx context.Context, commands ...[]string) ([]any, error) {
	k := &call{replies: make([]any, 0, len(commands)), left: len(commands), done: make(chan struct{})}
	select {
	case c.writing <- struct{}{}:
	case <-c.broken:
		return nil, c.failure()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	err := c.send(k, commands)
	<-c.writing
	if err != nil {
		return nil, err
	}
	select {
	case <-k.done:
		return k.replies, nil
	case <-c.broken:
		return nil, c.failure()
	case <-ctx.Done():
		return nil, ctx.Err() // the replies are read, and dropped
	}
}

// send writes commands. k gets the replies; nil: they are none of a call.
func (c *conn) send(k *call, commands [][]string) error {
	if k != nil && !c.expect(k) {
		return c.failure()
	}
	_ = c.net.SetWriteDeadline(time.Now().Add(connPatience))
	out := bufio.NewWriterSize(c.net, 32<<10)
	for _, command := range commands {
		writeCommand(out, command)
	}
	if err := out.Flush(); err != nil {
		c.fail(err)
		return err
	}
	return nil
}

// expect has a call get the next replies. A server that owes some has a limited
// time for each.
func (c *conn) expect(k *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	if len(c.pending) == 0 {
		_ = c.net.SetReadDeadline(time.Now().Add(connPatience))
	}
	c.pending = append(c.pending, k)
	return true
}

// writeCommand writes one command. What fails is found out at the flush.
func writeCommand(out *bufio.Writer, command []string) {
	var number [20]byte
	line := func(kind byte, n int) {
		_ = out.WriteByte(kind)
		_, _ = out.Write(strconv.AppendInt(number[:0], int64(n), 10))
		_, _ = out.WriteString("\r\n")
	}
	line('*', len(command))
	for _, argument := range command {
		line('$', len(argument))
		_, _ = out.WriteString(argument)
		_, _ = out.WriteString("\r\n")
	}
}

// receive reads replies until the connection breaks.
func (c *conn) receive() {
	for {
		reply, err := readReply(c.in)
		if err != nil {
			c.fail(err)
			return
		}
		if !c.hand(reply) {
			c.fail(errProtocol)
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
	deadline := time.Time{}
	if len(c.pending) > 0 {
		deadline = time.Now().Add(connPatience)
	}
	_ = c.net.SetReadDeadline(deadline)
	return true
}

const (
	// largestReply bounds what a server may announce.
	largestReply = 64 << 20

	// deepestReply is how far lists may be in lists.
	deepestReply = 4
)

// readReply reads one reply.
func readReply(in *bufio.Reader) (any, error) { return readReplyIn(in, deepestReply) }

func readReplyIn(in *bufio.Reader, depth int) (any, error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return nil, errProtocol
	}
	kind, text := line[0], string(line[1:len(line)-2])
	switch kind {
	case '+':
		return text, nil
	case '-':
		return replyError(text), nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, errProtocol
	}
	switch {
	case kind == ':':
		return n, nil
	case n == -1 && (kind == '$' || kind == '*'):
		return nil, nil
	case n < 0 || n > largestReply || depth == 0:
		return nil, errProtocol
	case kind == '$':
		b := make([]byte, n+2)
		if _, err := io.ReadFull(in, b); err != nil {
			return nil, err
		}
		return string(b[:n]), nil
	case kind == '*':
		var all []any
		for range n {
			one, err := readReplyIn(in, depth-1)
			if err != nil {
				return nil, err
			}
			all = append(all, one)
		}
		return all, nil
	}
	return nil, errProtocol
}

// texts are the strings of a reply.
func texts(reply any) ([]string, error) {
	all, ok := reply.([]any)
	if !ok {
		return nil, errReply
	}
	found := make([]string, len(all))
	for i, one := range all {
		if found[i], ok = one.(string); !ok {
			return nil, errReply
		}
	}
	return found, nil
}

var errReply = errors.New("redis: the server's answer is none of a store")
