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

	// lateBeat is a delay that is enough for a write to be taken for a blocked one.
	lateBeat = 100 * time.Millisecond

	// aftermath is how long an early end may have been on its way when the machine
	// stalled, and comes late for that.
	aftermath = time.Second
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
