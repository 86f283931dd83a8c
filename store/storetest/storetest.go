// Package storetest tests whether a store does what sse needs, and has a store in
// memory that can be made to fail.
package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// patience limits every wait for something that must happen.
	patience = time.Minute

	// ttl is for runs that stay.
	ttl = 10 * time.Minute

	// soon is for runs and leases that must expire within a test.
	soon = 500 * time.Millisecond
)

// Run tests a store. Each call of open returns another handle on the same store,
// like another node's; the test closes it. The store need not be empty. What the
// test leaves there expires.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, *nodes){
		"EventsAreReadAsTheyWereWritten":           testRoundTrip,
		"LargeRunsAreReadInPieces":                 testPieces,
		"WritesThatComeAgainChangeNothing":         testAgain,
		"ARunThatIsNotThereIsNotMadeByTheWay":      testUnknown,
		"NothingFollowsWhatTheStoreHasLost":        testAfter,
		"OneCallWritesManyRuns":                    testManyRuns,
		"AReaderWaits":                             testWait,
		"AReaderGetsTheEndAfterTheLastEvent":       testEnd,
		"WhatMustBeKeptIsAndMuchMoreIsNot":         testOldest,
		"ADroppedRunIsGone":                        testDrop,
		"RunsGoWhenTheirTimeIsOver":                testTTL,
		"NodesLiveAsLongAsTheirLease":              testLease,
		"MessagesComeOnceAndInOrder":               testMessages,
		"AContextEndsEachCall":                     testContext,
		"ManyReadersGetEveryEventOnceWhileWritten": testConcurrent,
		"CloseEndsCallsAndKeepsRuns":               testClose,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, &nodes{t: t, open: open})
		})
	}
}

// nodes are the handles of one test.
type nodes struct {
	t    *testing.T
	open func(t *testing.T) store.Store
}

func (n *nodes) handle() *handle {
	n.t.Helper()
	s := n.open(n.t)
	n.t.Cleanup(func() { _ = s.Close() })
	return &handle{t: n.t, Store: s}
}

// handle is a store whose calls must succeed, unless a test says otherwise.
type handle struct {
	t *testing.T
	store.Store
}

func (h *handle) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *handle) write(writes ...store.Write) {
	h.t.Helper()
	for i, err := range h.Write(h.context(), writes) {
		if err != nil {
			h.t.Fatalf("write %d: %v", i, err)
		}
	}
}

func (h *handle) find(run store.Key) store.Run {
	h.t.Helper()
	found, err := h.Find(h.context(), run)
	if err != nil {
		h.t.Fatalf("Find: %v", err)
	}
	return found
}

func (h *handle) expectUnknown(run store.Key) {
	h.t.Helper()
	if found, err := h.Find(h.context(), run); !errors.Is(err, store.ErrUnknown) {
		h.t.Fatalf("Find of a run that is not there returns %+v, %v", found, err)
	}
	if events, end, err := h.Read(h.context(), run, 0, 1, 0); !errors.Is(err, store.ErrUnknown) {
		h.t.Fatalf("Read of a run that is not there returns %d events, %q, %v", len(events), end, err)
	}
}

// read returns what a run has after an event, in one piece.
func (h *handle) read(run store.Key, after uint64, wait time.Duration) ([]store.Event, []byte) {
	h.t.Helper()
	events, end, err := h.Read(h.context(), run, after, 1<<20, wait)
	if err != nil {
		h.t.Fatalf("Read: %v", err)
	}
	return events, end
}

func newKey() (key store.Key) {
	_, _ = rand.Read(key[:])
	return key
}

func newNode() store.Node { return store.Node(rand.Text()) }

// events returns the events with the numbers from first to last.
func events(first, last uint64) []store.Event {
	var all []store.Event
	for n := first; n <= last; n++ {
		all = append(all, store.Event{Number: n, Data: fmt.Appendf(nil, "event %d", n)})
	}
	return all
}

func same(a, b []store.Event) bool {
	return slices.EqualFunc(a, b, func(a, b store.Event) bool { return a.Number == b.Number && bytes.Equal(a.Data, b.Data) })
}

// brief says which events there are.
func brief(events []store.Event) string {
	if len(events) == 0 {
		return "no events"
	}
	return fmt.Sprintf("%d events from %d to %d", len(events), events[0].Number, events[len(events)-1].Number)
}

func (h *handle) expect(what string, got, want []store.Event) {
	h.t.Helper()
	if !same(got, want) {
		h.t.Fatalf("%s: got %s, want %s", what, brief(got), brief(want))
	}
}

func testRoundTrip(t *testing.T, n *nodes) {
	a, b, run := n.handle(), n.handle(), newKey()
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	large := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	wrote := []store.Event{{Number: 1, Data: every}, {Number: 2, Data: large}, {Number: 3, Data: []byte{0}}}
	a.write(store.Write{Run: run, Begin: every, Events: wrote[:1], TTL: ttl})
	a.write(store.Write{Run: run, Events: wrote[1:], TTL: ttl})
	got, end := b.read(run, 0, 0)
	for len(got) > 0 && got[len(got)-1].Number < 3 { // it may be too much for one piece
		var more []store.Event
		more, end = b.read(run, got[len(got)-1].Number, 0)
		got = append(got, more...)
	}
	b.expect("all", got, wrote)
	if end != nil {
		t.Errorf("a run that has not ended has the end %q", end)
	}
	got, _ = b.read(run, 2, 0)
	b.expect("after 2", got, wrote[2:])
	found := b.find(run)
	if !bytes.Equal(found.Begin, every) || found.Oldest != 1 || found.Last != 3 || found.End != nil {
		t.Errorf("Find returns %.60q, %d to %d, end %q", found.Begin, found.Oldest, found.Last, found.End)
	}
	other := newKey()
	a.write(store.Write{Run: other, Begin: []byte("b"), TTL: ttl})
	if found := b.find(other); found.Oldest != 1 || found.Last != 0 {
		t.Errorf("a run without events has %d to %d", found.Oldest, found.Last)
	}
}

func testPieces(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	wrote := events(1, 500)
	a.write(store.Write{Run: run, Begin: []byte("b"), Events: wrote, End: []byte("over"), TTL: ttl})
	var got []store.Event
	for pieces := 0; ; pieces++ {
		piece, end, err := a.Read(a.context(), run, uint64(len(got)), 1000, 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(piece) > 250 {
			t.Fatalf("asked for about 1000 bytes, got %d events", len(piece))
		}
		got = append(got, piece...)
		if (end != nil) != (len(got) == len(wrote)) {
			t.Fatalf("the end is %q after %d events", end, len(got))
		}
		if end != nil {
			break
		}
		if len(piece) == 0 {
			t.Fatalf("a piece is empty after %d events", len(got))
		}
	}
	a.expect("all", got, wrote)
	piece, _, err := a.Read(a.context(), run, 7, 1, 0)
	if err != nil || len(piece) == 0 || piece[0].Number != 8 {
		t.Errorf("asked for one byte, got %d events, %v", len(piece), err)
	}
}

func testAgain(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	for range 2 {
		a.write(store.Write{Run: run, Begin: []byte("first"), Events: events(1, 3), TTL: ttl})
	}
	a.write(store.Write{Run: run, Begin: []byte("second"), Events: events(1, 5), TTL: ttl})
	a.write(store.Write{Run: run, Events: events(4, 5), TTL: ttl})
	a.write(store.Write{Run: run, Events: events(5, 6), TTL: ttl})
	for range 2 {
		a.write(store.Write{Run: run, Events: events(5, 7), End: []byte("over"), TTL: ttl})
	}
	got, end := a.read(run, 0, 0)
	a.expect("after repeated writes", got, events(1, 7))
	if found := a.find(run); string(found.Begin) != "first" || found.Last != 7 || string(end) != "over" {
		t.Errorf("the run began with %q, has %d events, and ended with %q", found.Begin, found.Last, end)
	}
}

func testUnknown(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	a.expectUnknown(run)
	for _, w := range []store.Write{
		{Run: run, Events: events(1, 2), TTL: ttl},
		{Run: run, Events: events(7, 8), Oldest: 3, TTL: ttl},
		{Run: run, End: []byte("over"), TTL: ttl},
		{Run: run, TTL: ttl},
	} {
		if errs := a.Write(a.context(), []store.Write{w}); len(errs) != 1 || !errors.Is(errs[0], store.ErrUnknown) {
			t.Errorf("a write of a run that is not there returns %v", errs)
		}
		a.expectUnknown(run)
	}
	if err := a.Touch(a.context(), ttl, run); err != nil {
		t.Errorf("Touch: %v", err)
	}
	a.expectUnknown(run)
}

func testAfter(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 3), TTL: ttl})
	for _, w := range []store.Write{
		{Run: run, After: 4, End: []byte("over"), TTL: ttl},
		{Run: run, After: 4, Events: events(5, 6), TTL: ttl},
		{Run: run, After: 4, TTL: ttl},
	} {
		if errs := a.Write(a.context(), []store.Write{w}); len(errs) != 1 || !errors.Is(errs[0], store.ErrUnknown) {
			t.Errorf("a write after an event that is not there returns %v", errs)
		}
		if found := a.find(run); found.Last != 3 || found.End != nil {
			t.Fatalf("then there are %d events, end %q", found.Last, found.End)
		}
	}
	for range 2 {
		a.write(store.Write{Run: run, After: 3, Events: events(4, 5), TTL: ttl})
	}
	a.write(store.Write{Run: run, After: 5, End: []byte("over"), TTL: ttl})
	got, end := a.read(run, 0, 0)
	a.expect("all of it", got, events(1, 5))
	if string(end) != "over" {
		t.Errorf("the end is %q", end)
	}
}

func testManyRuns(t *testing.T, n *nodes) {
	a, b := n.handle(), n.handle()
	var writes []store.Write
	missing := 77
	for i := range 300 {
		w := store.Write{Run: newKey(), Begin: []byte("b"), Events: events(1, 3), TTL: ttl}
		if i == missing {
			w.Begin = nil
		}
		writes = append(writes, w)
	}
	for _, w := range writes[:100] { // more for runs of the same call
		writes = append(writes, store.Write{Run: w.Run, Events: events(4, 6), TTL: ttl})
	}
	errs := a.Write(a.context(), writes)
	if len(errs) != len(writes) {
		t.Fatalf("%d writes have %d errors", len(writes), len(errs))
	}
	for i, err := range errs {
		if fails := i == missing || i == 300+missing; fails != errors.Is(err, store.ErrUnknown) {
			t.Errorf("write %d: %v", i, err)
		}
	}
	for i, w := range writes[:300] {
		if i == missing {
			b.expectUnknown(w.Run)
			continue
		}
		want := events(1, 3)
		if i < 100 {
			want = events(1, 6)
		}
		got, _ := b.read(w.Run, 0, 0)
		b.expect(fmt.Sprint("run ", i), got, want)
	}
}

// readLater reads on a goroutine of its own.
func (h *handle) readLater(run store.Key, after uint64) <-chan string {
	answer := make(chan string, 1)
	ctx := h.context()
	go func() {
		events, end, err := h.Read(ctx, run, after, 1<<20, patience)
		answer <- fmt.Sprintf("%d events, end %q, unknown %v", len(events), end, errors.Is(err, store.ErrUnknown))
	}()
	return answer
}

func testWait(t *testing.T, n *nodes) {
	a, b := n.handle(), n.handle()
	for want, write := range map[string]store.Write{
		`2 events, end "", unknown false`:     {Events: events(3, 4), TTL: ttl},
		`0 events, end "over", unknown false`: {End: []byte("over"), TTL: ttl},
		`0 events, end "", unknown true`:      {Drop: true},
	} {
		run := newKey()
		a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 2), TTL: ttl})
		if got, end := b.read(run, 2, 20*time.Millisecond); len(got) > 0 || end != nil {
			t.Errorf("there is nothing, and Read returns %d events, end %q", len(got), end)
		}
		answer := b.readLater(run, 2)
		select {
		case early := <-answer:
			t.Fatalf("Read does not wait: %s", early)
		case <-time.After(50 * time.Millisecond):
		}
		write.Run = run
		a.write(write)
		select {
		case got := <-answer:
			if got != want {
				t.Errorf("Read returns %s, want %s", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("Read still waits for %s", want)
		}
	}
}

func testEnd(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 4), TTL: ttl})
	a.write(store.Write{Run: run, End: []byte{0, 255, '\n'}, TTL: ttl})
	for after := range uint64(5) {
		got, end := a.read(run, after, 0)
		a.expect(fmt.Sprint("after ", after), got, events(after+1, 4))
		if !bytes.Equal(end, []byte{0, 255, '\n'}) {
			t.Errorf("after %d the end is %q", after, end)
		}
	}
	if got, end := a.read(run, 9, patience); len(got) > 0 || end == nil {
		t.Errorf("after an event that there is not: %d events, end %q", len(got), end)
	}
	if found := a.find(run); !bytes.Equal(found.End, []byte{0, 255, '\n'}) {
		t.Errorf("Find returns the end %q", found.End)
	}
}

func testOldest(t *testing.T, n *nodes) {
	a, run := n.handle(), newKey()
	const step, all = 50, 10_000
	for last := uint64(step); last <= all; last += step {
		w := store.Write{Run: run, Events: events(last-step+1, last), Oldest: max(1, last) - step/2, TTL: ttl}
		if last == step {
			w.Begin = []byte("b")
		}
		a.write(w)
	}
	found := a.find(run)
	if found.Last != all || found.Oldest > all-step/2 || found.Oldest < all/2 {
		t.Fatalf("there are events %d to %d", found.Oldest, found.Last)
	}
	got, _ := a.read(run, all-step, 0)
	if len(got) == 0 || got[0].Number > all-step/2 {
		t.Fatalf("an event that must be kept is gone: %d to %d", found.Oldest, found.Last)
	}
	got = got[len(got)-step/2:]
	a.expect("what must be kept", got, events(all-step/2+1, all))
	got, _ = a.read(run, 0, 0)
	if len(got) == 0 || got[0].Number != found.Oldest {
		t.Errorf("a reader that has lost events does not get the oldest one")
	}
	// All events may be removed. The numbers continue.
	a.write(store.Write{Run: run, Oldest: all + 1, TTL: ttl})
	if found := a.find(run); found.Last != all || found.Oldest > all+1 {
		t.Errorf("when all may go there are events %d to %d", found.Oldest, found.Last)
	}
	a.write(store.Write{Run: run, Events: events(all+1, all+2), Oldest: all + 1, TTL: ttl})
	got, _ = a.read(run, all, 0)
	a.expect("after all could go", got, events(all+1, all+2))
}

func testDrop(t *testing.T, n *nodes) {
	a, b, run := n.handle(), n.handle(), newKey()
	a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 4), End: []byte("over"), TTL: ttl})
	b.write(store.Write{Run: run, Drop: true})
	a.expectUnknown(run)
	b.write(store.Write{Run: run, Drop: true})
	if errs := a.Write(a.context(), []store.Write{{Run: run, Events: events(5, 6), TTL: ttl}}); len(errs) != 1 || !errors.Is(errs[0], store.ErrUnknown) {
		t.Errorf("a write of a dropped run returns %v", errs)
	}
	a.write(store.Write{Run: run, Begin: []byte("c"), Events: events(1, 1), TTL: ttl}, store.Write{Run: run, Drop: true})
	a.expectUnknown(run)
}

// expectGone waits until a run is gone.
func (h *handle) expectGone(run store.Key) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := h.Find(h.context(), run); errors.Is(err, store.ErrUnknown) {
			h.expectUnknown(run)
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatal("a run is still there")
		}
	}
}

func testTTL(t *testing.T, n *nodes) {
	a := n.handle()
	short, touched, written, shortened := newKey(), newKey(), newKey(), newKey()
	for _, run := range []store.Key{short, touched, written} {
		a.write(store.Write{Run: run, Begin: []byte("b"), Events: events(1, 2), TTL: soon})
		switch run {
		case touched:
			if err := a.Touch(a.context(), ttl, run, newKey()); err != nil {
				t.Fatal(err)
			}
		case written:
			a.write(store.Write{Run: run, Events: events(3, 4), TTL: ttl})
		}
	}
	a.write(store.Write{Run: shortened, Begin: []byte("b"), TTL: ttl})
	a.write(store.Write{Run: shortened, Events: events(1, 2), End: []byte("over"), TTL: soon})
	a.expectGone(short)
	a.expectGone(shortened)
	got, _ := a.read(touched, 0, 0)
	a.expect("touched", got, events(1, 2))
	got, _ = a.read(written, 0, 0)
	a.expect("written", got, events(1, 4))
	if err := a.Touch(a.context(), soon, touched, written); err != nil {
		t.Fatal(err)
	}
	a.expectGone(touched)
	a.expectGone(written)
}
