// Package caddysse is a Caddy HTTP middleware that makes Server-Sent Events
// upstreams safe in production without touching them.
//
// The text/event-stream format, event streams and their parsing are those of
// the WHATWG HTML standard, section 9.2, "Server-sent events".
package caddysse

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

func init() {
	caddy.RegisterModule(Handler{})
}

// Handler sits in front of any handler that answers with Server-Sent Events,
// `reverse_proxy` first of all, and keeps the streams alive and unbuffered.
//
// A response is a stream when its final status is 2xx but not 204, 205 or 206,
// its media type is `text/event-stream`, and its request is not HEAD. Every
// other response passes untouched. Each write of a stream is passed on and
// flushed at once; while the upstream is silent, comments are sent as
// heartbeats, only where the format allows one; headers that would have the
// stream cached, buffered or compressed are replaced.
//
// Durations are Caddy durations. Absent or 0 stands for the default, -1 for
// off where a setting can be off.
type Handler struct {
	// The label of this handler in logs, metrics and the admin API. Handlers may
	// share one.
	// Default: `sse`.
	Name string `json:"name,omitempty"`

	// What a silent stream gets so that nothing on the way takes it for dead.
	Heartbeat *Heartbeat `json:"heartbeat,omitempty"`

	// Replaces the `Cache-Control` of a stream; `keep` leaves the upstream's.
	// Default: `no-cache, no-store, no-transform`.
	CacheControl string `json:"cache_control,omitempty"`

	// `deny` puts `no-transform` into whatever `Cache-Control` results, so that
	// neither `encode` nor a CDN compresses the stream. `allow` leaves it out of
	// the default, and `encode` may compress, with a flush per write.
	// Default: `deny`.
	Compression string `json:"compression,omitempty"`

	// The reconnection time told to the client before anything else in the
	// stream. One that the upstream sends comes later and so wins.
	// Default: none is told.
	Retry *Retry `json:"retry,omitempty"`

	// Answers for an upstream that takes long to send its headers.
	// Default: off.
	EarlyStart *EarlyStart `json:"early_start,omitempty"`

	// Ends a stream whose upstream has sent nothing for this long; heartbeats do
	// not count. Default: off.
	UpstreamTimeout caddy.Duration `json:"upstream_timeout,omitempty"`

	// Ends a stream whose client takes no bytes for this long. It alone decides:
	// the server's own write timeouts do not apply to streams.
	// Default: 30s. -1: off.
	WriteTimeout caddy.Duration `json:"write_timeout,omitempty"`

	// Ends a stream whose client's host acknowledges nothing for this long after
	// something was sent. It is a setting of the connection (TCP_USER_TIMEOUT,
	// RFC 5482), which gets the shortest of its streams; it has no effect on
	// HTTP/3, Multipath TCP and Unix sockets, and is an error where the platform
	// has none.
	// Default: off.
	DeadClientTimeout caddy.Duration `json:"dead_client_timeout,omitempty"`

	// Ends resumable streams at an age. Default: off.
	MaxDuration *MaxDuration `json:"max_duration,omitempty"`

	// How resumable streams end on config reload and on exit.
	Drain *Drain `json:"drain,omitempty"`

	// How many streams may be open under this name; more get a 503. Resumable
	// requests reserve a place before the upstream is called, others are counted
	// at their headers. Default: no limit.
	MaxStreams int `json:"max_streams,omitempty"`

	// How many streams a client may have open under this name; more get a 429.
	// A client is Caddy's client IP, an IPv6 one its /64. Default: no limit.
	MaxStreamsPerClient int `json:"max_streams_per_client,omitempty"`

	// Statuses that an EventSource would take for final. A resumable request
	// gets an empty stream with a reconnection time instead, whether the status
	// comes from the upstream, from an error of another handler or from the
	// limits above. 401 and 403 can't be listed, nor can anything that is not an
	// error.
	ReconnectOn []int `json:"reconnect_on,omitempty"`

	ctx     caddy.Context
	logger  *zap.Logger
	events  *caddyevents.App
	group   *group
	warned  *warnings
	agenda  *agenda
	drain   *drain
	frames  frames
	headers headerPolicy
	limits  limits

	writeTimeout, upstreamTimeout, deadClientTimeout time.Duration // 0: off
}

// Heartbeat says when a silent stream gets a frame, and what the frame is.
type Heartbeat struct {
	// A frame goes out before the client has heard nothing for this long; bytes
	// of the upstream, comments too, restart the clock. The wait is drawn for
	// each frame from the last quarter below the interval, so that streams that
	// were opened together do not tick together. Default: 15s. -1: off.
	Interval caddy.Duration `json:"interval,omitempty"`

	// The text of the comment, without the colon. No line break, no NUL.
	// Default: `heartbeat`.
	Comment string `json:"comment,omitempty"`

	// `block`: a comment line and a blank line; inside an unfinished event the
	// comment line alone. `line`: the comment line alone. `event`: an event, at
	// event boundaries only. Default: `block`.
	Style string `json:"style,omitempty"`

	// The name of the heartbeat event. Required by style `event`, and only used
	// there. No line break, no NUL.
	Event string `json:"event,omitempty"`

	// The data of the heartbeat event, one line. Only used by style `event`.
	// Default: empty.
	Data string `json:"data,omitempty"`

	// The first frame of a stream comes after this much silence behind the
	// response headers (or after the interval, where that is shorter), so that
	// intermediaries let the headers go. Default: 1s, or off where the interval
	// is off. -1: off.
	Prelude caddy.Duration `json:"prelude,omitempty"`
}

// EarlyStart says when a stream begins without its upstream's headers. The
// client is answered 200 and text/event-stream with the headers that the site
// itself has set; the upstream's are lost.
type EarlyStart struct {
	// How long to wait for the upstream's headers. -1: off.
	Delay caddy.Duration `json:"delay,omitempty"`

	// Do so for every request, not only for those whose Accept names
	// text/event-stream and no other type.
	Any bool `json:"any,omitempty"`
}

// MaxDuration is an age at which streams end.
type MaxDuration struct {
	// The age. -1: off.
	Duration caddy.Duration `json:"duration,omitempty"`

	// A random part of this comes on top for each stream. Default, and -1: none.
	Jitter caddy.Duration `json:"jitter,omitempty"`
}

// Drain says over which time streams are ended, one by one and evenly.
type Drain struct {
	// The window on config reload. Default: 10s. -1: nobody is ended, on exit
	// neither unless exit is given.
	Reload caddy.Duration `json:"reload,omitempty"`

	// The window when the process exits. Default: 3s. -1: nobody is ended.
	Exit caddy.Duration `json:"exit,omitempty"`
}

// Retry is a range of reconnection times; each stream is told a random one in
// it, so that clients that lost their streams together do not return together.
type Retry struct {
	// The shortest reconnection time, at least one millisecond. Default, and -1:
	// none is told.
	Min caddy.Duration `json:"min,omitempty"`

	// The longest reconnection time. Default, and -1: min.
	Max caddy.Duration `json:"max,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.sse",
		New: func() caddy.Module { return new(Handler) },
	}
}

// The defaults of the configuration.
const (
	defaultName              = "sse"
	defaultHeartbeatInterval = 15 * time.Second
	defaultHeartbeatComment  = "heartbeat"
	defaultPrelude           = time.Second
	defaultWriteTimeout      = 30 * time.Second
	defaultReloadWindow      = 10 * time.Second
	defaultExitWindow        = 3 * time.Second

	// off is how JSON says that something with a default is not wanted.
	off = caddy.Duration(-1)
)

// Provision fills in the defaults. The configuration does not change after it.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.ctx = ctx
	h.logger = ctx.Logger()
	h.warned = new(warnings)
	if h.Name == "" {
		h.Name = defaultName
	}
	h.frames = newFrames(h.Heartbeat, h.Retry)
	h.headers = newHeaderPolicy(h.CacheControl, h.Compression)
	h.limits = limits{total: max(h.MaxStreams, 0), perClient: max(h.MaxStreamsPerClient, 0)}
	h.writeTimeout = orDefault(h.WriteTimeout, defaultWriteTimeout)
	h.upstreamTimeout = orDefault(h.UpstreamTimeout, 0)
	h.deadClientTimeout = orDefault(h.DeadClientTimeout, 0)
	h.agenda = new(agenda)
	if h.upstreamTimeout > 0 {
		h.agenda.pulse = max(min(h.upstreamTimeout/4, maxPulse), minPulse)
	}
	h.drain = newDrain(h.Drain)

	h.group = live.group(h.Name)
	if h.limits.perClient > 0 {
		h.group.countClients()
	}
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server.RegisterOnShutdown(h.drainStreams)
		server.RegisterOnStop(endWhatIsLeft)
		server.RegisterConnContext(peer.WithAccepted)
		if h.deadClientTimeout > 0 {
			server.RegisterConnContext(peer.WithConn)
		}
	}

	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("sse: getting the events app: %w", err)
	}
	h.events = events.(*caddyevents.App)
	return registerMetrics(ctx.GetMetricsRegistry())
}

// orDefault reads a duration of the configuration; 0 comes back for off.
func orDefault(d caddy.Duration, absent time.Duration) time.Duration {
	switch d {
	case 0:
		return absent
	case off:
		return 0
	}
	return time.Duration(d)
}

// Validate reports the first setting that can't be kept to.
func (h *Handler) Validate() error {
	for _, err := range []error{
		h.Heartbeat.validate(),
		validateCacheControl(h.CacheControl),
		validateCompression(h.Compression),
		h.Retry.validate(),
		h.EarlyStart.validate(),
		validateDuration("upstream_timeout", h.UpstreamTimeout),
		validateDuration("write_timeout", h.WriteTimeout),
		validateDeadClientTimeout(h.DeadClientTimeout),
		h.MaxDuration.validate(),
		h.Drain.validate(),
		validateLimit("max_streams", h.MaxStreams),
		validateLimit("max_streams_per_client", h.MaxStreamsPerClient),
		validateReconnectOn(h.ReconnectOn),
	} {
		if err != nil {
			return err
		}
	}
	return nil
}

func (hb *Heartbeat) validate() error {
	if hb == nil {
		return nil
	}
	if err := validateMilliseconds("heartbeat", hb.Interval); err != nil {
		return err
	}
	if err := validateMilliseconds("prelude", hb.Prelude); err != nil {
		return err
	}
	if err := validateLine("heartbeat", "comment", hb.Comment); err != nil {
		return err
	}
	return validateStyle(hb.Style, hb.Event, hb.Data)
}

func (r *Retry) validate() error {
	if r == nil {
		return nil
	}
	if err := validateMilliseconds("retry", r.Min); err != nil {
		return err
	}
	if err := validateDuration("retry", r.Max); err != nil {
		return err
	}
	if r.Max > 0 && r.Min <= 0 {
		return fmt.Errorf("sse: retry: the maximum %q needs a minimum", time.Duration(r.Max))
	}
	if r.Max > 0 && r.Max < r.Min {
		return fmt.Errorf("sse: retry: the minimum %q is above the maximum %q", time.Duration(r.Min), time.Duration(r.Max))
	}
	return nil
}

func (e *EarlyStart) validate() error {
	if e == nil {
		return nil
	}
	return validateDuration("early_start", e.Delay)
}

func (m *MaxDuration) validate() error {
	if m == nil {
		return nil
	}
	if m.Jitter > 0 && m.Duration <= 0 {
		return errors.New("sse: max_duration: a jitter needs a duration that it comes on top of")
	}
	if err := validateDuration("max_duration: jitter", m.Jitter); err != nil {
		return err
	}
	return validateDuration("max_duration", m.Duration)
}

func (dr *Drain) validate() error {
	if dr == nil {
		return nil
	}
	if err := validateDuration("drain", dr.Reload); err != nil {
		return err
	}
	return validateDuration("drain: exit", dr.Exit)
}

func validateDeadClientTimeout(d caddy.Duration) error {
	if err := validateDuration("dead_client_timeout", d); err != nil {
		return err
	}
	if d > 0 {
		if err := peer.CheckUserTimeout(); err != nil {
			return fmt.Errorf("sse: dead_client_timeout: %w; leave it out or set it to off", err)
		}
	}
	return nil
}

func validateLimit(setting string, n int) error {
	if n < -1 {
		return fmt.Errorf("sse: %s: %d is not a number of streams", setting, n)
	}
	return nil
}

func validateReconnectOn(statuses []int) error {
	for _, status := range statuses {
		switch {
		case status == http.StatusUnauthorized || status == http.StatusForbidden:
			return fmt.Errorf("sse: reconnect_on: %d can't be listed: it says who may not come, and coming back would not change it", status)
		case status == http.StatusNoContent:
			return fmt.Errorf("sse: reconnect_on: 204 can't be listed: with it an upstream tells an EventSource to stop")
		case status < 400 || status > 599:
			return fmt.Errorf("sse: reconnect_on: %d can't be listed: it is no error status (400 to 599)", status)
		}
	}
	return nil
}

// validateDuration accepts the default (0), off (-1) and positive durations.
func validateDuration(setting string, d caddy.Duration) error {
	if d < 0 && d != off {
		return fmt.Errorf("sse: %s: %q is not a positive duration; -1 stands for off", setting, time.Duration(d))
	}
	return nil
}

// validateMilliseconds accepts what validateDuration does, but not what is below the
// unit of a reconnection time, nor a silence so short that frames would be all
// that is sent.
func validateMilliseconds(setting string, d caddy.Duration) error {
	if err := validateDuration(setting, d); err != nil {
		return err
	}
	if d > 0 && time.Duration(d) < time.Millisecond {
		return fmt.Errorf("sse: %s: %q is below one millisecond", setting, time.Duration(d))
	}
	return nil
}

// validateLine refuses what would not stay one line of an event stream.
func validateLine(setting, what, text string) error {
	if strings.ContainsAny(text, "\r\n\x00") {
		return fmt.Errorf("sse: %s: the %s %q has a line break or a NUL; it must be one line of text", setting, what, text)
	}
	return nil
}

func validateStyle(style, event, data string) error {
	switch style {
	case styleEvent:
		if event == "" {
			return errors.New("sse: heartbeat_style: event needs the name of the event: event <name> [<data>]")
		}
		if err := validateLine("heartbeat_style", "event name", event); err != nil {
			return err
		}
		return validateLine("heartbeat_style", "data", data)
	case "", styleBlock, styleLine:
		if event != "" || data != "" {
			return fmt.Errorf("sse: heartbeat_style: an event name or data goes with style %s only", styleEvent)
		}
		return nil
	default:
		return fmt.Errorf("sse: heartbeat_style: unknown style %q; it is one of %s, %s, %s", style, styleBlock, styleLine, styleEvent)
	}
}

func validateCacheControl(value string) error {
	return validateLine("cache_control", "value", value)
}

func validateCompression(value string) error {
	switch value {
	case "", compressionAllow, compressionDeny:
		return nil
	}
	return fmt.Errorf("sse: compression: unknown value %q; it is %s or %s", value, compressionAllow, compressionDeny)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
