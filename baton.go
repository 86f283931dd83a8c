package caddysse

import (
	"context"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
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

	// At an age at which the client heard something last, how much could be written
	// before the kernel is asked again.
	heard time.Duration
	spare int
}

// What the kernel takes at once, whatever its buffers.
const (
	atOnce   = 8 << 10  // bytes of a write
	onItsWay = 16 << 10 // bytes that the client has not acknowledged

	aroundWrite = 128 // bytes that a write is larger on its way, at most
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
	attached := &reader.run.feed.attached
	attached.Store(reader)
	defer attached.CompareAndSwap(reader, nil)
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

// publishHere lets the client have what its journal has been given, and writes it
// from here where the client has all that came before and takes some more at once.
// It returns false where it has done nothing.
func (reader *runReader) publishHere(j *journal.Journal) bool {
	b, c := &reader.baton, reader.cursor
	if !b.mu.TryLock() {
		return false
	}
	defer b.mu.Unlock()
	s := b.stream
	if s == nil || !s.mu.TryLock() {
		return false
	}
	if !b.takesAtOnceLocked() || !c.Take() {
		s.unlock()
		return false
	}
	rests := false
	defer func() {
		if !rests {
			c.Wake()
		}
	}()
	defer s.survive()
	defer s.unlock()
	j.Publish()
	rests = b.deliverLocked(c)
	return true
}

// takesAtOnceLocked reports whether the client takes some more without making
// anybody wait. It asks the kernel again only where what has been written since may
// be too much. It wants the stream to be locked.
func (b *baton) takesAtOnceLocked() bool {
	if b.spare > 0 && b.heard == b.stream.lastHeard {
		return true
	}
	size, ok := b.backlog.Size()
	if !ok {
		b.spare = 0
		return false
	}
	b.spare, b.heard = onItsWay-size, b.stream.lastHeard
	return b.spare >= 0
}

// deliverLocked writes what there is, and reports whether that was all. The rest is
// left to the client's own goroutine. It wants the stream to be locked.
func (b *baton) deliverLocked(c *journal.Cursor) (all bool) {
	for sent := 0; ; {
		p, err := c.Next()
		switch {
		case err == nil && p == nil:
			c.Wait()
			return true
		case err != nil || sent+len(p) > atOnce:
			return false
		}
		n, err := b.stream.passOnLocked(p)
		c.Advance(n)
		sent += n
		b.spare -= n + aroundWrite
		b.heard = b.stream.lastHeard
		if err != nil || n < len(p) || b.stream.isEnding() {
			return false // an end may be due here, as it is when the lock is given back
		}
	}
}
