package redis

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-sse/caddy-sse/store"
)

// someEvents returns events with the numbers from first to last.
func someEvents(first, last uint64) (events []store.Event) {
	for n := first; n <= last; n++ {
		events = append(events, store.Event{Number: n, Data: fmt.Appendf(nil, "event %d", n)})
	}
	return events
}

// numbers describes in short what a reader gets.
func numbers(events []store.Event, ask bool) string {
	switch {
	case ask:
		return "ask"
	case len(events) == 0:
		return "none"
	}
	return fmt.Sprintf("%d to %d", events[0].Number, events[len(events)-1].Number)
}

func TestAReaderAsksTheServerUntilNoticesTellAll(t *testing.T) {
	const all, one = 1 << 20, toldCost + 8
	for name, c := range map[string]struct {
		before func(*tail)
		after  uint64
		want   string
	}{
		"nothing is known":                     {func(*tail) {}, 0, "ask"},
		"it had nothing":                       {func(t *tail) { t.found(3, 3, 0) }, 3, "none"},
		"a notice before the server was asked": {func(t *tail) { t.add(someEvents(4, 5), all) }, 3, "ask"},
		"a notice while it was asked":          {func(t *tail) { t.add(someEvents(4, 5), all); t.found(3, 3, 0) }, 3, "4 to 5"},
		"a notice after it was asked":          {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 5), all) }, 3, "4 to 5"},
		"of what it had some was told":         {func(t *tail) { t.add(someEvents(4, 6), all); t.found(2, 5, 0) }, 5, "6 to 6"},
		"all that it had was told":             {func(t *tail) { t.add(someEvents(4, 5), all); t.found(2, 5, 0) }, 5, "none"},
		"it had a part":                        {func(t *tail) { t.add(someEvents(9, 9), all); t.found(2, 5, 0) }, 5, "ask"},
		"it had what was not told":             {func(t *tail) { t.found(2, 5, 0) }, 5, "ask"},
		"a reader that is behind":              {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 5), all) }, 1, "ask"},
		"another one was there before":         {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 5), all); t.take(3, all) }, 3, "ask"},
		"some of it is read":                   {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 9), all); t.take(3, 8) }, 5, "6 to 9"},
		"a gap":                                {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(5, 5), all) }, 3, "ask"},
		"after a gap":                          {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(5, 5), all) }, 4, "5 to 5"},
		"too much":                             {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 5), one) }, 3, "ask"},
		"after too much":                       {func(t *tail) { t.found(3, 3, 0); t.add(someEvents(4, 5), one); t.add(someEvents(6, 6), one) }, 5, "6 to 6"},
		"something else":                       {func(t *tail) { t.found(3, 3, 0); t.doubt() }, 3, "ask"},
		"something else meanwhile":             {func(t *tail) { t.doubt(); t.found(3, 3, 0) }, 3, "ask"},
		"and it was asked again":               {func(t *tail) { t.doubt(); t.found(3, 3, 1) }, 3, "none"},
		// What was told before a doubt does not prove that it is the newest.
		"a part up to what was told":  {func(t *tail) { t.add(someEvents(4, 5), all); t.doubt(); t.found(2, 5, 1) }, 5, "ask"},
		"a place that is not reached": {func(t *tail) { t.found(9, 9, 0); t.add(someEvents(4, 5), all) }, 3, "4 to 5"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			var tail tail
			c.before(&tail)
			events, ask := tail.take(c.after, all)
			if got := numbers(events, ask); got != c.want {
				t.Errorf("after event %d a reader gets %s, want %s", c.after, got, c.want)
			}
			size := 0
			for _, event := range tail.events {
				size += len(event.Data) + toldCost
			}
			if size != tail.size {
				t.Errorf("%d bytes are kept, %d are counted", size, tail.size)
			}
		})
	}
}

func TestWhatWaitsForReadersIsBounded(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errClosed)
	n := newNotices(&connection{r: new(Redis), ctx: ctx, cancel: cancel})
	n.work.Wait()
	piece := strings.Repeat("x", mostTold/2)
	names := make([]string, 2*mostTails/longestTail)
	for i := range names {
		names[i] = fmt.Sprint(i)
		n.enter(names[i])() // its reader has left, and may come back
		for number := uint64(1); number <= 20; number++ {
			n.tell(names[i], fmt.Sprintf("%d %d %s", number, len(piece), piece))
			if held := n.channels[names[i]].tail.size; held > longestTail || n.size > mostTails {
				t.Fatalf("channel %d holds %d bytes, all %d", i, held, n.size)
			}
		}
	}
	// A small event costs more than its bytes.
	n.tell(names[0], "")
	for number := uint64(1); number <= 2*longestTail; number++ {
		n.tell(names[0], fmt.Sprintf("%d 1 x", number))
		if held := len(n.channels[names[0]].tail.events); held > 1100 {
			t.Fatalf("%d events of a byte are held", held)
		}
	}
	for _, ch := range n.channels {
		ch.idle = ch.idle.Add(-2 * noticeLinger)
	}
	n.difference()
	if len(n.channels) > 0 || n.size != 0 {
		t.Errorf("when nobody has come back for a while, %d channels hold %d bytes", len(n.channels), n.size)
	}
}

func TestANoticeThatIsDamagedSaysOnlyThatThereIsSomething(t *testing.T) {
	events := unmarshalTold("41 3 a b1 c")
	if len(events) != 2 || events[0].Number != 41 || string(events[0].Data) != "a b" || events[1].Number != 42 || string(events[1].Data) != "c" {
		t.Fatalf("got %+v", events)
	}
	for _, text := range []string{"", "41", "x 1 a", "41 x", "41 2 a", "41 0 ", "41 -1 a", "41 1 a2", "-1 1 a", "41 99999999999 a"} {
		if events := unmarshalTold(text); events != nil {
			t.Errorf("%q is read as %+v", text, events)
		}
	}
}

// calls returns how often the server has run scripts.
func (s *server) calls(t testing.TB) (n int) {
	for line := range strings.Lines(s.do(t, "INFO", "commandstats")) {
		if _, err := fmt.Sscanf(line, "cmdstat_evalsha:calls=%d,", &n); err == nil {
			return n
		}
	}
	return 0
}

func TestAReaderThatKeepsUpDoesNotAskForEachEvent(t *testing.T) {
	s := startServer(t)
	a, b := s.open(t), s.open(t)
	defer a.Close()
	defer b.Close()
	const runs, last = 10, 50
	var work sync.WaitGroup
	keys := make([]store.Key, runs)
	at := make([]chan uint64, runs)
	for i := range keys {
		keys[i] = newKey()
		at[i] = make(chan uint64, last)
		if err := write(t, a, keys[i], 1); err != nil {
			t.Fatal(err)
		}
		work.Go(func() {
			defer close(at[i])
			for after := uint64(0); after < last; {
				events, _, err := b.Read(t.Context(), keys[i], after, 1<<20, patience)
				if err != nil {
					t.Errorf("run %d: %v", i, err)
					return
				}
				for _, event := range events {
					if event.Number != after+1 || string(event.Data) != fmt.Sprint("event ", after+1) {
						t.Errorf("run %d: after event %d comes %d: %q", i, after, event.Number, event.Data)
						return
					}
					after++
				}
				at[i] <- after
			}
		})
	}
	eventually(t, "all wait", func() error {
		if channels := s.do(t, "PUBSUB", "CHANNELS"); strings.Count(channels, "sse:") < runs {
			return errors.New("not yet")
		}
		return nil
	})
	for i := range keys {
		if err := write(t, a, keys[i], 2); err != nil {
			t.Fatal(err)
		}
		for after := range at[i] {
			if after == 2 {
				break
			}
		}
	}
	before := s.calls(t)
	for n := uint64(3); n <= last; n++ {
		for i := range keys {
			if err := write(t, a, keys[i], n); err != nil {
				t.Fatal(err)
			}
		}
	}
	work.Wait()
	reads := s.calls(t) - before - runs*(last-2)
	if reads > runs*last/4 {
		t.Errorf("%d readers of %d events each have asked %d times", runs, last, reads)
	}
}

func TestLargeEventsAndEndsAreReadWhereNoticesDoNotTellThem(t *testing.T) {
	s := startServer(t)
	a, b := s.open(t), s.open(t)
	defer a.Close()
	defer b.Close()
	run := newKey()
	if err := write(t, a, run, 1); err != nil {
		t.Fatal(err)
	}
	type read struct {
		numbers string
		end     string
	}
	reads := make(chan read)
	go func() {
		defer close(reads)
		for after, over := uint64(1), false; !over; {
			events, end, err := b.Read(t.Context(), run, after, 1<<20, patience)
			if err != nil {
				t.Error(err)
				return
			}
			if over = end != nil; len(events) > 0 {
				after = events[len(events)-1].Number
			}
			reads <- read{numbers(events, false), string(end)}
		}
	}()
	for _, step := range []struct {
		w    store.Write
		want read
	}{
		{store.Write{Events: someEvents(2, 3)}, read{"2 to 3", ""}},
		{store.Write{Events: []store.Event{{Number: 4, Data: make([]byte, 2*mostTold)}, {Number: 5, Data: []byte("x")}}}, read{"4 to 5", ""}},
		{store.Write{Events: someEvents(6, 6)}, read{"6 to 6", ""}},
		{store.Write{Events: someEvents(7, 8), End: []byte("over")}, read{"7 to 8", "over"}},
	} {
		step.w.Run, step.w.TTL = run, ttl
		if err := errors.Join(a.Write(within(t, patience), []store.Write{step.w})...); err != nil {
			t.Fatal(err)
		}
		if got := <-reads; got != step.want {
			t.Errorf("got %+v, want %+v", got, step.want)
		}
	}
}
