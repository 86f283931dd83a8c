package caddysse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// If a client comes back to a shared run with an id of the upstream's that is not
// in the journal, it gets an upstream stream of its own that starts after that
// id. When this stream reaches an id that the run has sent too, the client
// continues with the run's journal.
const (
	// catchUpAfter is how long the client waits for its id to appear in the
	// journal.
	catchUpAfter = time.Second

	// catchUpWithin is how long it waits for an upstream stream: at most
	// maxCatchUps of a run are in progress at a time.
	catchUpWithin = 10 * time.Second
	maxCatchUps   = 8

	// catchUpLook is how often a client that has received all of its own stream
	// checks whether the run has come to the same place.
	catchUpLook = 100 * time.Millisecond
)

// catchUps are those of a run, by the ids after which they start. The run's lock
// guards them.
type catchUps struct {
	byID map[string]*catchUp
	free chan struct{} // closed when one is over
}

// catchUp is an upstream stream for the clients that come back with one id.
type catchUp struct {
	run      *run
	id       string
	feed     *feed
	cancel   context.CancelCauseFunc
	answered chan struct{} // closed when it is known whether it is a stream
	isStream bool
	clients  int // the run's lock
	end      runEnd
	ended    chan struct{}
}

// enterCatchUp adds a client to the stream that starts after an id, and starts
// that stream if there is none. If there are too many, it returns nil and a
// channel that is closed when that changes.
func (r *run) enterCatchUp(id string) (*catchUp, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.catchUps
	if c.free == nil {
		c.free = make(chan struct{})
		c.byID = make(map[string]*catchUp)
	}
	up := c.byID[id]
	if up == nil {
		if len(c.byID) >= maxCatchUps || r.stage >= runEnding {
			return nil, c.free
		}
		sh := r.h.sharing
		f := openFeed(sh.budget, journal.KeepNewest, sh.history, id, nil)
		if f == nil {
			return nil, c.free
		}
		up = &catchUp{run: r, id: id, feed: f, answered: make(chan struct{}), ended: make(chan struct{})}
		f.foreign = r.feed.foreign
		ctx, cancel := context.WithCancelCause(r.ctx)
		up.cancel, f.stop, f.plain = cancel, ctx.Done(), true
		c.byID[id] = up
		go up.serve(ctx)
	}
	up.clients++
	return up, c.free
}

// leave removes a client. The last one ends the stream.
func (up *catchUp) leave() {
	up.run.mu.Lock()
	defer up.run.mu.Unlock()
	if up.clients--; up.clients > 0 {
		return
	}
	up.cancel(errRunEnded)
	up.forgetLocked()
}

// forgetLocked makes room for another one.
func (up *catchUp) forgetLocked() {
	c := &up.run.catchUps
	if c.byID[up.id] == up {
		delete(c.byID, up.id)
		close(c.free)
		c.free = make(chan struct{})
	}
}

// serve calls the handlers after sse.
func (up *catchUp) serve(ctx context.Context) {
	w := &catchUpResponse{up: up, header: make(http.Header)}
	err := up.run.callSafely(ctx, up.id, w)
	switch {
	case !up.isStream:
		up.end = runEnd{reason: upstreamError, err: errors.New("the upstream's answer to a client that catches up is no stream")}
	case w.failed != nil:
		up.end = runEnd{reason: upstreamError, err: w.failed}
	case err != nil:
		up.end = runEnd{reason: upstreamError, err: err}
	default:
		up.end = runEnd{reason: upstreamClosed}
	}
	w.decide(false)
	close(up.ended)
	if up.end.reason == upstreamClosed {
		up.feed.journal.Close(nil)
	} else {
		up.feed.journal.Close(errRunEnded)
	}
	up.run.mu.Lock()
	up.forgetLocked()
	alone := up.clients == 0
	up.run.mu.Unlock()
	if alone {
		up.feed.journal.Discard()
		return
	}
	// Clients that still read it keep what is there.
	context.AfterFunc(ctx, up.feed.journal.Discard)
}

// catchUpResponse is the ResponseWriter of its handlers.
type catchUpResponse struct {
	up      *catchUp
	header  http.Header
	decided bool
	failed  error
}

func (w *catchUpResponse) asked(*http.Request) {}
func (w *catchUpResponse) yield()              {}

func (w *catchUpResponse) Header() http.Header { return w.header }

func (w *catchUpResponse) WriteHeader(status int) {
	if status >= 200 {
		w.decide(isStream(status, w.header) && !isEncoded(w.header))
	}
}

func (w *catchUpResponse) decide(isStream bool) {
	if w.decided {
		return
	}
	w.decided, w.up.isStream = true, isStream
	close(w.up.answered)
	if !isStream {
		w.up.cancel(errRunEnded)
	}
}

func (w *catchUpResponse) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if !w.up.isStream {
		return 0, errRunEnded
	}
	n, err := w.up.feed.write(p)
	if err != nil {
		w.failed = err
	}
	return n, err
}

// FlushError is what http.ResponseController flushes with.
func (w *catchUpResponse) FlushError() error {
	w.WriteHeader(http.StatusOK)
	return w.failed
}

// catchUp brings a client from an id of the upstream's to the run. It returns
// false if the stream has ended before that, and how it ended.
func (x *exchange) catchUp(reader *runReader, id string) (runEnd, bool) {
	ctx, r := x.rare.feed.ctx, reader.run
	arrives, stop := context.WithTimeout(ctx, catchUpAfter)
	found := reader.awaitID(arrives, id)
	stop()
	if found {
		x.noteFound()
		return runEnd{}, true
	}
	giveUp := time.NewTimer(catchUpWithin - catchUpAfter)
	defer giveUp.Stop()
	for {
		up, free := r.enterCatchUp(id)
		if up != nil {
			end, met, done := x.followCatchUp(ctx, reader, up)
			up.leave()
			if done {
				return end, met
			}
		}
		select {
		case <-free:
		case <-giveUp.C:
			return runEnd{}, x.startUnknown(reader)
		case <-r.ctx.Done():
			return r.outcome(), false
		case <-ctx.Done():
			return runEnd{}, false
		}
		if reader.join(journal.AfterID(id)) {
			x.noteFound()
			return runEnd{}, true
		}
	}
}

// awaitID gives the client its place as soon as its id is in the journal.
func (reader *runReader) awaitID(ctx context.Context, id string) bool {
	for {
		c, ok := reader.run.feed.journal.Join(journal.Live(), nil)
		if !ok {
			return false
		}
		if reader.join(journal.AfterID(id)) {
			c.Leave()
			return true
		}
		select {
		case <-c.Wait():
			c.Leave()
		case <-ctx.Done():
			c.Leave()
			return false
		case <-reader.run.ctx.Done():
			c.Leave()
			return false
		}
	}
}

// noteFound records that the client's id was found.
func (x *exchange) noteFound() {
	s := x.stream
	s.goesOnIn(x.rare.reader.run.feed)
	s.facts.Lock()
	s.fed.resumed = true
	s.facts.Unlock()
	x.h.group.countResume(resumeFound)
}

// startUnknown lets a client start with what comes from now on, after telling it
// that it has lost something.
func (x *exchange) startUnknown(reader *runReader) bool {
	x.h.group.countResume(resumeUnknown)
	x.stream.goesOnIn(reader.run.feed)
	if !reader.join(journal.Live()) {
		return false
	}
	if !x.h.lost.isToldTo(x.kind.eventSource) {
		return true
	}
	g := greeting{
		event: x.h.lost.name,
		data:  lostUnknown,
		id:    reader.run.feed.place(reader.cursor.Begin()),
	}
	return x.stream.greet(g.text()) == nil
}

// followCatchUp passes on what the upstream sends after the client's id, until
// that meets the run. done is false if the client has come too late for the
// beginning of that stream.
func (x *exchange) followCatchUp(ctx context.Context, reader *runReader, up *catchUp) (end runEnd, met, done bool) {
	c, ok := up.feed.journal.Join(journal.AfterID(up.id), func() { reader.endStream(lagged) })
	if !ok {
		return runEnd{}, false, false
	}
	defer c.Leave()
	x.stream.goesOnIn(up.feed)
	look := time.NewTicker(catchUpLook)
	defer look.Stop()
	for {
		p, err := c.Next()
		switch {
		case errors.Is(err, journal.ErrLagged):
			x.stream.end(lagged)
			return runEnd{}, false, true
		case err != nil:
			<-up.ended
			if x.meets(reader, c) {
				return runEnd{}, true, true
			}
			if reader.run.ctx.Err() != nil {
				return reader.run.outcome(), false, true
			}
			if !errors.Is(err, io.EOF) && !errors.Is(err, errRunEnded) {
				return runEnd{reason: upstreamError, err: fmt.Errorf("catching up: %w", err)}, false, true
			}
			return up.end, false, true
		case p != nil:
			if x.stream.passBlocks(c, p, nil) != nil {
				return runEnd{}, false, true
			}
			c.Advance(len(p))
			if x.meets(reader, c) {
				return runEnd{}, true, true
			}
			continue
		}
		select {
		case <-c.Wait():
		case <-look.C:
			if x.meets(reader, c) {
				return runEnd{}, true, true
			}
		case <-ctx.Done():
			return runEnd{}, false, true
		}
	}
}

// meets moves the client to the run if the run has the id at which the client is.
func (x *exchange) meets(reader *runReader, c *journal.Cursor) bool {
	at := c.Place()
	if !at.Exact || !reader.join(journal.AfterID(at.ID)) {
		return false
	}
	x.noteFound()
	return true
}

// Interface guards
var (
	_ runWriter                       = (*catchUpResponse)(nil)
	_ interface{ FlushError() error } = (*catchUpResponse)(nil)
)
