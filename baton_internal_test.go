package caddysse

import (
	"io"
	"net"
	"strings"
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
	// From now on the kernel can't answer, which shows whether it is asked.
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
		b.spare, b.heard = onItsWay, s.lastHeard // whatever the kernel says, because the client's host may delay its acknowledgement
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

func TestAClientThatTheKernelTellsNothingOfIsNotWrittenToFromHere(t *testing.T) {
	s := &stream{lastHeard: time.Second}
	b := &baton{stream: s} // HTTP/2: no backlog
	for i := range 3 {
		if b.takesAtOnceLocked() {
			t.Errorf("call %d: a client of which nobody can tell takes at once (spare %d)", i, b.spare)
		}
	}
}

// The event's last byte is also the last byte of a chunk of the journal.
func TestAnEarlyEndThatWaitsForAnEventComesRightAfterIt(t *testing.T) {
	conn, client := tcpPair(t)
	s := &stream{chunks: conn, frames: new(frames), h: &Handler{agenda: new(agenda)}}
	s.stage.Store(uint32(stageOpen))
	s.cancel = func(error) {}
	defer s.h.agenda.drop(s)
	f := openFeed(journal.NewBudget(journal.KeepUnsent, 1<<20), journal.KeepUnsent, 64<<10, "", func() {})
	f.plain = true
	reader := &runReader{run: &run{feed: f}}
	reader.join(journal.After(0))
	b := &reader.baton
	b.stream, b.backlog = s, peer.NewBacklog(conn)
	f.attached.Store(reader)
	reader.cursor.Wait()
	_, _ = f.write([]byte("data: 1")) // 7 bytes of the first 512
	s.end(drained)                    // waits for the event
	rest := make([]byte, 512-7)
	for i := range rest {
		rest[i] = 'x'
	}
	copy(rest[len(rest)-2:], "\n\n")
	_, _ = f.write(append(rest, "data: the next one is not whole"...))
	conn.Close()
	got, _ := io.ReadAll(client)
	if tail := string(got[len(got)-40:]); !strings.HasSuffix(tail, "\n\n\r\n") {
		t.Errorf("it ended in mid-event: %q", tail)
	}
}
