package caddysse

import (
	"runtime"
	"testing"
	"time"
	"weak"
)

// A window can be an hour long, and its streams may end earlier.
func TestADrainKeepsNoStreamThatHasEnded(t *testing.T) {
	for name, drains := range map[string]func(h *Handler, s *stream){
		"one that it finds": func(h *Handler, _ *stream) {
			stop := make(chan struct{})
			over := make(chan struct{})
			go func() {
				defer close(over)
				h.drainOver(time.Hour, stop)
			}()
			t.Cleanup(func() { close(stop); <-over })
			for h.drain.left.Load() == nil {
				time.Sleep(time.Millisecond) // until it waits for the first turn
			}
		},
		"one that joins in": func(h *Handler, s *stream) {
			h.drain.until.Store(int64(now().plus(time.Hour)))
			s.joinDrain()
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := quietHandler()
			h.drain, h.group = newDrain(nil), live.group("drained")
			h.drain.enter() // another request
			kept := func() weak.Pointer[stream] {
				s := openStream(h, new(beaten), time.Hour)
				s.kind.resumable = true
				h.group.add(s, noPlace)
				drains(h, s)
				h.group.remove(s, clientClosed, counts{})
				h.agenda.drop(s)
				return weak.Make(s)
			}()
			for deadline := time.Now().Add(20 * time.Second); kept.Value() != nil; time.Sleep(time.Millisecond) {
				if runtime.GC(); time.Now().After(deadline) {
					t.Fatal("it is still in memory")
				}
			}
		})
	}
}
