package caddysse

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// newExitNotice returns one for a process that looks as if it were exiting when
// ends is true.
func newExitNotice() (e *exitNotice, ends *atomic.Bool) {
	ends = new(atomic.Bool)
	return &exitNotice{exiting: ends.Load}, ends
}

func TestWhoWaitsForTheExitIsToldOnce(t *testing.T) {
	synctest.Test(t, whoWaitsForTheExitIsToldOnce)
}

func whoWaitsForTheExitIsToldOnce(t *testing.T) {
	e, ends := newExitNotice()
	var told []string
	wait := func(who string) (forget func()) {
		return e.await(func() { told = append(told, who) })
	}
	wait("first")
	forget := wait("forgotten")
	wait("second")
	forget()
	forget() // twice does no harm

	// A reload also stops a configuration, but must not call them.
	e.notify()
	if err := e.Handle(context.Background(), caddy.Event{}); err != nil || len(told) > 0 {
		t.Errorf("a reload told %v, %v", told, err)
	}
	ends.Store(true)
	if err := e.Handle(context.Background(), caddy.Event{}); err != nil {
		t.Error(err)
	}
	e.notify()
	slices.Sort(told)
	if !slices.Equal(told, []string{"first", "second"}) {
		t.Errorf("told were %v", told)
	}
	if len(e.waiting) != 0 {
		t.Errorf("%d still wait", len(e.waiting))
	}
}

func TestNobodyIsMissedWhoRegistersDuringTheExit(t *testing.T) {
	e, ends := newExitNotice()
	ends.Store(true)
	var told atomic.Int64
	var waiting sync.WaitGroup
	const many = 2000
	for range 4 {
		waiting.Go(func() {
			for range many {
				e.await(func() { told.Add(1) })
				e.notify()
			}
		})
	}
	waiting.Wait()
	if n := told.Load(); n != 4*many {
		t.Errorf("%d of %d were told", n, 4*many)
	}
}

// Nothing reports the exit if the current configuration has no handler and no
// admin API.
func TestWhoWaitsForTheExitLooksByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, ends := newExitNotice()
		told, forgotten := 0, 0
		e.await(func() { told++ })
		forget := e.await(func() { forgotten++ })
		time.Sleep(time.Hour)
		synctest.Wait()
		if told != 0 {
			t.Error("it was told of no exit")
		}
		forget()
		ends.Store(true)
		time.Sleep(noticePause)
		synctest.Wait()
		if told != 1 || forgotten != 0 {
			t.Errorf("told %d times, and %d times who had forgotten", told, forgotten)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if told != 1 {
			t.Errorf("told %d times", told)
		}
	})
}

// A function that is called may add others, or remove them.
func TestTheExitIsToldWithoutALock(t *testing.T) {
	synctest.Test(t, theExitIsToldWithoutALock)
}

func theExitIsToldWithoutALock(t *testing.T) {
	e, ends := newExitNotice()
	ends.Store(true)
	later := false
	var forget func()
	e.await(func() {
		forget()
		e.await(func() { later = true })
	})
	forget = e.await(func() {})
	e.notify()
	e.notify()
	if !later {
		t.Error("who came while others were told was not")
	}
}
