package caddysse

import (
	"errors"
	"net/http"
	"os"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// slowWrite is how long a write may take before it counts that the upstream can't
// send anything in that time.
const slowWrite = 100 * time.Millisecond

// write passes on what the upstream sent, and flushes it. It can take bytes
// without passing them on only if a frame or a retry field comes before the
// upstream's first bytes: the bytes of a BOM, which must not follow anything, or
// an LF that the client already has.
func (s *stream) write(p []byte) (int, error) {
	if _, err := s.pass(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pass is write, and returns how much of p the stream has used: less than all if
// it ends early.
func (s *stream) pass(p []byte) (int, error) {
	s.mu.Lock()
	defer s.unlock()
	return s.passOnLocked(p)
}

// passOnLocked is pass for callers that have locked the stream.
func (s *stream) passOnLocked(p []byte) (int, error) {
	if s.at() == stageRetrying {
		return 0, errStreamEnded // of an attempt that is over
	}
	if err := s.errLocked(); err != nil || len(p) == 0 {
		return 0, err
	}
	events, ends := s.splicer.Scanner().Events(), s.endsSilenceLocked()
	lead, body, n := s.followLocked(p)
	first := events == 0 && s.splicer.Scanner().Events() > 0 && !s.fed.hasNothing()
	if len(lead) == 0 && len(body) == 0 {
		if s.splicer.Overdue() {
			s.beatLocked() // the silence goes on, and a frame is allowed here
		}
		return n, s.errLocked()
	}
	if first {
		// The client may have it, and leave, before the write has returned.
		s.noteFirstEvent(s.lastBytes)
	}
	if err := s.sendBodyLocked(nil, lead, body); err != nil {
		if first {
			s.noteFirstEvent(0)
		}
		return 0, err
	}
	if ends {
		s.wait = s.frames.wait()
	}
	s.isSentLocked(first)
	return n, nil
}

// passBlocks is pass for the next bytes of a shared run's reader: whole blocks,
// which the run has scanned. The client gets all of them or, if its stream ends
// early, none. A worker passes its framing; nil: there is none.
func (s *stream) passBlocks(c *journal.Cursor, p []byte, f *framing) error {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil {
		return err
	}
	ends := s.endsSilenceLocked()
	lead, first, passes := s.followBlocksLocked(c, p)
	if !passes {
		return errStreamEnded
	}
	if err := s.sendBodyLocked(f, lead, p); err != nil {
		if first {
			s.noteFirstEvent(0)
		}
		return err
	}
	if ends {
		s.wait = s.frames.wait()
	}
	s.isSentLocked(first)
	return nil
}

// isSentLocked is called after bytes from the upstream have been written.
func (s *stream) isSentLocked(first bool) {
	if first || s.lastHeard-s.lastBytes > slowWrite {
		s.facts.Lock()
		s.lastBytes = s.lastHeard // the upstream was not read in the meantime
		s.facts.Unlock()
	}
	if first {
		s.noteFirstEvent(s.lastHeard)
		collector.observeFirstEvent(s)
	}
}

// followBlocksLocked records blocks, and returns what goes before them, and
// whether they contain the client's first event. A stream that is to end is at a
// boundary already.
func (s *stream) followBlocksLocked(c *journal.Cursor, p []byte) (lead []byte, first, passes bool) {
	events, invalid, at := c.Coming()
	age := s.age()
	s.facts.Lock()
	defer s.facts.Unlock()
	if s.isEndingLocked() {
		return nil, false, false
	}
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	s.bytes += uint64(len(p))
	s.fed.at = at
	if s.body != eventStreamBody {
		return nil, false, true
	}
	if first = events > 0 && s.splicer.Scanner().Events() == 0; first {
		// The client may have it, and leave, before the write has returned.
		s.firstEvent = age
	}
	lead = s.splicer.PassBlocks(&s.frames.Frames, p, events, invalid)
	if s.fed.line != nil && events > 0 {
		s.addsIDsLocked()
	}
	return lead, first, true
}

// addsIDsLocked is called for the first id that the client gets: from then on,
// the frames are those for streams to which this module adds ids, if it does.
func (s *stream) addsIDsLocked() {
	if !s.fed.source.hasUpstreamsIDs() {
		s.frames = s.fed.line
	}
	s.fed.line = nil
}

func (s *stream) noteFirstEvent(age time.Duration) {
	s.facts.Lock()
	defer s.facts.Unlock()
	s.firstEvent = age
}

// followLocked scans what the upstream sent, and returns what the client gets for
// it, and for how much of it.
func (s *stream) followLocked(p []byte) (lead, body []byte, n int) {
	age := s.age()
	s.facts.Lock()
	defer s.facts.Unlock()
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	n = len(p)
	switch {
	case s.body == encodedBody:
		body = p
	case s.isEndingLocked():
		done := false
		if lead, body, n, done = s.splicer.SpliceToEnd(&s.frames.Frames, p); done {
			s.hurryLocked()
		}
	default:
		lead, body = s.splicer.Splice(&s.frames.Frames, p)
	}
	s.bytes += uint64(n)
	if s.splicer.HasOwnIDs() && s.fed != nil && s.fed.line != nil {
		s.addsIDsLocked()
	}
	if s.body == eventStreamBody && s.splicer.Opaque() {
		if s.refuseLocked() {
			return nil, nil, n
		}
		s.body = otherBody
		s.h.unprotected(causeOtherBody)
	}
	return lead, body, n
}

// flush sends what a handler may have left in a buffer on the way. Every write
// has been flushed already, so there is nothing to do, and each write stays one
// flush.
func (s *stream) flush() error {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil {
		return err
	}
	if !s.unflushed {
		return nil
	}
	s.moves(s.age())
	defer s.rests()
	return s.flushLocked()
}

func (s *stream) errLocked() error {
	if s.isCut() || s.gone || s.failed != notEnded {
		return errStreamEnded
	}
	return nil
}

// failLocked records that the client can't be written to any more.
func (s *stream) failLocked(err error) {
	s.failed = clientClosed
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.failed = writeTimeout
	}
}

// sendLocked writes and flushes. since is the age at which the bytes were ready
// to be written.
func (s *stream) sendLocked(since time.Duration, lead, body []byte) error {
	if err := s.passLocked(since, lead, body); err != nil {
		return err
	}
	s.lastHeard = s.age()
	return nil
}

// endsSilenceLocked reports whether the next bytes end a silence of unusual
// length: the prelude, or one in which a frame was due where none is allowed.
func (s *stream) endsSilenceLocked() bool {
	return s.wait > 0 && (!s.splicer.Spoken() || s.splicer.Overdue())
}

// passLocked writes in pieces, so that a slow client is not mistaken for one that
// takes nothing.
func (s *stream) passLocked(since time.Duration, lead, body []byte) error {
	defer s.rests() // also after a panic
	for _, part := range [2][]byte{lead, body} {
		for len(part) > 0 {
			s.moves(since)
			piece := part[:min(len(part), progressUnit)]
			s.unflushed = true
			if _, err := s.w.Write(piece); err != nil {
				s.failLocked(err)
				return err
			}
			if part = part[len(piece):]; len(part) > 0 {
				since = s.age()
			}
		}
	}
	return s.flushLocked()
}

func (s *stream) flushLocked() error {
	if !s.unflushed {
		return nil
	}
	s.unflushed = false
	err := http.NewResponseController(s.w).Flush()
	if err == nil || errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	s.failLocked(err)
	return err
}
