package caddysse

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// mayBeKept reports whether resume may apply to requests of this kind. All others
// go to the upstream unchanged, except that an id of this module is removed.
// OPTIONS is one of them: the preflight of a page of another origin has the query
// of the request that follows it, and thus may have an id (Fetch, section 4.8).
func (x *exchange) mayBeKept() bool {
	return x.h.resuming != nil && x.r.Method != http.MethodOptions && !isMCP(x.r.Header) && !asksForUpgrade(x.r.Header)
}

// mayComeBack reports whether the client may have come back to its stream.
func (x *exchange) mayComeBack() bool { return x.mayBeKept() && x.broughtOurs() }

// keep prepares a request whose stream may outlive its client's connection. It
// returns whether this is such a request.
func (x *exchange) keep(next caddyhttp.Handler) bool {
	if !x.mayBeKept() || !x.h.resuming.any && !x.kind.resumable {
		return false
	}
	if quirkOf(x.r.Header) == noFrames {
		// The client fails on an id as it does on a comment, so it never comes
		// back.
		return false
	}
	k := &keeping{x: x, site: x.w.Header().Clone()}
	k.ctx, k.cancel = context.WithCancelCause(context.WithoutCancel(x.r.Context()))
	k.unlink = context.AfterFunc(x.r.Context(), func() { k.cancel(context.Cause(x.r.Context())) })
	k.next = next
	if x.h.UpstreamRetry.window() > 0 && x.kind.resumable && mayLackBody(x.r) {
		k.entered, k.state = withoutBody(x.r), newIsolation(x.r)
	}
	x.rarely().keeping = k
	return true
}

// keeps reports whether the request's stream may outlive the client's connection.
func (x *exchange) keeps() bool { return x.rare != nil && x.rare.keeping != nil }

// keptPlace is a hash of everything that must be the same when a client comes
// back: the name, the requested host and path, and the values of bind.
func (x *exchange) keptPlace() [sha256.Size]byte {
	var b []byte
	add := func(text string) {
		b = binary.AppendUvarint(b, uint64(len(text)))
		b = append(b, text...)
	}
	add(x.h.Name)
	add(x.r.Host)
	add(originalPath(x.r))
	for _, name := range x.h.resuming.bind {
		var value string
		if x.replacer != nil {
			value, _ = x.replacer.GetString(name)
		}
		add(value)
	}
	return sha256.Sum256(b)
}

// originalPath is the path that the client requested.
func originalPath(r *http.Request) string {
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		return original.URL.EscapedPath()
	}
	return r.URL.EscapedPath()
}

// findKept finds the run to which the client's id belongs. The time it takes and
// the result are the same for an unknown id and for someone else's.
func (x *exchange) findKept() (r *run, n uint64) {
	id, ok := parseRunID(x.rare.brought)
	if !ok {
		return nil, 0
	}
	place := x.keptPlace()
	var its [sha256.Size]byte
	found, known := x.h.runTable().get(id.token)
	if known && found.kept != nil {
		its = found.kept.place
	}
	if subtle.ConstantTimeCompare(place[:], its[:]) == 0 {
		return nil, 0
	}
	return found, id.n
}

// comeBack answers a client that has come back with an id of this module. done is
// false if the request continues as a new one.
func (x *exchange) comeBack() (out outcome, done bool) {
	r, n := x.findKept()
	if r == nil && x.h.resuming.session != nil {
		if out, answer := x.comeBackElsewhere(); answer != notElsewhere {
			return out, answer == answeredElsewhere
		}
	}
	if x.r.Method == http.MethodDelete {
		return outcome{left: true, err: x.stopKept(r, n)}, true
	}
	if r != nil && x.kind.eventSource && r.hasNothingAfter(n) {
		if !r.isCut() {
			// It has everything, and comes back for more. The run stays: the
			// connection may break again before the client has another id.
			return outcome{}, false
		}
		r = nil // it has everything that was kept, and must be told that there was more
	}
	if r != nil {
		if reader := (&runReader{run: r}); r.enterAt(n, reader) {
			return outcome{left: true, run: x.goOn(reader)}, true
		}
	}
	if x.r.Method != http.MethodGet {
		x.h.group.countResume(resumeRefused)
		x.answerLost()
		return outcome{left: true}, true
	}
	x.h.group.countResume(resumeUnknown)
	x.rare.unknown = true
	return outcome{}, false
}

// hasNothingAfter reports whether the run has ended with event n.
func (r *run) hasNothingAfter(n uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stage >= runEnded && r.feed.journal.Figures().Events == n
}

// isCut reports whether the run ended because nothing more could be kept for its
// client, which was away.
func (r *run) isCut() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.kept.cut
}

// stopKept ends a run on its client's request.
func (x *exchange) stopKept(r *run, n uint64) error {
	if r == nil || n > r.feed.journal.Figures().Events || !r.stop(clientClosed) {
		return caddyhttp.Error(http.StatusNotFound, errors.New("sse: no stream of this host and path has the id"))
	}
	x.role = answered
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

// goOn makes a stream of a run to which the client has come back, beginning at
// its place.
func (x *exchange) goOn(reader *runReader) runEnd {
	r := reader.run
	p := placing{brought: true, found: true, missed: reader.cursor.Missed()}
	if p.missed > 0 {
		p.lost = fmt.Sprintf(lostHistory, p.missed)
	}
	x.h.group.countPlace(p)
	x.rare.reader = reader
	x.rare.fed = x.newFed(r, x.greeting(reader, p))
	x.rare.fed.resumed, x.rare.fed.missed = true, p.missed
	feed := &x.rare.feed
	feed.ctx, feed.cancel = context.WithCancelCause(x.r.Context())
	x.takeDifference(r.kept.added, r.kept.replaced)
	x.open(r.answer.status)
	return reader.followRun(feed.ctx, x.stream)
}

// takeDifference makes the changes in the site's headers that the run's handlers
// have made.
func (x *exchange) takeDifference(added, replaced http.Header) {
	header := x.w.Header()
	for field, values := range replaced {
		header[field] = slices.Clone(values)
	}
	for field, values := range added {
		// Outer handlers edit values in place.
		header[field] = slices.Concat(header[field], values)
	}
}

// The type and the message of the error for a client whose stream is gone.
const (
	streamLost        = "stream_lost"
	streamLostMessage = "the stream is over, and what it had for its client is gone; ask again without Last-Event-ID"
)

// answerLost answers a request that must not go to the upstream again, because an
// answer must not be paid for twice. A client that repeats its request after
// every error uses its last id, and stops if that is empty.
func (x *exchange) answerLost() {
	x.role = answered
	header := x.w.Header()
	if !x.accept.eventStream {
		header["Content-Type"] = []string{"application/json"}
		header["Cache-Control"] = []string{"no-store"}
		x.w.WriteHeader(http.StatusGone)
		// A client that has left needs no answer.
		_, _ = fmt.Fprintf(x.w, "%s\n", errorData(http.StatusGone, streamLost, streamLostMessage))
		return
	}
	header["Content-Type"] = []string{eventStreamType}
	x.h.headers.apply(header)
	x.w.WriteHeader(http.StatusOK)
	_, _ = fmt.Fprintf(x.w, "id:\n%s", errorEvent(http.StatusGone, streamLost, streamLostMessage))
	_ = http.NewResponseController(x.w).Flush()
}

// enterAt adds a client that has come back at its place, and ends the streams of
// clients that are still connected. It returns false if there is no such place.
func (r *run) enterAt(n uint64, reader *runReader) bool {
	r.mu.Lock()
	if r.stage == runEnding || r.stage == runGone || !reader.join(journal.After(n)) {
		r.mu.Unlock()
		return false
	}
	before := r.readersLocked()
	r.addReaderLocked(reader)
	r.group().dropDetached(r)
	r.kept.newest, r.kept.told = reader, true
	if reader.remote != nil {
		if r.kept.remote == nil {
			r.kept.remote = make(map[string]*runReader)
		}
		r.kept.remote[reader.remote.id] = reader
	}
	r.mu.Unlock()
	for _, other := range before {
		other.endStream(takenOver)
	}
	return true
}
