package caddysse

import (
	"sync"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// runReader is one client of a run, from when it begins to wait for the answer.
type runReader struct {
	baton  baton           // of a resumedRun
	cursor *journal.Cursor // nil until it has a place

	run    *run
	remote *remoteReader // nil: it is a client of this node

	mu     sync.Mutex
	stream *stream
	why    reason // of an early end that was requested before there was a stream
	left   bool
}

// enter adds a client. It returns nil if the run takes no more clients.
func (r *run) enter() *runReader {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stage >= runEnding {
		return nil
	}
	reader := &runReader{run: r}
	if r.answer.kind == answerPending {
		// A client that waits for the answer gets everything after it.
		reader.join(journal.Live())
	}
	r.addReaderLocked(reader)
	return reader
}

func (r *run) addReaderLocked(reader *runReader) {
	r.readers[reader] = struct{}{}
	r.joined++
	if r.idle != nil {
		r.idle.Stop()
	}
	r.group().dropIdle(r)
}

// turnAway removes a reader that does not become a client of the run.
func (reader *runReader) turnAway() {
	reader.run.mu.Lock()
	reader.run.joined--
	reader.run.mu.Unlock()
	reader.leave()
}

// leave removes the client from the run.
func (reader *runReader) leave() {
	r := reader.run
	reader.mu.Lock()
	left, cursor := reader.left, reader.cursor
	reader.left = true
	reader.mu.Unlock()
	if left {
		return
	}
	if cursor != nil {
		cursor.Leave()
	}
	r.mu.Lock()
	delete(r.readers, reader)
	last := len(r.readers) == 0
	if last {
		r.alone = now()
	}
	r.mu.Unlock()
	if last {
		r.restIfAlone()
	}
}

// join gives the client a place in the journal, which replaces its present one.
func (reader *runReader) join(at journal.Start) bool {
	c, ok := reader.run.feed.journal.Join(at, func() { reader.endStream(lagged) })
	if !ok {
		return false
	}
	if reader.cursor != nil {
		reader.cursor.Leave()
	}
	reader.cursor = c
	return true
}

// leaveJournal gives up the client's place: a client that does not read it would
// fall behind.
func (reader *runReader) leaveJournal() {
	if reader.cursor != nil {
		reader.cursor.Leave()
		reader.cursor = nil
	}
}

// feeds tells the reader which stream is its client's.
func (reader *runReader) feeds(s *stream) {
	reader.mu.Lock()
	reader.stream = s
	why := reader.why
	reader.mu.Unlock()
	if why != notEnded {
		s.end(why)
	}
}

// endStream ends the client's stream at an event boundary, and never waits for
// the client.
func (reader *runReader) endStream(why reason) {
	if reader.remote != nil {
		reader.run.sendAway(reader, why)
		return
	}
	reader.mu.Lock()
	s := reader.stream
	if reader.why == notEnded {
		reader.why = why
	}
	reader.mu.Unlock()
	if s != nil {
		s.end(why)
	}
}
