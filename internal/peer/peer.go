// Package peer knows what the kernel knows of a client's TCP connection: whether
// the client's host still acknowledges what is sent, and whether it takes any of
// it. It also ends a connection from outside the server that owns it.
//
// A server keeps the connection in the context of its requests:
//
//	server.ConnContext = peer.WithConn
//	…
//	conn := peer.FromContext(r.Context())
//	conn.Watch(30 * time.Second)
//	… // stream until the client is gone
//	fate := conn.Leave(30 * time.Second)
//
// It knows neither Caddy nor HTTP.
package peer

import (
	"context"
	"net"
	"reflect"
	"syscall"
	"time"
)

type connKey struct{}

// WithConn adds a connection to the context of its requests, for FromContext. It
// finds the socket inside TLS and listener wrappers. It returns ctx unchanged if
// there is no TCP socket (a Unix socket, a wrapper that hides it), or if the
// connection was added before. It fits net/http.Server.ConnContext.
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

// FromContext returns the connection that WithConn added, or nil, on which Watch
// and Leave do nothing.
func FromContext(ctx context.Context) *Conn {
	c, _ := ctx.Value(connKey{}).(*Conn)
	return c
}

type acceptedKey struct{}

// WithAccepted adds the connection that the server reads from and writes to, to
// the context of its requests, for Accepted and Served. It is cheap enough for
// every connection, while WithConn is for connections that may be watched. It
// returns ctx unchanged if that was added before. It fits
// net/http.Server.ConnContext.
func WithAccepted(ctx context.Context, c net.Conn) context.Context {
	if ctx.Value(acceptedKey{}) != nil {
		return ctx
	}
	return context.WithValue(ctx, acceptedKey{}, c)
}

// Accepted returns the connection that the listener accepted, without the TLS and
// other wrappers around it, or nil if WithAccepted was not called. LimitUnsent,
// Expire and HangUp ignore nil. Over HTTP/3 there is no such connection.
func Accepted(ctx context.Context) net.Conn {
	c := Served(ctx)
	if c == nil {
		return nil
	}
	return unwrapped(c)
}

// Served returns what WithAccepted added, with all wrappers, or nil.
func Served(ctx context.Context) net.Conn {
	c, _ := ctx.Value(acceptedKey{}).(net.Conn)
	return c
}

// unsentLimit is enough to keep a fast client busy.
const unsentLimit = 32 << 10 // bytes

// LimitUnsent stops the kernel from accepting more while 32 KiB wait to be sent
// (TCP_NOTSENT_LOWAT; Linux finishes a segment of up to 64 KiB first), and makes
// it wake the writer when less than half of that is left. Without the limit the
// kernel accepts megabytes for a slow client and wakes the writer only when a
// third of that is free, so that the client seems to take nothing.
//
// The limit stays on the socket. Nothing happens if c is not a TCP socket, if it
// is closed, or if the platform has no such limit.
func LimitUnsent(c net.Conn) {
	socket := tcpSocket(c)
	if socket == nil {
		return
	}
	if raw, err := socket.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = setUnsentLimit(int(fd), unsentLimit) })
	}
}

// Expire makes writes to a connection fail with os.ErrDeadlineExceeded, one that
// blocks and all later ones. A server that sets write deadlines can undo it. It
// is safe during a write, and does nothing on nil.
func Expire(c net.Conn) {
	if c != nil {
		_ = c.SetWriteDeadline(time.Unix(1, 0))
	}
}

// HangUp tells the client that nothing follows on a connection: it sends FIN after
// what the kernel has accepted (shutdown(2) with SHUT_WR; RFC 9293, section 3.6).
// It does not wait for a write that blocks, which fails, and does nothing on a
// connection that cannot be half closed.
func HangUp(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// unwrapped returns the connection that a listener accepted, without the wrappers
// around it, as far as it can see through them. If a proxy uses the PROXY
// protocol, that is the connection from the proxy.
func unwrapped(c net.Conn) net.Conn {
	for range 16 { // no one wraps deeper, and a wrapper could return itself
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

// tcpSocket returns the TCP socket of an unwrapped connection, or nil.
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
	// Caddy's own wrappers (http_redirect, single HTTP versions) and those of many
	// plugins only embed it.
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
