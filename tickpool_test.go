package caddysse

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// parallel counts how many goroutines are somewhere at the same time.
type parallel struct{ present, most atomic.Int64 }

func (p *parallel) enter() {
	n := p.present.Add(1)
	for most := p.most.Load(); n > most && !p.most.CompareAndSwap(most, n); most = p.most.Load() {
	}
}

func (p *parallel) leave() { p.present.Add(-1) }

func TestStreamsThatAreDueInOneInstantAreCalledOnByAFew(t *testing.T) {
	const streams = 50_000
	synctest.Test(t, func(t *testing.T) {
		h := quietHandler()
		var at parallel
		client := &beaten{write: func() {
			at.enter()
			time.Sleep(callPatience / 5)
			at.leave()
		}}
		all := make([]*stream, streams)
		for i := range all {
			all[i] = openStream(h, client, time.Minute)
		}
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if client.writes.Load() != 0 {
			t.Fatal("some were called on before their time")
		}
		began := time.Now()
		for client.writes.Load() < streams && time.Since(began) < time.Minute {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(callPatience)
		synctest.Wait()
		if n, most := client.writes.Load(), at.most.Load(); n != streams || most != tickPoolSize {
			t.Errorf("%d frames by %d callers, want %d by %d", n, most, streams, tickPoolSize)
		}
		h.agenda.pool.mu.Lock()
		defer h.agenda.pool.mu.Unlock()
		if pool := &h.agenda.pool; len(pool.callers) != 0 || len(pool.waiting) != 0 {
			t.Errorf("left are %d callers and %d streams", len(pool.callers), len(pool.waiting))
		}
		for _, s := range all {
			h.agenda.drop(s)
		}
	})
}

// The clients that are called first read nothing.
func TestClientsThatReadNothingDelayNobodyElsesFrame(t *testing.T) {
	const blocked, healthy = 200, 2000
	synctest.Test(t, func(t *testing.T) {
		h := quietHandler()
		var all []*stream
		free := make(chan struct{})
		var at parallel
		stuck := &beaten{write: func() {
			at.enter()
			<-free
			at.leave()
		}}
		for range blocked {
			all = append(all, openStream(h, stuck, time.Minute))
		}
		reader := new(beaten)
		time.Sleep(time.Nanosecond) // the others become due first
		for range healthy {
			all = append(all, openStream(h, reader, time.Minute))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		// In each callPatience, as many callers are replaced as were blocked.
		limit := (blocked/tickPoolSize + 2) * 2 * callPatience
		time.Sleep(limit)
		synctest.Wait()
		if n := reader.writes.Load(); n != healthy {
			t.Errorf("%d of %d frames have gone out within %v", n, healthy, limit)
		}
		if n := at.present.Load(); n != blocked {
			t.Errorf("%d calls are under way, want one for each of the %d that block", n, blocked)
		}
		// A caller that has been replaced does not continue when its client
		// reads again.
		close(free)
		synctest.Wait()
		h.agenda.pool.mu.Lock()
		if pool := &h.agenda.pool; len(pool.callers) != 0 || len(pool.waiting) != 0 {
			t.Errorf("left are %d callers and %d streams", len(pool.callers), len(pool.waiting))
		}
		h.agenda.pool.mu.Unlock()
		for _, s := range all {
			h.agenda.drop(s)
		}
	})
}

// The pool is emptied and filled again and again, at the moments when its
// callers leave. No stream is forgotten.
func TestNoStreamIsForgottenAsCallersComeAndGo(t *testing.T) {
	var c tickPool
	h := quietHandler()
	const adders, each = 8, 2000
	var calls atomic.Int64
	var adding, called sync.WaitGroup
	called.Add(adders * each)
	for range adders {
		adding.Go(func() {
			for range each {
				s := &stream{h: h, frames: &h.frames, w: &beaten{write: func() { calls.Add(1); called.Done() }}, arrived: now() - instant(time.Hour), wait: time.Minute, cancel: func(error) {}}
				s.stage.Store(uint32(stageOpen))
				c.add(s)
			}
		})
	}
	adding.Wait()
	called.Wait()
	if n := calls.Load(); n != adders*each {
		t.Errorf("%d calls", n)
	}
	h.agenda.mu.Lock()
	defer h.agenda.mu.Unlock()
	if h.agenda.timer != nil {
		h.agenda.timer.Stop()
	}
}
