package journal

import (
	"errors"
	"io"
	"math/rand/v2"
	"sort"
	"strings"
	"testing"
)

// fill appends events until the journal takes no more. It returns the number of
// the last complete event, and what is left of the next one.
func fill(t testing.TB, j *Journal, n, size int) (last int, rest string) {
	t.Helper()
	for ; ; n++ {
		text := event(n, size)
		took, err := j.Append([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if took < len(text) {
			return n - 1, text[took:]
		}
		j.Commit(Block{Event: true})
		j.Publish()
		if n > 1_000_000 {
			t.Fatal("it is never full")
		}
	}
}

func TestWhatNobodyHasBeenSentIsNeverDropped(t *testing.T) {
	const history = 8 << 10
	j := open(t, KeepUnsent, history)
	n, rest := fill(t, j, 1, 100)
	if f := j.Figures(); f.Gone != 0 || f.Unsent != uint64(n) || f.Bytes > history+4<<10 {
		t.Fatalf("%+v when it is full", f)
	}
	if n < 60 {
		t.Errorf("only %d events of 100 bytes fit into 8 KiB", n)
	}
	select {
	case <-j.Room():
		t.Fatal("there is room, and nobody has read anything")
	default:
	}
	c := join(t, j, After(0))
	<-j.Room() // joining may have made some room
	if took, _ := j.Append([]byte(rest)); took != 0 {
		t.Fatalf("it takes %d bytes more", took)
	}
	got, err := read(c)
	if err != nil {
		t.Fatal(err)
	}
	<-j.Room()
	_, _ = j.Append([]byte(rest))
	j.Commit(Block{Event: true})
	j.Publish()
	more, _ := read(c)
	if got+more != events(1, n+1, 100) {
		t.Error("something is lost")
	}
	check(t, j)
}

func TestWhatHasBeenSentGoesFirst(t *testing.T) {
	const history = 8 << 10
	j := open(t, KeepUnsent, history)
	c := join(t, j, After(0))
	for n := 1; n <= 1000; n++ {
		add(t, j, event(n, 100))
		wantRead(t, c, event(n, 100))
		check(t, j)
	}
	f := j.Figures()
	if f.Unsent != 0 || f.Events-f.Gone < 50 || f.Bytes > history {
		t.Fatalf("%+v after 1000 events that have been sent", f)
	}
	c.Leave()

	// A reader that comes back gets what is there, and learns what is missing.
	back := join(t, j, After(10))
	if back.Missed() != f.Gone-10 || back.Begin().Number != f.Gone {
		t.Errorf("missed %d, begins at %d; %d are gone", back.Missed(), back.Begin().Number, f.Gone)
	}
	wantRead(t, back, events(int(f.Gone)+1, 1000, 100))
}

func TestWhatFollowsAReturningClientsIDCountsAsNotSent(t *testing.T) {
	const history = 8 << 10
	j := open(t, KeepUnsent, history)
	first := join(t, j, After(0))
	n := 1
	for ; n <= 200; n++ {
		add(t, j, event(n, 100))
		wantRead(t, first, event(n, 100))
	}
	first.Leave()
	gone := int(j.Figures().Gone)
	from := gone + 10
	back := join(t, j, After(uint64(from)))
	if f := j.Figures(); f.Unsent != uint64(200-from) {
		t.Fatalf("%d events count as not sent, want %d", f.Unsent, 200-from)
	}
	last, _ := fill(t, j, n, 100)
	if f := j.Figures(); int(f.Gone) > from {
		t.Fatalf("what follows event %d is needed, and the first %d are gone", from, f.Gone)
	}
	if got, err := read(back); !strings.HasPrefix(got, events(from+1, last, 100)) || err != nil {
		t.Errorf("read %q, %v", clip(got), err)
	}
}

func TestTheNewestReaderIsTheOneThatCounts(t *testing.T) {
	j := open(t, KeepUnsent, 8<<10)
	old := join(t, j, After(0))
	add(t, j, event(1, 100), event(2, 100))
	newer := join(t, j, After(0))
	wantRead(t, old, events(1, 2, 100)) // it has not been told to end yet
	if f := j.Figures(); f.Unsent != 2 {
		t.Errorf("%d events have not been sent, want 2", f.Unsent)
	}
	old.Leave()
	wantRead(t, newer, events(1, 2, 100))
	if f := j.Figures(); f.Unsent != 0 {
		t.Errorf("%d events have not been sent, want none", f.Unsent)
	}
	newer.Leave()
	newer.Leave()
	if f := j.Figures(); f.Unsent != 0 {
		t.Errorf("%d events have not been sent once it has left", f.Unsent)
	}
}

func TestHalfAnEventThatWasSentIsKeptFromItsBeginning(t *testing.T) {
	j := open(t, KeepUnsent, 16<<10)
	c := join(t, j, After(0))
	for n := 1; n <= 100; n++ {
		add(t, j, event(n, 100))
		_, _ = read(c)
	}
	text := event(101, 9000)
	_, _ = j.Append([]byte(text[:8000]))
	j.Publish()
	wantRead(t, c, text[:8000])
	if c.Events() != 100 {
		t.Errorf("%d events have been sent", c.Events())
	}
	c.Leave()
	back := join(t, j, After(100))
	wantRead(t, back, text[:8000])
	_, _ = j.Append([]byte(text[8000:]))
	j.Commit(Block{Event: true})
	j.Publish()
	wantRead(t, back, text[8000:])
	if back.Events() != 101 {
		t.Errorf("%d events have been sent", back.Events())
	}
	check(t, j)
}

func TestAReaderGoesOnWhereWhatItWasSentIsDroppedUnderIt(t *testing.T) {
	b := NewBudget(KeepUnsent, plenty)
	j := openIn(t, b, 1<<20)
	c := join(t, j, After(0))
	_, _ = j.Append([]byte(event(1, 100)))
	j.Publish()
	wantRead(t, c, event(1, 100)) // before the event is known to be complete
	j.Commit(Block{Event: true})
	j.Publish()
	b.SetLimit(0)
	b.Open(1<<20, "", nil)
	if f := j.Figures(); f.Gone != 1 || f.Bytes != 0 {
		t.Fatalf("%+v", f)
	}
	wantRead(t, c, "")
	b.SetLimit(plenty)
	add(t, j, event(2, 100))
	wantRead(t, c, event(2, 100))
	if c.Events() != 2 {
		t.Errorf("it has %d events", c.Events())
	}
}

func TestAnUnfinishedEventStaysWhenOthersNeedRoomInTheMiddleOfAnAppend(t *testing.T) {
	b := NewBudget(KeepUnsent, plenty)
	j := openIn(t, b, 1<<20)
	c := join(t, j, After(0))
	text := event(1, smallestChunk+1)
	_, _ = j.Append([]byte(text[:smallestChunk]))
	j.Publish()
	wantRead(t, c, text[:smallestChunk])
	// As Append does, between two of its checks of the journal.
	if grown, err := b.grow(j, 1); !grown || err != nil {
		t.Fatal(err)
	}
	b.SetLimit(0)
	b.Open(1<<20, "", nil)
	b.SetLimit(plenty)
	_, _ = j.Append([]byte(text[smallestChunk:]))
	j.Commit(Block{Event: true})
	j.Publish()
	wantRead(t, join(t, j, After(0)), text)
}

func TestCommentsThatHaveBeenSentMakeRoom(t *testing.T) {
	j := open(t, KeepUnsent, 4<<10)
	c := join(t, j, After(0))
	add(t, j, event(1, 100))
	for range 2000 {
		if n, err := j.Append([]byte(":comment\n")); n != 9 || err != nil {
			t.Fatalf("took %d, %v", n, err)
		}
		j.Commit(Block{})
		j.Publish()
		if got, err := read(c); !strings.HasSuffix(got, ":comment\n") || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
	}
	if f := j.Figures(); f.Bytes > 4<<10 || f.Gone != 1 {
		t.Errorf("%+v after many comments", f)
	}
	if c := join(t, j, After(1)); c.Missed() != 0 {
		t.Errorf("missed %d", c.Missed())
	}
}

func TestAnEventAboveTheHistoryIsPassedOn(t *testing.T) {
	const history = 8 << 10
	j := open(t, KeepUnsent, history)
	c := join(t, j, After(0))
	add(t, j, event(1, 100))
	var got strings.Builder
	take := func() {
		s, err := read(c)
		if got.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	take()
	text := event(2, 100_000)
	passing := false
	for rest := []byte(text); len(rest) > 0; take() {
		n, err := j.Append(rest[:min(1000, len(rest))])
		switch {
		case errors.Is(err, ErrEventTooLarge) && !passing:
			passing = true
			if sent := len(text) - len(rest) + n; sent < history/2 {
				t.Errorf("an event of %d bytes is above a history of %d", sent, history)
			}
			j.Pass()
		case err != nil:
			t.Fatal(err)
		}
		rest = rest[n:]
		j.Publish()
	}
	if !passing {
		t.Error("the event is not too large")
	}
	if got.String() != event(1, 100)+text {
		t.Error("the reader has not got everything")
	}
	if f := j.Figures(); f.Bytes > history {
		t.Errorf("%d bytes are held", f.Bytes)
	}
	if _, ok := j.Join(After(1), nil); ok {
		t.Error("one can come back to what is only passed on")
	}
	j.Close(nil)
	wantEnd(t, c, "", io.EOF)
}

func TestPassingOnTakesNoMoreThanTheReader(t *testing.T) {
	j := open(t, KeepUnsent, 1<<20)
	c := join(t, j, After(0))
	j.Pass()
	text := strings.Repeat("0123456789", 100_000)
	n, err := j.Append([]byte(text))
	if n == len(text) || n > passingHistory || err != nil {
		t.Fatalf("took %d, %v", n, err)
	}
	got := text[:0]
	for err == nil && len(got) < len(text) {
		var s string
		s, err = read(c)
		got += s
		var more int
		more, _ = j.Append([]byte(text[n:]))
		n += more
		j.Publish()
	}
	if got != text || err != nil {
		t.Errorf("got %d of %d bytes, %v", len(got), len(text), err)
	}
}

// TestABacklogAgainstAModel makes a client come, read some bytes, leave and
// come back to any event, while events and comments arrive in pieces. It
// compares what the client gets with everything that the upstream has sent.
func TestABacklogAgainstAModel(t *testing.T) {
	const comment = ":comment\n"
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 4))
		history := 2<<10 + rng.IntN(32<<10)
		j := open(t, KeepUnsent, history)
		var (
			stream []byte       // everything that was appended
			ends   = []int64{0} // where the events end in it
			rest   []byte       // what is left of an event that is incomplete
			c      *Cursor      // nil while the client is away
			sent   int64        // what the client has been sent
		)
		leave := func() {
			if c != nil {
				c.Leave()
				c = nil
			}
		}
		for range 4000 {
			switch op := rng.IntN(20); {
			case op < 9: // a part of an event
				if len(rest) == 0 {
					rest = []byte(event(len(ends), 12+rng.IntN(300)))
				}
				n, err := j.Append(rest[:1+rng.IntN(len(rest))])
				if err != nil {
					t.Fatal(err)
				}
				stream = append(stream, rest[:n]...)
				if rest = rest[n:]; len(rest) == 0 {
					j.Commit(Block{Event: true})
					ends = append(ends, int64(len(stream)))
				}
				j.Publish()
			case op == 9 && len(rest) == 0:
				n, _ := j.Append([]byte(comment))
				if stream = append(stream, comment[:n]...); n < len(comment) {
					rest = []byte(comment[n:] + event(len(ends), 30)) // it is completed later
				} else {
					j.Commit(Block{})
				}
				j.Publish()
			case op < 16 && c != nil:
				for limit := rng.IntN(2000); limit > 0; {
					p, err := c.Next()
					if err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
					n := min(len(p), limit)
					if n == 0 {
						break
					}
					if string(p[:n]) != string(stream[sent:sent+int64(n)]) {
						t.Fatalf("seed %d: it got %q, want %q", seed, clip(string(p[:n])), clip(string(stream[sent:sent+int64(n)])))
					}
					c.Advance(n)
					limit -= n
					sent += int64(n)
				}
			case op == 16:
				leave()
			case op == 17:
				if rng.IntN(2) == 0 {
					leave() // otherwise it would take over from itself
				}
				n, f := rng.IntN(len(ends)+1), j.Figures()
				old := c
				next, ok := j.Join(After(uint64(n)), nil)
				if ok != (n < len(ends)) {
					t.Fatalf("seed %d: event %d of %d is known: %v", seed, n, len(ends)-1, ok)
				}
				if !ok {
					continue
				}
				if c = next; old != nil {
					old.Leave()
				}
				begin := max(uint64(n), f.Gone)
				if c.Begin().Number != begin || c.Missed() != begin-uint64(n) {
					t.Fatalf("seed %d: %d begins at %+v, missed %d; %d are gone", seed, n, c.Begin(), c.Missed(), f.Gone)
				}
				skipped := strings.ReplaceAll(string(stream[ends[begin]:c.offset]), comment, "")
				if sent = c.offset; skipped != "" {
					t.Fatalf("seed %d: %d begins after %q", seed, n, skipped)
				}
			}
			check(t, j)
			f := j.Figures()
			if ends[f.Gone] > sent {
				t.Fatalf("seed %d: %d events are gone, and only %d bytes have been sent", seed, f.Gone, sent)
			}
			if unsent := len(ends) - 1 - sort.Search(len(ends), func(i int) bool { return ends[i] > sent }) + 1; f.Unsent != uint64(unsent) {
				t.Fatalf("seed %d: %d events have not been sent, want %d", seed, f.Unsent, unsent)
			}
			if f.Bytes > history+4<<10 {
				t.Fatalf("seed %d: %+v with a history of %d", seed, f, history)
			}
		}
		leave()
	}
}
