package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

func (h *handle) expectLife(node store.Node, want bool) {
	h.t.Helper()
	if lives, err := h.Lives(h.context(), node); err != nil || lives != want {
		h.t.Fatalf("a node lives: %v, %v; want %v", lives, err, want)
	}
}

func (h *handle) renew(node store.Node, lease time.Duration) {
	h.t.Helper()
	if err := h.Renew(h.context(), node, lease); err != nil {
		h.t.Fatalf("Renew: %v", err)
	}
}

func testLease(t *testing.T, n *nodes) {
	a, b := n.handle(), n.handle()
	short, long := newNode(), newNode()
	b.expectLife(short, false)
	a.renew(short, soon)
	a.renew(long, soon)
	a.renew(long, ttl)
	b.expectLife(long, true)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if lives, err := b.Lives(b.context(), short); err == nil && !lives {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a lease does not end")
		}
	}
	b.expectLife(long, true)
	a.renew(short, ttl)
	b.expectLife(short, true)
	a.renew(long, 0)
	b.expectLife(long, false)
	a.renew(short, 0)
	a.renew(short, 0)
	b.expectLife(short, false)
}

func (h *handle) send(to store.Node, messages ...string) {
	h.t.Helper()
	var all [][]byte
	for _, message := range messages {
		all = append(all, []byte(message))
	}
	if err := h.Send(h.context(), to, all...); err != nil {
		h.t.Fatalf("Send: %v", err)
	}
}

// receive waits for this many messages.
func (h *handle) receive(node store.Node, want int) (got []string) {
	h.t.Helper()
	for len(got) < want {
		messages, err := h.Receive(h.context(), node, patience)
		if err != nil || len(messages) == 0 {
			h.t.Fatalf("Receive returns %d messages, %v", len(messages), err)
		}
		for _, message := range messages {
			got = append(got, string(message))
		}
	}
	return got
}

func testMessages(t *testing.T, n *nodes) {
	a, b := n.handle(), n.handle()
	one, two := newNode(), newNode()
	if messages, err := a.Receive(a.context(), one, 20*time.Millisecond); len(messages) > 0 || err != nil {
		t.Errorf("nothing was sent, and Receive returns %q, %v", messages, err)
	}
	b.send(one, "a", "b\x00\r\n\xff")
	b.send(two, "other")
	a.send(one, "c")
	if got := a.receive(one, 3); !slices.Equal(got, []string{"a", "b\x00\r\n\xff", "c"}) {
		t.Errorf("received %q", got)
	}
	if messages, err := a.Receive(a.context(), one, 0); len(messages) > 0 || err != nil {
		t.Errorf("messages come again: %q, %v", messages, err)
	}
	answer := make(chan []string, 1)
	go func() {
		messages, _ := a.Receive(a.context(), one, patience)
		var got []string
		for _, message := range messages {
			got = append(got, string(message))
		}
		answer <- got
	}()
	select {
	case early := <-answer:
		t.Fatalf("Receive does not wait: %q", early)
	case <-time.After(50 * time.Millisecond):
	}
	b.send(one, "d")
	select {
	case got := <-answer:
		if !slices.Equal(got, []string{"d"}) {
			t.Errorf("received %q, want d", got)
		}
	case <-time.After(patience):
		t.Fatal("Receive still waits")
	}
	if got := b.receive(two, 1); !slices.Equal(got, []string{"other"}) {
		t.Errorf("the other node received %q", got)
	}
	var sent []string
	for i := range 1000 {
		sent = append(sent, fmt.Sprint(i))
	}
	for half := range slices.Chunk(sent, 100) {
		b.send(one, half...)
	}
	if got := a.receive(one, len(sent)); !slices.Equal(got, sent) {
		t.Errorf("of %d messages %d came in another order", len(sent), len(got))
	}
}

func testContext(t *testing.T, n *nodes) {
	a, run, node := n.handle(), newKey(), newNode()
	a.write(store.Write{Run: run, Begin: []byte("b"), TTL: ttl})
	for name, call := range map[string]func(ctx context.Context) error{
		"Read": func(ctx context.Context) error {
			_, _, err := a.Read(ctx, run, 0, 1, patience)
			return err
		},
		"Receive": func(ctx context.Context) error {
			_, err := a.Receive(ctx, node, patience)
			return err
		},
	} {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- call(ctx) }()
		time.AfterFunc(20*time.Millisecond, cancel)
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s returns %v when its context has ended", name, err)
			}
		case <-time.After(patience / 2):
			t.Errorf("%s does not heed its context", name)
		}
		cancel()
	}
	// A Receive that was cancelled has not taken the message that is sent after
	// it.
	a.send(node, "still")
	if got := a.receive(node, 1); !slices.Equal(got, []string{"still"}) {
		t.Errorf("received %q", got)
	}
}

func testConcurrent(t *testing.T, n *nodes) {
	const runs, last, readers = 20, 300, 2
	a, b := n.handle(), n.handle()
	keys := make([]store.Key, runs)
	var begin []store.Write
	for i := range keys {
		keys[i] = newKey()
		begin = append(begin, store.Write{Run: keys[i], Begin: []byte("b"), TTL: ttl})
	}
	a.write(begin...)
	ctx := b.context()
	var wg sync.WaitGroup
	for i := range runs * readers {
		wg.Go(func() {
			run, h := keys[i%runs], a
			if i >= runs {
				h = b
			}
			var got []store.Event
			for {
				piece, end, err := h.Read(ctx, run, uint64(len(got)), 512, patience)
				if err != nil {
					t.Errorf("reader %d after %d events: %v", i, len(got), err)
					return
				}
				got = append(got, piece...)
				if end != nil {
					break
				}
			}
			if want := events(1, last); !same(got, want) {
				t.Errorf("reader %d got %s, want %s", i, brief(got), brief(want))
			}
		})
	}
	const step = 10
	for first := uint64(1); first <= last; first += step {
		var writes []store.Write
		for _, run := range keys {
			w := store.Write{Run: run, Events: events(first, first+step-1), TTL: ttl}
			if first+step > last {
				w.End = []byte("over")
			}
			writes = append(writes, w)
		}
		a.write(writes...)
	}
	wg.Wait()
}

func testClose(t *testing.T, n *nodes) {
	a, b, run := n.handle(), n.handle(), newKey()
	a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 2), TTL: ttl})
	done := make(chan error, 1)
	go func() {
		_, _, err := a.Read(context.Background(), run, 2, 1, patience)
		done <- err
	}()
	time.Sleep(20 * time.Millisecond)
	if err := a.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	select {
	case err := <-done:
		if err == nil || errors.Is(err, store.ErrUnknown) {
			t.Errorf("a call that is under way returns %v", err)
		}
	case <-time.After(patience / 2):
		t.Error("a call that is under way goes on")
	}
	if errs := a.Write(context.Background(), []store.Write{{Run: run, Events: events(3, 3), TTL: ttl}}); len(errs) != 1 || errs[0] == nil || errors.Is(errs[0], store.ErrUnknown) {
		t.Errorf("a write after Close returns %v", errs)
	}
	got, _ := b.read(run, 0, 0)
	b.expect("after another node's Close", got, events(1, 2))
}
