package caddysse

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// pretendExit lets the process look as if it were about to end, or not.
func pretendExit(t *testing.T) *atomic.Bool {
	var pretended atomic.Bool
	real := exiting
	exiting = pretended.Load
	t.Cleanup(func() { exiting = real })
	return &pretended
}

func TestWhoWaitsForTheExitIsToldOnce(t *testing.T) {
	ends := pretendExit(t)
	var e exitNotice
	var told []string
	wait := func(who string) (forget func()) {
		return e.await(func() { told = append(told, who) })
	}
	wait("first")
	forget := wait("forgotten")
	wait("second")
	forget()
	forget() // twice does no harm

	// A reload stops a configuration, too, and is none of their business.
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

func TestNobodyIsForgottenWhoComesWhileTheExitIsTold(t *testing.T) {
	pretendExit(t).Store(true)
	var e exitNotice
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

// Somebody who is told may have others wait, or forget.
func TestTheExitIsToldWithoutALock(t *testing.T) {
	pretendExit(t).Store(true)
	var e exitNotice
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
