package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// firstDialPause is the pause after a first attempt to connect that failed,
	// or after a first connection that broke early. It doubles up to
	// lastDialPause. Half of it is random, so that nodes do not all reconnect at
	// the same time.
	firstDialPause = 250 * time.Millisecond
	lastDialPause  = 2 * time.Second

	// steadyAfter is how long a connection must last so that the next one is made
	// without a pause.
	steadyAfter = 5 * time.Second
)

var (
	errClosed  = errors.New("redis: the store has been closed")
	errReplica = errors.New("it is a replica, which takes no writes")
)

// pauses is the pause between attempts to connect.
type pauses time.Duration

// next returns the pause after a dial.
func (p *pauses) next() time.Duration {
	d := min(max(2*time.Duration(*p), firstDialPause), lastDialPause)
	*p = pauses(d)
	return d/2 + rand.N(d/2)
}

// connection is the connection for calls. It is made when it is first needed, and
// again after it has broken, so the server may start later than Caddy.
type connection struct {
	r       *Redis
	ctx     context.Context
	cancel  context.CancelCauseFunc
	work    sync.WaitGroup
	demoted func() // called when the server has become a replica

	mu     sync.Mutex
	conn   *conn         // nil: there is none
	dials  chan struct{} // closed when the present dial is over; nil: there is none
	failed error         // why there is none
	pauses pauses
	until  time.Time // it is not dialled again before
	shy    string    // the address that last refused to write: it is tried last
}

func newConnection(r *Redis) *connection {
	c := &connection{r: r, demoted: func() {}}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// dial connects to the first server that answers and is not a replica. A replica
// that does not say so is recognized when it refuses a write.
func (c *connection) dial(ctx context.Context) (*conn, error) {
	c.mu.Lock()
	addresses := slices.Clone(c.r.Address)
	if i := slices.Index(addresses, c.shy); i >= 0 {
		addresses = append(slices.Delete(addresses, i, i+1), c.shy)
	}
	c.mu.Unlock()
	return c.r.dial(ctx, addresses...)
}

// dial connects to the first of these addresses that can be used.
func (r *Redis) dial(ctx context.Context, addresses ...string) (*conn, error) {
	var failures []error
	for _, address := range addresses {
		c, err := r.dialOne(ctx, address)
		if err == nil {
			c.address = address
			return c, nil
		}
		failures = append(failures, fmt.Errorf("redis: %s: %w", address, err))
	}
	return nil, errors.Join(failures...)
}

func (r *Redis) dialOne(ctx context.Context, address string) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
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
	stop := context.AfterFunc(ctx, func() { c.fail(ctx.Err()) })
	err = c.greet(r)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		c.fail(err)
		return nil, err
	}
	return c, nil
}

// greet logs in, and checks whether the server can be used.
func (c *conn) greet(r *Redis) error {
	var commands [][]string
	switch {
	case r.Username != "":
		commands = append(commands, []string{"AUTH", r.Username, r.Password})
	case r.Password != "":
		commands = append(commands, []string{"AUTH", r.Password})
	}
	commands = append(commands, []string{"CLIENT", "SETNAME", "caddy-sse"})
	if r.DB > 0 {
		commands = append(commands, []string{"SELECT", strconv.Itoa(r.DB)})
	}
	commands = append(commands, []string{"HELLO", "2"}, []string{"PING"})
	var out []byte
	for _, command := range commands {
		out = appendCommand(out, command)
	}
	if _, err := c.net.Write(out); err != nil {
		return err
	}
	var failure error
	var refused replyError
	for _, command := range commands {
		reply, err := readReply(c.in)
		switch {
		case err != nil && failure != nil:
			return fmt.Errorf("%w: %w", failure, err)
		case err != nil && refused != "": // this says why it takes no connection
			return fmt.Errorf("%w: %w", refused, err)
		case err != nil:
			return err
		}
		refused, _ = reply.(replyError)
		switch {
		case failure != nil: // the first one counts
		case command[0] == "HELLO":
			if isReplica(reply) {
				failure = errReplica
			}
		case command[0] == "CLIENT": // the name is optional
		case command[0] == "PING":
			if refused.isOf("LOADING", "MASTERDOWN", "NOAUTH") {
				failure = refused
			}
		case refused != "":
			failure = refused
		}
	}
	return failure
}

// isReplica reads the reply to HELLO. A server that does not know the command,
// such as a proxy, counts as a primary until it refuses a write.
func isReplica(reply any) bool {
	fields, _ := reply.([]any)
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i] == "role" {
			return fields[i+1] == "replica"
		}
	}
	return false
}

// isOf reports whether an error has one of these codes.
func (e replyError) isOf(codes ...string) bool {
	code, _, _ := strings.Cut(string(e), " ")
	for _, one := range codes {
		if code == one {
			return true
		}
	}
	return false
}

// get returns the connection, and makes it if there is none.
func (c *connection) get(ctx context.Context) (*conn, error) {
	for {
		c.mu.Lock()
		if c.conn != nil {
			c.dropLocked(c.conn.failure())
		}
		switch {
		case c.ctx.Err() != nil:
			c.mu.Unlock()
			return nil, context.Cause(c.ctx)
		case c.conn != nil:
			defer c.mu.Unlock()
			return c.conn, nil
		case c.dials == nil && time.Now().Before(c.until):
			defer c.mu.Unlock()
			return nil, c.failed
		case c.dials == nil:
			c.dials = make(chan struct{})
			over := c.dials
			c.work.Go(func() { c.open(over) })
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

// dropLocked drops the connection if it has broken.
func (c *connection) dropLocked(failure error) {
	if failure == nil {
		return
	}
	if c.conn.lived >= steadyAfter {
		c.pauses, c.until = 0, time.Time{}
	}
	c.conn, c.failed = nil, failure
}

func (c *connection) open(over chan struct{}) {
	conn, err := c.dial(c.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(over)
	c.dials = nil
	c.until = time.Now().Add(c.pauses.next())
	switch {
	case err != nil:
		c.failed = err
	case c.ctx.Err() != nil:
		conn.fail(errClosed)
	default:
		c.conn = conn
		c.work.Go(conn.send)
		c.work.Go(conn.receive)
	}
}

// do sends commands together and returns their replies.
func (c *connection) do(ctx context.Context, commands ...[]string) ([]any, error) {
	conn, err := c.get(ctx)
	if err != nil {
		return nil, err
	}
	replies, err := conn.do(ctx, commands...)
	for _, reply := range replies {
		// The server has become a replica, and may be loading all its data from
		// another server. That does not change soon, so another server is needed.
		if refused, ok := reply.(replyError); ok && refused.isOf("READONLY", "MASTERDOWN", "LOADING") {
			c.mu.Lock()
			c.shy = conn.address
			c.mu.Unlock()
			conn.fail(refused)
			c.demoted()
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

// close closes the connection, and ends calls in progress.
func (c *connection) close() {
	c.cancel(errClosed)
	c.mu.Lock()
	if c.conn != nil {
		c.conn.fail(errClosed)
	}
	c.mu.Unlock()
	c.work.Wait()
}
