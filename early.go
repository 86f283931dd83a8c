package caddysse

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// early is a response that starts as a stream if the upstream's headers take
// too long. Until it is settled whether it does, the handlers behind it write
// their headers to a map of their own, as they do so without our lock.
type early struct {
	header http.Header // of the handlers behind; starts as the site's
	upload *upload     // nil: there is none that could be in the way

	// mu guards what follows, and the client's header map until it is settled.
	mu      sync.Mutex
	timer   *time.Timer
	stream  *stream // nil: not started
	settled bool    // it does not start any more
}

// upload is the body of a request. It knows when it has been read to its end.
type upload struct {
	io.ReadCloser
	read atomic.Bool
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err == io.EOF {
		u.read.Store(true)
	}
	return n, err
}

// startsEarly reports whether a stream may start before its upstream answers.
// A request for another protocol never does: its answer is no stream.
func (h *Handler) startsEarly(r *http.Request, accept accept) bool {
	if h.EarlyStart == nil || h.EarlyStart.Delay <= 0 || r.Header.Get("Upgrade") != "" {
		return false
	}
	return h.EarlyStart.Any || accept.only
}

// startEarly starts the stream after the delay, unless it is settled before.
// What only the goroutine of the request may read is read now, and the stream
// gets an exchange of its own, as the handlers use this one until then.
func (rw *response) startEarly() {
	s := rw.newStream(http.StatusOK)
	s.exchange = &exchange{h: rw.h, w: rw.w, r: rw.r, cancel: rw.cancel, began: rw.began, rare: rw.rare}
	s.waiting = true
	s.id = newID(s.ctx)
	adoptID(s.ctx, s.id)

	e := &early{header: rw.w.Header().Clone()}
	if rw.r.ProtoMajor == 1 && rw.r.ContentLength != 0 {
		e.upload = &upload{ReadCloser: rw.r.Body}
		rw.r.Body = e.upload
	}
	rw.rarely().early = e
	e.mu.Lock()
	defer e.mu.Unlock()
	reserved := rw.place
	e.timer = time.AfterFunc(time.Duration(rw.h.EarlyStart.Delay), func() { e.start(s, reserved) })
}

func (e *early) start(s *stream, reserved reservation) {
	defer s.survive()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.settled {
		return
	}
	if reserved == noPlace && s.h.limits != (limits{}) {
		if reserved, _ = s.h.group.reserve(s.h.limits, s.client.ip); reserved == noPlace {
			return // the upstream's answer will be refused, when it comes
		}
	}
	e.stream = s
	header := s.w.Header()
	header["Content-Type"] = []string{eventStreamType}
	s.h.headers.apply(header)
	if e.upload != nil && !e.upload.read.Load() {
		// Else net/http takes what is left of the request's body from the
		// upstream when the headers go out. And as it may panic on the next
		// request of a connection where some of it is left in the end, there is
		// no next one. Where this is not supported there is no such habit.
		if http.NewResponseController(s.w).EnableFullDuplex() == nil {
			header["Connection"] = []string{"close"}
		}
	}
	s.begin(reserved)
}

// settle lets the stream not start any more and returns it if it has.
func (e *early) settle() *stream {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.settled = true
	e.timer.Stop()
	return e.stream
}

// writeInformational passes a 1xx on while the stream has not started.
func (e *early) writeInformational(w http.ResponseWriter, status int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stream != nil {
		return
	}
	site := w.Header().Clone()
	replaceHeader(w.Header(), e.header)
	w.WriteHeader(status)
	replaceHeader(w.Header(), site)
}

func (e *early) setWriteDeadline(w http.ResponseWriter, deadline time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stream != nil {
		return e.stream.setWriteDeadline(deadline)
	}
	return http.NewResponseController(w).SetWriteDeadline(deadline)
}

// answered takes the upstream's late headers: those of a stream are all that
// is usable.
func (s *stream) answered(status int, header http.Header, upstream string) {
	if s.ctx.Err() != nil {
		return // it is the proxy that answers, for an upstream that was given up
	}
	age := s.age()
	s.facts.Lock()
	s.upstreamStatus = uint16(status)
	s.client.upstream = upstream
	s.longestGap = max(s.longestGap, age-s.lastBytes)
	s.lastBytes = age
	s.waiting = false
	s.facts.Unlock()
	switch {
	case !isStream(status, header):
		s.failEarly(status, fmt.Sprintf("the upstream answered %d %s, %s", status, http.StatusText(status), typeOf(header)))
	case isEncoded(header):
		s.failEarly(status, "the upstream answered with an encoded body")
	}
}

func typeOf(header http.Header) string {
	if value := header.Get("Content-Type"); value != "" {
		return printable(value, 64)
	}
	return "no type"
}

// unanswered is told when the handlers have left without an answer.
func (s *stream) unanswered(err error, panicked any) {
	s.facts.Lock()
	s.client.upstream = upstreamOf(s.r)
	s.facts.Unlock()
	status := statusOf(err)
	if panicked != nil {
		status = http.StatusBadGateway
	}
	s.failEarly(status, "the upstream did not answer")
}

// statusOf returns the status that Caddy answers with when a handler leaves
// with err.
func statusOf(err error) int {
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && handlerErr.StatusCode != 0 {
		return handlerErr.StatusCode
	}
	if err != nil {
		return http.StatusInternalServerError
	}
	return http.StatusOK
}

// failEarly tells the client of a stream that has started that there is none,
// in the only way that is left, and ends it. The upstream's own words stay
// here: they are not for everybody.
func (s *stream) failEarly(status int, message string) {
	s.mu.Lock()
	defer s.unlock()
	if s.errLocked() != nil || s.ctx.Err() != nil || !s.ending.CompareAndSwap(0, uint32(upstreamError)) {
		return
	}
	s.facts.Lock()
	s.upstreamStatus = uint16(status)
	s.facts.Unlock()
	collector.earlyStartFailures.WithLabelValues(s.h.Name, strconv.Itoa(status)).Inc()
	data, err := json.Marshal(struct {
		Status  int    `json:"status"`
		Message string `json:"message"`
	}{http.StatusBadGateway, message})
	if err != nil {
		panic(err) // two plain fields
	}
	var text []byte
	if s.retryOwed {
		s.retryOwed = false
		text = s.h.frames.retry(text, "\n")
	}
	text = append(text, "event: error\ndata: "...)
	text = append(text, data...)
	text = append(text, "\n\n"...)
	if s.sendLocked(s.age(), nil, text) == nil {
		s.told = true
	}
	s.cutLocked()
}
