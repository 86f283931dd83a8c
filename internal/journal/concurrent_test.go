package journal

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
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

// feed appends events like an upstream, in pieces, and waits for room.
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

// numbers are those of the events in a text.
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

// wantRun expects the numbers to follow on each other, from one to another; a
// last one of 0 is any.
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
	const total = 5000
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
	const total = 5000
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
				if rng.IntN(2) == 0 { // else another one takes over first
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

// followFor reads at least that many bytes, or up to the end.
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
		for i := range 40 {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 2))
				for range 20 {
					j := b.Open(32<<10, "", nil)
					if j == nil {
						continue
					}
					c, ok := j.Join(After(0), nil)
					if !ok {
						t.Error("unknown")
						return
					}
					var reader sync.WaitGroup
					reader.Go(func() {
						text, err := follow(c)
						if !errors.Is(err, io.EOF) && !errors.Is(err, ErrLagged) && !errors.Is(err, ErrDiscarded) {
							t.Error(err)
						}
						wantRun(t, numbers(t, text), 1, 0)
					})
					feed(t, j, rng, 100, nil)
					j.Close(nil)
					reader.Wait()
					c.Leave()
					check(t, j)
					if rng.IntN(3) > 0 {
						j.Discard()
					}
				}
			})
		}
		all.Wait()
		if used, _ := b.Used(); used > 256<<10+40*(16<<10) {
			t.Errorf("%d bytes are used", used)
		}
	}
}

// BenchmarkFanOut is one event to a thousand readers that wait for it, up to
// the moment when each of them has it.
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

// BenchmarkBacklog is events through a journal and out to one reader.
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
