package caddysse

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/jsonflag"
)

// upload is the body of a request. It knows when it has been read completely.
type upload struct {
	io.ReadCloser
	left     int64 // of its Content-Length; -1: it has none
	outlives bool  // its attempt may outlive the client's connection
	read     atomic.Bool
	found    atomic.Bool // there has been a byte
}

// Read does not look for an end after Content-Length if the connection may be
// gone by then.
func (u *upload) Read(p []byte) (int, error) {
	if u.outlives && u.read.Load() {
		return 0, io.EOF
	}
	n, err := u.ReadCloser.Read(p)
	if n > 0 {
		u.found.Store(true)
	}
	if u.outlives && u.left >= 0 && err == nil {
		if u.left -= int64(n); u.left <= 0 {
			err = io.EOF
		}
	}
	if err == io.EOF {
		u.read.Store(true)
	}
	return n, err
}

// Close does nothing for a body that may outlive its connection; the server
// closes it.
func (u *upload) Close() error {
	if u.outlives {
		return nil
	}
	return u.ReadCloser.Close()
}

// mayStartEarly reports whether a stream may start before its upstream answers,
// perhaps only once the request's body has asked for one. A request for another
// protocol never does, nor does OPTIONS: its answer is not a stream.
func (x *exchange) mayStartEarly() bool {
	early := x.h.EarlyStart
	if early == nil || early.Delay <= 0 || x.r.Method == http.MethodOptions || asksForUpgrade(x.r.Header) {
		return false
	}
	return early.Any || x.accept.only || isJSON(x.r)
}

// isJSON reports whether a request has a body that is JSON (RFC 8259; RFC 6839,
// section 3.1).
func isJSON(r *http.Request) bool {
	if r.ContentLength == 0 || r.Body == nil {
		return false
	}
	essence := strings.ToLower(mediaType(r.Header["Content-Type"]))
	return essence == "application/json" || strings.HasSuffix(essence, "+json")
}

// askingBody is a JSON body that may ask for a stream. It says so once, when the
// upstream has read that far, and delays nothing.
type askingBody struct {
	io.ReadCloser
	scan  jsonflag.Scanner
	asked chan struct{} // closed when it does
}

func (b *askingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if !b.scan.Settled() {
		if b.scan.Scan(p[:n]); b.scan.AsksForStream() {
			close(b.asked)
		}
	}
	return n, err
}

// awaitAsking returns a channel that is closed when the client has asked for a
// stream: at once, or when its body does. It is nil if that would change nothing.
func (x *exchange) awaitAsking() <-chan struct{} {
	if !x.mayStartEarly() {
		return nil
	}
	asked := make(chan struct{})
	if x.h.EarlyStart.Any || x.accept.only {
		close(asked)
	} else {
		x.attempt.request.Body = &askingBody{ReadCloser: x.attempt.request.Body, asked: asked}
	}
	return asked
}

// asksForUpgrade reports whether a request wants another protocol. One that only
// offers HTTP/2 (h2c) is still answered over HTTP/1.1.
func asksForUpgrade(header http.Header) bool {
	for _, value := range header["Upgrade"] {
		for protocol := range strings.SplitSeq(value, ",") {
			if protocol = strings.TrimSpace(protocol); protocol != "" && !strings.EqualFold(protocol, "h2c") {
				return true
			}
		}
	}
	return false
}

// watchUpload wraps the request's body to record when it has been read.
func (x *exchange) watchUpload() {
	if x.keeps() && x.r.ContentLength != 0 && x.r.Body != nil {
		x.rare.upload = &upload{ReadCloser: x.r.Body, left: x.r.ContentLength, outlives: true}
		x.attempt.request.Body = x.rare.upload
		return
	}
	if x.r.ProtoMajor == 1 && x.r.ContentLength != 0 {
		x.rare.upload = &upload{ReadCloser: x.r.Body, left: -1}
		x.attempt.request.Body = x.rare.upload
	}
}

// startEarly starts the stream without the upstream's headers, unless the
// handlers have answered.
func (x *exchange) startEarly() {
	if x.role != undecided {
		return
	}
	if x.place == nil && x.h.limits != (limits{}) {
		if x.place, _ = x.reserve(); x.place == nil {
			return // the upstream's answer will be refused when it comes
		}
	}
	x.idleTimeoutsOfHandlers() // before a heartbeat can use the server's
	header := x.w.Header()
	if x.attempt == nil {
		x.rare.siteHeader = header.Clone() // it may come to an attempt yet
	}
	header["Content-Type"] = []string{eventStreamType}
	x.startedEarly = true
	if x.keeps() {
		x.beginRun(http.StatusOK, http.Header{"Content-Type": {eventStreamType}})
	}
	s := x.newStream(http.StatusOK)
	s.stage.Store(uint32(stageWaiting))
	x.stream = s
	x.h.headers.apply(header)
	if upload := x.rare.upload; upload != nil && x.r.ProtoMajor == 1 && !upload.read.Load() {
		// Otherwise net/http reads the rest of the request's body itself when the
		// headers go out, and the upstream does not get it. net/http may also panic
		// on the connection's next request if some of the body is left at the end, so
		// this connection gets no further request. Connections that do not support
		// full duplex have neither problem.
		if http.NewResponseController(x.w).EnableFullDuplex() == nil {
			header["Connection"] = []string{"close"}
		}
	}
	x.feedStream()
	x.start()
}

// answered takes the upstream's late headers. Only those of a stream are usable.
func (s *stream) answered(status int, header http.Header, upstream string) {
	if s.isCut() || s.ctx.Err() != nil {
		return // the proxy answers, for an upstream that was given up
	}
	age := s.age()
	s.facts.Lock()
	s.upstreamStatus = uint16(status)
	s.client.upstream = upstream
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	if s.at() == stageWaiting {
		s.stage.Store(uint32(stageOpen))
	}
	s.facts.Unlock()
	switch {
	case !isStream(status, header):
		s.failEarly(status, fmt.Sprintf("the upstream answered %d %s, %s", status, http.StatusText(status), typeOf(header)))
	case isEncoded(header):
		s.failEarly(status, "the upstream answered with an encoded body")
	}
}

// siteHeader is what the site had set when the request came to sse.
func (x *exchange) siteHeader() http.Header {
	if x.startedEarly {
		return x.rare.siteHeader
	}
	return x.w.Header()
}

func typeOf(header http.Header) string {
	if value := header.Get("Content-Type"); value != "" {
		return printable(value, 64)
	}
	return "no type"
}

// unanswered ends a stream whose handlers have left without an answer. A writer
// around this one may panic on the last bytes.
func (x *exchange) unanswered(out outcome) (after outcome) {
	after = out
	defer func() {
		if panicked := recover(); panicked != nil {
			after.panicked = panicked
		}
	}()
	s := x.stream
	s.facts.Lock()
	s.client.upstream = x.upstream()
	s.facts.Unlock()
	status := statusOf(out.err)
	if out.panicked != nil || !out.left {
		status = http.StatusBadGateway
	}
	s.failEarly(status, "the upstream did not answer")
	return after
}

// statusOf returns the status with which Caddy answers when a handler returns
// err.
func statusOf(err error) int {
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && handlerErr.StatusCode != 0 {
		return handlerErr.StatusCode
	}
	if err != nil {
		return http.StatusInternalServerError
	}
	return http.StatusOK
}

// failEarly tells the client of a stream that was started early that the upstream
// has no stream for it, in the only way that is left, and ends it. The upstream's
// own error text is not sent: it may be confidential.
func (s *stream) failEarly(status int, message string) {
	s.mu.Lock()
	defer s.unlock()
	if s.errLocked() != nil || s.ctx.Err() != nil || !s.ask(upstreamError, stageEnding, endPatience) {
		return
	}
	s.facts.Lock()
	s.upstreamStatus = uint16(status)
	s.facts.Unlock()
	countEarlyStartFailure(s.h, status)
	text := errorEvent(http.StatusBadGateway, "upstream_error", message)
	if s.sendLocked(s.age(), s.splicer.Block(&s.frames.Frames, nil, text), nil) == nil {
		s.told = true
	}
	s.cutLocked()
}

func countEarlyStartFailure(h *Handler, status int) {
	collector.earlyStartFailures.WithLabelValues(h.Name, strconv.Itoa(status)).Inc()
}

// errorEvent is an event that reports an error.
func errorEvent(status int, kind, message string) []byte {
	return fmt.Appendf(nil, "event: error\ndata: %s\n\n", errorData(status, kind, message))
}

// errorData is the data of such an event. The SDKs of OpenAI and Anthropic look
// for the member error, whatever the event's name, and raise an error.
func errorData(status int, kind, message string) []byte {
	type failure struct {
		Type    string `json:"type"`
		Code    int    `json:"code"`
		Message string `json:"message"`
	}
	data, err := json.Marshal(struct {
		Status  int     `json:"status"`
		Message string  `json:"message"`
		Error   failure `json:"error"`
	}{status, message, failure{kind, status, message}})
	if err != nil {
		panic(err) // plain fields
	}
	return data
}
