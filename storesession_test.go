package caddysse

import (
	"context"
	"testing"
	"time"
)

func TestARunIsLookedForAsLongAsItMayBeLate(t *testing.T) {
	const lease = 10 * time.Second
	ago := func(d time.Duration) int64 { return int64(now()) - int64(d) }
	for what, c := range map[string]struct {
		prepare     func(*storeSession)
		least, most time.Duration
	}{
		"a store that is fast":            {func(*storeSession) {}, leastLook, leastLook},
		"a write that took long":          {func(d *storeSession) { d.writePace.since.Store(ago(time.Second)); d.writePace.end(lease) }, leastLook + 2*time.Second, lease},
		"a renewal that takes long":       {func(d *storeSession) { d.renewPace.since.Store(ago(time.Second)) }, leastLook + 2*time.Second, lease},
		"a write that took long long ago": {func(d *storeSession) { d.writePace.since.Store(ago(time.Second)); d.writePace.end(0) }, leastLook, leastLook},
		"a write that hangs":              {func(d *storeSession) { d.writePace.since.Store(ago(time.Minute)) }, leastLook + lease/2, leastLook + lease/2},
		"a store that has just come back": {func(d *storeSession) { d.away.Store(true); d.answers() }, 2 * storePause, lease / 2},
		"a store that was never away":     {func(d *storeSession) { d.answers() }, leastLook, leastLook},
	} {
		d := &storeSession{lease: lease}
		at := now()
		c.prepare(d)
		if until := time.Duration(d.maySeeUntil(at) - at); until < c.least || until > c.most {
			t.Errorf("%s: a run is looked for %v, want %v to %v", what, until, c.least, c.most)
		}
	}
}

func TestALeaveWaitsUntilNothingIsLeft(t *testing.T) {
	d := &storeSession{dirty: []*mirror{{}}, outbox: []outgoing{{}}}
	idle := make(chan struct{})
	go func() { d.awaitIdle(t.Context()); close(idle) }()
	still := func(what string) {
		t.Helper()
		select {
		case <-idle:
			t.Fatalf("it is idle with %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
	still("something to write and to send")
	d.nextBatch()
	still("a write under way")
	d.nextBatch()
	still("something to send")
	d.mu.Lock()
	d.outbox = nil
	d.tellIdleLocked()
	d.mu.Unlock()
	<-idle
	d.awaitIdle(t.Context())
	over, cancel := context.WithCancel(t.Context())
	cancel()
	d.dirty = []*mirror{{}}
	d.awaitIdle(over)
}
