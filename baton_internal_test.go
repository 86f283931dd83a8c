package caddysse

import (
	"net"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

func TestTheKernelIsAskedAgainOnlyOnceTooMuchMayBeOnItsWay(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := &stream{lastHeard: time.Second}
	b := &baton{stream: s, backlog: peer.NewBacklog(conn)}
	if _, tells := b.backlog.Size(); !tells {
		t.Skip("the platform does not tell what is on its way")
	}
	if !b.takesAtOnceLocked() || b.spare != onItsWay {
		t.Fatalf("a client that has all can be sent %d bytes, want %d", b.spare, onItsWay)
	}
	// From now on the kernel has nothing to say, so it shows whether it is asked.
	conn.Close()
	if b.spare = 1; !b.takesAtOnceLocked() {
		t.Error("the kernel was asked while little was on its way")
	}
	if s.lastHeard++; b.takesAtOnceLocked() {
		t.Error("the kernel was not asked after somebody else's write")
	}
	b.spare, b.heard = 0, s.lastHeard
	if b.takesAtOnceLocked() {
		t.Error("the kernel was not asked where too much may be on its way")
	}
}
