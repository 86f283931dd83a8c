// Package caddysse is a Caddy HTTP middleware that makes Server-Sent Events
// upstreams safe in production, without changes to the upstreams.
//
// The text/event-stream format, event streams and their parsing are those of the
// WHATWG HTML standard, section 9.2, "Server-sent events".
package caddysse

import (
	"fmt"
	"sync/atomic"
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
// its media type is `text/event-stream`, and its request is not HEAD. Every other
// response passes untouched. Each write of a stream is passed on and flushed at
// once. While the upstream is silent, comments are sent as heartbeats, only where
// the format allows one. Headers that would cause the stream to be cached,
// buffered or compressed are replaced.
//
// Durations are Caddy durations. Absent or 0 means the default, -1 means off for
// settings that can be off. Global placeholders, such as `{env.NAME}` and
// `{file./path}`, are replaced once, when the configuration is loaded. Caddy
// leaves unknown ones as they are; if the result is empty, the default applies.
type Handler struct {
	// The label of this handler in logs, metrics and the admin API. Handlers with
	// the same name share their limits. Takes global placeholders.
	// Default: `sse`.
	Name string `json:"name,omitempty"`

	// What a silent stream gets, so that nothing on the way treats it as dead.
	Heartbeat *Heartbeat `json:"heartbeat,omitempty"`

	// Replaces the `Cache-Control` of a stream; `keep` leaves the upstream's.
	// Takes global placeholders.
	// Default: `no-cache, no-store, no-transform`.
	CacheControl string `json:"cache_control,omitempty"`

	// `deny` adds `no-transform` to `Cache-Control`, whatever its value, so that
	// neither `encode` nor a CDN compresses the stream. `allow` leaves it out of
	// the default value, and `encode` may compress, with a flush per write.
	// Default: `deny`.
	Compression string `json:"compression,omitempty"`

	// The reconnection time that is sent to the client of a resumable stream before
	// anything else in it. If the upstream sends one too, that comes later and
	// wins.
	// Default: none is sent.
	Retry *Retry `json:"retry,omitempty"`

	// Answers the client when the upstream takes long to send its headers.
	// Default: off.
	EarlyStart *EarlyStart `json:"early_start,omitempty"`

	// Ends a stream whose upstream has sent nothing for this long; heartbeats do
	// not count. Default: off.
	UpstreamTimeout caddy.Duration `json:"upstream_timeout,omitempty"`

	// Ends a stream whose client takes no bytes for this long. The server's own
	// write timeouts do not apply to streams.
	// Default: 30s. -1: off.
	WriteTimeout caddy.Duration `json:"write_timeout,omitempty"`

	// Ends a stream whose client's host acknowledges nothing for this long after
	// something was sent. It is a setting of the connection (TCP_USER_TIMEOUT, RFC
	// 5482), which gets the shortest value of its streams. It has no effect on
	// HTTP/3, Multipath TCP and Unix sockets, and is an error on platforms without
	// it.
	// Default: off.
	DeadClientTimeout caddy.Duration `json:"dead_client_timeout,omitempty"`

	// Ends resumable streams at an age. Default: off.
	MaxDuration *MaxDuration `json:"max_duration,omitempty"`

	// How resumable streams end on config reload and on exit.
	Drain *Drain `json:"drain,omitempty"`

	// Which streams are resumable, that is, belong to clients that open a stream
	// again by themselves when it breaks. `auto`: those of GET requests whose
	// `Accept` names `text/event-stream` and no other type. `always`: those of all
	// GET requests. `never`: none. Requests with `Mcp-Session-Id`,
	// `MCP-Protocol-Version` or `Mcp-Method` are never resumable. Default: `auto`.
	Resumable string `json:"resumable,omitempty"`

	// Maximum open streams under this name; further requests get a 503. Resumable
	// requests count before the upstream is called, others when their response
	// headers arrive. Default: no limit.
	MaxStreams int `json:"max_streams,omitempty"`

	// Maximum open streams of one client under this name; further requests get a
	// 429. Clients are told apart by Caddy's client IP, an IPv6 one by its /64.
	// Default: no limit.
	MaxStreamsPerClient int `json:"max_streams_per_client,omitempty"`

	// Tells clients apart for that limit, instead of their address: a text with
	// placeholders, such as `{http.auth.user.id}`, with its value when the request
	// arrives. If that is empty, the address counts. The key never appears in an
	// answer, a label or a log.
	ClientKey string `json:"client_key,omitempty"`

	// Error statuses after which an EventSource would not reconnect. It gets an
	// empty stream with a reconnection time instead (a Retry-After is added to
	// that), whether the status comes from the upstream, from an error of another
	// handler or from the limits above. 401 and 403 can't be listed, nor can
	// statuses that are not errors.
	ReconnectOn []int `json:"reconnect_on,omitempty"`

	// Repeats the request to the upstream of a resumable stream when that breaks
	// off, while the client stays connected. Default: off.
	UpstreamRetry *UpstreamRetry `json:"upstream_retry,omitempty"`

	// Lets clients that reconnect continue their stream. Default: off.
	Resume *Resume `json:"resume,omitempty"`

	// One upstream stream for all clients that request the same. Default: off.
	Share *Share `json:"share,omitempty"`

	ctx     caddy.Context
	logger  *zap.Logger
	events  *caddyevents.App
	group   *group
	warned  *warnings
	agenda  *agenda
	drain   *drain
	frames  frames
	spared  *sparedFrames // nil: all clients get the same
	headers headerPolicy
	limits  limits
	sharing *sharing // nil: off

	resuming *resuming // nil: off
	lost     lostEvent // of resume or share

	// foreignIDs: an upstream has sent ids of the form that this module adds, so
	// ids that belong to no known run are the upstream's.
	foreignIDs *atomic.Bool

	writeTimeout, upstreamTimeout, deadClientTimeout time.Duration // 0: off
}

// Heartbeat says when a silent stream gets a frame, and what the frame is.
type Heartbeat struct {
	// The longest time in which the client receives nothing, except where no frame
	// is allowed. Any bytes from the upstream, comments included, restart the
	// clock. Waits vary between 75 % and 100 % of the interval, so that streams
	// that opened together do not send their frames together. Default: 15s. -1:
	// off.
	Interval caddy.Duration `json:"interval,omitempty"`

	// The text of the comment, without the colon. No line break, no NUL. Takes
	// global placeholders.
	// Default: `heartbeat`.
	Comment string `json:"comment,omitempty"`

	// `auto`: `block`, except for clients that are known to fail on it and can be
	// recognised. `block`: a comment line and a blank line; inside an unfinished
	// event only the comment line. `line`: only the comment line. `event`: an
	// event, at event boundaries only. Default: `auto`.
	Style string `json:"style,omitempty"`

	// Fills each comment with spaces to this many bytes in total, line ends and
	// blank line included, for intermediaries that hold back anything smaller. At
	// most 65536. Not with style `event`. Default, and -1: none.
	Pad int `json:"pad,omitempty"`

	// The name of the heartbeat event. Required by style `event`, and only used
	// there. No line break, no NUL. Takes global placeholders.
	Event string `json:"event,omitempty"`

	// The data of the heartbeat event, one line. Only used by style `event`. Takes
	// global placeholders.
	// Default: empty.
	Data string `json:"data,omitempty"`

	// The first frame of a stream comes after this much silence after the response
	// headers (or after the interval, if that is shorter), so that intermediaries
	// forward the headers. Default: 1s, or off if the interval is off. -1: off.
	Prelude caddy.Duration `json:"prelude,omitempty"`
}

// EarlyStart says when a stream begins without its upstream's headers. The client
// gets 200 and text/event-stream, with the headers that the site itself has set;
// the upstream's are lost.
type EarlyStart struct {
	// How long to wait for the upstream's headers. -1: off.
	Delay caddy.Duration `json:"delay,omitempty"`

	// Also for all other requests except OPTIONS and HEAD, not only for those whose
	// Accept names text/event-stream and no other type, or whose JSON body has
	// "stream": true at its top level.
	Any bool `json:"any,omitempty"`
}

// MaxDuration is an age at which streams end.
type MaxDuration struct {
	// The age. -1: off.
	Duration caddy.Duration `json:"duration,omitempty"`

	// A random part of this is added for each stream. Default, and -1: none.
	Jitter caddy.Duration `json:"jitter,omitempty"`
}

// Drain says over which time streams are ended, one by one and evenly.
type Drain struct {
	// The window on config reload. Default: 10s. -1: no stream is ended, not even
	// on exit unless exit is given.
	Reload caddy.Duration `json:"reload,omitempty"`

	// The window when the process exits. Default: 3s. -1: no stream is ended.
	Exit caddy.Duration `json:"exit,omitempty"`
}

// Retry is a range of reconnection times. Each stream gets a random one from it,
// so that clients that lost their streams together do not reconnect together.
type Retry struct {
	// The shortest reconnection time, at least one millisecond. Default, and -1:
	// none is sent.
	Min caddy.Duration `json:"min,omitempty"`

	// The longest reconnection time. Default, and -1: min.
	Max caddy.Duration `json:"max,omitempty"`
}

// UpstreamRetry says for how long the request to an upstream that has broken off
// is repeated. It is for resumable requests without a body whose stream has
// opened. When the upstream aborts, its connection fails or it is silent for
// `upstream_timeout`, at an event boundary, the client stays connected and gets
// heartbeats. The handlers after this one run again, with `Last-Event-ID` set to
// the last ID of the upstream (HTML Standard, section 9.2.4), and the stream
// continues with what they send. If the upstream ends its response cleanly, the
// stream ends.
//
// The wait before the first try is the reconnection time that the client was
// sent, else one second. It doubles up to 10 seconds while tries bring no event,
// varies between half of that and all of it, and respects `Retry-After`. All
// streams of a name together make at most 64 tries a second. An answer that is
// not a stream ends the stream, except for 502, 503 and 504.
type UpstreamRetry struct {
	// The tries of a stream end this long after the first one, unless one brings an
	// event. -1: off.
	Window caddy.Duration `json:"window,omitempty"`

	// Also retry if there is no ID to continue from, because the upstream sends
	// none: what it sends in the meantime is lost, and the client is not told.
	Live bool `json:"live,omitempty"`
}

// window is 0 if nothing is retried.
func (u *UpstreamRetry) window() time.Duration {
	if u == nil {
		return 0
	}
	return max(time.Duration(u.Window), 0)
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

	// off is the JSON value that switches off a setting with a default.
	off = caddy.Duration(-1)
)

// Provision fills in the defaults. The configuration does not change after it.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.ctx = ctx
	h.logger = ctx.Logger()
	h.warned = new(warnings)
	texts, err := h.replaceGlobals()
	if err != nil {
		return err
	}
	if h.Name = texts.name; h.Name == "" {
		h.Name = defaultName
	}
	h.frames = newFrames(&texts.heartbeat, h.Retry)
	if texts.heartbeat.Style == "" || texts.heartbeat.Style == styleAuto {
		h.spared = newSparedFrames(texts.heartbeat, h.Retry)
	}
	h.headers = newHeaderPolicy(texts.cacheControl, h.Compression)
	h.limits = limits{total: max(h.MaxStreams, 0), perClient: max(h.MaxStreamsPerClient, 0)}
	h.writeTimeout = orDefault(h.WriteTimeout, defaultWriteTimeout)
	h.upstreamTimeout = orDefault(h.UpstreamTimeout, 0)
	h.deadClientTimeout = orDefault(h.DeadClientTimeout, 0)
	h.agenda = new(agenda)
	if h.upstreamTimeout > 0 {
		h.agenda.pulse = max(min(h.upstreamTimeout/4, maxPulse), minPulse)
	}
	h.drain = newDrain(h.Drain)
	h.foreignIDs = new(atomic.Bool)

	h.group = live.group(h.Name)
	if h.sharing, err = newSharing(h, h.Share); err != nil {
		return err
	}
	if h.resuming, err = newResuming(h, ctx); err != nil {
		return err
	}
	collector.expect(h.Name, h.ReconnectOn, h.UpstreamRetry.window() > 0)
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

// orDefault returns a duration of the configuration, or a default; 0 means off.
func orDefault(d caddy.Duration, absent time.Duration) time.Duration {
	switch d {
	case 0:
		return absent
	case off:
		return 0
	}
	return time.Duration(d)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
