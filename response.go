package caddysse

import (
	"context"
	"io"
	"maps"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// exchange is what is known of a request before its answer is. A stream and the
// response that the stream's handlers see share it.
type exchange struct {
	h      *Handler // the settings and the totals
	w      http.ResponseWriter
	r      *http.Request           // for the goroutine of the request alone
	cancel context.CancelCauseFunc // ends the upstream's half
	began  instant                 // when the request came; ages count from here

	// moved is the age at which the write that is on its way got further last; 0:
	// none is. It is a stream's, and here because there is room.
	moved atomic.Int64

	rare *rare // nil for most
}

// rare is what few responses need.
type rare struct {
	uploads    *uploads    // between the body of the request and the connection
	early      *early      // may start without the upstream's headers
	siteHeader http.Header // what was set before the upstream was called
	refusal    error       // of a stream too many
}

// rarely returns the rare part and makes it where there is none.
func (x *exchange) rarely() *rare {
	if x.rare == nil {
		x.rare = new(rare)
	}
	return x.rare
}

func (x *exchange) uploads() *uploads {
	if x.rare == nil {
		return nil
	}
	return x.rare.uploads
}

func (x *exchange) early() *early {
	if x.rare == nil {
		return nil
	}
	return x.rare.early
}

// role is what a response has turned out to be.
type role uint8

const (
	undecided role = iota // no final header yet
	aside                 // none of our business
	streaming             // a stream
	answered              // an error that a reconnection time was sent for
	refused               // a stream too many
)

// response is the ResponseWriter that the handlers behind this one get. It
// decides at the final header whether there is a stream, and otherwise passes
// everything through. It belongs to the goroutine of the request.
type response struct {
	exchange
	stream    *stream
	role      role
	resumable bool
	place     reservation
}

// enclosingResponse returns the response of an outer sse handler, if any.
func enclosingResponse(w http.ResponseWriter) *response {
	for ; w != nil; w = unwrap(w) {
		if rw, ok := w.(*response); ok {
			return rw
		}
	}
	return nil
}

// unwrap returns the writer that another one is around, nil for a connection's
// own.
func unwrap(w http.ResponseWriter) http.ResponseWriter {
	if outer, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
		return outer.Unwrap()
	}
	return nil
}

// standAside leaves the response to an inner sse handler, unless the stream has
// begun.
func (rw *response) standAside() bool {
	rw.settle()
	if rw.stream != nil {
		return false
	}
	rw.role = aside
	rw.givePlaceBack()
	return true
}

// settle makes an end to waiting for the upstream's headers: its handlers have
// answered or left. If the stream has started meanwhile, this is the response's
// stream.
func (rw *response) settle() {
	early := rw.early()
	if early == nil || rw.stream != nil {
		return
	}
	if rw.stream = early.settle(); rw.stream == nil {
		replaceHeader(rw.w.Header(), early.header)
		rw.rare.early = nil
	}
}

// replaceHeader makes header the same as another, in place.
func replaceHeader(header, by http.Header) {
	clear(header)
	maps.Copy(header, by)
}

// Header returns the client's header map, or one of their own for handlers that
// answer a stream that may start without them.
func (rw *response) Header() http.Header {
	if early := rw.early(); early != nil {
		return early.header
	}
	return rw.w.Header()
}

// Unwrap lets http.ResponseController find what this type does not have itself.
func (rw *response) Unwrap() http.ResponseWriter { return rw.w }

// Push implements http.Pusher.
func (rw *response) Push(target string, opts *http.PushOptions) error {
	return (&caddyhttp.ResponseWriterWrapper{ResponseWriter: rw.w}).Push(target, opts)
}

func (rw *response) WriteHeader(status int) {
	if status < 200 && status != http.StatusSwitchingProtocols {
		rw.writeInformational(status)
		return
	}
	if rw.role == undecided {
		rw.decide(status)
	}
	if rw.role == aside {
		rw.w.WriteHeader(status)
	}
}

// writeInformational passes a 1xx on, unless the final header has been sent.
func (rw *response) writeInformational(status int) {
	switch {
	case rw.role == streaming:
	case rw.early() != nil:
		rw.early().writeInformational(rw.w, status)
	default:
		rw.w.WriteHeader(status)
	}
}

// decide finds out what the response is, at its final header.
func (rw *response) decide(status int) {
	rw.settle()
	header := rw.Header()
	switch {
	case rw.stream != nil:
		rw.role = streaming
		rw.stream.answered(status, header, upstreamOf(rw.r))
	case rw.wantsReconnect(status):
		rw.role = answered
		rw.givePlaceBack()
		rw.answerReconnect(status)
	case !isStream(status, header):
		rw.role = aside
		rw.givePlaceBack()
	case rw.h.limits != limits{} && rw.place == noPlace:
		if err := rw.takePlace(); err != nil {
			rw.role, rw.rarely().refusal = refused, err
			rw.cancel(errStreamEnded)
			return
		}
		rw.open(status, header)
	default:
		rw.open(status, header)
	}
}

// open makes a stream of the response.
func (rw *response) open(status int, header http.Header) {
	rw.role = streaming
	rw.stream = rw.newStream(status)
	if isEncoded(header) {
		rw.stream.body = encodedBody
		rw.h.unprotected(causeEncodedBody)
	}
	rw.h.headers.apply(header)
	rw.stream.begin(rw.place)
}

func (rw *response) newStream(status int) *stream {
	return &stream{
		exchange:  &rw.exchange,
		ctx:       rw.r.Context(),
		client:    newClient(rw.r),
		status:    uint16(status),
		proto:     protoOf(rw.r),
		resumable: rw.resumable,
	}
}

// begin decides for handlers that write or flush before they call WriteHeader,
// which means 200 (net/http.ResponseWriter).
func (rw *response) begin() {
	if rw.role != undecided {
		return
	}
	if hasEventStreamType(rw.Header()) || rw.early() != nil {
		rw.WriteHeader(http.StatusOK)
	} else {
		rw.role = aside
		rw.givePlaceBack()
	}
}

func (rw *response) Write(p []byte) (int, error) {
	rw.begin()
	switch rw.role {
	case streaming:
		return rw.stream.write(p)
	case answered:
		return len(p), nil // the error's body, which nobody gets
	case refused:
		return 0, rw.rare.refusal
	}
	return rw.w.Write(p)
}

// ReadFrom keeps sendfile possible for what is none of our business.
func (rw *response) ReadFrom(r io.Reader) (int64, error) {
	rw.begin()
	if rw.role != aside {
		return io.Copy(writerOnly{rw}, r)
	}
	return (&caddyhttp.ResponseWriterWrapper{ResponseWriter: rw.w}).ReadFrom(r)
}

// writerOnly hides ReadFrom from io.Copy.
type writerOnly struct{ io.Writer }

// FlushError is what http.ResponseController flushes with.
func (rw *response) FlushError() error {
	rw.begin()
	switch rw.role {
	case streaming:
		return rw.stream.flush()
	case answered, refused:
		return nil
	}
	return http.NewResponseController(rw.w).Flush()
}

// SetWriteDeadline keeps a handler's deadlines and the stream's own writes from
// meeting in the ResponseWriter.
func (rw *response) SetWriteDeadline(deadline time.Time) error {
	switch {
	case rw.stream != nil:
		return rw.stream.setWriteDeadline(deadline)
	case rw.early() != nil:
		return rw.early().setWriteDeadline(rw.w, deadline)
	}
	return http.NewResponseController(rw.w).SetWriteDeadline(deadline)
}

// Interface guards
var (
	_ http.ResponseWriter             = (*response)(nil)
	_ http.Pusher                     = (*response)(nil)
	_ io.ReaderFrom                   = (*response)(nil)
	_ interface{ FlushError() error } = (*response)(nil)
)
