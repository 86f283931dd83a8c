package peer

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// CheckUserTimeout returns an error if Watch can do nothing on this platform. It
// reads well after the name of a setting and a colon.
// Linux has had TCP_USER_TIMEOUT since 2.6.37.
func CheckUserTimeout() error { return nil }

// userTimeout returns a socket's TCP_USER_TIMEOUT (tcp(7)); 0: the system's
// limit of retransmissions holds.
func userTimeout(fd int) (time.Duration, error) {
	ms, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
	return time.Duration(ms) * time.Millisecond, err
}

// setUserTimeout sets a socket's TCP_USER_TIMEOUT, in milliseconds, rounded up; 0
// brings the system's limit back. It is local: the client is not told, as the TCP
// option of RFC 5482 would do.
func setUserTimeout(fd int, timeout time.Duration) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, roundUp(timeout, time.Millisecond))
}

// setUnsentLimit sets a socket's TCP_NOTSENT_LOWAT (Linux 3.12): how many bytes a
// writer may be ahead of what has been sent.
func setUnsentLimit(fd, limit int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, limit)
}

// States of a connection (include/net/tcp_states.h); TCP_INFO tells them.
const (
	tcpEstablished = 1
	tcpClose       = 7
)

// tellsWindow says that TCP_INFO has the client's window (Linux 5.4). That is known
// once a window was seen that is not zero.
var tellsWindow atomic.Bool

// observe asks for TCP_INFO (tcp(7); the fields are described in
// include/uapi/linux/tcp.h). After the end of a connection the kernel still has its
// figures, except that nothing counts as unacknowledged. Seen on Linux 6.18:
//
//	given up, sent data unacknowledged   CLOSE, unacked 0, last_ack_recv as long ago as the last ACK
//	given up, zero window                CLOSE, snd_wnd 0, notsent > 0, bytes_acked as it was
//	given up, keepalive unanswered       CLOSE, probes > 0, last_ack_recv at least the timeout
//	reset by the client                  CLOSE, segs_in one more, last_ack_recv as before
func observe(fd int) (observation, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return observation{}, err
	}
	o := observation{
		phase:    phaseLeaving,
		waiting:  info.Unacked > 0 || info.Notsent_bytes > 0,
		acked:    info.Bytes_acked,
		received: uint64(info.Segs_in),
		busy:     time.Duration(info.Busy_time) * time.Microsecond,
		heard:    time.Duration(info.Last_ack_recv) * time.Millisecond,
	}
	switch info.State {
	case tcpEstablished:
		o.phase = phaseOpen
	case tcpClose:
		o.phase = phaseClosed
	}
	o.probing = !o.waiting && info.Probes > 0
	if info.Snd_wnd > 0 {
		tellsWindow.Store(true)
	}
	if tellsWindow.Load() {
		o.shut = info.Snd_wnd == 0
	} else {
		// A window that lets nothing out is probed.
		o.shut = info.Unacked == 0 && info.Notsent_bytes > 0 && info.Probes > 0
	}
	return o, nil
}

// unacknowledged is what SIOCOUTQ tells (tcp(7)).
func unacknowledged(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.SIOCOUTQ) }
