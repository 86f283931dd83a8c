package caddysse

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/journal"
	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// tcpPair returns the two ends of a connection.
func tcpPair(t *testing.T) (server, client net.Conn) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if client, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server, client
}

func TestTheKernelIsAskedAgainOnlyOnceTooMuchMayBeOnItsWay(t *testing.T) {
	conn, _ := tcpPair(t)
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

func TestAnEventForAClientThatKeepsUpAllocatesNothing(t *testing.T) {
	conn, client := tcpPair(t)
	event := []byte("data: some text that is as long as that of an event\n\n")
	s := &stream{chunks: conn, frames: new(frames)}
	s.splicer.Splice(new(eventstream.Frames), event) // it has had its first event
	f := openFeed(journal.NewBudget(journal.KeepUnsent, 1<<20), journal.KeepUnsent, 64<<10, "", func() {})
	reader := &runReader{run: &run{feed: f}}
	reader.join(journal.After(0))
	b := &reader.baton
	b.stream, b.backlog = s, peer.NewBacklog(conn)
	if _, tells := b.backlog.Size(); !tells {
		t.Skip("the platform does not tell what is on its way")
	}
	read := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, client)
		read <- n
	}()
	reader.cursor.Wait()
	f.attached.Store(reader)
	before := s.bytes
	if allocs := testing.AllocsPerRun(1000, func() {
		_, _ = b.backlog.Size()
		b.spare, b.heard = onItsWay, s.lastHeard // whatever it says: the client's host may wait with its answer
		if _, err := f.write(event); err != nil {
			t.Error(err)
		}
	}); allocs != 0 {
		t.Errorf("an event takes %v allocations", allocs)
	}
	if p, err := reader.cursor.Next(); len(p) > 0 || err != nil {
		t.Errorf("left to the client's own goroutine: %d bytes, %v", len(p), err)
	}
	conn.Close()
	if sent, got := int64(s.bytes-before), <-read; got <= sent {
		t.Errorf("%d bytes arrived, want the %d that were sent and what frames them", got, sent)
	}
}
