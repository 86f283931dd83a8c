package caddysse

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// reason is why a stream ended.
type reason uint8

const (
	notEnded        reason = iota
	upstreamClosed         // the upstream finished its response
	upstreamError          // the upstream broke off, or its answer after an early start was unusable
	upstreamTimeout        // silent too long
	clientClosed           // the client went away
	writeTimeout           // the client took no bytes
	deadClient             // the client's host acknowledged nothing
	maxDuration            // old enough
	drained                // reload or exit
	endedByAdmin           // ended through the admin API
	serverClosed           // the process exits and its grace period is over
	reasonCount
)

var reasonNames = [reasonCount]string{
	upstreamClosed:  "upstream_closed",
	upstreamError:   "upstream_error",
	upstreamTimeout: "upstream_timeout",
	clientClosed:    "client_closed",
	writeTimeout:    "write_timeout",
	deadClient:      "dead_client",
	maxDuration:     "max_duration",
	drained:         "drained",
	endedByAdmin:    "admin",
	serverClosed:    "server_closed",
}

func (r reason) String() string { return reasonNames[r] }

// state is where a live stream is in its life.
type state uint8

const (
	stateOpen    state = iota
	stateWaiting       // started early: the upstream has not answered
	stateEnding
)

func (st state) String() string {
	switch st {
	case stateWaiting:
		return "waiting"
	case stateEnding:
		return "ending"
	}
	return "open"
}

// stateLocked wants facts to be locked.
func (s *stream) stateLocked() state {
	switch {
	case s.ending.Load() != 0:
		return stateEnding
	case s.waiting:
		return stateWaiting
	}
	return stateOpen
}

// proto is the protocol that a client speaks.
type proto uint8

const (
	http1 proto = iota // HTTP/1.0 included
	http2
	http3
	protoCount
)

var protoNames = [protoCount]string{http1: "HTTP/1.1", http2: "HTTP/2.0", http3: "HTTP/3.0"}

func (p proto) String() string { return protoNames[p] }

func protoOf(r *http.Request) proto {
	switch r.ProtoMajor {
	case 3:
		return http3
	case 2:
		return http2
	}
	return http1
}

// client is who is at the other end of a stream and what was asked for.
type client struct {
	ip, host, userAgent, upstream string

	lastEventID *string // the request's; nil where it has none
}

// newClient takes what is only safe to read on the request's goroutine.
func newClient(r *http.Request) client {
	c := client{
		host:      printable(r.Host, 255),
		userAgent: printable(r.UserAgent(), 256),
	}
	if given := r.Header.Get("Last-Event-ID"); given != "" {
		id := given
		c.lastEventID = &id
	}
	c.ip = clientIP(r)
	c.upstream = upstreamOf(r)
	return c
}

// clientIP returns Caddy's client IP, which respects trusted proxies.
func clientIP(r *http.Request) string {
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	return ip
}

// upstreamOf returns the upstream that reverse_proxy has chosen, if it has.
func upstreamOf(r *http.Request) string {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	upstream, _ := repl.GetString("http.reverse_proxy.upstream.hostport")
	return printable(upstream, 255) // its placeholders may say what the client said
}

// requestUUID is the placeholder that identifies a request.
const requestUUID = "http.request.uuid"

// newID returns what {http.request.uuid} is for the request. Where nobody has
// asked for the placeholder yet, the id is made here, and adoptID makes it the
// placeholder's. To resolve it would cost each quiet stream 300 bytes, and write
// to the request's variables: a map without a lock, which a connection to the
// upstream that reverse_proxy did not wait for may still be reading as it dials.
func newID(ctx context.Context) uuid.UUID {
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok && caddyhttp.GetVar(ctx, "uuid") != nil {
		text, _ := repl.GetString(requestUUID)
		if id, err := uuid.Parse(text); err == nil {
			return id
		}
	}
	return uuid.New()
}

// adoptID makes an id the request's, for whoever asks from now on.
func adoptID(ctx context.Context, id uuid.UUID) {
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Set(requestUUID, id.String())
	}
}

// printable makes what a client chose fit for a log line and a terminal: at
// most limit bytes, and nothing that moves a cursor, starts a line or turns the
// direction of writing.
func printable(text string, limit int) string {
	clean := true
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			clean = false
			break
		}
	}
	if !clean {
		text = strings.Map(func(r rune) rune {
			if unicode.IsPrint(r) {
				return r
			}
			return utf8.RuneError
		}, text)
	}
	if len(text) > limit {
		end := limit
		for !utf8.RuneStart(text[end]) {
			end--
		}
		text = text[:end]
	}
	return text
}

// report is a stream at one moment: what logs, events, the access log, the
// placeholders and the admin API tell of it.
type report struct {
	client
	id        string
	method    string
	path      string
	name      string
	state     state
	proto     proto
	resumable bool
	openedAt  time.Time
	duration  time.Duration
	idle      time.Duration // since the upstream's last bytes
	counts    counts
	end       end

	lastEventID string // the last one of the stream, else the request's
}

// end is what is known of a stream when it has ended.
type end struct {
	reason           reason
	status           int           // what the client got
	upstreamStatus   int           // what the upstream answered; 0: the same
	timeToHeaders    time.Duration // from the request
	timeToFirstEvent time.Duration // from the request; 0: there was none
	longestGap       time.Duration // between bytes of the upstream
	incompleteEvent  bool          // clients drop what is behind the last blank line
	invalidUTF8      bool          // clients read something else
	err              error
}

// original returns the method and the path that the client asked for, whatever
// handlers behind this one have made of them.
func (s *stream) original() (method, path string) {
	r, ok := s.ctx.Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if !ok {
		return "", ""
	}
	return printable(r.Method, 32), printable(r.URL.Path, 1024)
}

// report never waits for the client.
func (s *stream) report() report {
	method, path := s.original()
	s.facts.Lock()
	defer s.facts.Unlock()
	age := s.age()
	r := report{
		client:    s.client, // with facts locked, as the upstream may be learnt late
		id:        s.id.String(),
		method:    method,
		path:      path,
		name:      s.h.Name,
		state:     s.stateLocked(),
		proto:     s.proto,
		resumable: s.resumable,
		openedAt:  time.Now().Add(s.opened - age),
		duration:  age - s.opened,
		idle:      age - s.lastBytes,
		counts:    s.countsLocked(),
		end: end{
			status:           int(s.status),
			upstreamStatus:   int(s.upstreamStatus),
			timeToHeaders:    s.opened,
			timeToFirstEvent: s.firstEvent,
			longestGap:       s.longestGap,
			incompleteEvent:  s.scan.Incomplete(),
			invalidUTF8:      !s.scan.ValidUTF8() || s.scan.TruncatedUTF8(),
		},
	}
	if id, committed := s.scan.LastEventID(); committed {
		r.lastEventID = id
	} else if s.client.lastEventID != nil {
		r.lastEventID = *s.client.lastEventID
	}
	if len(r.lastEventID) > eventstream.MaxIDLength {
		r.lastEventID = eventstream.TooLongID
	}
	r.lastEventID = printable(r.lastEventID, eventstream.MaxIDLength)
	return r
}

// verdict says why a closed stream ended. err and panicked are how its handlers
// left, fate is that of the client's connection.
func (s *stream) verdict(err error, panicked any, fate peer.Fate) (reason, error) {
	switch {
	case reason(s.ending.Load()) == upstreamError:
		return upstreamError, errUnusable(err)
	case s.cut || s.broken:
		return reason(s.ending.Load()), nil
	case s.failed == writeTimeout:
		return writeTimeout, nil
	case s.failed != notEnded, s.ctx.Err() != nil: // not by us: those cases are above
		return s.whyGone(fate), nil
	case isAbort(panicked):
		return upstreamError, errors.New("the upstream broke off")
	case panicked != nil:
		return upstreamError, fmt.Errorf("panic: %v", panicked)
	case err != nil:
		return upstreamError, err
	}
	return upstreamClosed, nil
}

// errUnusable is the error of a stream that started early and got no upstream:
// the one that the handlers left with, if it says more than that we ended them.
func errUnusable(err error) error {
	if err != nil {
		return err
	}
	return errors.New("the upstream's answer to an early start was no stream")
}

// whyGone tells a client that went away from one whose host is dead, and from
// one that has been sent away.
func (s *stream) whyGone(fate peer.Fate) reason {
	if s.proto == http3 && s.h.drain.graceIsOver() {
		return serverClosed // its server closes connections, before we come to it
	}
	switch fate {
	case peer.Dead:
		return deadClient
	case peer.Stalled:
		return writeTimeout
	}
	return clientClosed
}

// isAbort reports whether a handler has left by saying that a side broke off
// (net/http.ErrAbortHandler).
func isAbort(panicked any) bool {
	err, ok := panicked.(error)
	return ok && errors.Is(err, http.ErrAbortHandler)
}

// tellOpened tells of a stream that has been opened.
func (h *Handler) tellOpened(s *stream) {
	if c := h.logger.Check(zapcore.DebugLevel, "stream opened"); c != nil {
		c.Write(zap.Inline(openedFields(s.report())))
	}
	if h.events.ShouldEmit(eventOpened) {
		h.emit(eventOpened, openedFields(s.report()))
	}
}

// tellClosed tells of a stream that has ended: in the log, to who subscribed to
// the event, in the request's access log and in its placeholders.
func (h *Handler) tellClosed(s *stream, r report) {
	adoptID(s.ctx, s.id)
	level := zapcore.InfoLevel
	if r.end.reason == upstreamError {
		level = zapcore.WarnLevel
	}
	if c := h.logger.Check(level, "stream closed"); c != nil {
		c.Write(zap.Inline(closedFields(r)))
	}
	if h.events.ShouldEmit(eventClosed) {
		h.emit(eventClosed, closedFields(r))
	}
	if extra, ok := s.ctx.Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.Object("sse", figures(r)))
	}
	if repl, ok := s.ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(r.placeholder)
	}
}

const (
	eventOpened = "sse_stream_opened"
	eventClosed = "sse_stream_closed"
)

func (h *Handler) emit(name string, fields zapcore.ObjectMarshaler) {
	enc := zapcore.NewMapObjectEncoder()
	if err := fields.MarshalLogObject(enc); err != nil {
		h.logger.Error("describing a stream", zap.String("event", name), zap.Error(err))
		return
	}
	// A stream may outlive its configuration, and so its context; its end is
	// told all the same.
	ctx := h.ctx
	ctx.Context = context.WithoutCancel(ctx.Context)
	h.events.Emit(ctx, name, enc.Fields)
}

func (r report) placeholder(key string) (any, bool) {
	switch key {
	case "http.sse.id":
		return r.id, true
	case "http.sse.reason":
		return r.end.reason.String(), true
	case "http.sse.events":
		return r.counts.events, true
	case "http.sse.bytes":
		return r.counts.bytes, true
	case "http.sse.heartbeats":
		return r.counts.heartbeats, true
	case "http.sse.duration":
		return r.duration, true
	case "http.sse.last_event_id":
		return r.lastEventID, true
	}
	return nil, false
}

// openedFields are what is told of a stream when it opens.
type openedFields report

func (r openedFields) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("id", r.id)
	enc.AddString("name", r.name)
	enc.AddString("client_ip", r.ip)
	enc.AddString("method", r.method)
	enc.AddString("host", r.host)
	enc.AddString("path", r.path)
	enc.AddString("proto", r.proto.String())
	enc.AddString("user_agent", r.userAgent)
	enc.AddString("upstream", r.upstream)
	enc.AddBool("resumable", r.resumable)
	return nil
}

// closedFields are what is told of a stream when it has ended.
type closedFields report

func (r closedFields) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if err := openedFields(r).MarshalLogObject(enc); err != nil {
		return err
	}
	r.addFigures(enc)
	return nil
}

// figures are what an access log says of a stream beside what it says of every
// request.
type figures report

func (r figures) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("id", r.id)
	enc.AddString("name", r.name)
	enc.AddString("upstream", r.upstream)
	enc.AddBool("resumable", r.resumable)
	closedFields(r).addFigures(enc)
	return nil
}

func (r closedFields) addFigures(enc zapcore.ObjectEncoder) {
	enc.AddString("reason", r.end.reason.String())
	enc.AddInt("status", r.end.status)
	if r.end.upstreamStatus != 0 && r.end.upstreamStatus != r.end.status {
		enc.AddInt("upstream_status", r.end.upstreamStatus)
	}
	enc.AddDuration("duration", r.duration)
	enc.AddDuration("time_to_headers", r.end.timeToHeaders)
	if r.end.timeToFirstEvent > 0 {
		enc.AddDuration("time_to_first_event", r.end.timeToFirstEvent)
	}
	enc.AddDuration("longest_gap", r.end.longestGap)
	enc.AddUint64("events", r.counts.events)
	enc.AddUint64("bytes", r.counts.bytes)
	enc.AddUint64("heartbeats", r.counts.heartbeats)
	enc.AddUint64("heartbeats_deferred", r.counts.deferred)
	enc.AddString("last_event_id", r.lastEventID)
	if r.end.incompleteEvent {
		enc.AddBool("incomplete_event", true)
	}
	if r.end.invalidUTF8 {
		enc.AddBool("invalid_utf8", true)
	}
	if r.end.err != nil {
		enc.AddString("error", printable(r.end.err.Error(), 512))
	}
}
