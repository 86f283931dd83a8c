package caddysse

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
)

var someTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestTheReconnectionTimeIsTheUpstreamsThenOursThenASecond(t *testing.T) {
	for _, c := range []struct {
		ms   uint64
		told bool
		ours time.Duration
		want time.Duration
	}{
		{0, false, 0, time.Second},
		{0, false, 3 * time.Second, 3 * time.Second},
		{7000, true, 3 * time.Second, 7 * time.Second},
		{0, true, 3 * time.Second, 0},
		{1<<64 - 1, true, 0, 1<<63 - 1},
	} {
		if got := reconnection(c.ms, c.told, c.ours); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestWaitsDoubleFromTheReconnectionTimeAndVary(t *testing.T) {
	for _, c := range []struct {
		told time.Duration
		upTo []time.Duration
	}{
		{time.Second, []time.Duration{1e9, 2e9, 4e9, 8e9, 10e9, 10e9}},
		{0, []time.Duration{1e8, 2e8, 4e8, 8e8}},
		{3 * time.Second, []time.Duration{3e9, 6e9, 10e9, 10e9}},
		{20 * time.Second, []time.Duration{20e9, 20e9, 20e9}},
		{10 * time.Second, []time.Duration{10e9, 10e9}},
	} {
		drawn := make([]map[time.Duration]bool, len(c.upTo))
		for range 300 {
			w := retryWaits{window: time.Hour}
			at := someTime
			for i, upTo := range c.upTo {
				wait, ok := w.wait(at, c.told, 0)
				if !ok || wait > upTo || wait < max(upTo/2, shortestRetryWait) {
					t.Fatalf("told %v: wait %d is %v, %v; want between half and all of %v", c.told, i+1, wait, ok, upTo)
				}
				if drawn[i] == nil {
					drawn[i] = make(map[time.Duration]bool)
				}
				drawn[i][wait] = true
				at = at.Add(wait)
			}
		}
		for i, waits := range drawn {
			if len(waits) < 100 && c.upTo[i] > shortestRetryWait {
				t.Errorf("told %v: wait %d has %d values", c.told, i+1, len(waits))
			}
		}
	}
}

func TestARetryAfterCountsAndLeavesTheWaitsSpread(t *testing.T) {
	waits := make(map[time.Duration]bool)
	for range 300 {
		w := retryWaits{window: time.Hour}
		wait, ok := w.wait(someTime, time.Second, 30*time.Second)
		if !ok || wait < 30*time.Second+time.Second/2 || wait > 31*time.Second {
			t.Fatalf("%v, %v", wait, ok)
		}
		waits[wait] = true
	}
	if len(waits) < 100 {
		t.Errorf("%d values", len(waits))
	}
	w := retryWaits{window: 1<<63 - 1}
	if wait, ok := w.wait(someTime, 1<<63-1, 1<<63-1); !ok || wait < 0 {
		t.Errorf("the longest of all: %v, %v", wait, ok)
	}
}

func TestNoWaitLeadsPastTheWindow(t *testing.T) {
	w := retryWaits{window: time.Second}
	if _, ok := w.wait(someTime, 10*time.Second, 0); ok {
		t.Error("the first wait leads past the window")
	}
	if _, ok := w.wait(someTime, 0, 0); ok {
		t.Error("a stream that has given up tries again")
	}
	w = retryWaits{window: 20 * time.Second}
	if _, ok := w.wait(someTime, time.Second, 30*time.Second); ok {
		t.Error("a Retry-After leads past the window")
	}

	// The window begins with the first try.
	w = retryWaits{window: 10 * time.Second}
	if _, ok := w.end(); ok {
		t.Error("the window ends before it begins")
	}
	wait, ok := w.wait(someTime, 8*time.Second, 0)
	if !ok {
		t.Fatal("the first wait fits")
	}
	if end, ok := w.end(); !ok || end != someTime.Add(wait+10*time.Second) {
		t.Errorf("the window is over at %v, %v", end, ok)
	}
	w = retryWaits{window: 10 * time.Second}
	_, _ = w.wait(someTime, 200*time.Millisecond, 0)
	if _, ok := w.wait(w.first.Add(9900*time.Millisecond), 0, 0); ok {
		t.Error("a wait of at least 200 ms fits into 100")
	}
}

func TestAnEventBeginsTheWaitsAnew(t *testing.T) {
	w := retryWaits{window: time.Minute}
	at := someTime
	for range 4 {
		wait, _ := w.wait(at, time.Second, 0)
		at = at.Add(wait)
	}
	w.resumed()
	at = at.Add(time.Hour)
	if wait, ok := w.wait(at, 2*time.Second, 0); !ok || wait > 2*time.Second {
		t.Errorf("%v, %v", wait, ok)
	}
}

func TestThePositionIsTheLastIDThatTheUpstreamCanBeTold(t *testing.T) {
	long := strings.Repeat("x", eventstream.MaxIDLength)
	for _, c := range []struct {
		name, own string
		committed []string
		want      string
	}{
		{"none", "", nil, ""},
		{"the request's own", "7", nil, "7"},
		{"one of ours", "sse1-" + someToken + ".3", nil, ""},
		{"malformed, of ours", "sse1-", nil, ""},
		{"the upstream's", "7", []string{"8", "9"}, "9"},
		{"the upstream's of our form", "", []string{"sse1-x.1"}, "sse1-x.1"},
		{"reset", "7", []string{"8", ""}, ""},
		{"set again", "7", []string{"", "9"}, "9"},
		{"the longest", "7", []string{long}, long},
		{"too long", "7", []string{"8", long + "x"}, ""},
		{"too long to be known", "7", []string{eventstream.TooLongID}, ""},
		{"a control character", "7", []string{"8", "a\x01b"}, ""},
		{"DEL", "7", []string{"\x7f"}, ""},
		{"a tab inside", "", []string{"a\tb"}, "a\tb"},
		{"a space in front", "", []string{" a"}, ""},
		{"a space at the end", "", []string{"a "}, ""},
		{"other letters", "", []string{"é☃"}, "é☃"},
	} {
		p := positionOf(c.own)
		for _, id := range c.committed {
			p.commit(id)
		}
		if got, ok := p.value(); got != c.want || ok != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", c.name, got, ok, c.want)
		}
	}
}

func TestAFewTriesComeWhenTheyFallDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q tryQueue
		began := time.Now()
		late, soon := q.enter(2*time.Second), q.enter(time.Second)
		<-soon.come
		if waited := time.Since(began); waited != time.Second {
			t.Errorf("the first came after %v", waited)
		}
		<-late.come
		if waited := time.Since(began); waited != 2*time.Second {
			t.Errorf("the second came after %v", waited)
		}
		time.Sleep(time.Hour)
		<-q.enter(0).come
		if waited := time.Since(began); waited != time.Hour+2*time.Second {
			t.Errorf("the third came after %v", waited)
		}
	})
}

func TestNoSecondHasMoreThan64TriesAndTheyComeInTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 500
		var (
			q    tryQueue
			mu   sync.Mutex
			when []time.Time
			who  []time.Duration
			all  sync.WaitGroup
		)
		for i := range streams {
			wait := time.Duration(i*7919%1000) * time.Millisecond
			place := q.enter(wait)
			all.Go(func() {
				<-place.come
				mu.Lock()
				defer mu.Unlock()
				when, who = append(when, time.Now()), append(who, wait)
			})
		}
		all.Wait()
		if !slices.IsSorted(who) {
			t.Errorf("they did not come in the order in which they fell due: %v", who)
		}
		for i := triesPerSecond; i < len(when); i++ {
			if took := when[i].Sub(when[i-triesPerSecond]); took < time.Second {
				t.Fatalf("%d tries in %v", triesPerSecond+1, took)
			}
		}
		if took := when[len(when)-1].Sub(when[0]); took > streams*time.Second/triesPerSecond {
			t.Errorf("%d tries took %v", streams, took)
		}
	})
}

func TestAStreamThatLeavesTheQueueHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q tryQueue
		began := time.Now()
		var gone []*turn
		for range 1000 {
			gone = append(gone, q.enter(time.Second))
		}
		last := q.enter(time.Second)
		for _, place := range gone {
			q.leave(place)
			q.leave(place)
		}
		<-last.come
		if waited := time.Since(began); waited != time.Second {
			t.Errorf("it came after %v", waited)
		}
		q.leave(last)
		for _, place := range gone {
			select {
			case <-place.come:
				t.Fatal("a turn comes to one who has left")
			default:
			}
		}
		q.leave(q.enter(time.Hour))
		time.Sleep(2 * time.Hour)
		<-q.enter(time.Second).come
	})
}
