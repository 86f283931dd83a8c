package caddysse

import (
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	h3 "github.com/quic-go/quic-go/http3"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// keptRun is the part of a run that only resume needs.
type keptRun struct {
	place    [sha256.Size]byte // hash of who may come back, and where
	client   clientID          // the client for which it counts in the limits
	added    http.Header       // header fields that the upstream has added to those of the site
	replaced http.Header       // header fields of the site that the upstream has replaced
	keeping  *keeping
	mirror   *mirror // nil: there is no store

	// What follows is guarded by the run's lock.
	newest  *runReader    // the client that came last; stay is set when it leaves
	stay    time.Duration // how long the run continues without a client
	told    bool          // a client has been sent an id
	passing bool          // nothing is kept any more
	cut     bool          // it has ended for that reason, because its client was away

	// Clients of other nodes.
	remote   map[string]*runReader // by the names that their nodes have given them
	sentAway map[string]reason     // their streams must end, for this reason

	alone *list.Element // its place among the runs without a client; guarded by the group's lock
}

// clientID is the client for which the run counts while it has no client; zero if
// it counts for none.
func (r *run) clientID() clientID {
	if r.kept == nil {
		return clientID{}
	}
	return r.kept.client
}

// keeping is for a request whose stream may outlive its client. The stream begins
// like any other, and becomes a run's with its final header.
type keeping struct {
	x    *exchange
	site http.Header // the headers before the handlers answered

	// ctx is the context of the attempt. It ends with the client's request, until
	// there is a run.
	ctx    context.Context
	cancel context.CancelCauseFunc
	unlink func() bool

	next     caddyhttp.Handler
	response *keptResponse

	// The request as it arrived, for later attempts; nil: there are none.
	entered *http.Request
	state   *isolation
}

// ask calls the handlers again, for a run whose upstream has broken off.
func (k *keeping) ask(ctx context.Context, lastEventID string, w runWriter) error {
	a := k.x.newAttemptOf(k.entered, ctx, w, k.state.copy())
	a.context.replacer.Set(requestUUID, k.x.rare.id.String())
	if lastEventID != "" {
		a.request.Header[lastEventIDHeader] = []string{lastEventID}
	} else {
		delete(a.request.Header, lastEventIDHeader)
	}
	w.asked(a.request)
	return k.next.ServeHTTP(w, a.request)
}

// beginRun makes a run of the request's stream, which is about to open. If that
// is not possible, the stream continues as without resume.
func (x *exchange) beginRun(status int, header http.Header) {
	k := x.rare.keeping
	k.response.mu.Lock()
	defer k.response.mu.Unlock()
	if k.response.left {
		return // the handlers have just sent their whole answer
	}
	var r *run
	f, release := x.openKept(func() { go r.giveWay() })
	if f == nil {
		return
	}
	r = x.makeKept(f, release, status, header)
	reader := &runReader{run: r}
	reader.join(journal.After(0))
	r.readers[reader] = struct{}{}
	r.joined, r.kept.newest = 1, reader
	r.head(runAnswer{kind: answerStream, status: status, upstream: x.attempt.upstream()})
	x.h.group.addRun(r)
	r.endAfter(x.h.resuming.runFor, maxDuration)

	p := placing{brought: x.rare.brought != ""}
	if x.rare.unknown {
		p.lost = lostUnknown
	}
	greeting := x.greeting(reader, p)
	r.kept.told = greeting.event != ""
	x.rare.reader = reader
	x.rare.fed = x.newFed(r, greeting)
	feed := &x.rare.feed
	feed.ctx, feed.cancel = context.WithCancelCause(x.r.Context())
	x.role = streaming
	k.response.run, k.response.feed, k.response.answered = r, f, !x.startedEarly
}

// openKept opens the feed of the request's run. If there is a store, it is held
// until release is called. f is nil if the stream can't be kept.
func (x *exchange) openKept(evicted func()) (f *feed, release func()) {
	rs := x.h.resuming
	if d := rs.session; d != nil {
		if !d.takesRuns() {
			return nil, nil
		}
		if release = d.hold(x.h.Name); release == nil {
			return nil, nil
		}
	}
	f = openFeed(rs.budget, journal.KeepUnsent, rs.history, x.upstreamsID(), evicted)
	switch {
	case f == nil:
		x.h.notKept()
	case !x.rare.keeping.unlink(): // the client has left
		f.journal.Discard()
		f = nil
	}
	if f == nil && release != nil {
		release()
	}
	return f, release
}

// makeKept makes the request's run.
func (x *exchange) makeKept(f *feed, release func(), status int, header http.Header) *run {
	rs, k := x.h.resuming, x.rare.keeping
	r := x.h.makeRun(resumedRun, f, k.ctx, k.cancel)
	r.kept = &keptRun{place: x.keptPlace(), client: x.clientID(), keeping: k, stay: rs.window}
	r.kept.added, r.kept.replaced = k.difference(header)
	r.host, r.path = printable(x.r.Host, 255), printable(originalPath(x.r), 1024)
	r.attempts, r.cancelAttempt = 1, x.attempt.cancel
	if k.entered != nil {
		r.call = k.ask
	}
	if rs.session != nil {
		r.kept.mirror = rs.session.newMirror(r, r.marshalBegin(status, x.attempt.upstream()), release)
		f.mirror = r.kept.mirror
	}
	f.foreign = func() { x.h.foreignIDs.Store(true) }
	f.unkeep = r.unkeep
	r.stays = r.staysAlone
	r.forget = func() {
		r.h.runTable().drop(r.token())
		r.group().dropDetached(r)
		if r.kept.mirror != nil {
			r.kept.mirror.forget()
		}
	}
	return r
}

// causeNoRoom is the cause in metrics for a stream that is not kept for lack of room.
const causeNoRoom = "journal_full"

// notKept counts a stream that runs without resume because the journals of the
// name are full, and logs a warning at most once a minute.
func (h *Handler) notKept() {
	collector.unprotected.WithLabelValues(h.Name, causeNoRoom).Inc()
	at := time.Now().UnixNano()
	last := h.resuming.warned.Load()
	if at-last < int64(time.Minute) || !h.resuming.warned.CompareAndSwap(last, at) {
		return
	}
	h.logger.Warn("resume: the journals have used up the total of history; new streams end with their clients",
		zap.String("name", h.Name))
}

// isKept reports whether the request's stream has become a run's.
func (x *exchange) isKept() bool { return x.keeps() && x.rare.reader != nil }

// feedStream tells the request's reader which stream is its client's.
func (x *exchange) feedStream() {
	switch {
	case x.rare == nil:
	case x.rare.follower != nil:
		x.rare.follower.feeds(x.stream)
	case x.rare.reader != nil && x.rare.reader.run.kept != nil:
		x.rare.reader.feeds(x.stream)
	}
}

// difference returns what the handlers have changed in the site's headers: the
// values that they have added, and the fields that they have replaced. It leaves
// out fields that belong to one client, one moment or one connection.
func (k *keeping) difference(header http.Header) (added, replaced http.Header) {
	added, replaced = make(http.Header), make(http.Header)
	for field, values := range runsHeader(header) {
		site := k.site[field]
		switch {
		case len(site) == 0 || len(values) < len(site) || !slices.Equal(values[:len(site)], site):
			replaced[field] = slices.Clone(values)
		case len(values) > len(site):
			added[field] = slices.Clone(values[len(site):])
		}
	}
	return added, replaced
}

// runsHeader is the part of an upstream's header that later clients of its run
// also get.
func runsHeader(header http.Header) http.Header {
	header = header.Clone()
	for _, declared := range header["Trailer"] {
		for field := range strings.SplitSeq(declared, ",") {
			header.Del(strings.TrimSpace(field))
		}
	}
	for field := range header {
		if strings.HasPrefix(field, http.TrailerPrefix) {
			delete(header, field)
		}
	}
	for _, field := range notOfRun {
		delete(header, field)
	}
	return header
}

// followKept passes on what the run has for the request's client, until the
// stream or the run is over.
func (x *exchange) followKept(w *relayedResponse) outcome {
	end := x.rare.reader.followRun(x.rare.feed.ctx, x.stream)
	if x.handlersGoOn() {
		return outcome{run: end}
	}
	x.handOut()
	x.takeTrailers(w.header)
	return outcome{left: true, run: end}
}

// handlersGoOn reports whether the handlers continue without the request's
// goroutine.
func (x *exchange) handlersGoOn() bool {
	return x.isKept() && x.rare.keeping.response != nil && !x.rare.keeping.response.haveLeft()
}

// unkeep stops keeping what the upstream sends: from now on the stream is as
// without resume, and its client can't come back. It returns false if there is no
// client.
func (r *run) unkeep() bool {
	r.mu.Lock()
	// Clients of other nodes only get what the store has.
	attached := len(r.readers) > len(r.kept.remote)
	if attached {
		r.kept.passing = true
		r.feed.journal.Pass()
	}
	r.kept.cut = !attached
	r.mu.Unlock()
	if attached {
		r.forget()
	}
	return attached
}

// staysAlone is how long the run continues without a client. It must be called
// with the run's lock held.
func (r *run) staysAlone() time.Duration {
	k := r.kept
	switch {
	case r.why != notEnded, k.passing, !k.told, exit.exiting(), !r.group().resumes():
		return 0
	case r.stage >= runEnded:
		return r.h.resuming.window
	case !k.keeping.bodyIsRead():
		return 0
	}
	return k.stay
}

// bodyIsRead reports whether the handlers have read the request's body: what they
// have not read is lost with the client's connection. A GET over HTTP/2 or HTTP/3
// does not always say that it has no body.
func (k *keeping) bodyIsRead() bool {
	u := k.x.rare.upload
	if u == nil || u.read.Load() {
		return true
	}
	return k.x.r.Method == http.MethodGet && k.x.r.ProtoMajor > 1 && k.x.r.ContentLength < 0 && !u.found.Load()
}

// lacksBody reports whether the request turned out to have no body.
func (k *keeping) lacksBody() bool {
	u := k.x.rare.upload
	return u == nil || !u.found.Load()
}

// leaveRun removes the request's client from its run, after its stream has been
// reported.
func (x *exchange) leaveRun() {
	if x.rare != nil && x.rare.follower != nil {
		x.leaveElsewhere()
	}
	if x.rare == nil || x.rare.reader == nil {
		return
	}
	if x.rare.reader.run.kept != nil {
		x.leaveKept()
	}
	x.rare.reader.leave()
}

// leaveKept decides what happens to the run when its client leaves.
func (x *exchange) leaveKept() {
	reader := x.rare.reader
	r := reader.run
	why, stay := x.whyLeft()
	switch why {
	case endedByAdmin, serverClosed:
		r.stop(why)
	case upstreamTimeout: // of an upstream that has not answered an early start
		r.finish(runEnd{reason: upstreamTimeout})
	}
	sent := reader.cursor.Place().Number > 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kept.told = r.kept.told || sent
	if r.kept.newest == reader {
		r.kept.stay = stay
	}
}

// whyLeft returns why the request's stream has ended, if there was one, and how
// long its run should then continue without a client.
func (x *exchange) whyLeft() (why reason, stay time.Duration) {
	if x.stream != nil {
		if told := x.stream.final(); told != nil {
			why = told.end.reason
		}
	}
	stay = x.h.resuming.window
	switch why {
	case notEnded:
		stay = 0
	case clientClosed:
		cancel := x.h.resuming.cancel
		if cancel != stay && x.r.Context().Err() != nil && x.hasCancelled() {
			stay = cancel
		}
	}
	return why, stay
}

// hasCancelled reports whether a client that has left has cancelled its stream,
// while its connection is still open. Over HTTP/1.1 there is no way to know.
func (x *exchange) hasCancelled() bool {
	switch x.stream.proto {
	case http2:
		// The stream closes slightly after the request's context is done.
		for wait := time.Millisecond; wait < 100*time.Millisecond; wait *= 2 {
			if err := connectionWriter(x.w).Flush(); err != nil {
				return !strings.Contains(err.Error(), "client disconnected")
			}
			time.Sleep(wait)
		}
	case http3:
		_, err := innermost(x.w).Write([]byte("\n")) // no one reads it
		if stream, ok := errors.AsType[*quic.StreamError](err); ok {
			return stream.Remote
		}
		if reset, ok := errors.AsType[*h3.Error](err); ok {
			return reset.Remote && reset.ErrorCode == h3.ErrCodeRequestCanceled
		}
	}
	return false
}
