package caddysse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// fed is what a stream knows about the run that feeds it.
type fed struct {
	run string // as it may be shown

	// first is sent with the headers, before anything from the upstream.
	first []byte

	greeting greeting // until the stream is open

	// line replaces frames after the first id that this module adds; nil: no
	// change. Parsers that treat a blank line as an event do so after an id.
	line *frames

	source  feedSource
	tried   int64  // how many tries of the run there were before
	resumed bool   // the client's id was found
	missed  uint64 // events that the client has lost

	// feed is that of the run's journal; nil: the run is on another node. The
	// stream's facts guard it.
	feed *feed

	// For the client of a shared run: its place in the journal, and the id that
	// it had before, from a journal that it has left. Both are guarded by the
	// stream's facts.
	at    journal.Spot
	id    string
	hasID bool
}

// feedSource is what feeds a stream: a run of this process, or a store's copy of
// another node's run.
type feedSource interface {
	outcome() runEnd
	tries() int64          // how often the upstream was asked again
	hasUpstreamsIDs() bool // the upstream's own, so that none are added
	hasNothing() bool      // it has nothing from the upstream, only an error
}

// fedReport is what is reported about it.
type fedReport struct {
	run     string
	resumed bool
	missed  uint64
}

func (f *fed) report() *fedReport {
	return &fedReport{run: f.run, resumed: f.resumed, missed: f.missed}
}

// endedSoftly reports whether an upstream_error is clean to an EventSource.
func (f *fed) endedSoftly() bool { return f != nil && f.source.outcome().soft }

// retries is how many tries of upstream_retry the run has made since the client
// joined. It takes no lock, because its callers hold a lock of the stream.
func (f *fed) retries() int { return int(f.source.tries() - f.tried) }

// sendFirstLocked writes what is sent with the headers.
func (s *stream) sendFirstLocked() error {
	if len(s.fed.first) == 0 {
		return nil
	}
	block := s.splicer.Block(&s.frames.Frames, nil, s.fed.first)
	s.fed.first = nil
	if _, err := s.w.Write(block); err != nil {
		s.failLocked(err)
		return err
	}
	return nil
}

// greet sends what comes before anything from the upstream, on a stream that has
// been open for a while.
func (s *stream) greet(text []byte) error {
	s.mu.Lock()
	defer s.unlock()
	if err := s.errLocked(); err != nil || len(text) == 0 {
		return err
	}
	return s.sendLocked(s.age(), s.splicer.Block(&s.frames.Frames, nil, text), nil)
}

// hasNothing reports whether the run has nothing from the upstream.
func (f *fed) hasNothing() bool { return f != nil && f.source.hasNothing() }

// lastID is the id of the last event that the client of a shared run has been
// sent; ok is false if there was none. The caller must hold the stream's facts.
func (f *fed) lastID() (id string, ok bool) {
	if f == nil || f.feed == nil {
		return "", false
	}
	if id, ok = f.at.ID(); ok {
		return id, true
	}
	if n := min(f.at.Number(), f.feed.numbered.Load()); n > f.at.Since() {
		return runID{token: f.feed.token, n: n}.String(), true
	}
	return f.id, f.hasID
}

// goesOnIn records that the client reads another feed's journal from now on.
func (s *stream) goesOnIn(f *feed) {
	s.facts.Lock()
	defer s.facts.Unlock()
	s.fed.id, s.fed.hasID = s.fed.lastID()
	s.fed.feed, s.fed.at = f, journal.Spot{}
}

// followRun passes on what the reader of a run gets, until the stream or the run
// ends, and returns how the run ended.
func (reader *runReader) followRun(ctx context.Context, s *stream) runEnd {
	var err error
	if reader.run.use == sharedRun {
		err = reader.followShared(ctx)
	} else {
		err = reader.followInTurns(ctx, s)
	}
	switch {
	case err == nil:
		return runEnd{}
	case errors.Is(err, journal.ErrLagged):
		s.end(lagged)
		return runEnd{}
	case errors.Is(err, io.EOF), errors.Is(err, errRunEnded):
		return reader.run.outcome()
	default: // the journal has been discarded
		if end := reader.run.outcome(); end.reason != notEnded {
			return end // to make room, after the client had received all of it
		}
		return runEnd{reason: upstreamError, err: err}
	}
}

// greeting is what a client gets before anything from the upstream: a
// reconnection time, and an event.
type greeting struct {
	eventSource          bool
	retry, upstreamRetry time.Duration // 0: none
	event                string        // its name; empty: none
	id                   string
	data                 string
}

// retryLines appends the reconnection times. Only for an EventSource, a blank
// line follows each: parsers of other clients may treat it as an event.
func (g *greeting) retryLines(dst []byte) []byte {
	for _, d := range [2]time.Duration{g.retry, g.upstreamRetry} {
		if d <= 0 {
			continue
		}
		dst = append(dst, "retry: "...)
		dst = strconv.AppendInt(dst, d.Milliseconds(), 10)
		dst = append(dst, '\n')
		if g.eventSource {
			dst = append(dst, '\n')
		}
	}
	return dst
}

// text is the complete greeting.
func (g *greeting) text() []byte {
	dst := g.retryLines(nil)
	if g.event == "" {
		return dst
	}
	dst = fmt.Appendf(dst, "event: %s\n", g.event)
	if g.data == "" {
		dst = append(dst, "data:\n"...)
	} else {
		dst = fmt.Appendf(dst, "data: %s\n", g.data)
	}
	if g.id != "" {
		dst = fmt.Appendf(dst, "id: %s\n", g.id)
	}
	return append(dst, '\n')
}

// owe makes the client of a stream get the greeting: with the headers, if it has
// an event, else with the first bytes that follow.
func (g *greeting) owe(s *stream) {
	text := g.text()
	if g.event != "" {
		s.fed.first = text
	} else if len(text) > 0 {
		s.splicer.OweLead(text)
	}
}

// oweLost tells a client that its id is unknown, on a stream that gets no ids. It
// resets the client's id, so that the client does not send it again.
func (x *exchange) oweLost(s *stream) {
	if x.h.lost.isToldTo(x.kind.eventSource) {
		s.splicer.OweLead(fmt.Appendf(nil, "event: %s\ndata: %s\nid:\n\n", x.h.lost.name, lostUnknown))
	}
}

// unfeed turns a stream that was started early for a run into one that its
// handlers feed.
func (s *stream) unfeed() {
	s.mu.Lock()
	defer s.unlock()
	s.facts.Lock()
	defer s.facts.Unlock()
	s.fed = nil
}
