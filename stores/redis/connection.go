package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"
)

const (
	// dialPatience bounds the making of a connection, TLS and AUTH included.
	dialPatience = 2 * time.Second

	// answerPatience is how long a server may leave its connection without any
	// answer. Then it is taken for broken.
	answerPatience = 4 * time.Second

	// pingAfter is after how long without an answer the server is asked for one.
	pingAfter = time.Second

	// firstRedial is the wait before the server is dialled again. It doubles up to
	// lastRedial.
	firstRedial = 50 * time.Millisecond
	lastRedial  = 500 * time.Millisecond

	// buffer is the size of a connection's buffers, each way.
	buffer = 64 << 10

	// ring is the logarithm of how many calls may be under way on a connection.
	ring = 9
)

var (
	errClosed     = errors.New("the store has been closed")
	errConnecting = errors.New("no connection yet")
)

// link is the way to a server while it lasts: one connection for all commands,
// which are pipelined, and one that listens.
type link struct {
	rueidis.Client

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	cut    bool
	broken chan struct{} // closed when it is of no more use
	err    error         // why
}

// cutOff ends a link, and what is under way there.
func (l *link) cutOff(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return
	}
	l.cut, l.err = true, err
	close(l.broken)
	for conn := range l.conns {
		_ = conn.Close()
	}
}

// dial makes one of its connections.
func (l *link) dial(ctx context.Context, s settings, dialer *net.Dialer) (net.Conn, error) {
	conn, err := dialer.DialContext(ctx, s.Network, s.Address)
	if err != nil {
		return nil, err
	}
	if s.TLS != nil {
		config, err := s.TLS.config(s.Address)
		if err != nil {
			_ = conn.Close()
			return nil, err
		}
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, err
		}
		conn = secured
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		_ = conn.Close()
		return nil, l.err
	}
	l.conns[conn] = struct{}{}
	return conn, nil
}

// connect makes a link.
func connect(s settings) (*link, error) {
	l := &link{conns: make(map[net.Conn]struct{}), broken: make(chan struct{})}
	client, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{s.Address},
		Username:    s.Username,
		Password:    s.Password,
		SelectDB:    s.DB,
		ClientName:  "caddy-sse",
		DialCtxFn: func(ctx context.Context, _ string, dialer *net.Dialer, _ *tls.Config) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialPatience)
			defer cancel()
			return l.dial(ctx, s, dialer)
		},
		Dialer:           net.Dialer{Timeout: dialPatience, KeepAlive: pingAfter},
		ConnWriteTimeout: answerPatience,

		ForceSingleClient: true,
		DisableRetry:      true, // the handler writes again what has failed
		DisableCache:      true,
		ClientSetInfo:     rueidis.DisableClientSetInfo,

		// All commands go over one connection, however many there are at a time, and
		// one that is given up does not end it.
		PipelineMultiplex: -1,
		AlwaysPipelining:  true,
		BlockingPipeline:  -1,
		BlockingPoolSize:  1,

		RingScaleEachConn:   ring,
		ReadBufferEachConn:  buffer,
		WriteBufferEachConn: buffer,
	})
	if err != nil {
		l.cutOff(err)
		if client != nil {
			client.Close()
		}
		return nil, err
	}
	l.Client = client
	return l, nil
}

// links keeps a link.
type links struct {
	settings settings

	mu      sync.Mutex
	current *link
	err     error         // why there is none; errConnecting: nobody knows yet
	changed chan struct{} // closed when one of these has changed
}

func newLinks(s settings) *links {
	return &links{settings: s, err: errConnecting, changed: make(chan struct{})}
}

func (c *links) set(l *link, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current, c.err = l, err
	close(c.changed)
	c.changed = make(chan struct{})
}

// keep makes a link, again and again until ctx ends. What it calls with each new
// one is to return when that is broken.
func (c *links) keep(ctx context.Context, listen func(*link)) {
	pause := firstRedial
	for ctx.Err() == nil {
		l, err := connect(c.settings)
		if err != nil {
			c.set(nil, err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			pause = min(2*pause, lastRedial)
			continue
		}
		stop := context.AfterFunc(ctx, func() { l.cutOff(errClosed) })
		c.set(l, nil)
		start := time.Now()
		listen(l)
		<-l.broken
		c.set(nil, errConnecting)
		stop()
		l.Close()
		if time.Since(start) > lastRedial {
			pause = firstRedial
		} else { // a server that closes what it has just accepted
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			pause = min(2*pause, lastRedial)
		}
	}
	c.set(nil, errClosed)
}

// get returns the link. It waits while the first attempt at one is under way, and
// returns at once while the server can't be reached.
func (c *links) get(ctx context.Context) (*link, error) {
	for {
		c.mu.Lock()
		l, err, changed := c.current, c.err, c.changed
		c.mu.Unlock()
		switch {
		case l != nil:
			return l, nil
		case !errors.Is(err, errConnecting):
			return nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", errConnecting, ctx.Err())
		}
	}
}

// heed ends a link for which an error says that it is of no more use.
func (l *link) heed(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil {
		return
	}
	if answer, ok := rueidis.IsRedisErr(err); ok {
		// A primary that is one no more: the address may lead to another one by now.
		if strings.HasPrefix(answer.Error(), "READONLY") {
			l.cutOff(err)
		}
		return
	}
	l.cutOff(err)
}
