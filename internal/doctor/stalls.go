package doctor

import (
	"slices"
	"sync"
	"time"
)

const (
	// stallTick is how often the doctor looks whether it runs, and stallFrom
	// from when on it has not.
	stallTick = 20 * time.Millisecond
	stallFrom = 60 * time.Millisecond
)

// stalls notices when this process did not run: it was stopped, or the machine
// had no time for it. What arrived then, arrived unseen.
type stalls struct {
	began time.Time
	stop  chan struct{}
	done  chan struct{}

	mu    sync.Mutex
	last  time.Time
	spans []Span
}

func watchStalls(began time.Time) *stalls {
	s := &stalls{began: began, stop: make(chan struct{}), done: make(chan struct{}), last: time.Now()}
	go s.run()
	return s
}

func (s *stalls) run() {
	defer close(s.done)
	ticker := time.NewTicker(stallTick)
	defer ticker.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-ticker.C:
			s.look()
		}
	}
}

func (s *stalls) look() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.last) > stallFrom {
		s.spans = append(s.spans, Span{s.last.Sub(s.began), now.Sub(s.began)})
	}
	s.last = now
}

// during returns the stalls since a moment. It looks first: a process that goes
// on may come here before its ticker does.
func (s *stalls) during(from time.Duration) []Span {
	s.look()
	s.mu.Lock()
	defer s.mu.Unlock()
	first, _ := slices.BinarySearchFunc(s.spans, from, func(span Span, from time.Duration) int {
		return int(min(max(span.To-from, -1), 1))
	})
	return slices.Clone(s.spans[first:])
}

func (s *stalls) close() {
	close(s.stop)
	<-s.done
}
