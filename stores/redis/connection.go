package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"
)

// dialPause is how long a server that could not be reached is left alone.
const dialPause = 250 * time.Millisecond

var errClosed = errors.New("redis: the store has been closed")

// connection is the client, once there is one: the server may come later than
// Caddy. After that the client makes a lost connection anew by itself.
type connection struct {
	option rueidis.ClientOption
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu     sync.Mutex
	client rueidis.Client
	dials  chan struct{} // closed when the dial that is under way is over; nil: none is
	failed error         // of the last one
	until  time.Time     // until when it is not dialled again
}

func newConnection(option rueidis.ClientOption, addresses []string) *connection {
	c := &connection{option: option}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.option.DialCtxFn = func(ctx context.Context, _ string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
		return dial(ctx, addresses, dialer, config)
	}
	return c
}

// dial connects to the first server that answers.
func dial(ctx context.Context, addresses []string, dialer *net.Dialer, config *tls.Config) (conn net.Conn, err error) {
	var failures []error
	for _, address := range addresses {
		parsed, err := network(address)
		if err != nil {
			return nil, err
		}
		to := parsed.JoinHostPort(0)
		if parsed.IsUnixNetwork() {
			to = parsed.Host
		}
		if config != nil {
			secured := config.Clone()
			if secured.ServerName == "" {
				secured.ServerName = parsed.Host
			}
			conn, err = (&tls.Dialer{NetDialer: dialer, Config: secured}).DialContext(ctx, parsed.Network, to)
		} else {
			conn, err = dialer.DialContext(ctx, parsed.Network, to)
		}
		if err == nil {
			return conn, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

// get returns the client, and makes it where there is none.
func (c *connection) get(ctx context.Context) (rueidis.Client, error) {
	for {
		c.mu.Lock()
		switch {
		case c.ctx.Err() != nil:
			c.mu.Unlock()
			return nil, context.Cause(c.ctx)
		case c.client != nil:
			defer c.mu.Unlock()
			return c.client, nil
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

// open makes the client.
func (c *connection) open(over chan struct{}) {
	client, err := rueidis.NewClient(c.option)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(over)
	c.dials = nil
	switch {
	case err != nil:
		c.failed, c.until = err, time.Now().Add(dialPause)
	case c.ctx.Err() != nil:
		client.Close()
	default:
		c.client = client
	}
}

// note looks at an error: a server that has become a replica will stay one, so
// another has to be found.
func (c *connection) note(err error) {
	replied, ok := rueidis.IsRedisErr(err)
	if !ok || !strings.HasPrefix(replied.Error(), "READONLY") {
		return
	}
	c.mu.Lock()
	client := c.client
	c.client, c.failed, c.until = nil, err, time.Now().Add(dialPause)
	c.mu.Unlock()
	if client != nil {
		go client.Close() // which waits for the calls that are under way
	}
}

func (c *connection) close() {
	c.cancel(errClosed)
	c.mu.Lock()
	client := c.client
	c.client = nil
	c.mu.Unlock()
	if client != nil {
		client.Close()
	}
}
