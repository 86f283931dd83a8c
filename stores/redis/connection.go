package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// dialPause is how long a server that could not be reached is left alone.
const dialPause = 250 * time.Millisecond

var errClosed = errors.New("redis: the store has been closed")

// connection is the way to the server: what calls go over. It is made when it is
// first wanted, and anew after it has broken: the server may come later than
// Caddy.
type connection struct {
	r      *Redis
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu     sync.Mutex
	conn   *conn
	dials  chan struct{} // closed when the dial that is under way is over; nil: none is
	failed error         // of the last one
	until  time.Time     // until when it is not dialled again
}

func newConnection(r *Redis) *connection {
	c := &connection{r: r}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// dial connects to the first server that answers.
func (r *Redis) dial(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	var failures []error
	for _, address := range r.Address {
		c, err := r.dialOne(ctx, address)
		if err == nil {
			return c, nil
		}
		failures = append(failures, fmt.Errorf("redis: %s: %w", address, err))
	}
	return nil, errors.Join(failures...)
}

func (r *Redis) dialOne(ctx context.Context, address string) (*conn, error) {
	parsed, err := network(address)
	if err != nil {
		return nil, err
	}
	to := parsed.JoinHostPort(0)
	if parsed.IsUnixNetwork() {
		to = parsed.Host
	}
	var dialled net.Conn
	if r.secured != nil {
		config := r.secured.Clone()
		if config.ServerName == "" {
			config.ServerName = parsed.Host
		}
		dialled, err = (&tls.Dialer{Config: config}).DialContext(ctx, parsed.Network, to)
	} else {
		dialled, err = new(net.Dialer).DialContext(ctx, parsed.Network, to)
	}
	if err != nil {
		return nil, err
	}
	c := newConn(dialled)
	if err := c.greet(ctx, r); err != nil {
		c.fail(err)
		return nil, err
	}
	return c, nil
}

// greet logs in.
func (c *conn) greet(ctx context.Context, r *Redis) error {
	commands := [][]string{{"CLIENT", "SETNAME", "caddy-sse"}}
	if r.DB > 0 {
		commands = append(commands, []string{"SELECT", strconv.Itoa(r.DB)})
	}
	switch {
	case r.Username != "":
		commands = append([][]string{{"AUTH", r.Username, r.Password}}, commands...)
	case r.Password != "":
		commands = append([][]string{{"AUTH", r.Password}}, commands...)
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.net.SetReadDeadline(deadline)
	}
	if err := c.send(nil, commands); err != nil {
		return err
	}
	for range commands {
		reply, err := readReply(c.in)
		if err != nil {
			return err
		}
		if refused, ok := reply.(replyError); ok {
			return refused
		}
	}
	return c.net.SetReadDeadline(time.Time{})
}

// get returns the connection, and makes it where there is none.
func (c *connection) get(ctx context.Context) (*conn, error) {
	for {
		c.mu.Lock()
		switch {
		case c.ctx.Err() != nil:
			c.mu.Unlock()
			return nil, context.Cause(c.ctx)
		case c.conn != nil && c.conn.failure() == nil:
			defer c.mu.Unlock()
			return c.conn, nil
		case c.dials == nil && time.Now().Before(c.until):
			defer c.mu.Unlock()
			return nil, c.failed
		case c.dials == nil:
			c.dials = make(chan struct{})
			go c.open(c.dials)
		}
		dials := c.dials
		c.mu.Unlock()
		select {
		case <-dials:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// open makes it.
func (c *connection) open(over chan struct{}) {
	conn, err := c.r.dial(c.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(over)
	c.dials = nil
	switch {
	case err != nil:
		c.failed, c.until = err, time.Now().Add(dialPause)
	case c.ctx.Err() != nil:
		conn.fail(errClosed)
	default:
		c.conn = conn
		go conn.receive()
	}
}

// do sends commands at once and returns their replies.
func (c *connection) do(ctx context.Context, commands ...[]string) ([]any, error) {
	conn, err := c.get(ctx)
	if err != nil {
		return nil, err
	}
	replies, err := conn.do(ctx, commands...)
	for _, reply := range replies {
		// A server that has become a replica will stay one: another has to be found.
		if refused, ok := reply.(replyError); ok && strings.HasPrefix(string(refused), "READONLY") {
			conn.fail(refused)
			break
		}
	}
	return replies, err
}

// one is do for one command.
func (c *connection) one(ctx context.Context, command ...string) (any, error) {
	replies, err := c.do(ctx, command)
	if err != nil {
		return nil, err
	}
	if refused, ok := replies[0].(replyError); ok {
		return nil, refused
	}
	return replies[0], nil
}

func (c *connection) close() {
	c.cancel(errClosed)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		c.conn.fail(errClosed)
	}
}
