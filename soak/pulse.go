//go:build linux

package main

import (
	"context"
	"time"
)

// pulse measures how much of the time the machine is too busy to let a goroutine
// run that is due. The module can't be on time then, either.
type pulse struct {
	total, stalled time.Duration
}

const (
	beat = 20 * time.Millisecond

	// lateBeat is a delay after which the module can take a write for a blocked one.
	lateBeat = 100 * time.Millisecond

	// aftermath is how long after a delay an early end can still be late because of it.
	aftermath = time.Second

	// tooBusy is the share of the time from which on late ends say nothing about the
	// module. It was 0.03 on a quiet machine with two processors.
	tooBusy = 0.1
)

// run measures until ctx is done.
func (p *pulse) run(ctx context.Context) {
	for start := time.Now(); pause(ctx, beat); start = time.Now() {
		p.add(time.Since(start))
	}
}

// add notes how long a beat has taken.
func (p *pulse) add(took time.Duration) {
	p.total += took
	if late := took - beat; late > lateBeat {
		p.stalled += late + aftermath
	}
}

// share returns the part of the time that was stalled, 0 to 1.
func (p *pulse) share() float64 {
	if p.total == 0 {
		return 0
	}
	return min(1, float64(p.stalled)/float64(p.total))
}
