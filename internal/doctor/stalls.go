package doctor

import (
	"slices"
	"sync"
	"time"
)

const (
	// stallTick is how often the doctor checks that it is running, and stallFrom
	// the shortest gap that counts as a stall.
	stallTick = 20 * time.Millisecond
	stallFrom = 60 * time.Millisecond
)

// stalls records when this process did not run: it was stopped, or the machine
// was too busy. What arrived in that time was seen too late.
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

// during returns the stalls since a moment. It checks first, because a process
// that continues may come here before its ticker fires.
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
