package caddysse

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// writeBatch is how many runs are written at a time.
	writeBatch = 1000

	// largestBatch is about how many bytes a batch has at most.
	largestBatch = 4 << 20

	// firstWritePause is how long the writer waits after a failure. It doubles up
	// to storePause.
	firstWritePause = 50 * time.Millisecond
)

// queue tells the writer that a run has something for the store. It must be
// called with the mirror's lock held.
func (d *storeSession) queue(m *mirror) {
	d.mu.Lock()
	d.dirty = append(d.dirty, m)
	d.mu.Unlock()
	select {
	case d.writes <- struct{}{}:
	default:
	}
}

func (d *storeSession) dropMirror(m *mirror) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.mirrors, m)
}

// allMirrors returns the mirrors that still have something for the store. A
// mirror's lock must be taken before the session's.
func (d *storeSession) allMirrors() []*mirror {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.mirrors))
}

// isIdleLocked reports whether nothing is left to write to the store, or to send
// to other nodes.
func (d *storeSession) isIdleLocked() bool {
	return len(d.dirty) == 0 && !d.writing && len(d.outbox) == 0 && !d.sending
}

// tellIdleLocked wakes the callers of awaitIdle, if the session is idle.
func (d *storeSession) tellIdleLocked() {
	if d.idle != nil && d.isIdleLocked() {
		close(d.idle)
		d.idle = nil
	}
}

// awaitIdle waits until the session is idle.
func (d *storeSession) awaitIdle(ctx context.Context) {
	d.mu.Lock()
	if d.isIdleLocked() {
		d.mu.Unlock()
		return
	}
	if d.idle == nil {
		d.idle = make(chan struct{})
	}
	idle := d.idle
	d.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// keepWriting writes what the runs have for the store, many runs at a time. The
// next batch grows during a call.
func (d *storeSession) keepWriting() {
	pause := firstWritePause
	for {
		batch := d.nextBatch()
		if len(batch) == 0 {
			select {
			case <-d.writes:
			case <-d.ctx.Done():
				return
			}
			continue
		}
		if d.write(batch) {
			pause = firstWritePause
			continue
		}
		d.loseLate()
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
			return
		}
		pause = min(2*pause, storePause)
	}
}

// nextBatch takes the runs to write next.
func (d *storeSession) nextBatch() []*mirror {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(d.dirty), writeBatch)
	batch := slices.Clone(d.dirty[:n])
	d.dirty = slices.Delete(d.dirty, 0, n)
	d.writing = n > 0
	d.tellIdleLocked()
	return batch
}

// write writes a batch, and reports whether the store has accepted all of it.
func (d *storeSession) write(batch []*mirror) bool {
	var (
		writes  []store.Write
		writers []*mirror
		names   = make(map[string]struct{})
		size    int
	)
	for _, m := range batch {
		if size > largestBatch {
			d.queueAgain(m)
			continue
		}
		w, ok := m.take()
		if !ok {
			m.settle(w, nil)
			continue
		}
		for _, event := range w.Events {
			size += len(event.Data)
		}
		writes, writers = append(writes, w), append(writers, m)
		names[m.run.h.Name] = struct{}{}
	}
	if len(writes) == 0 {
		return true
	}
	ctx, cancel := context.WithTimeout(d.ctx, max(storePatience, d.lease/2))
	defer cancel()
	start := now()
	d.writePace.begin()
	errs := d.store.Write(ctx, writes)
	d.writePace.end(d.lease)
	took := time.Duration(now() - start)
	for name := range names {
		collector.storeDuration.WithLabelValues(name, string(storeWrite)).Observe(took.Seconds())
	}
	var failure error
	for i, m := range writers {
		var err error
		if errs != nil {
			err = errs[i]
		}
		if err != nil && !errors.Is(err, store.ErrUnknown) {
			failure = err
		}
		m.settle(writes[i], err)
	}
	if failure == nil {
		d.refuses.Store(0)
		return true
	}
	if d.ctx.Err() == nil {
		d.refuses.Store(int64(now()))
		d.tell(storeWrite, failure, slices.Sorted(maps.Keys(names)))
	}
	return false
}

// queueAgain postpones a run that is too much for this batch.
func (d *storeSession) queueAgain(m *mirror) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d.queue(m)
}

// loseLate gives up the runs that have waited for too long.
func (d *storeSession) loseLate() {
	d.mu.Lock()
	dirty := slices.Clone(d.dirty)
	d.mu.Unlock()
	for _, m := range dirty {
		m.loseIfLate()
	}
}
