package caddysse

import (
	"context"
	"sync"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// A run of one client has two goroutines: its handlers', which appends to the
// journal, and that of the client's request, which reads it. To wake the second one
// for each event costs more than the event. So a client that has all that there is
// leaves its turn to the handlers' goroutine, which then writes what has come by
// itself, where that can't take long: a client that does not read holds up nobody.

// baton says who reads for a run's client.
type baton struct {
	mu      sync.Mutex // whose turn it is holds it
	stream  *stream    // nil: the client's own goroutine reads
	backlog *peer.Backlog
}

// What the kernel takes at once, whatever its buffers.
const (
	atOnce   = 8 << 10  // bytes of a write
	onItsWay = 16 << 10 // bytes that the client has not acknowledged
)

// followInTurns passes on what the client of a run of its own gets, until the
// stream or the journal ends. The error is the journal's, io.EOF for a clean end
// of the upstream; nil where the stream is over.
func (reader *runReader) followInTurns(ctx context.Context, s *stream) error {
	b, c := &reader.baton, reader.cursor
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.proto == http1 {
		// Over HTTP/2 and HTTP/3 a client has a window of its own.
		b.backlog = peer.NewBacklog(peer.Accepted(s.ctx))
	}
	reader.run.kept.attached.Store(reader)
	defer reader.run.kept.attached.CompareAndSwap(reader, nil)
	for {
		p, err := c.Next()
		switch {
		case err != nil:
			return err
		case p == nil:
			if !b.rest(ctx, s, c.Wait()) {
				return nil
			}
		default:
			n, err := s.pass(p)
			c.Advance(n)
			if err != nil || n < len(p) {
				return nil
			}
		}
	}
}

// rest leaves the turn to others until there is something that they do not do. It
// returns false where the stream is over.
func (b *baton) rest(ctx context.Context, s *stream, more <-chan struct{}) (goesOn bool) {
	b.stream = s
	b.mu.Unlock()
	select {
	case <-more:
		goesOn = true
	case <-ctx.Done():
	}
	b.mu.Lock()
	b.stream = nil
	return goesOn
}

// publish lets the client of a run have what its feed has been given.
func (r *run) publish() {
	j, reader := r.feed.journal, r.kept.attached.Load()
	if reader == nil || !reader.baton.mu.TryLock() {
		j.Publish()
		return
	}
	b := &reader.baton
	defer b.mu.Unlock()
	if b.stream == nil || !b.takesAtOnce() || !reader.cursor.Take() {
		j.Publish()
		return
	}
	j.Publish()
	reader.deliverHere(b.stream)
}

// takesAtOnce reports whether the client takes some more without making anybody
// wait.
func (b *baton) takesAtOnce() bool {
	size, ok := b.backlog.Size()
	return ok && size <= onItsWay
}

// deliverHere writes what there is. What it can't do is left to the client's own
// goroutine.
func (reader *runReader) deliverHere(s *stream) {
	c, rests := reader.cursor, false
	defer func() {
		if !rests {
			c.Wake()
		}
	}()
	defer s.survive()
	for sent := 0; ; {
		p, err := c.Next()
		switch {
		case err == nil && p == nil:
			rests = true
			c.Wait()
			return
		case err != nil || sent+len(p) > atOnce:
			return
		}
		n, err := s.pass(p)
		c.Advance(n)
		sent += n
		if err != nil || n < len(p) {
			return
		}
	}
}
