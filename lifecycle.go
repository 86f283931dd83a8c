package caddysse

import (
	"context"
	"net/http"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
)

// reason is why a stream ended.
type reason uint8

const (
	notEnded        reason = iota
	upstreamClosed         // the upstream finished its response
	upstreamError          // the upstream broke off, or its answer after an early start was unusable
	upstreamTimeout        // silent for too long
	clientClosed           // the client went away
	writeTimeout           // the client took no bytes
	deadClient             // the client's host acknowledged nothing
	maxDuration            // it reached max_duration
	drained                // reload or exit
	endedByAdmin           // ended through the admin API
	takenOver              // its client reconnected on another connection
	lagged                 // it could not keep up with a shared stream
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
	takenOver:       "taken_over",
	lagged:          "lagged",
	serverClosed:    "server_closed",
}

func (r reason) String() string { return reasonNames[r] }

// state is the name of a stream's stage in logs, lists and the admin API.
func (at stage) state() string {
	switch {
	case at == stageWaiting:
		return "waiting"
	case at == stageOpen:
		return "open"
	case at == stageRetrying:
		return "retrying"
	}
	return "ending"
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

// client is who is at the other end of a stream, and what was requested.
type client struct {
	ip, host, userAgent, upstream string

	lastEventID *string // the request's; nil where it has none
}

// newClient reads what is only safe to read on the request's goroutine.
func (x *exchange) newClient() client {
	c := client{
		ip:        x.ip,
		host:      printable(x.r.Host, 255),
		userAgent: printable(x.r.UserAgent(), 256),
		upstream:  x.upstream(),
	}
	if given := x.lastEventID(); given != "" {
		id := printableID(given)
		c.lastEventID = &id
	}
	return c
}

// clientIP returns Caddy's client IP, which respects trusted proxies.
func clientIP(r *http.Request) string {
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	return ip
}

// requestUUID is the placeholder that identifies a request.
const requestUUID = "http.request.uuid"

// newID returns what {http.request.uuid} is for the request. If nothing has used
// the placeholder yet, the id is made here, and adoptID makes it the
// placeholder's value. Resolving the placeholder would cost each quiet stream 300
// bytes, and write to the request's variables.
func newID(ctx context.Context) uuid.UUID {
	if repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok && caddyhttp.GetVar(ctx, "uuid") != nil {
		text, _ := repl.GetString(requestUUID)
		if id, err := uuid.Parse(text); err == nil {
			return id
		}
	}
	return uuid.New()
}

// adoptID makes an id the request's, for everything that reads it from now on.
func (x *exchange) adoptID(id string) {
	if x.replacer != nil {
		x.replacer.Set(requestUUID, id)
	}
}

// fixID sets the request's id before handlers on a goroutine of their own can use
// it.
func (x *exchange) fixID() {
	id := newID(x.r.Context())
	x.rarely().id = id
	x.adoptID(id.String())
	x.attempt.context.replacer.Set(requestUUID, id.String())
}

// printable makes what a client chose safe for a log line and a terminal: at most
// limit bytes, and nothing that moves a cursor, starts a line or changes the text
// direction. It does not keep the rest of the text in memory.
func printable(text string, limit int) string {
	if len(text) <= limit && isPrintable(text) {
		return text
	}
	clean := make([]byte, 0, min(len(text), limit))
	for _, r := range text {
		if !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		if len(clean)+utf8.RuneLen(r) > limit {
			break
		}
		clean = utf8.AppendRune(clean, r)
	}
	return string(clean)
}

func isPrintable(text string) bool {
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// printableID is printable for a last event ID, which is shown completely or not
// at all; one of ours is shown without its secret.
func printableID(id string) string {
	if len(id) > eventstream.MaxIDLength {
		return eventstream.TooLongID
	}
	return printable(shortID(id), eventstream.MaxIDLength)
}

// report is a stream at one moment, for logs, events, the access log, the
// placeholders and the admin API.
type report struct {
	client
	id        string
	method    string
	path      string
	name      string
	state     string
	proto     proto
	resumable bool
	openedAt  time.Time
	duration  time.Duration
	idle      time.Duration // since the upstream's last bytes
	counts    counts
	end       end
	fed       *fedReport // nil: fed by the handlers themselves

	lastEventID string // the last one of the stream, else the request's
}

// end is what is known of a stream only when it has ended.
type end struct {
	reason           reason
	status           int           // what the client got
	upstreamStatus   int           // what the upstream answered; 0: the same
	timeToHeaders    time.Duration // from the request
	timeToFirstEvent time.Duration // from the request; 0: there was none
	longestGap       time.Duration // between bytes of the upstream
	retries          int           // tries of upstream_retry; -1: it does not apply
	incompleteEvent  bool          // clients drop what is after the last blank line
	invalidUTF8      bool          // clients read something else
	err              error
}

// original returns the method and the path that the client requested, whatever
// handlers after this one have changed.
func (s *stream) original() (method, path string) {
	r, ok := s.ctx.Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if !ok {
		return "", ""
	}
	return printable(r.Method, 32), printable(r.URL.Path, 1024)
}

// report never waits for the client.
func (s *stream) report() report {
	s.facts.Lock()
	defer s.facts.Unlock()
	return s.reportLocked()
}

// reportLocked must be called with facts locked.
func (s *stream) reportLocked() report {
	method, path := s.original()
	age := s.age()
	scanner := s.splicer.Scanner()
	r := report{
		client:    s.client,
		id:        s.id.String(),
		method:    method,
		path:      path,
		name:      s.h.Name,
		state:     s.at().state(),
		proto:     s.proto,
		resumable: s.kind.resumable,
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
			retries:          s.retriesLocked(),
			incompleteEvent:  scanner.Incomplete(),
			invalidUTF8:      !scanner.ValidUTF8() || scanner.TruncatedUTF8(),
		},
	}
	if s.fed != nil {
		r.fed = s.fed.report()
	}
	r.lastEventID = s.lastEventIDLocked()
	return r
}

// lastEventIDLocked must be called with facts locked.
func (s *stream) lastEventIDLocked() string {
	if id, committed := s.splicer.Scanner().LastEventID(); committed {
		return printableID(id)
	}
	if id, committed := s.fed.lastID(); committed {
		return printableID(id)
	}
	if s.client.lastEventID != nil {
		return *s.client.lastEventID
	}
	return ""
}

// tellOpened reports that a stream has been opened.
func (h *Handler) tellOpened(s *stream) {
	if c := h.logger.Check(zapcore.DebugLevel, "stream opened"); c != nil {
		c.Write(zap.Inline(openedFields(s.report())))
	}
	if h.events.ShouldEmit(eventOpened) {
		h.emit(eventOpened, openedFields(s.report()))
	}
}

// tellClosed reports that a stream has ended: in the log, and to subscribers of
// the event. The access log is written by exchange.tell.
func (h *Handler) tellClosed(r report) {
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
}

// tell adds what is known of a stream that has ended to its request's access log
// and placeholders.
func (x *exchange) tell(r *report) {
	x.adoptID(r.id)
	x.told = r
	if extra, ok := x.r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.Object("sse", figures(*r)))
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
	// A stream may outlive its configuration, and so its context; its end is still
	// reported.
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

// openedFields are the log fields of a stream that opens.
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

// closedFields are the log fields of a stream that has ended.
type closedFields report

func (r closedFields) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	if err := openedFields(r).MarshalLogObject(enc); err != nil {
		return err
	}
	r.addFigures(enc)
	return nil
}

// figures are an access log's fields about a stream, in addition to those of
// every request.
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
	if r.end.retries >= 0 {
		enc.AddInt("retries", r.end.retries)
	}
	if r.fed != nil {
		enc.AddString("run", r.fed.run)
		enc.AddBool("resumed", r.fed.resumed)
		enc.AddUint64("missed", r.fed.missed)
	}
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
