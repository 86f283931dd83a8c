package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"unsafe"
)

const plenty = 1 << 30

func open(t testing.TB, policy Policy, history int) *Journal {
	t.Helper()
	return openIn(t, NewBudget(policy, plenty), history)
}

func openIn(t testing.TB, b *Budget, history int) *Journal {
	t.Helper()
	j := b.Open(history, "", nil)
	if j == nil {
		t.Fatal("the budget has no room for a journal")
	}
	return j
}

// add appends and publishes complete events. It fails the test if there is no
// room.
func add(t testing.TB, j *Journal, events ...string) {
	t.Helper()
	for _, e := range events {
		if n, err := j.Append([]byte(e)); n != len(e) || err != nil {
			t.Fatalf("Append took %d of %d bytes: %v", n, len(e), err)
		}
		j.Commit(Block{Event: true})
	}
	j.Publish()
}

// addID appends an event with an id of the upstream.
func addID(t testing.TB, j *Journal, id, text string) {
	t.Helper()
	if n, err := j.Append([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("Append took %d of %d bytes: %v", n, len(text), err)
	}
	j.Commit(Block{Event: true, SetsID: true, ID: id})
	j.Publish()
}

func join(t testing.TB, j *Journal, at Start) *Cursor {
	t.Helper()
	c, ok := j.Join(at, nil)
	if !ok {
		t.Fatalf("%+v is unknown", at)
	}
	t.Cleanup(c.Leave)
	return c
}

// read reads everything that there is.
func read(c *Cursor) (string, error) {
	var b strings.Builder
	for {
		p, err := c.Next()
		if len(p) == 0 {
			return b.String(), err
		}
		b.Write(p)
		c.Advance(len(p))
	}
}

func wantRead(t testing.TB, c *Cursor, want string) {
	t.Helper()
	if got, err := read(c); got != want || err != nil {
		t.Fatalf("read %q, %v; want %q", clip(got), err, clip(want))
	}
}

func wantEnd(t testing.TB, c *Cursor, want string, wantErr error) {
	t.Helper()
	if got, err := read(c); got != want || !errors.Is(err, wantErr) {
		t.Fatalf("read %q, %v; want %q, %v", clip(got), err, clip(want), wantErr)
	}
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + fmt.Sprintf("… (%d bytes)", len(s))
	}
	return s
}

// event returns event number n with a size in bytes.
func event(n, size int) string {
	head := fmt.Sprintf("data: %d ", n)
	return head + strings.Repeat("x", max(size-len(head)-2, 0)) + "\n\n"
}

func events(from, to, size int) string {
	var b strings.Builder
	for n := from; n <= to; n++ {
		b.WriteString(event(n, size))
	}
	return b.String()
}

// check compares the size that the journal reports with what it holds.
func check(t testing.TB, j *Journal) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	cost := 0
	for _, c := range j.chunks {
		cost += c.cost()
	}
	if cost != j.bytes {
		t.Fatalf("the journal counts %d bytes and holds %d", j.bytes, cost)
	}
	kept := 0
	for _, c := range j.chunks {
		for _, m := range c.ids {
			if m.id != "" {
				kept++
			}
		}
	}
	for id, spot := range j.ids {
		kept -= spot.count
		if j.nextWithIDLocked(id, spot.offset-1) != spot.offset {
			t.Fatalf("the first %q is not where the map says", id)
		}
	}
	if kept != 0 {
		t.Fatalf("the map has %d ids fewer than the chunks", kept)
	}
}

func TestAnEmptyJournalHasNoChunk(t *testing.T) {
	for _, policy := range []Policy{KeepNewest, KeepUnsent} {
		j := open(t, policy, 1<<20)
		c := join(t, j, Live())
		wantRead(t, c, "")
		if f := j.Figures(); f != (Figures{}) {
			t.Errorf("figures of an empty journal: %+v", f)
		}
		if used, n := j.budget.Used(); used != 0 || n != 1 {
			t.Errorf("an empty journal uses %d bytes in %d journals", used, n)
		}
	}
	if size := unsafe.Sizeof(Journal{}) + unsafe.Sizeof(Cursor{}); size > 600 {
		t.Errorf("an empty journal and its reader take %d bytes", size)
	}
	if size := unsafe.Sizeof(chunk{}); size > chunkOverhead {
		t.Errorf("a chunk takes %d bytes beside its text, and %d are counted", size, chunkOverhead)
	}
}

func TestAQuietJournalIsSmall(t *testing.T) {
	j := open(t, KeepUnsent, 256<<10)
	add(t, j, event(1, 40))
	if f := j.Figures(); f.Bytes > 1<<10 {
		t.Errorf("one event of 40 bytes takes %d", f.Bytes)
	}
}

func TestReadersGetWhatWasThereAndWhatFollowsWithoutGapOrOverlap(t *testing.T) {
	for _, policy := range []Policy{KeepNewest, KeepUnsent} {
		j := open(t, policy, 1<<20)
		for joinAt := range 100 {
			add(t, j, event(joinAt+1, 150))
			for _, from := range []int{0, joinAt / 2, joinAt, joinAt + 1} {
				c, ok := j.Join(After(uint64(from)), nil)
				if !ok {
					t.Fatalf("event %d is unknown", from)
				}
				wantRead(t, c, events(from+1, joinAt+1, 150))
				if c.Events() != uint64(joinAt+1) || c.Missed() != 0 || c.Begin().Number != uint64(from) {
					t.Fatalf("begins at %d, missed %d, now at %d", c.Begin().Number, c.Missed(), c.Events())
				}
				c.Leave()
			}
		}
		if _, ok := j.Join(After(101), nil); ok {
			t.Error("an event that has not been reached is known")
		}
		check(t, j)
	}
}

func TestARingShowsWholeEventsAndABacklogShowsBytesAsTheyCome(t *testing.T) {
	ring, backlog := open(t, KeepNewest, 1<<20), open(t, KeepUnsent, 1<<20)
	fromRing, fromBacklog := join(t, ring, Live()), join(t, backlog, Live())
	for _, j := range []*Journal{ring, backlog} {
		_, _ = j.Append([]byte("data: a"))
		j.Publish()
	}
	wantRead(t, fromRing, "")
	wantRead(t, fromBacklog, "data: a")
	for _, j := range []*Journal{ring, backlog} {
		_, _ = j.Append([]byte("\n\n"))
		j.Commit(Block{Event: true})
		_, _ = j.Append([]byte(":hello"))
		j.Publish()
	}
	wantRead(t, fromRing, "data: a\n\n")
	wantRead(t, fromBacklog, "\n\n:hello")
	if fromBacklog.Events() != 1 {
		t.Errorf("the reader has %d events, want 1", fromBacklog.Events())
	}

	// Both know where the next reader begins. Only the backlog keeps the rest.
	wantRead(t, join(t, ring, After(1)), "")
	wantRead(t, join(t, backlog, After(1)), ":hello")
	ring.Close(nil)
	backlog.Close(nil)
	wantEnd(t, join(t, ring, After(0)), "data: a\n\n", io.EOF)
	wantEnd(t, join(t, backlog, After(0)), "data: a\n\n:hello", io.EOF)
}

func TestARingDropsTheOldestAndSaysHowMany(t *testing.T) {
	const history = 8 << 10
	j := open(t, KeepNewest, history)
	for n := 1; n <= 500; n++ {
		add(t, j, event(n, 100))
		if f := j.Figures(); f.Bytes > history {
			t.Fatalf("the journal takes %d bytes", f.Bytes)
		}
		check(t, j)
	}
	f := j.Figures()
	if f.Gone == 0 || f.Events != 500 || f.Events-f.Gone < 50 {
		t.Fatalf("of 500 events the first %d are gone", f.Gone)
	}
	c := join(t, j, After(3))
	if c.Missed() != f.Gone-3 || c.Begin().Number != f.Gone {
		t.Errorf("missed %d, begins at %d; %d are gone", c.Missed(), c.Begin().Number, f.Gone)
	}
	wantRead(t, c, events(int(f.Gone)+1, 500, 100))
	if c := join(t, j, After(f.Gone)); c.Missed() != 0 {
		t.Errorf("missed %d after the last event that is gone", c.Missed())
	}
	wantRead(t, join(t, j, Last(3)), events(498, 500, 100))
	wantRead(t, join(t, j, Last(0)), "")
	c = join(t, j, Last(1000))
	if wantRead(t, c, events(int(f.Gone)+1, 500, 100)); c.Missed() != 0 {
		t.Errorf("missed %d of the last 1000", c.Missed())
	}
}

func TestTheNewestEventStaysWhateverItsSize(t *testing.T) {
	j := open(t, KeepNewest, 4<<10)
	add(t, j, event(1, 100), event(2, 1<<20))
	check(t, j)
	wantRead(t, join(t, j, Last(1)), event(2, 1<<20))
	add(t, j, event(3, 100))
	check(t, j)
	if f := j.Figures(); f.Gone != 2 || f.Bytes > 4<<10 {
		t.Errorf("%+v after a large event and a small one", f)
	}
	wantRead(t, join(t, j, Last(2)), event(3, 100))

	if n, err := j.Append(make([]byte, largestEvent+1)); !errors.Is(err, ErrEventTooLarge) {
		t.Errorf("a larger event: %d, %v", n, err)
	}
	j.Rollback()
	check(t, j)
	if f := j.Figures(); f.Bytes > 4<<10 {
		t.Errorf("%d bytes are left of an event that was dropped", f.Bytes)
	}
	add(t, j, event(4, 100))
	wantRead(t, join(t, j, After(3)), event(4, 100))
}

func TestALargeEventArrivesInOnePieceHoweverItComes(t *testing.T) {
	for _, step := range []int{100, 5000, 70_000} {
		j := open(t, KeepNewest, 1<<20)
		add(t, j, event(1, 100))
		c := join(t, j, Live())
		text := event(2, 300_000)
		for rest := text; rest != ""; rest = rest[min(step, len(rest)):] {
			_, _ = j.Append([]byte(rest[:min(step, len(rest))]))
			j.Publish()
			wantRead(t, c, "")
		}
		j.Commit(Block{Event: true})
		j.Publish()
		if p, err := c.Next(); string(p) != text || err != nil {
			t.Errorf("in steps of %d: %d bytes, %v", step, len(p), err)
		}
		check(t, j)
	}
}

func TestCommentsGoBeforeTheNewestEventDoes(t *testing.T) {
	j := open(t, KeepNewest, 4<<10)
	add(t, j, event(1, 100))
	c := join(t, j, Live())
	comment := ":" + strings.Repeat("c", 98) + "\n"
	for n := range 500 {
		_, _ = j.Append([]byte(comment))
		j.Commit(Block{})
		j.Publish()
		check(t, j)
		if n == 250 {
			c = join(t, j, Live())
		}
	}
	if f := j.Figures(); f.Gone != 0 || f.Bytes > 4<<10 {
		t.Errorf("%+v after many comments", f)
	}
	if got, err := read(join(t, j, Last(1))); !strings.HasPrefix(got, event(1, 100)) || err != nil {
		t.Errorf("the newest event is gone: %q, %v", clip(got), err)
	}
	// A reader that was asleep has lost comments, but no event.
	add(t, j, event(2, 100))
	if got, err := read(c); !strings.HasSuffix(got, event(2, 100)) || err != nil || c.Events() != 2 {
		t.Errorf("read %q, %v", clip(got), err)
	}
}

func TestAPlaceIsFoundByTheUpstreamsID(t *testing.T) {
	j := NewBudget(KeepNewest, plenty).Open(1<<20, "began", nil)
	wantRead(t, join(t, j, AfterID("began")), "")
	addID(t, j, "a", event(1, 50))
	addID(t, j, "b", event(2, 50))
	add(t, j, event(3, 50)) // without an id of its own
	addID(t, j, "a", event(4, 50))
	// An id without data counts as an id.
	_, _ = j.Append([]byte("id: only\n\n"))
	j.Commit(Block{SetsID: true, ID: "only"})
	addID(t, j, "", event(5, 50))

	for id, after := range map[string]int{"began": 0, "a": 1, "b": 2} {
		c := join(t, j, AfterID(id))
		if c.Begin() != (Place{Number: uint64(after), ID: id}) {
			t.Errorf("%q begins at %+v", id, c.Begin())
		}
		if got, _ := read(c); !strings.HasPrefix(got, event(after+1, 50)) {
			t.Errorf("%q: read %q", id, got)
		}
		if c.Place() != (Place{Number: 5}) {
			t.Errorf("an empty id does not reset it: %+v", c.Place())
		}
	}
	wantRead(t, join(t, j, AfterID("only")), event(5, 50))
	if c := join(t, j, Last(2)); c.Begin() != (Place{Number: 3, ID: "b"}) {
		t.Errorf("the last two begin at %+v", c.Begin())
	}
	for _, id := range []string{"", "c", "A"} {
		if _, ok := j.Join(AfterID(id), nil); ok {
			t.Errorf("%q is known", id)
		}
	}
}

func TestAnIDIsFoundForAsLongAsAllThatFollowsIsThere(t *testing.T) {
	const history = 4 << 10
	j := NewBudget(KeepNewest, plenty).Open(history, "began", nil)
	for n := 1; n <= 300; n++ {
		addID(t, j, fmt.Sprint(n%200), event(n, 60))
		check(t, j)
		f := j.Figures()
		if f.Bytes > history {
			t.Fatalf("the journal takes %d bytes", f.Bytes)
		}
		for m := 1; m <= n; m++ {
			if n > 200 && m < 200 {
				continue // some of these ids come twice
			}
			c, ok := j.Join(AfterID(fmt.Sprint(m%200)), nil)
			if ok != (uint64(m) >= f.Gone) {
				t.Fatalf("id %d of %d with %d gone: %v", m, n, f.Gone, ok)
			}
			if ok {
				wantRead(t, c, events(m+1, n, 60))
				c.Leave()
			}
		}
	}
	if _, ok := j.Join(AfterID("began"), nil); ok {
		t.Error("the id that it began with is known forever")
	}
	// The first of the two events is gone, so the second is the earliest.
	add(t, j, event(301, 60))
	wantRead(t, join(t, j, AfterID("100")), event(301, 60))
}

func TestARepeatedIDKeepsItsEarliestPlace(t *testing.T) {
	j := open(t, KeepNewest, 4<<10)
	for n := 1; n <= 200; n++ {
		addID(t, j, []string{"x", "y", "y", "z"}[n%4], event(n, 60))
		check(t, j)
	}
	gone := int(j.Figures().Gone)
	first := gone + 1
	for first%4 != 1 {
		first++
	}
	// "y" may have been committed by the last event that is gone.
	c := join(t, j, AfterID("y"))
	if begin := int(c.Begin().Number); begin != first && begin != gone {
		t.Errorf("with %d gone, y begins at %d", gone, begin)
	}
}

func TestAReaderThatFallsBehindIsTold(t *testing.T) {
	j := open(t, KeepNewest, 4<<10)
	add(t, j, event(1, 100))
	told := 0
	slow, _ := j.Join(Live(), func() { told++ })
	fast := join(t, j, Live())
	add(t, j, event(2, 100))
	wantRead(t, fast, event(2, 100))
	held, err := slow.Next() // as if it were blocked in its write
	if string(held) != event(2, 100) || err != nil {
		t.Fatalf("%q, %v", held, err)
	}
	for n := 3; told == 0; n++ {
		add(t, j, event(n, 100))
		wantRead(t, fast, event(n, 100))
		if n > 200 {
			t.Fatal("it is never told")
		}
	}
	if f := j.Figures(); f.Gone < 3 {
		t.Errorf("told while its next event is there: %d gone", f.Gone)
	}
	for n := 1000; n < 1100; n++ {
		add(t, j, event(n, 100))
		_, _ = read(fast)
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	if string(held) != event(2, 100) {
		t.Error("what it holds has changed")
	}
	slow.Advance(len(held))
	got, err := read(slow)
	if !errors.Is(err, ErrLagged) {
		t.Fatalf("read %q, %v", got, err)
	}
	// What it still got has no gap.
	if n := strings.Count(got, "\n\n"); got != events(3, 2+n, 100) {
		t.Errorf("it got %q", clip(got))
	}
	slow.Leave()
}

func TestWhatAReaderIsToGetWhenItJoinsIsKeptForIt(t *testing.T) {
	j := open(t, KeepNewest, 8<<10)
	n := 1
	for ; n <= 200; n++ {
		add(t, j, event(n, 100))
	}
	fast := join(t, j, Live())
	slow := join(t, j, Last(1000))
	from := int(slow.Begin().Number) + 1
	for ; n <= 1000; n++ {
		add(t, j, event(n, 100))
		_, _ = read(fast)
	}
	got, err := read(slow)
	if !strings.HasPrefix(got, events(from, 200, 100)) {
		t.Errorf("it got %q", clip(got))
	}
	if !errors.Is(err, ErrLagged) {
		t.Errorf("what came later is gone, and it got %v", err)
	}
}

func TestTheUpstreamIsReadAsFastAsTheFastestReaderTakesIt(t *testing.T) {
	j := open(t, KeepNewest, 8<<10)
	a, b := join(t, j, Live()), join(t, j, Live())
	text := events(1, 1000, 100)
	var got strings.Builder
	waits := 0
	for rest := []byte(text); len(rest) > 0; {
		part := (len(rest)-1)%100 + 1 // to the end of the event
		n, err := j.Append(rest[:part])
		if err != nil {
			t.Fatal(err)
		}
		if rest = rest[n:]; n == part {
			j.Commit(Block{Event: true})
			j.Publish()
			continue
		}
		waits++
		s, err := read(a)
		if err != nil {
			t.Fatal(err)
		}
		got.WriteString(s)
		select {
		case <-j.Room():
		default:
			t.Fatal("a reader has taken what was there, and the appender is not told")
		}
	}
	s, err := read(a)
	if got.WriteString(s); err != nil || got.String() != text {
		t.Errorf("the fastest reader has lost something: %v", err)
	}
	if waits < 5 {
		t.Errorf("the appender has waited %d times", waits)
	}
	if _, err := read(b); !errors.Is(err, ErrLagged) {
		t.Errorf("the other one: %v", err)
	}

	// Once all have left, it waits for none of them.
	a.Leave()
	b.Leave()
	for n := range 300 {
		add(t, j, event(n, 100))
	}
}

func TestARingRollsAnUnfinishedEventBack(t *testing.T) {
	j := open(t, KeepNewest, 64<<10)
	add(t, j, event(1, 100))
	c := join(t, j, Live())
	for n := 2; n < 60; n++ {
		_, _ = j.Append(bytes.Repeat([]byte("x"), n*20))
		j.Rollback()
		check(t, j)
		add(t, j, event(n, 100))
		wantRead(t, c, event(n, 100))
	}
	wantRead(t, join(t, j, After(0)), events(1, 59, 100))
}

func TestClosingSaysHowTheUpstreamEnded(t *testing.T) {
	broke := errors.New("it broke")
	for _, policy := range []Policy{KeepNewest, KeepUnsent} {
		for _, cause := range []error{nil, broke} {
			j := open(t, policy, 1<<20)
			waiting := join(t, j, Live())
			_, _ = j.Append([]byte(event(1, 100)))
			j.Commit(Block{Event: true})
			j.Close(cause)
			j.Close(errors.New("too late"))
			want := cause
			if want == nil {
				want = io.EOF
			}
			wantEnd(t, waiting, event(1, 100), want)
			wantEnd(t, join(t, j, After(0)), event(1, 100), want)
			wantEnd(t, join(t, j, After(1)), "", want)
			if _, err := j.Append([]byte("x")); err == nil {
				t.Error("it takes more after its end")
			}
		}
	}
}

func TestADiscardedJournalIsGone(t *testing.T) {
	for _, policy := range []Policy{KeepNewest, KeepUnsent} {
		j := open(t, policy, 1<<20)
		c := join(t, j, Live())
		add(t, j, event(1, 100), event(2, 100))
		held, _ := c.Next()
		j.Discard()
		j.Discard()
		if string(held) != events(1, 2, 100) {
			t.Error("what a reader holds has changed")
		}
		c.Advance(len(held))
		wantEnd(t, c, "", ErrDiscarded)
		if _, ok := j.Join(Live(), nil); ok {
			t.Error("one can join it")
		}
		if used, n := j.budget.Used(); used != 0 || n != 0 {
			t.Errorf("%d bytes in %d journals are left", used, n)
		}
		if _, err := j.Append([]byte("x")); !errors.Is(err, ErrDiscarded) {
			t.Errorf("append: %v", err)
		}
	}
}

func TestAPlaceIsExactWhereItsIDWasCommittedLast(t *testing.T) {
	j := NewBudget(KeepNewest, plenty).Open(1<<20, "", nil)
	c := join(t, j, Live())
	want := func(id string, exact bool) {
		t.Helper()
		if _, err := read(c); err != nil {
			t.Fatal(err)
		}
		if at := c.Place(); at.ID != id || at.Exact != exact {
			t.Errorf("%+v, want id %q, exact: %v", at, id, exact)
		}
	}
	addID(t, j, "a", event(1, 50))
	want("a", true)
	add(t, j, event(2, 50)) // without an id of its own
	want("a", false)
	_, _ = j.Append([]byte("id: b\n\n")) // this is not an event
	j.Commit(Block{SetsID: true, ID: "b"})
	j.Publish()
	want("b", true)
	addID(t, j, "", event(3, 50))
	want("", false)
}
