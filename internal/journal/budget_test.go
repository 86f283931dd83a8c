package journal

import (
	"testing"
)

func used(b *Budget) int {
	n, _ := b.Used()
	return n
}

func TestTheOldestEventsOfTheLongestRingGoFirst(t *testing.T) {
	const limit = 256 << 10
	b := NewBudget(KeepNewest, limit)
	long, short := openIn(t, b, 1<<20), openIn(t, b, 1<<20)
	for n := 1; n <= 300; n++ {
		add(t, short, event(n, 100))
	}
	before := short.Figures()
	for n := 1; n <= 5000; n++ {
		add(t, long, event(n, 100))
		if used(b) > limit {
			t.Fatalf("%d bytes are used of %d", used(b), limit)
		}
	}
	if short.Figures() != before {
		t.Errorf("the short journal has lost events: %+v", short.Figures())
	}
	if f := long.Figures(); f.Gone == 0 || f.Bytes < limit/2 {
		t.Errorf("the long journal: %+v", f)
	}
	if b.Open(1<<20, "", nil) != nil {
		t.Error("a new run begins while the budget is used up")
	}
	long.Discard()
	if b.Open(1<<20, "", nil) == nil {
		t.Error("no new run begins, and there is room")
	}
	short.Discard()
	if used(b) != 0 {
		t.Errorf("%d bytes are used by nobody", used(b))
	}
}

func TestAReaderIsToldWhereAnotherRingTookItsEvents(t *testing.T) {
	b := NewBudget(KeepNewest, 160<<10)
	j := openIn(t, b, 1<<20)
	told := false
	c, _ := j.Join(After(0), func() {
		told = true
		j.Figures() // this needs the locks to be free
		b.Used()
	})
	defer c.Leave()
	for n := 1; n <= 900; n++ {
		add(t, j, event(n, 100))
	}
	if told {
		t.Fatal("told before anything is gone")
	}
	other := openIn(t, b, 1<<20)
	add(t, other, event(1, 100_000))
	if f := j.Figures(); !told || f.Gone == 0 {
		t.Errorf("told: %v, %+v", told, f)
	}
}

// filled returns a backlog with 100 events of 1 KiB, some of which have been
// sent.
func filled(t testing.TB, b *Budget, sent int, evicted func()) (*Journal, *Cursor) {
	t.Helper()
	j := b.Open(1<<20, "", evicted)
	if j == nil {
		t.Fatal("the budget has no room for a journal")
	}
	c := join(t, j, After(0))
	for n := 1; n <= 100; n++ {
		add(t, j, event(n, 1<<10))
		if n <= sent {
			wantRead(t, c, event(n, 1<<10))
		}
	}
	return j, c
}

func TestWhenTheBudgetIsUsedUpEndedRunsGoFirstAndThenWhatWasSent(t *testing.T) {
	b := NewBudget(KeepUnsent, plenty)
	var evicted []string
	evict := func(name string) func() { return func() { evicted = append(evicted, name); b.Used() } }

	endedSent, c := filled(t, b, 100, evict("ended, sent"))
	endedSent.Close(nil)
	_, _ = read(c)
	c.Leave()
	endedUnsent, c := filled(t, b, 50, evict("ended, not sent"))
	endedUnsent.Close(nil)
	c.Leave()
	back, c := filled(t, b, 100, evict("ended, and its client is back"))
	back.Close(nil)
	_, _ = read(c)
	c.Leave()
	join(t, back, After(10))
	attached, _ := filled(t, b, 90, nil)
	away, c := filled(t, b, 90, nil)
	c.Leave()

	want := func(j *Journal, gone, unsent bool) {
		t.Helper()
		check(t, j)
		f := j.Figures()
		if (f.Gone > 0) != gone || f.Unsent > 0 != unsent {
			t.Errorf("gone: %v, unsent: %v; %+v", gone, unsent, f)
		}
	}
	b.SetLimit(used(b) - 50<<10)
	openIn(t, b, 1<<20)
	if len(evicted) != 1 || evicted[0] != "ended, sent" {
		t.Fatalf("evicted: %q", evicted)
	}
	want(attached, false, true)

	for {
		before := used(b)
		b.SetLimit(before - 1)
		b.Open(1<<20, "", nil)
		if used(b) == before {
			break
		}
	}
	if len(evicted) != 1 {
		t.Errorf("evicted: %q", evicted)
	}
	want(endedUnsent, false, true)
	want(back, true, true) // the first ten, because its client has them
	want(attached, true, true)
	want(away, false, true)
	if f := attached.Figures(); f.Gone > 90 || f.Gone < 70 {
		t.Errorf("of 90 events that were sent %d are gone", f.Gone)
	}
	if b.Open(1<<20, "", nil) != nil {
		t.Error("a new run begins while the budget is used up")
	}
	// Each run still has its history.
	before := attached.Figures().Events
	for n := 101; n <= 200; n++ {
		add(t, attached, event(n, 1<<10))
	}
	if f := attached.Figures(); f.Events != before+100 {
		t.Errorf("%+v", f)
	}
}

func TestABacklogIsTrimmedAgainOnceItsReaderHasGoneOn(t *testing.T) {
	b := NewBudget(KeepUnsent, plenty)
	j, c := filled(t, b, 0, nil)
	b.SetLimit(64 << 10)
	if b.Open(1<<20, "", nil) != nil {
		t.Fatal("a new run begins while the budget is used up")
	}
	if _, err := read(c); err != nil {
		t.Fatal(err)
	}
	if b.Open(1<<20, "", nil) == nil {
		t.Errorf("all has been sent, and %d bytes are used", used(b))
	}
	check(t, j)
}
