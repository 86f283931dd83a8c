package caddysse

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// ServeHTTP lets next answer and looks after the answer if it is a stream.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) (err error) {
	began := now()
	accept := acceptOf(r.Header)
	if accept.eventStream {
		// Frames can go into text only. Error routes get the request as it came.
		accepted, given := r.Header["Accept-Encoding"]
		r.Header["Accept-Encoding"] = []string{"identity"}
		defer restoreHeader(r.Header, "Accept-Encoding", accepted, given)
	}
	switch r.Method {
	case http.MethodHead, http.MethodConnect:
		return next.ServeHTTP(w, r)
	}
	if outer := enclosingResponse(w); outer != nil {
		h.warnNested(outer)
		if !outer.standAside() {
			return next.ServeHTTP(w, r)
		}
	}

	h.drain.requests.Add(1)
	defer h.drain.requests.Add(-1)

	// The context goes into the request that everybody has: placeholders read
	// that one, and would miss what is rewritten in a copy.
	own := r.Context()
	ctx, cancel := context.WithCancelCause(own)
	rw := &response{
		exchange:  exchange{h: h, w: w, r: r, cancel: cancel, began: began},
		resumable: accept.eventStream && r.Method == http.MethodGet,
	}
	if uploads := newUploads(r); uploads != nil {
		rw.rarely().uploads = uploads
	}
	*r = *r.WithContext(ctx)
	defer func() {
		// Connections that reverse_proxy did not wait for may still read the
		// request. It is given back only where its context would fail the
		// handlers of an error; the server ends the other ones.
		if ctx.Err() != nil && own.Err() == nil {
			*r = *r.WithContext(own)
		}
	}()
	defer func() {
		var panicked any
		if rw.settle(); rw.role > aside || rw.stream != nil {
			panicked = recover()
		}
		err = rw.leave(err, panicked)
	}()
	if err := rw.enter(accept); err != nil {
		return err
	}
	return next.ServeHTTP(rw, r)
}

// enter does what comes before the upstream is called.
func (rw *response) enter(accept accept) error {
	switch {
	case rw.h.limits == limits{}:
	case rw.resumable:
		if err := rw.takePlace(); err != nil {
			return err
		}
	default:
		// The upstream will have set its headers before the answer can be
		// refused.
		rw.rarely().siteHeader = rw.w.Header().Clone()
	}
	if rw.h.startsEarly(rw.r, accept) {
		rw.startEarly()
	}
	return nil
}

// leave does what comes behind the upstream. err and panicked are how the
// handlers left.
func (rw *response) leave(err error, panicked any) error {
	if rw.stream != nil {
		if rw.role == undecided {
			rw.stream.unanswered(err, panicked)
		}
		return rw.conclude(err, panicked)
	}
	rw.givePlaceBack()
	if panicked != nil && !isAbort(panicked) {
		panic(panicked)
	}
	switch rw.role {
	case answered:
		return nil
	case refused:
		return rw.rare.refusal
	case undecided:
		if err != nil && rw.wantsReconnect(statusOf(err)) {
			rw.answerReconnect(statusOf(err))
			return nil
		}
	}
	return err
}

// conclude ends the stream when its handlers have left, with an error or in a
// panic perhaps, accounts for it, and lets the server complete the response or
// abort it.
func (rw *response) conclude(err error, panicked any) error {
	s := rw.stream
	s.close()
	if beside, ok := errors.AsType[*panicError](context.Cause(s.ctx)); ok {
		panicked = beside.value
	}
	if !s.begun { // its headers did not get through, so it has been no stream
		if panicked == nil {
			panicked = http.ErrAbortHandler // a handler has recovered from what it was
		}
		panic(panicked)
	}
	r := s.report()
	r.end.reason, r.end.err = s.verdict(err, panicked, s.giveConnectionBack())
	rw.h.group.remove(s, r.end.reason, r.counts)
	collector.observeClosed(r)
	rw.h.tellClosed(s, r)

	switch {
	case panicked != nil && !isAbort(panicked):
		panic(panicked) // somebody's bug, and not ours to hide
	case s.aborts(r.end.reason):
		panic(http.ErrAbortHandler)
	}
	s.boundLastWrite() // of an encoder, and of the server, which completes the response
	// Where the client has left or the end is ours, the handlers around this
	// one complete, and the access log with them.
	return nil
}

func restoreHeader(header http.Header, field string, values []string, given bool) {
	if given {
		header[field] = values
	} else {
		delete(header, field)
	}
}

// warnings remembers what has been said, so that no request repeats it.
type warnings struct {
	nested      sync.Once
	unprotected atomic.Int64 // unix nanoseconds of the last one
}

// warnNested says once that two handlers met.
func (h *Handler) warnNested(outer *response) {
	h.warned.nested.Do(func() {
		h.logger.Warn("two sse handlers meet one request: the inner one owns its stream, the outer one stands aside; "+
			"give routes settings of their own with handle blocks or with matchers that exclude each other",
			zap.String("inner", h.Name),
			zap.String("outer", outer.h.Name))
	})
}

// Why a stream's body can't be given frames.
const (
	causeEncodedBody = "content_encoding"
	causeOtherBody   = "not_an_event_stream"
)

// unprotected counts a stream whose body can't be given frames, and warns of it
// at most once a minute.
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
