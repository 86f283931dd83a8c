package peer

import (
	"net"
	"syscall"
)

// Backlog measures what has been written to a connection but is still on its way.
// Only one goroutine at a time may use it.
type Backlog struct {
	raw  syscall.RawConn
	look func(fd uintptr)
	size int
	err  error
}

// NewBacklog returns nil if c is not a TCP socket.
func NewBacklog(c net.Conn) *Backlog {
	socket := tcpSocket(c)
	if socket == nil {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	b := &Backlog{raw: raw}
	b.look = func(fd uintptr) { b.size, b.err = unacknowledged(int(fd)) }
	return b
}

// Size is how many bytes the client's host has not acknowledged yet. ok is false
// if the platform does not report it, and after the connection's end.
func (b *Backlog) Size() (size int, ok bool) {
	if b == nil || b.raw.Control(b.look) != nil || b.err != nil {
		return 0, false
	}
	return b.size, true
}
