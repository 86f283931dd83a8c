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

// keptRun is what a run has whose client may come back.
type keptRun struct {
	place    [sha256.Size]byte // of whom it is, and where
	client   clientID          // that it counts for
	added    http.Header       // what the upstream has added to the site's headers
	replaced http.Header       // and put in place of them
	keeping  *keeping
	mirror   *mirror // nil: no other node knows of it

	// What follows is guarded by the run's lock.
	newest  *runReader    // whose leaving counts
	stay    time.Duration // how long the run goes on without a client
	told    bool          // a client has been sent an id
	passing bool          // nothing is kept any more
	cut     bool          // so it has ended, as its client was away

	// Of clients of other nodes.
	distant  map[string]*runReader // by what those call them
	sentAway map[string]reason     // they are to end, for this reason

	alone *list.Element // its place among those without a client; the group's lock
}

// clientID is the client that the run counts for while nobody is there; it is
// not known where it counts for none.
func (r *run) clientID() clientID {
	if r.kept == nil {
		return clientID{}
	}
	return r.kept.client
}

// keeping is what is known of a request whose stream may outlive its client: it
// begins as any other, and at the final header of a stream it becomes a run's.
type keeping struct {
	x    *exchange
	site http.Header // what was there before the handlers answered

	// ctx is the context of the attempt. It ends with the client's request until
	// there is a run.
	ctx    context.Context
	cancel context.CancelCauseFunc
	unlink func() bool

	next     caddyhttp.Handler
	response *keptResponse

	// The request as it came, for later attempts; nil: there are none.
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

// beginRun makes a run of the request's stream, which is about to open. Where it
// can't, the stream is one as without resume.
func (x *exchange) beginRun(status int, header http.Header) {
	rs, k := x.h.resuming, x.rare.keeping
	k.response.mu.Lock()
	defer k.response.mu.Unlock()
	if k.response.left {
		return // they have just said all that they have to say
	}
	var release func() // of the store
	if d := rs.depot; d != nil {
		if !d.takesRuns() {
			return
		}
		if release = d.hold(x.h.Name); release == nil {
			return
		}
	}
	var r *run
	f := openFeed(rs.budget, journal.KeepUnsent, rs.history, x.upstreamsID(), func() { go r.giveWay() })
	switch {
	case f == nil:
		x.h.notKept()
	case !k.unlink(): // the client has left
		f.journal.Discard()
		f = nil
	}
	if f == nil {
		if release != nil {
			release()
		}
		return
	}
	r = x.h.makeRun(resumedRun, f, k.ctx, k.cancel)
	r.kept = &keptRun{place: x.keptPlace(), client: x.clientID(), keeping: k, stay: rs.window}
	r.kept.added, r.kept.replaced = k.difference(header)
	r.host, r.path = printable(x.r.Host, 255), printable(originalPath(x.r), 1024)
	r.attempts, r.cancelAttempt = 1, x.attempt.cancel
	if k.entered != nil {
		r.call = k.ask
	}
	if rs.depot != nil {
		r.kept.mirror = rs.depot.newMirror(r, r.marshalBegin(status, x.attempt.upstream()), release)
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
	reader := &runReader{run: r}
	reader.join(journal.After(0))
	r.readers[reader] = struct{}{}
	r.joined, r.kept.newest = 1, reader
	r.head(runAnswer{kind: answerStream, status: status, upstream: x.attempt.upstream()})
	x.h.group.addRun(r)
	r.endAfter(rs.runFor, maxDuration)

	p := placing{brought: x.rare.brought != "", lost: ""}
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

// causeNoRoom is why a stream can't be kept.
const causeNoRoom = "journal_full"

// notKept counts a stream that is as without resume, because the journals of the
// name are full, and warns of it at most once a minute.
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

// feedStream says which stream is that of the request's reader.
func (x *exchange) feedStream() {
	switch {
	case x.rare == nil:
	case x.rare.follower != nil:
		x.rare.follower.feeds(x.stream)
	case x.rare.reader != nil && x.rare.reader.run.kept != nil:
		x.rare.reader.feeds(x.stream)
	}
}

// difference tells what handlers have made of the site's headers: what they have
// added, and what they have put in its place. What belongs to one client, to one
// moment or to one connection is left out.
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

// runsHeader is what clients get of an upstream's header that come to its run
// later.
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

// followKept passes on what the run has for the request's client, until one of
// them is through.
func (x *exchange) followKept(w *relayedResponse) outcome {
	end := x.rare.reader.followRun(x.rare.feed.ctx, x.stream)
	if x.handlersGoOn() {
		return outcome{run: end}
	}
	x.handOut()
	x.takeTrailers(w.header)
	return outcome{left: true, run: end}
}

// handlersGoOn reports whether the handlers go on without the request's
// goroutine.
func (x *exchange) handlersGoOn() bool {
	return x.isKept() && x.rare.keeping.response != nil && !x.rare.keeping.response.haveLeft()
}

// unkeep stops keeping what the upstream sends: from now on the stream is as
// without resume, and nobody comes back to it. It returns false where no client
// is there.
func (r *run) unkeep() bool {
	r.mu.Lock()
	attached := len(r.readers) > len(r.kept.distant) // who reads elsewhere gets what the store has
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

// staysAlone is how long the run stays without a client. It is called with the
// run's lock held.
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

// bodyIsRead reports whether the handlers have read the request's body, which is
// gone when the client's connection is. A GET over HTTP/2 or HTTP/3 does not
// always tell that it has none.
func (k *keeping) bodyIsRead() bool {
	u := k.x.rare.upload
	if u == nil || u.read.Load() {
		return true
	}
	return k.x.r.Method == http.MethodGet && k.x.r.ProtoMajor > 1 && k.x.r.ContentLength < 0 && !u.found.Load()
}

// lacksBody reports whether the request has turned out to have no body.
func (k *keeping) lacksBody() bool {
	u := k.x.rare.upload
	return u == nil || !u.found.Load()
}

// leaveRun takes the request's client off its run, once its stream has been
// accounted for.
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

// leaveKept decides what becomes of the run when its client leaves.
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

// whyLeft tells why the request's stream has ended, if there was one, and how long
// its run should go on without a client then.
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

// hasCancelled reports whether the client that has left has cancelled its stream
// while its connection lives. Over HTTP/1.1 nobody can tell.
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
		_, err := innermost(x.w).Write([]byte("\n")) // which nobody reads
		if stream, ok := errors.AsType[*quic.StreamError](err); ok {
			return stream.Remote
		}
		if reset, ok := errors.AsType[*h3.Error](err); ok {
			return reset.Remote && reset.ErrorCode == h3.ErrCodeRequestCanceled
		}
	}
	return false
}
