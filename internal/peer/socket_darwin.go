package peer

import (
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// CheckUserTimeout returns an error if Watch can do nothing on this platform. It
// reads well after the name of a setting and a colon.
// Darwin has TCP_RXT_CONNDROPTIME.
func CheckUserTimeout() error { return nil }

// userTimeout returns a socket's TCP_RXT_CONNDROPTIME (netinet/tcp.h: "time
// after which tcp retransmissions will be stopped and the connection will be
// dropped"); 0: the system's limit holds. It does not act on a zero window, nor
// on keepalive probes.
func userTimeout(fd int) (time.Duration, error) {
	seconds, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RXT_CONNDROPTIME)
	return time.Duration(seconds) * time.Second, err
}

// setUserTimeout sets a socket's TCP_RXT_CONNDROPTIME, in seconds, rounded up.
func setUserTimeout(fd int, timeout time.Duration) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RXT_CONNDROPTIME, roundUp(timeout, time.Second))
}

// setUnsentLimit sets a socket's TCP_NOTSENT_LOWAT (netinet/tcp.h): how many bytes
// a writer may be ahead of what has been sent.
func setUnsentLimit(fd, limit int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, limit)
}

// States of a connection (netinet/tcp_fsm.h); TCP_CONNECTION_INFO tells them.
const (
	tcpsClosed      = 0
	tcpsEstablished = 4
)

// observe asks for TCP_CONNECTION_INFO (netinet/tcp.h). It has neither how long data
// has been waiting nor when the client was last heard, so the time since the last
// glance stands for both. This was written from the headers, and has been compiled
// but not run.
func observe(fd int) (observation, error) {
	info, err := unix.GetsockoptTCPConnectionInfo(fd, unix.IPPROTO_TCP, unix.TCP_CONNECTION_INFO)
	if err != nil {
		return observation{}, err
	}
	o := observation{
		phase:    phaseLeaving,
		waiting:  info.Snd_sbbytes > 0,
		shut:     info.Snd_wnd == 0,
		acked:    info.Rxpackets,
		received: info.Rxpackets,
		busy:     time.Duration(now()),
		heard:    math.MaxInt64,
	}
	switch info.State {
	case tcpsEstablished:
		o.phase = phaseOpen
	case tcpsClosed:
		o.phase = phaseClosed
	}
	return o, nil
}

// unacknowledged is SO_NWRITE: what is in the send buffer.
func unacknowledged(fd int) (int, error) {
	return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_NWRITE)
}
