package caddysse

import (
	"context"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// beaten is a client that counts the writes that it gets.
type beaten struct {
	writes atomic.Int64
	write  func() // called by each write, unless nil
}

func (b *beaten) Header() http.Header { return nil }
func (b *beaten) WriteHeader(int)     {}
func (b *beaten) FlushError() error   { return nil }
func (b *beaten) Write(p []byte) (int, error) {
	b.writes.Add(1)
	if b.write != nil {
		b.write()
	}
	return len(p), nil
}

// quietHandler returns a handler without heartbeats.
func quietHandler() *Handler {
	return &Handler{
		agenda: new(agenda),
		frames: newFrames(&Heartbeat{Interval: off}, nil),
	}
}

// openStream returns a stream without a server, whose next frame is due after
// wait.
func openStream(h *Handler, w http.ResponseWriter, wait time.Duration) *stream {
	s := &stream{h: h, frames: &h.frames, w: w, arrived: now(), ctx: context.Background(), cancel: func(error) {}, wait: wait, headed: true}
	s.stage.Store(uint32(stageOpen))
	s.mu.Lock()
	s.scheduleLocked()
	s.mu.Unlock()
	return s
}

func TestAStopOfTheProcessIsNoSilenceOfTheUpstream(t *testing.T) {
	const second = instant(time.Second)
	for name, test := range map[string]struct {
		fires [][2]instant // when the timer was due, and when it fired
		since instant
		want  time.Duration
	}{
		"no stop":                          {[][2]instant{{1 * second, 1 * second}, {2 * second, 2*second + 99e6}}, 0, 0},
		"a stop":                           {[][2]instant{{1 * second, 8 * second}}, 0, 7 * time.Second},
		"two stops":                        {[][2]instant{{1 * second, 8 * second}, {9 * second, 12 * second}}, 0, 10 * time.Second},
		"a stop before the silence":        {[][2]instant{{1 * second, 8 * second}}, 8 * second, 0},
		"a silence that began in the stop": {[][2]instant{{1 * second, 8 * second}}, 5 * second, 3 * time.Second},
		"a busy machine":                   {[][2]instant{{1 * second, 1*second + instant(stopSlack)}}, 0, stopSlack},
	} {
		a := &agenda{pulse: time.Second}
		for _, fire := range test.fires {
			a.noteStopLocked(fire[0], fire[1])
		}
		if got := a.stoppedSince(test.since); got != test.want {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

func TestTheLatestStopsAreRemembered(t *testing.T) {
	a := &agenda{pulse: time.Second}
	for i := range instant(100) {
		a.noteStopLocked(i*instant(time.Minute), i*instant(time.Minute)+instant(time.Second))
	}
	if len(a.stops) != keptStops || cap(a.stops) > 2*keptStops {
		t.Errorf("%d stops are kept in room for %d", len(a.stops), cap(a.stops))
	}
	if got, want := a.stoppedSince(0), keptStops*time.Second; got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

// While the process was stopped, the client may have read everything that was
// sent.
func TestAWriteHasAMomentToGetFurtherAfterAStop(t *testing.T) {
	const timeout = 30 * time.Second
	for stop, want := range map[time.Duration]time.Duration{
		0:               timeout,
		stopSlack - 1:   timeout,
		stopSlack:       timeout + resumePatience,
		7 * time.Second: timeout + resumePatience,
	} {
		synctest.Test(t, func(t *testing.T) {
			h := quietHandler()
			h.writeTimeout = timeout
			taken := make(chan struct{})
			s := openStream(h, &beaten{write: func() { <-taken }}, 0)
			ended := make(chan time.Duration, 1)
			began := time.Now()
			brokenOff := sync.OnceFunc(func() {
				ended <- time.Since(began)
				close(taken)
			})
			s.cancel = func(error) { brokenOff() }
			s.watchWrite()
			go s.write([]byte("data: 1\n\n"))
			time.Sleep(timeout - 1)
			h.agenda.mu.Lock()
			h.agenda.armed -= instant(stop) // as if it fired that late
			h.agenda.mu.Unlock()
			if got := <-ended; got < want || got > want+time.Millisecond {
				t.Errorf("after a stop of %v, the write was broken off at %v, want %v", stop, got, want)
			}
			synctest.Wait()
			h.agenda.drop(s)
		})
	}
}

// While the process was stopped, the rest of the event may have arrived.
func TestAnEarlyEndWaitsAMomentForItsEventAfterAStop(t *testing.T) {
	for stop, want := range map[time.Duration]time.Duration{
		0:               endPatience,
		stopSlack - 1:   endPatience,
		stopSlack:       endPatience + resumePatience,
		7 * time.Second: endPatience + resumePatience,
	} {
		synctest.Test(t, func(t *testing.T) {
			h := quietHandler()
			s := openStream(h, new(beaten), 0)
			s.body = eventStreamBody
			cut := make(chan time.Duration, 1)
			began := time.Now()
			s.cancel = func(error) { cut <- time.Since(began) }
			s.write([]byte("data: ha"))
			s.end(drained)
			time.Sleep(endPatience - 1)
			h.agenda.mu.Lock()
			h.agenda.armed -= instant(stop) // as if it fired that late
			h.agenda.mu.Unlock()
			s.facts.Lock()
			s.due -= instant(stop)
			s.facts.Unlock()
			if got := <-cut; got < want || got > want+time.Millisecond {
				t.Errorf("after a stop of %v, the event was cut at %v, want %v", stop, got, want)
			}
			synctest.Wait()
			h.agenda.drop(s)
		})
	}
}

// A machine that is overloaded looks like a process that is stopped again and
// again.
func TestAnEarlyEndDoesNotWaitForEverForAMachineThatIsTooBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := quietHandler()
		s := openStream(h, new(beaten), 0)
		s.body = eventStreamBody
		var cut atomic.Bool
		began := time.Now()
		s.cancel = func(error) { cut.Store(true) }
		s.write([]byte("data: ha"))
		s.end(drained)
		for !cut.Load() && time.Since(began) < time.Minute {
			h.agenda.mu.Lock()
			h.agenda.armed -= instant(stopSlack)
			h.agenda.mu.Unlock()
			time.Sleep(resumePatience / 2)
			synctest.Wait()
		}
		if got, most := time.Since(began), endPatience+2*resumePatience; got > most {
			t.Errorf("the event was cut at %v, want at most %v", got, most)
		}
		h.agenda.drop(s)
	})
}

// Only the timer notices a stop, so it fires often if an upstream's silence is
// limited, and not once more than needed if it is not.
func TestAnAgendaLooksForStopsOnlyWhereSilenceIsLimited(t *testing.T) {
	for _, pulse := range []time.Duration{0, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			h := quietHandler()
			h.agenda.pulse = pulse
			s := openStream(h, new(beaten), time.Hour)
			fired := 0
			for range 600 {
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				h.agenda.mu.Lock()
				if left := time.Duration(h.agenda.armed - now()); pulse > 0 && left > pulse {
					t.Errorf("the timer fires in %v", left)
				} else if pulse == 0 && left < 58*time.Minute {
					fired++
				}
				h.agenda.mu.Unlock()
			}
			if fired > 0 {
				t.Errorf("the timer was set for something else than the frame %d times", fired)
			}
			h.agenda.drop(s)
		})
	}
}

// No wait may be so long that its end overflows into the past.
func TestAWaitBeyondAllTimeIsNeverOver(t *testing.T) {
	for _, wait := range []time.Duration{never, never - 1, never - time.Second, never - time.Hour, 2 * 1752000 / 2 * time.Hour} {
		h := quietHandler()
		client := new(beaten)
		s := openStream(h, client, wait)
		s.lastHeard = time.Duration(rand.N(int64(time.Hour)))
		h.agenda.mu.Lock()
		first := h.agenda.entries[0].at
		h.agenda.mu.Unlock()
		if first < now()+instant(24*365*time.Hour) {
			t.Errorf("a wait of %v is over at %v", wait, time.Duration(first))
		}
		s.tick()
		h.agenda.mu.Lock()
		again := h.agenda.entries[0].at
		h.agenda.mu.Unlock()
		if again < now()+instant(24*365*time.Hour) || client.writes.Load() != 0 {
			t.Errorf("after a look, a wait of %v is over at %v, with %d writes", wait, time.Duration(again), client.writes.Load())
		}
		h.agenda.drop(s)
	}
	for _, from := range []instant{instant(-never), 0, 1, instant(time.Hour), instant(never) - 1, instant(never)} {
		if to := from.plus(never); to < from {
			t.Errorf("after %v comes %v", time.Duration(from), time.Duration(to))
		}
	}
}

// The agenda may be about to visit a stream that is just ending.
func TestAStreamWhoseHandlersHaveLeftIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := quietHandler()
		h.upstreamTimeout = time.Second
		client := new(beaten)
		s := openStream(h, client, time.Second)
		s.rare = &rareStream{tries: &tries{live: true}}
		s.close()
		time.Sleep(time.Minute)
		s.tick()
		s.mu.Lock() // as if another goroutine looked at it at the same time
		s.arrived = now()
		s.tick()
		s.mu.Unlock()
		if s.end(drained) || s.at() != stageOpen || s.why != notEnded {
			t.Errorf("it is at stage %d, ended as %v", s.at(), s.why)
		}
		if len(h.agenda.entries) != 0 || client.writes.Load() != 0 {
			t.Errorf("%d entries are left, %d frames have gone out", len(h.agenda.entries), client.writes.Load())
		}
	})
}
