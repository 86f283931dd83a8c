package caddysse

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// exchange is one request on its way through sse: what is known of it before it
// is answered, what the answer turns out to be, and the stream if it is one. It
// belongs to the request's goroutine.
type exchange struct {
	// The fields that a write uses come first.
	response response // what the attempt's handlers answer to
	stream   *stream
	role     role

	headed       bool // an answer that is not a stream has got its final header
	startedEarly bool
	kind         kind
	accept       accept

	h       *Handler
	w       http.ResponseWriter
	r       *http.Request // the client's; handlers after sse get another one
	arrived instant

	replacer *caddy.Replacer // the client's
	outer    caddy.Replacer  // the same, but does not ask the attempt's Replacer
	attempt  *attempt
	shown    atomic.Pointer[attempt] // whose placeholders handlers before sse see
	told     *report                 // of the stream, when it has ended

	ip     string  // the client's IP when the request arrived
	frames *frames // which frames its client can take
	place  *place  // nil: none has been taken

	rare *rare // nil for most
}

// rare is what few requests need.
type rare struct {
	uploads    *uploads    // between the body of the request and the connection
	upload     *upload     // knows whether the body has been read
	siteHeader http.Header // what was set before the upstream was called
	refusal    error       // why a stream was refused
	id         uuid.UUID   // the request's, if it had to be known before the stream
	idle       *caddyhttp.IdleTimeoutWriter
	lent       caddyhttp.IdleDeadline // what idle and the server's writer had in common last
	relay      *relay
	abandon    chan struct{}
	tries      *tries  // nil: no upstream_retry
	key        keyHash // the client's, for the limit; zero: its address counts

	given    *http.Request // without our ids, for the handlers after sse
	brought  string        // the id that the client brought
	taken    bool          // it is one of ours, and has been removed
	unknown  bool          // it belongs to no known run
	share    *shareRequest
	reader   *runReader
	follower *follower // of another node's run
	feed     feedContext
	keeping  *keeping // nil: the stream ends with its client
	fed      *fed
}

// role is what the answer to a request has turned out to be.
type role uint8

const (
	undecided role = iota // no final header yet
	aside                 // not a stream
	streaming             // a stream
	answered              // an error that was answered with a reconnection time
	refused               // a stream that exceeds a limit
)

// newExchange reads what is only safe to read before the handlers are called.
func (h *Handler) newExchange(w http.ResponseWriter, r *http.Request, arrived instant) *exchange {
	x := &exchange{h: h, w: w, r: r, arrived: arrived, accept: acceptOf(r.Header), ip: clientIP(r)}
	x.response.x = x
	if mayStream(r) {
		x.kind = kindOf(r, x.accept, h.Resumable)
	} else {
		x.role = aside
	}
	x.frames = h.framesFor(r.Header)
	if h.sharing != nil || h.resuming != nil {
		x.takeID()
	}
	x.replacer, _ = r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if x.replacer != nil {
		x.outer = *x.replacer
		if h.ClientKey != "" {
			x.rememberKey(x.replacer.ReplaceAll(h.ClientKey, ""))
		}
		// Map takes no lock. A dial that an earlier proxy of this request gave up
		// (forward_auth, with a placeholder in tls_server_name) may look up a
		// placeholder at this moment. Caddy's own handlers (map) have the same
		// problem: only the Replacer could have a lock for it, and there is no other
		// way to let handlers before sse see what those after it set.
		x.replacer.Map(x.placeholder)
	}
	return x
}

// beginExchange is newExchange, and joins the run that the request shares, if
// there is one.
func (h *Handler) beginExchange(w http.ResponseWriter, r *http.Request, arrived instant) *exchange {
	if h.sharing == nil {
		return h.newExchange(w, r, arrived)
	}
	var x *exchange
	onOwnStack(func() {
		if x = h.newExchange(w, r, arrived); x.mayShare() {
			x.findRun()
		}
	})
	return x
}

// rarely returns the rare part and makes it where there is none.
func (x *exchange) rarely() *rare {
	if x.rare == nil {
		x.rare = new(rare)
	}
	return x.rare
}

// ServeHTTP calls next and handles the answer if it is a stream.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) (err error) {
	arrived := now()
	if outer, ok := r.Context().Value(exchangeKey{}).(*exchange); ok {
		h.warnNested(outer.h)
		if !outer.standAside() {
			return next.ServeHTTP(w, r)
		}
	}
	if outer, ok := r.Context().Value(runKey{}).(runWriter); ok {
		outer.yield()
		return errRunEnded // each client asks the upstream itself
	}
	h.drain.enter()
	defer h.drain.leave()

	x := h.beginExchange(w, r, arrived)
	out := outcome{left: true}
	defer func() {
		if x.role > aside || x.stream != nil {
			if panicked := recover(); panicked != nil {
				out.panicked = panicked
			}
		}
		defer x.leaveRun() // when it is known how its stream ended
		err = x.leave(out)
	}()
	if x.role == aside {
		// Never a stream: the handlers get the client's own writer.
		x.attempt = x.newAttempt(nil)
		out.err = next.ServeHTTP(w, x.attempt.request)
		return nil
	}
	if x.mayComeBack() {
		var back bool
		if out, back = x.comeBack(); back {
			return nil
		}
	}
	if out.err = x.enter(); out.err != nil {
		x.turnAway()
		return nil
	}
	if x.joinRun(next) {
		var shared bool
		if out, shared = x.callShared(); shared {
			return nil
		}
	}
	if x.keep(next) {
		out = x.callRelayed(next)
		return nil
	}
	if x.prepareTries() {
		out = x.callAgain(next)
		return nil
	}
	if x.mayStartEarly() || x.startedEarly {
		out = x.callRelayed(next)
		return nil
	}
	x.attempt = x.newAttempt(nil)
	out.err = next.ServeHTTP(&x.response, x.attempt.request)
	return nil
}

// enter does what comes before the upstream is called.
func (x *exchange) enter() error {
	if uploads := newUploads(x.r); uploads != nil {
		x.rarely().uploads = uploads
	}
	switch {
	case x.h.limits == limits{}:
	case x.kind.resumable:
		return x.takePlace()
	default:
		// By the time the answer can be refused, the upstream has set its headers.
		x.rarely().siteHeader = x.w.Header().Clone()
	}
	return nil
}

// standAside leaves the answer to an inner sse handler, unless there is a stream
// already.
func (x *exchange) standAside() (done bool) {
	yield := func() {
		if done = x.stream == nil; done {
			x.role = aside
			x.givePlaceBack()
		}
	}
	if x.relayed() {
		x.rare.relay.do(yield)
	} else {
		yield()
	}
	return done
}

// decide finds out at the final header what the answer is.
func (x *exchange) decide(status int, header http.Header) {
	x.handOut()
	if x.stream != nil {
		x.role = streaming
		if x.triesAgain() {
			x.answeredAgain(status, header)
			return
		}
		x.stream.answered(status, header, x.attempt.upstream())
		return
	}
	switch {
	case x.wantsReconnect(status):
		x.takeHeader(header)
		x.role = answered
		x.givePlaceBack()
		x.answerReconnect(status)
	case !isStream(status, header):
		x.role = aside
		x.givePlaceBack()
		x.lendIdleTimeouts()
	case x.h.limits != limits{} && x.place == nil:
		x.takeHeader(header)
		if err := x.takePlace(); err != nil {
			x.role, x.rarely().refusal = refused, err
			x.attempt.cancel(errStreamEnded)
			return
		}
		x.open(status)
	default:
		x.takeHeader(header)
		x.open(status)
	}
}

// takeHeader copies the handlers' headers into the client's header map, if they
// have a map of their own.
func (x *exchange) takeHeader(header http.Header) {
	if x.relayed() {
		replaceHeader(x.w.Header(), header)
	}
}

// open makes the answer a stream.
func (x *exchange) open(status int) {
	x.role = streaming
	header := x.w.Header()
	encoded := isEncoded(header)
	if x.keeps() && !encoded {
		x.beginRun(status, header)
	}
	x.stream = x.newStream(status)
	if encoded {
		x.stream.body = encodedBody
		x.h.unprotected(causeEncodedBody)
	}
	x.h.headers.apply(header)
	x.feedStream()
	x.start()
}

// start sends the stream's headers and registers it.
func (x *exchange) start() {
	x.stream.start(x.place)
	x.stream.writeChunksTo(x.chunkConn())
	x.uploads().suspend(x.w)
}

func (x *exchange) uploads() *uploads {
	if x.rare == nil {
		return nil
	}
	return x.rare.uploads
}

// relayed reports whether the handlers run on a goroutine of their own.
func (x *exchange) relayed() bool { return x.rare != nil && x.rare.relay != nil }

// leave does what comes after the handlers. If there is a panic that is not ours,
// it continues after this.
func (x *exchange) leave(out outcome) error {
	if out.left {
		x.handOut()
		x.lendIdleTimeouts()
	}
	if x.stream != nil {
		if x.role == undecided {
			out = x.unanswered(out)
		}
		return x.conclude(out)
	}
	x.givePlaceBack()
	switch x.role {
	case answered:
		if out.panicked != nil && !isAbort(out.panicked) {
			panic(out.panicked)
		}
		return nil
	case refused:
		if out.panicked != nil && !isAbort(out.panicked) {
			panic(out.panicked)
		}
		return x.rare.refusal
	}
	switch {
	case out.panicked != nil:
		panic(out.panicked)
	case !out.left:
		if x.role == undecided {
			x.w.WriteHeader(statusClientClosed)
		}
		return nil
	case x.role == undecided && out.err != nil && x.wantsReconnect(statusOf(out.err)):
		x.answerReconnect(statusOf(out.err))
		return nil
	}
	return out.err
}

// statusClientClosed is what access logs show for a client that left before there
// was an answer, as with reverse_proxy.
const statusClientClosed = 499

// conclude ends the stream when its handlers have returned, perhaps with an error
// or a panic, accounts for it, and lets the server complete the response or abort
// it.
func (x *exchange) conclude(out outcome) error {
	s := x.stream
	s.close()
	if panicked := s.panicked(); panicked != nil {
		out.panicked = panicked
	}
	if !s.started { // its headers were not sent, so it was never a stream
		x.givePlaceBack()
		if out.panicked == nil {
			out.panicked = http.ErrAbortHandler // a handler has recovered the original panic
		}
		panic(out.panicked)
	}
	s.told = s.told || out.run.told
	s.account(s.verdict(out))
	r := s.final()
	x.uploads().resume()
	x.tell(r)

	switch {
	case out.panicked != nil && !isAbort(out.panicked):
		panic(out.panicked) // a bug in another handler, which we must not hide
	case s.aborts(r.end.reason):
		s.letArrive()
		panic(http.ErrAbortHandler)
	}
	if s.proto == http1 && s.ctx.Err() == context.Canceled {
		// No one reads the end of the response, or a handler around this one has
		// ended it, and it is incomplete. Plain Caddy aborts in this case.
		s.expireWrites()
		return nil
	}
	s.boundLastWrite() // by an encoder, and by the server, which completes the response
	// If the client has left or the end is ours, let the handlers around this one
	// and the access log complete.
	return nil
}

// warnings records what has been logged, so that requests do not repeat it.
type warnings struct {
	nested      sync.Once
	unprotected atomic.Int64 // unix nanoseconds of the last one
}

// warnNested logs once that two handlers met.
func (h *Handler) warnNested(outer *Handler) {
	h.warned.nested.Do(func() {
		h.logger.Warn("two sse handlers meet one request: the inner one owns its stream, the outer one stands aside; "+
			"give routes settings of their own with handle blocks or with matchers that exclude each other",
			zap.String("inner", h.Name),
			zap.String("outer", outer.Name))
	})
}

// Why frames can't be added to a stream's body.
const (
	causeEncodedBody = "content_encoding"
	causeOtherBody   = "not_an_event_stream"
)

// unprotected counts a stream to whose body frames can't be added, and warns of
// it at most once a minute.
func (h *Handler) unprotected(cause string) {
	collector.unprotected.WithLabelValues(h.Name, cause).Inc()
	at := time.Now().UnixNano()
	last := h.warned.unprotected.Load()
	if at-last < int64(time.Minute) || !h.warned.unprotected.CompareAndSwap(last, at) {
		return
	}
	h.logger.Warn("the body of a stream is no text that heartbeats may go into; it is passed on untouched",
		zap.String("name", h.Name),
		zap.String("cause", cause))
}
