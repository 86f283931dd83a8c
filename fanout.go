package caddysse

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// When a client of a shared run has received everything, it rests: its request's
// goroutine only waits for the end. A few workers then write new events, to one
// client after the other, so that an event wakes a few goroutines and not one per
// client. If a client does not read, its worker stays with it and another worker
// takes that worker's place, so that no other client waits. Workers use a stream
// as its agenda does, under its lock.

// fanOut makes workers write to the resting clients of a run.
type fanOut struct{}

// round is what workers do when there are new events.
type round struct {
	due     *journal.Due
	workers atomic.Int32 // all workers
	busy    atomic.Int32 // workers that are with a client
}

var rounds = sync.Pool{New: func() any { return new(round) }}

// Serve begins a round.
func (fanOut) Serve(due *journal.Due) {
	r := rounds.Get().(*round)
	r.due = due
	n := min(runtime.GOMAXPROCS(0), due.Len())
	r.workers.Store(int32(n))
	for range n {
		go r.work()
	}
}

func (r *round) work() {
	f := framings.Get().(*framing)
	for deliver := r.due.Next(); deliver != nil; deliver = r.due.Next() {
		if busy := r.busy.Add(1); busy >= r.workers.Load() {
			// All workers are with a client now, which may block them.
			r.workers.Add(1)
			go r.work()
		}
		deliver(f)
		r.busy.Add(-1)
	}
	f.recycle()
	if r.workers.Add(-1) == 0 {
		r.due.Recycle()
		r.due = nil
		rounds.Put(r)
	}
}

// mostAtATime is how much a worker writes to one client. If there is more, the
// client has fallen behind, and its own goroutine continues.
const mostAtATime = 64 << 10

// deliver writes new events to the reader's client, on a worker with a framing.
func (reader *runReader) deliver(worker any) {
	f := worker.(*framing)
	c, s := reader.cursor, reader.stream
	rested := false
	defer func() {
		if !rested {
			c.GiveBack()
		}
	}()
	defer s.survive()
	for sent := 0; sent <= mostAtATime; {
		p, err := c.Next()
		switch {
		case err != nil:
			return
		case p == nil:
			if rested = c.Rested(); rested {
				return
			}
		case s.passBlocks(c, p, f) != nil:
			return
		default:
			c.Advance(len(p))
			sent += len(p)
		}
	}
}

// followShared is followInTurns for a reader of a shared run.
func (reader *runReader) followShared(ctx context.Context) error {
	for c := reader.cursor; ; {
		p, err := c.Next()
		switch {
		case err != nil:
			return err
		case p == nil:
			if !reader.rest(ctx) {
				return nil
			}
		case reader.stream.passBlocks(c, p, nil) != nil:
			return nil
		default:
			c.Advance(len(p))
		}
	}
}

// rest waits until the workers leave the client to its own goroutine again. It
// returns false if the stream is over.
func (reader *runReader) rest(ctx context.Context) bool {
	back := reader.cursor.Rest(reader.deliver)
	for {
		select {
		case <-back:
			if reader.cursor.IsHeld() {
				return true
			}
		case <-ctx.Done():
			reader.cursor.Reclaim()
			return false
		}
	}
}
