package redis

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

// hop is a proxy between a store and its server that can lose an answer.
type hop struct {
	address string

	mu  sync.Mutex
	at  string // the text in an answer that makes it call met
	met func() (arrives bool)
}

// lose makes the next answer with a text get lost: the server has sent it, but
// the connection breaks. The returned channel is closed when that happens.
func (h *hop) lose(text string) <-chan struct{} {
	lost := make(chan struct{})
	h.meet(text, func() bool { close(lost); return false })
	return lost
}

// meet makes the hop call met before the next answer with a text arrives. If
// met returns false, the answer does not arrive.
func (h *hop) meet(text string, met func() (arrives bool)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.at, h.met = text, met
}

// passes reports whether an answer may arrive.
func (h *hop) passes(answer []byte) bool {
	h.mu.Lock()
	met := h.met
	if h.at == "" || !bytes.Contains(answer, []byte(h.at)) {
		met = func() bool { return true }
	} else {
		h.at = ""
	}
	h.mu.Unlock()
	return met()
}

func startHop(t testing.TB, target string) *hop {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hop{address: l.Addr().String()}
	ctx, stop := context.WithCancel(context.Background())
	var work sync.WaitGroup
	t.Cleanup(func() {
		stop()
		l.Close()
		work.Wait()
	})
	work.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			context.AfterFunc(ctx, func() { near.Close(); far.Close() })
			work.Go(func() {
				defer far.Close()
				_, _ = io.Copy(far, near)
			})
			work.Go(func() {
				defer near.Close()
				for piece := make([]byte, 1<<20); ; {
					n, err := far.Read(piece)
					if err != nil || !h.passes(piece[:n]) {
						return
					}
					if _, err := near.Write(piece[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	return h
}

// receive returns the messages that wait for a node now.
func receive(t testing.TB, s store.Store, node store.Node) (got []string) {
	t.Helper()
	eventually(t, "a receipt", func() error {
		messages, err := s.Receive(within(t, patience), node, 0)
		for _, message := range messages {
			got = append(got, string(message))
		}
		return err
	})
	return got
}

func send(t testing.TB, s store.Store, node store.Node, messages ...string) {
	t.Helper()
	var all [][]byte
	for _, message := range messages {
		all = append(all, []byte(message))
	}
	if err := s.Send(within(t, patience), node, all...); err != nil {
		t.Fatal(err)
	}
}

func expectMessages(t testing.TB, s store.Store, node store.Node, want ...string) {
	t.Helper()
	if got := receive(t, s, node); !slices.Equal(got, want) {
		t.Errorf("received %q, want %q", got, want)
	}
}

func TestAMessageIsNotLostWithTheConnectionThatItComesOver(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	h := startHop(t, s.address)
	a, b := openAt(t, h.address), s.open(t)
	defer b.Close()
	send(t, b, "n", "first", "stop it")
	met := h.lose("stop it")
	if messages, err := a.Receive(within(t, patience), "n", 0); err == nil {
		t.Errorf("received %q", messages)
	}
	<-met
	expectMessages(t, a, "n", "first", "stop it")

	// The answer to the call that acknowledges them is lost. They do not come
	// again, but messages that arrived meanwhile do.
	send(t, b, "n", "second")
	met = h.lose("second")
	if messages, err := a.Receive(within(t, patience), "n", 0); err == nil {
		t.Errorf("received %q", messages)
	}
	<-met
	send(t, b, "n", "third")
	expectMessages(t, a, "n", "second", "third")
	expectMessages(t, a, "n")
}

func TestAMessageIsNotLostWithACallThatDoesNotWaitForIt(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	h := startHop(t, s.address)
	a, b := openAt(t, h.address), s.open(t)
	defer b.Close()
	send(t, b, "n", "stop it")
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan struct{})
	h.meet("stop it", func() bool { leave(); <-left; return true })
	if messages, err := a.Receive(ctx, "n", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("received %q, %v", messages, err)
	}
	close(left)
	expectMessages(t, a, "n", "stop it")
}

func TestMessagesComeAlsoWhereTheServerHasForgottenTheOlderOnes(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	a, b := s.open(t), s.open(t)
	defer a.Close()
	defer b.Close()
	send(t, b, "n", "first")
	expectMessages(t, a, "n", "first")
	// The clock of the server that replaces it may be behind.
	inbox := a.(*redisStore).inboxOf("n")
	s.do(t, "DEL", inbox)
	s.do(t, "XADD", inbox, "1-1", "m", "second")
	expectMessages(t, a, "n", "second")
	send(t, b, "n", "third")
	expectMessages(t, a, "n", "third")
}

func TestMessagesThatHaveComeAreRemovedAndThoseThatWaitAreBounded(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	a := s.open(t)
	defer a.Close()
	inbox := a.(*redisStore).inboxOf("n")
	all := make([]string, mostMessages/4)
	for i := range all {
		all[i] = fmt.Sprint(i)
	}
	for range 5 {
		send(t, a, "n", all...)
	}
	if n := s.do(t, "XLEN", inbox); n != fmt.Sprint(mostMessages) {
		t.Errorf("%s messages wait", n)
	}
	if got := receive(t, a, "n"); !slices.Equal(got, all[:someMessages]) {
		t.Errorf("received %d messages, of which %q was the first", len(got), got[:1])
	}
	for range 4*len(all)/someMessages - 1 {
		receive(t, a, "n")
	}
	expectMessages(t, a, "n")
	if n := s.do(t, "XLEN", inbox); n != "1" { // the last message shows that the inbox is still the same
		t.Errorf("%s messages are left", n)
	}
	if left := s.do(t, "PTTL", inbox); strings.HasPrefix(left, "-") {
		t.Errorf("they stay for %s ms", left)
	}
}

// A node that receives nothing asks no more often than its waits allow.
func TestAReceiptIsOneCallOfTheServer(t *testing.T) {
	s := startServer(t)
	a := s.open(t)
	defer a.Close()
	send(t, a, "n", "first")
	expectMessages(t, a, "n", "first")
	before := s.calls(t)
	for i := range 10 {
		send(t, a, "n", fmt.Sprint(i))
		if messages, err := a.Receive(within(t, patience), "n", time.Second); err != nil || len(messages) != 1 {
			t.Fatalf("received %q, %v", messages, err)
		}
	}
	if calls := s.calls(t) - before - 10; calls != 10 {
		t.Errorf("ten receipts are %d calls", calls)
	}
}
