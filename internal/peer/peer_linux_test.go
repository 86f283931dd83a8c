package peer

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTheKernelTakesLittleAheadForASlowClient(t *testing.T) {
	const segment = 64 << 10 // the kernel completes a segment
	for _, limited := range []bool{false, true} {
		server, _ := acceptOne(t, listen(t))
		if limited {
			LimitUnsent(server)
		}
		server.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		for {
			if _, err := server.Write(make([]byte, 4<<10)); err != nil {
				break
			}
		}
		c := FromContext(WithConn(t.Context(), server))
		var unsent int
		err := c.controlLocked(func(fd int) error {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil {
				unsent = int(info.Notsent_bytes)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if within := unsent <= unsentLimit+segment; within != limited {
			t.Errorf("limited %v: %d bytes unsent", limited, unsent)
		}
	}
}
