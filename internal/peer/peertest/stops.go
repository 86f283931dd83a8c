package peertest

import (
	"sync/atomic"
	"testing"
	"time"
)

// WatchStops watches for how long the process does not run at a time, until the
// test ends. The kernel's clocks go on meanwhile, so a test of what they do may find
// an answer that is right for a process that has seen nothing of it.
func WatchStops(t testing.TB) (longest func() time.Duration) {
	const beat = 10 * time.Millisecond
	var most atomic.Int64
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(beat)
		defer ticker.Stop()
		for before := time.Now(); ; before = time.Now() {
			select {
			case <-ticker.C:
				most.Store(max(most.Load(), int64(time.Since(before)-beat)))
			case <-over:
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(over)
		<-done
	})
	return func() time.Duration { return time.Duration(most.Load()) }
}

// SkipIfStopped skips the rest of a test in which the process was stopped for longer
// than a limit.
func SkipIfStopped(t testing.TB, longest func() time.Duration, limit time.Duration) {
	t.Helper()
	if stopped := longest(); stopped > limit {
		t.Skipf("the process was stopped for %v, which shows nothing", stopped)
	}
}
