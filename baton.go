package caddysse

import (
	"context"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// A run with one client has two goroutines: the one of its handlers, which
// appends to the journal, and the one of the client's request, which reads it.
// Waking the second one for each event costs more than the event itself. So when
// the client has received everything, its goroutine leaves the turn to the
// handlers' goroutine, which then also writes new events to the client, as long
// as that can't block: a client that does not read must not delay the handlers.

// baton says which goroutine writes to the client of a run.
type baton struct {
	mu      sync.Mutex // held by the goroutine whose turn it is
	stream  *stream    // nil: the client's own goroutine reads
	backlog *peer.Backlog

	// heard is the age at which the client was last sent something, and spare is how
	// much could be written then before the kernel must be asked again.
	heard time.Duration
	spare int
}

// What the kernel takes without blocking, whatever the sizes of its buffers.
const (
	atOnce   = 8 << 10  // bytes of a write
	onItsWay = 16 << 10 // bytes that the client has not acknowledged

	aroundWrite = 128 // bytes that framing may add to a write, at most
)

// followInTurns passes on what the client of a resumed run gets, until the stream
// or the journal ends. The error is the journal's, io.EOF for a clean end of the
// upstream; nil if the stream is over.
func (reader *runReader) followInTurns(ctx context.Context, s *stream) error {
	b, c := &reader.baton, reader.cursor
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.proto == http1 {
		// Over HTTP/2 and HTTP/3 a client has its own flow-control window.
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

// rest leaves the turn to the handlers until there is something that they do not
// write. It returns false if the stream is over.
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

// publishHere makes what was appended to the journal visible to the client. It
// also writes it, on the calling goroutine, if the client has everything before
// and can take more at once. It returns false if it has done neither.
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

// takesAtOnceLocked reports whether a write to the client would not block. It
// asks the kernel again only if what has been written since the last time may be
// too much. The stream must be locked.
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

// deliverLocked writes what there is, and reports whether that was all. The rest
// is left to the client's own goroutine. The stream must be locked.
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
			return false // the stream may have to end here, when the lock is released
		}
	}
}
