package journal

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// follow reads like a client until the journal ends, and returns what it got.
func follow(c *Cursor) (string, error) {
	var b strings.Builder
	for {
		p, err := c.Next()
		switch {
		case err != nil:
			return b.String(), err
		case len(p) == 0:
			<-c.Wait()
		default:
			b.Write(p)
			c.Advance(len(p))
		}
	}
}

// feed appends events in pieces, as an upstream does, and waits for room.
func feed(t testing.TB, j *Journal, rng *rand.Rand, n int, stop <-chan struct{}) {
	for i := 1; i <= n; i++ {
		text := []byte(event(i, 20+rng.IntN(300)))
		for len(text) > 0 {
			part := text[:1+rng.IntN(len(text))]
			took, err := j.Append(part)
			if err != nil {
				t.Error(err)
				return
			}
			if text = text[took:]; took < len(part) {
				select {
				case <-j.Room():
				case <-stop:
					return
				}
			}
		}
		j.Commit(Block{Event: true, SetsID: true, ID: fmt.Sprint(i)})
		if rng.IntN(3) == 0 {
			j.Publish()
		}
	}
}

// numbers returns the numbers of the events in a text.
func numbers(t testing.TB, text string) []int {
	t.Helper()
	var all []int
	for block := range strings.SplitSeq(text, "\n\n") {
		var n int
		if block == "" {
			continue
		}
		if _, err := fmt.Sscanf(block, "data: %d ", &n); err != nil {
			t.Errorf("%q: %v", clip(block), err)
		}
		all = append(all, n)
	}
	return all
}

// wantRun expects consecutive numbers from first to last. If last is 0, any end
// is right.
func wantRun(t testing.TB, got []int, first, last int) {
	t.Helper()
	for i, n := range got {
		if n != first+i {
			t.Errorf("event %d follows %d", n, first+i-1)
			return
		}
	}
	if last > 0 && len(got) != last-first+1 {
		t.Errorf("%d events from %d on, want them up to %d", len(got), first, last)
	}
}

func TestReadersOfARingComeAndGoWhileItIsFilled(t *testing.T) {
	const total = 2000
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 0))
		b := NewBudget(KeepNewest, 200<<10)
		j := openIn(t, b, 64<<10)
		var readers sync.WaitGroup
		var lagged atomic.Int64
		for range 30 {
			seed := rng.Uint64()
			readers.Go(func() {
				rng := rand.New(rand.NewPCG(seed, 1))
				for range 20 {
					at := []Start{Live(), Last(5), Last(1 << 40), After(j.Figures().Gone)}[rng.IntN(4)]
					var told atomic.Bool
					c, ok := j.Join(at, func() { told.Store(true) })
					if !ok {
						t.Error("unknown")
						return
					}
					first := int(c.Begin().Number) + 1
					if id := c.Begin().ID; first > 1 && id != fmt.Sprint(first-1) {
						t.Errorf("event %d comes after the id %q", first, id)
					}
					text, err := follow(c)
					c.Leave()
					switch {
					case errors.Is(err, ErrLagged):
						lagged.Add(1)
						wantRun(t, numbers(t, text), first, 0)
					case errors.Is(err, io.EOF):
						wantRun(t, numbers(t, text), first, total)
						return
					default:
						t.Error(err)
					}
				}
			})
		}
		feed(t, j, rng, total, nil)
		j.Close(nil)
		readers.Wait()
		check(t, j)
		t.Logf("seed %d: %d readers lagged, %d events are gone", seed, lagged.Load(), j.Figures().Gone)
	}
}

func TestAClientOfABacklogComesAndGoesAndHasEveryEventOnce(t *testing.T) {
	const total = 3000
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 0))
		b := NewBudget(KeepUnsent, 1<<20)
		j := openIn(t, b, 16<<10)
		done := make(chan struct{})
		var got []int
		go func() {
			defer close(done)
			rng := rand.New(rand.NewPCG(seed, 1))
			for {
				c, ok := j.Join(After(uint64(len(got))), nil)
				if !ok || c.Missed() != 0 {
					t.Errorf("back after %d events: %v", len(got), ok)
					return
				}
				text, err := followFor(c, rng.IntN(20_000))
				if rng.IntN(2) == 0 { // otherwise another reader takes over first
					c.Leave()
				} else {
					defer c.Leave()
				}
				whole := strings.LastIndex(text, "\n\n")
				got = append(got, numbers(t, text[:max(whole, 0)])...)
				if err != nil {
					if !errors.Is(err, io.EOF) {
						t.Error(err)
					}
					return
				}
			}
		}()
		feed(t, j, rng, total, done)
		j.Close(nil)
		<-done
		wantRun(t, got, 1, total)
		check(t, j)
	}
}

// followFor reads at least limit bytes, or up to the end.
func followFor(c *Cursor, limit int) (string, error) {
	var b strings.Builder
	for b.Len() < limit {
		p, err := c.Next()
		switch {
		case err != nil:
			return b.String(), err
		case len(p) == 0:
			<-c.Wait()
		default:
			b.Write(p)
			c.Advance(len(p))
		}
	}
	return b.String(), nil
}

func TestManyJournalsShareABudget(t *testing.T) {
	for _, policy := range []Policy{KeepNewest, KeepUnsent} {
		b := NewBudget(policy, 256<<10)
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 2))
				for range 10 {
					j := b.Open(32<<10, "", nil)
					if j == nil {
						continue
					}
					c, ok := j.Join(After(0), nil)
					if !ok {
						t.Error("unknown")
						return
					}
					done := make(chan struct{})
					go func() {
						defer close(done)
						text, err := follow(c)
						switch {
						case policy == KeepUnsent || errors.Is(err, io.EOF):
							wantRun(t, numbers(t, text), 1, 100)
						case errors.Is(err, ErrLagged): // if another ring took the room of its events
							wantRun(t, numbers(t, text), 1, 0)
						default:
							t.Error(err)
						}
					}()
					feed(t, j, rng, 100, done)
					j.Close(nil)
					<-done
					c.Leave()
					check(t, j)
					if rng.IntN(3) > 0 {
						j.Discard()
					}
				}
			})
		}
		all.Wait()
		if used, _ := b.Used(); used > 256<<10+20*(16<<10) {
			t.Errorf("%d bytes are used", used)
		}
	}
}

// TestARingAgainstAModel does everything that a ring allows, in random order,
// and compares what each reader gets with a list of all events.
func TestARingAgainstAModel(t *testing.T) {
	type reader struct {
		c    *Cursor
		next int // the number of the event that comes next
	}
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 3))
		history := 1<<10 + rng.IntN(32<<10)
		j := NewBudget(KeepNewest, plenty).Open(history, "began", nil)
		var (
			log     []string            // all events
			ids     = []string{"began"} // the id in force after each
			set     = []string{"began"} // the id that each has committed
			readers []*reader
			newest  int
		)
		take := func(r *reader) bool {
			text, err := read(r.c)
			for block := range strings.SplitSeq(text, "\n\n") {
				if block == "" || block[0] == ':' {
					continue
				}
				if r.next >= len(log) || log[r.next] != block+"\n\n" {
					t.Fatalf("seed %d: event %d is %q", seed, r.next+1, clip(block))
				}
				r.next++
			}
			switch {
			case errors.Is(err, ErrLagged):
				if f := j.Figures(); r.next >= int(f.Gone) {
					t.Fatalf("seed %d: lagged with %d events, %d are gone", seed, r.next, f.Gone)
				}
				r.c.Leave()
				return false
			case err != nil || r.next != len(log) || r.c.Events() != uint64(r.next):
				t.Fatalf("seed %d: at event %d of %d, %v", seed, r.next, len(log), err)
			}
			return true
		}
		for range 3000 {
			switch op := rng.IntN(20); {
			case op < 10: // an event, which may have to wait for the fastest reader
				size := 12 + rng.IntN(200)
				if rng.IntN(50) == 0 {
					size = rng.IntN(2 * history)
				}
				text, id := event(len(log)+1, size), ids[len(ids)-1]
				for rest := []byte(text); len(rest) > 0; {
					n, err := j.Append(rest[:1+rng.IntN(len(rest))])
					if err != nil {
						t.Fatal(err)
					}
					if rest = rest[n:]; n == 0 {
						readers = slices.DeleteFunc(readers, func(r *reader) bool { return !take(r) })
					}
				}
				b := Block{Event: true}
				if rng.IntN(2) == 0 {
					id = fmt.Sprint(rng.IntN(len(log) + 2))
					b.SetsID, b.ID = true, id
				}
				j.Commit(b)
				set = append(set, b.ID)
				log, ids, newest = append(log, text), append(ids, id), len(text)
				j.Publish()
			case op < 12:
				if n, _ := j.Append([]byte(":comment\n\n")); n < len(":comment\n\n") {
					j.Rollback()
					continue
				}
				j.Commit(Block{})
				j.Publish()
			case op == 12:
				_, _ = j.Append(make([]byte, rng.IntN(500)))
				j.Publish()
				j.Rollback()
			case op < 16:
				f := j.Figures()
				n := uint64(rng.IntN(len(log) + 2))
				at, want := Live(), uint64(len(log))
				switch rng.IntN(4) {
				case 0:
					at, want = Last(n), max(f.Gone, uint64(len(log))-min(n, uint64(len(log))))
				case 1:
					at, want = After(n), max(f.Gone, n)
				case 2:
					at = AfterID(ids[rng.IntN(len(ids))])
				}
				known := at.kind != startAfter || n <= uint64(len(log))
				if at.kind == startAfterID {
					i := slices.Index(set[f.Gone:], at.id) // the earliest event with it that is kept
					known, want = i >= 0, f.Gone+uint64(max(i, 0))
				}
				c, ok := j.Join(at, nil)
				if ok != known {
					t.Fatalf("seed %d: %+v is known: %v", seed, at, ok)
				}
				if !ok {
					continue
				}
				begin := c.Begin()
				if begin.Number != want || begin.ID != ids[want] {
					t.Fatalf("seed %d: %+v begins at %+v, want %d %q; %d are gone", seed, at, begin, want, ids[want], f.Gone)
				}
				readers = append(readers, &reader{c, int(want)})
			case len(readers) > 0:
				i := rng.IntN(len(readers))
				if stays := take(readers[i]); !stays || rng.IntN(4) == 0 {
					readers[i].c.Leave()
					readers = slices.Delete(readers, i, i+1)
				}
			}
			check(t, j)
			if f := j.Figures(); f.Events != uint64(len(log)) || f.Bytes > max(history, newest)+4*(16<<10) {
				t.Fatalf("seed %d: %+v with %d events and a history of %d", seed, f, len(log), history)
			}
		}
	}
}

// BenchmarkFanOut measures one event for a thousand waiting readers, until each
// of them has it.
func BenchmarkFanOut(b *testing.B) {
	for _, readers := range []int{1, 1000} {
		b.Run(fmt.Sprint(readers), func(b *testing.B) {
			j := openIn(b, NewBudget(KeepNewest, plenty), 1<<20)
			var all, round sync.WaitGroup
			for range readers {
				c, _ := j.Join(Live(), nil)
				all.Go(func() {
					defer c.Leave()
					for {
						p, err := c.Next()
						if err != nil {
							return
						}
						if len(p) == 0 {
							<-c.Wait()
							continue
						}
						c.Advance(len(p))
						round.Done()
					}
				})
			}
			text := []byte(event(1, 100))
			b.ReportAllocs()
			for b.Loop() {
				round.Add(readers)
				_, _ = j.Append(text)
				j.Commit(Block{Event: true})
				j.Publish()
				round.Wait()
			}
			b.StopTimer()
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(readers), "ns/delivery")
			j.Close(nil)
			all.Wait()
		})
	}
}

// BenchmarkBacklog measures events through a journal to one reader.
func BenchmarkBacklog(b *testing.B) {
	j := openIn(b, NewBudget(KeepUnsent, plenty), 256<<10)
	c, _ := j.Join(After(0), nil)
	defer c.Leave()
	text := []byte(event(1, 100))
	b.ReportAllocs()
	for b.Loop() {
		_, _ = j.Append(text)
		j.Commit(Block{Event: true})
		j.Publish()
		p, _ := c.Next()
		c.Advance(len(p))
	}
}
