package caddysse

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("sse", parseCaddyfile)
	// Inside encode, so that what this module writes goes through the encoder.
	httpcaddyfile.RegisterDirectiveOrder("sse", httpcaddyfile.After, "encode")
}

func parseCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h := new(Handler)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	return h, nil
}

// subdirective is one line of the directive's block.
type subdirective struct {
	usage            string // its arguments, for people
	minArgs, maxArgs int
	set              func(h *Handler, args []string) error
}

// subdirectives are the grammar below as a table.
var subdirectives = map[string]subdirective{
	"name":            {"<name>", 1, 1, setName},
	"heartbeat":       {"<interval>|off [<comment>]", 1, 2, setHeartbeat},
	"heartbeat_style": {"auto|block|line [pad <size>], or event <name> [<data>]", 1, 3, setHeartbeatStyle},
	"prelude":         {"<delay>|off", 1, 1, setPrelude},
	"cache_control":   {"<value>|keep", 1, 1, setCacheControl},
	"compression":     {"allow|deny", 1, 1, setCompression},
	"retry":           {"<min> [<max>]", 1, 2, setRetry},

	"early_start":         {"<delay> [any]", 1, 2, setEarlyStart},
	"upstream_timeout":    {"<duration>|off", 1, 1, setUpstreamTimeout},
	"write_timeout":       {"<duration>|off", 1, 1, setWriteTimeout},
	"dead_client_timeout": {"<duration>|off", 1, 1, setDeadClientTimeout},
	"max_duration":        {"<duration> [<jitter>]", 1, 2, setMaxDuration},
	"drain":               {"<reload_window>|off [<exit_window>]", 1, 2, setDrain},
	"resumable":           {"auto|always|never", 1, 1, setResumable},

	"max_streams":            {"<n>", 1, 1, setMaxStreams},
	"max_streams_per_client": {"<n> [<key>]", 1, 2, setMaxStreamsPerClient},
	"reconnect_on":           {"<status...>", 1, math.MaxInt, setReconnectOn},

	"upstream_retry": {"<window> [live]", 1, 2, setUpstreamRetry},

	"resume": {"<window> [any]", 1, 2, setResume},
	"share":  {"[<header|placeholder>...]", 0, math.MaxInt, setShare},
}

// blocks are the subdirectives that take a block, with the grammar of it.
var blocks = map[string]map[string]subdirective{
	"resume": resumeSubdirectives,
	"share":  shareSubdirectives,
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	sse [<matcher>] [<heartbeat_interval>] {
//		name            <name>
//		heartbeat       <interval>|off [<comment>]
//		heartbeat_style auto|block|line [pad <size>]
//		heartbeat_style event <name> [<data>]
//		prelude         <delay>|off
//		cache_control   <value>|keep
//		compression     allow|deny
//		retry           <min> [<max>]
//
//		early_start         <delay> [any]
//		upstream_timeout    <duration>|off
//		write_timeout       <duration>|off
//		dead_client_timeout <duration>|off
//		max_duration        <duration> [<jitter>]
//		drain               <reload_window>|off [<exit_window>]
//		resumable           auto|always|never
//
//		max_streams            <n>
//		max_streams_per_client <n> [<key>]
//		reconnect_on           <status...>
//
//		upstream_retry <window> [live]
//
//		resume <window> [any] {
//			history  <size> [<total>]
//			bind     <placeholder...>
//			cancel   <duration>
//			detached <n>
//			run_for  <duration>
//			lost     <event>|off
//			store    <name> { ... }
//		}
//		share [<header|placeholder>...] {
//			join    live|last <n>
//			history <size> [<total>]
//			linger  <duration>
//			run_for <duration>
//			lost    <event>|off
//		}
//	}
//
// What can be checked is checked here, where the line is known.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume directive name
	given := make(map[string]bool)
	heartbeat := *d // where its settings are
	if args := d.RemainingArgs(); len(args) > 1 {
		return d.Errf("sse: want at most one argument after the matcher, the heartbeat interval; got %q", args)
	} else if len(args) == 1 {
		interval, err := parseDuration("heartbeat interval", args[0])
		if err != nil {
			return d.WrapErr(err)
		}
		if err := validateMilliseconds("heartbeat interval", interval); err != nil {
			return d.WrapErr(err)
		}
		h.heartbeat().Interval = interval
		given["heartbeat"] = true
	}
	for d.NextBlock(0) {
		name := d.Val()
		if name == "heartbeat" {
			heartbeat = *d
		}
		if err := h.unmarshalSubdirective(d, name, subdirectives, given); err != nil {
			return err
		}
		block := blocks[name]
		if block == nil && d.NextBlock(d.Nesting()) {
			return d.Errf("sse: %s takes no block", name)
		}
		inner := make(map[string]bool)
		for nesting := d.Nesting(); block != nil && d.NextBlock(nesting); {
			setting := d.Val()
			if name == "resume" && setting == "store" {
				if err := h.unmarshalStore(d); err != nil {
					return err
				}
				continue
			}
			if err := h.unmarshalSubdirective(d, setting, block, inner); err != nil {
				return err
			}
			if d.NextBlock(d.Nesting()) {
				return d.Errf("sse: %s: %s takes no block", name, setting)
			}
		}
	}
	for _, err := range []error{h.Resume.validate(h.Resumable, h.Share != nil), h.Share.validate(h.Resumable)} {
		if err != nil {
			return d.WrapErr(err)
		}
	}
	// Whether a comment is ever sent depends on all of these settings together.
	if err := h.Heartbeat.validate(); err != nil {
		return heartbeat.WrapErr(err)
	}
	return nil
}

// unmarshalSubdirective reads one line of a block.
func (h *Handler) unmarshalSubdirective(d *caddyfile.Dispenser, name string, grammar map[string]subdirective, given map[string]bool) error {
	sub, known := grammar[name]
	if !known {
		return d.Errf("sse: unknown subdirective %q; there are %s", name, strings.Join(slices.Sorted(maps.Keys(grammar)), ", "))
	}
	if given[name] {
		return d.Errf("sse: %s is set twice; keep one of the two", name)
	}
	given[name] = true
	args := d.RemainingArgs()
	if len(args) < sub.minArgs || len(args) > sub.maxArgs {
		return d.Errf("sse: %s: wrong number of arguments (%d); usage: %s %s", name, len(args), name, sub.usage)
	}
	if slices.Contains(args, "") {
		return d.Errf("sse: %s: \"\" is an empty argument; leave it out for the default", name)
	}
	if err := sub.set(h, args); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func setName(h *Handler, args []string) error {
	h.Name = args[0]
	return validateGlobals("name", "name", h.Name)
}

func setHeartbeat(h *Handler, args []string) (err error) {
	hb := h.heartbeat()
	if hb.Interval, err = parseDurationOrOff("heartbeat", args[0]); err != nil {
		return err
	}
	if err := validateMilliseconds("heartbeat", hb.Interval); err != nil {
		return err
	}
	if len(args) > 1 {
		hb.Comment = args[1]
	}
	return validateText("heartbeat", "comment", hb.Comment)
}

func setHeartbeatStyle(h *Handler, args []string) (err error) {
	hb := h.heartbeat()
	hb.Style = args[0]
	switch {
	case hb.Style == styleEvent:
		if len(args) > 1 {
			hb.Event = args[1]
		}
		if len(args) > 2 {
			hb.Data = args[2]
		}
	case len(args) == 3 && args[1] == "pad":
		if hb.Pad, err = parseSize("heartbeat_style: pad", args[2]); err != nil {
			return err
		}
	case len(args) > 1:
		return fmt.Errorf("sse: heartbeat_style: %q is unknown after %s; pad <size> may follow it", args[1], hb.Style)
	}
	if err := validateStyle(hb.Style, hb.Event, hb.Data); err != nil {
		return err
	}
	return validatePad(hb.Style, hb.Pad)
}

func setPrelude(h *Handler, args []string) (err error) {
	if h.heartbeat().Prelude, err = parseDurationOrOff("prelude", args[0]); err != nil {
		return err
	}
	return validateMilliseconds("prelude", h.Heartbeat.Prelude)
}

func setCacheControl(h *Handler, args []string) error {
	h.CacheControl = args[0]
	return validateCacheControl(h.CacheControl)
}

func setCompression(h *Handler, args []string) error {
	h.Compression = args[0]
	return validateCompression(h.Compression)
}

func setRetry(h *Handler, args []string) (err error) {
	h.Retry = new(Retry)
	if h.Retry.Min, err = parseDuration("retry", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if h.Retry.Max, err = parseDuration("retry", args[1]); err != nil {
			return err
		}
	}
	return h.Retry.validate()
}

func setEarlyStart(h *Handler, args []string) (err error) {
	h.EarlyStart = new(EarlyStart)
	if h.EarlyStart.Delay, err = parseDuration("early_start", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if args[1] != "any" {
			return fmt.Errorf("sse: early_start: %q is unknown here; the one word that may follow the delay is any", args[1])
		}
		h.EarlyStart.Any = true
	}
	return nil
}

func setUpstreamTimeout(h *Handler, args []string) (err error) {
	h.UpstreamTimeout, err = parseDurationOrOff("upstream_timeout", args[0])
	return err
}

func setWriteTimeout(h *Handler, args []string) (err error) {
	h.WriteTimeout, err = parseDurationOrOff("write_timeout", args[0])
	return err
}

func setDeadClientTimeout(h *Handler, args []string) (err error) {
	if h.DeadClientTimeout, err = parseDurationOrOff("dead_client_timeout", args[0]); err != nil {
		return err
	}
	return validateDeadClientTimeout(h.DeadClientTimeout)
}

func setMaxDuration(h *Handler, args []string) (err error) {
	h.MaxDuration = new(MaxDuration)
	if h.MaxDuration.Duration, err = parseDuration("max_duration", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		h.MaxDuration.Jitter, err = parseDuration("max_duration", args[1])
	}
	return err
}

func setDrain(h *Handler, args []string) (err error) {
	h.Drain = new(Drain)
	if h.Drain.Reload, err = parseDurationOrOff("drain", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		h.Drain.Exit, err = parseDuration("drain", args[1])
	}
	return err
}

func setResumable(h *Handler, args []string) error {
	h.Resumable = args[0]
	return validateResumable(h.Resumable)
}

func setMaxStreams(h *Handler, args []string) (err error) {
	h.MaxStreams, err = parseCount("max_streams", args[0])
	return err
}

func setMaxStreamsPerClient(h *Handler, args []string) (err error) {
	if h.MaxStreamsPerClient, err = parseCount("max_streams_per_client", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		h.ClientKey = args[1]
	}
	return validateClientKey(h.ClientKey, h.MaxStreamsPerClient)
}

func setReconnectOn(h *Handler, args []string) error {
	for _, arg := range args {
		status, err := strconv.Atoi(arg)
		if err != nil {
			return fmt.Errorf("sse: reconnect_on: %q is not a status code%s", arg, tooLate(arg))
		}
		h.ReconnectOn = append(h.ReconnectOn, status)
	}
	return validateReconnectOn(h.ReconnectOn)
}

func setUpstreamRetry(h *Handler, args []string) (err error) {
	h.UpstreamRetry = new(UpstreamRetry)
	if h.UpstreamRetry.Window, err = parseDuration("upstream_retry", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if args[1] != "live" {
			return fmt.Errorf("sse: upstream_retry: %q is unknown here; the one word that may follow the window is live", args[1])
		}
		h.UpstreamRetry.Live = true
	}
	return nil
}

func (h *Handler) heartbeat() *Heartbeat {
	if h.Heartbeat == nil {
		h.Heartbeat = new(Heartbeat)
	}
	return h.Heartbeat
}

// parseCount wants a positive number.
func parseCount(setting, value string) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("sse: %s: %q is not a positive number%s", setting, value, tooLate(value))
	}
	return n, nil
}

// parseSize wants a positive number of bytes, as Caddy's request_body does.
func parseSize(setting, value string) (int, error) {
	n, err := humanize.ParseBytes(value)
	if err != nil || n == 0 || n > math.MaxInt32 {
		return 0, fmt.Errorf("sse: %s: %q is not a positive size such as 4096, 4KiB or 64KB%s", setting, value, tooLate(value))
	}
	return int(n), nil
}

// parseTotal is parseSize for a total.
func parseTotal(setting, value string) (int, error) {
	n, err := humanize.ParseBytes(value)
	if err != nil || n == 0 || n > math.MaxInt {
		return 0, fmt.Errorf("sse: %s: %q is not a positive size such as 64MiB or 1GB%s", setting, value, tooLate(value))
	}
	return int(n), nil
}

// parseDuration wants a positive duration.
func parseDuration(setting, value string) (caddy.Duration, error) {
	d, err := caddy.ParseDuration(value)
	if err != nil {
		return 0, fmt.Errorf("sse: %s: %q is not a duration such as 500ms, 15s or 1h%s", setting, value, tooLate(value))
	}
	if d <= 0 {
		return 0, fmt.Errorf("sse: %s: %q is not a positive duration", setting, value)
	}
	return caddy.Duration(d), nil
}

// tooLate is a hint for values that are a placeholder: Caddy replaces
// placeholders only after it has read the Caddyfile, but {$NAME} before.
func tooLate(value string) string {
	name, ok := strings.CutPrefix(value, "{env.")
	if name, closed := strings.CutSuffix(name, "}"); ok && closed {
		return fmt.Sprintf("; an environment variable is written {$%s} here", name)
	}
	if hasPlaceholder(value) {
		return "; placeholders can't be used here"
	}
	return ""
}

// parseDurationOrOff wants a positive duration or the word off.
func parseDurationOrOff(setting, value string) (caddy.Duration, error) {
	if value == "off" {
		return off, nil
	}
	d, err := parseDuration(setting, value)
	if err != nil {
		return 0, fmt.Errorf("%w; off switches it off", err)
	}
	return d, nil
}

// Interface guards
var _ caddyfile.Unmarshaler = (*Handler)(nil)
