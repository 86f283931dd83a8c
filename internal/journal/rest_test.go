package journal

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// workers serves each round with some goroutines.
type workers struct {
	rounds atomic.Int64
	group  sync.WaitGroup
}

func (w *workers) Serve(due *Due) {
	w.rounds.Add(1)
	var left atomic.Int32
	left.Store(3)
	for range 3 {
		w.group.Go(func() {
			for deliver := due.Next(); deliver != nil; deliver = due.Next() {
				deliver(nil)
			}
			if left.Add(-1) == 0 {
				due.Recycle()
			}
		})
	}
}

// sleeper is a reader for which the workers read. It has no lock, so that the
// race detector reports workers that read for it at the same time.
type sleeper struct {
	c     *Cursor
	text  strings.Builder
	reads int // by workers
	upTo  int // bytes that a worker reads before it leaves the rest to the reader
}

func (r *sleeper) take() (rested bool) {
	for read := 0; ; {
		p, err := r.c.Next()
		switch {
		case err != nil || read > r.upTo:
			r.c.GiveBack()
			return false
		case p == nil:
			if r.c.Rested() {
				return true
			}
		default:
			r.text.Write(p)
			read += len(p)
			r.reads++
			r.c.Advance(len(p))
		}
	}
}

// follow reads until the journal ends or stop is closed.
func (r *sleeper) follow(stop <-chan struct{}) error {
	for {
		p, err := r.c.Next()
		switch {
		case err != nil:
			return err
		case p != nil:
			r.text.Write(p)
			r.c.Advance(len(p))
			continue
		}
		back := r.c.Rest(func(any) { r.take() })
		for resting := true; resting; {
			select {
			case <-back:
				resting = !r.c.IsHeld()
			case <-stop:
				r.c.Reclaim()
				return nil
			}
		}
	}
}

func TestWhoRestsGetsAllFromOthersInOrderAndOnce(t *testing.T) {
	const total = 1500
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		server := new(workers)
		j := openIn(t, NewBudget(KeepNewest, plenty), 1<<20)
		j.ServedBy(server)
		var readers sync.WaitGroup
		var others atomic.Int64
		for i := range 20 {
			seed := rng.Uint64()
			comesAndGoes := i >= 10
			first, ok := j.Join(Live(), nil)
			if !ok {
				t.Fatal("unknown")
			}
			readers.Go(func() {
				rng := rand.New(rand.NewPCG(seed, 3))
				for c := first; ; {
					r := &sleeper{c: c, upTo: rng.IntN(4000)}
					stop := make(chan struct{})
					if comesAndGoes {
						leaves := uint64(rng.IntN(300))
						go func() { // it stops the reader when the journal has got that many more events
							defer close(stop)
							c, ok := j.Join(Live(), nil)
							if !ok {
								return
							}
							defer c.Leave()
							for begin := c.Begin().Number; c.Events() < begin+leaves; {
								p, err := c.Next()
								if err != nil {
									return
								}
								if p == nil {
									<-c.Wait()
								}
								c.Advance(len(p))
							}
						}()
					}
					err := r.follow(stop)
					got := numbers(t, r.text.String())
					begin, at := int(c.Begin().Number), c.Events()
					c.Leave()
					others.Add(int64(r.reads))
					switch {
					case errors.Is(err, io.EOF):
						wantRun(t, got, begin+1, total+1)
						return
					case err != nil:
						t.Error(err)
						return
					}
					// It comes back to the place where it left.
					wantRun(t, got, begin+1, int(at))
					if c, ok = j.Join(After(at), nil); !ok {
						t.Error("its place is unknown")
						return
					}
				}
			})
		}
		feed(t, j, rng, total, nil)
		j.Publish()
		for !someoneRests(j) {
			runtime.Gosched()
		}
		add(t, j, event(total+1, 20)) // workers read it for the reader that rests
		j.Close(nil)
		readers.Wait()
		server.group.Wait()
		if others.Load() == 0 {
			t.Error("nobody has read for anybody else")
		}
	}
}

// someoneRests reports whether a reader has everything, and rests.
func someoneRests(j *Journal) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.readers, func(c *Cursor) bool { return c.state.Load() == resting })
}

func TestWhoRestsIsToldOfTheEnd(t *testing.T) {
	for name, end := range map[string]func(j *Journal){
		"closed":    func(j *Journal) { j.Close(io.ErrUnexpectedEOF) },
		"discarded": func(j *Journal) { j.Discard() },
	} {
		j := open(t, KeepNewest, 1<<20)
		j.ServedBy(new(workers))
		c := join(t, j, Live())
		back := c.Rest(func(any) { t.Error("there is nothing to read") })
		end(j)
		if <-back; !c.IsHeld() {
			t.Errorf("%s: the cursor has not been given back", name)
		}
		if _, err := c.Next(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestAReaderThatIsBeingReadForTakesItsCursorBackAfterThat(t *testing.T) {
	j := open(t, KeepNewest, 1<<20)
	server := new(workers)
	j.ServedBy(server)
	c := join(t, j, Live())
	reading, goOn := make(chan struct{}), make(chan struct{})
	c.Rest(func(any) {
		close(reading)
		<-goOn
		p, _ := c.Next()
		c.Advance(len(p))
		for !c.Rested() {
		}
	})
	add(t, j, event(1, 20))
	<-reading
	var back atomic.Bool
	reclaimed := make(chan struct{})
	go func() {
		c.Reclaim()
		back.Store(true)
		close(reclaimed)
	}()
	if back.Load() {
		t.Error("it has two owners")
	}
	close(goOn)
	<-reclaimed
	if c.Events() != 1 || !c.IsHeld() {
		t.Errorf("%d events, is held: %v", c.Events(), c.IsHeld())
	}
	server.group.Wait()
}

func TestASpotKnowsTheIDThatItsReaderHasBeenGiven(t *testing.T) {
	j := open(t, KeepNewest, 8<<10)
	addID(t, j, "a", event(1, 20))
	c := join(t, j, Live())
	wantID := func(want string, wantOK bool) {
		t.Helper()
		var at Spot
		for {
			p, err := c.Next()
			if err != nil {
				t.Fatal(err)
			}
			if p == nil {
				break
			}
			_, _, at = c.Coming()
			c.Advance(len(p))
		}
		if id, ok := at.ID(); id != want || ok != wantOK {
			t.Errorf("got %q, %v, want %q, %v", id, ok, want, wantOK)
		}
	}
	add(t, j, event(2, 20))
	wantID("", false) // the event before it began is not one that it has been given
	addID(t, j, "b", event(3, 20))
	add(t, j, event(4, 20))
	wantID("b", true)
	addID(t, j, "", event(5, 20))
	wantID("", true)
	for n := 6; n < 100; n++ { // over many chunks
		addID(t, j, fmt.Sprint(n), event(n, 300))
		wantID(fmt.Sprint(n), true)
	}
}
