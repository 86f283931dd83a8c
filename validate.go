package caddysse

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// Validate reports the first setting that is invalid.
func (h *Handler) Validate() error {
	for _, err := range []error{
		h.Heartbeat.validate(),
		validateCacheControl(h.CacheControl),
		validateCompression(h.Compression),
		validateGlobals("name", "name", h.Name),
		h.Retry.validate(),
		h.EarlyStart.validate(),
		validateDuration("upstream_timeout", h.UpstreamTimeout),
		validateDuration("write_timeout", h.WriteTimeout),
		validateDeadClientTimeout(h.DeadClientTimeout),
		h.MaxDuration.validate(),
		h.Drain.validate(),
		validateResumable(h.Resumable),
		validateLimit("max_streams", h.MaxStreams),
		validateLimit("max_streams_per_client", h.MaxStreamsPerClient),
		validateClientKey(h.ClientKey, h.MaxStreamsPerClient),
		validateReconnectOn(h.ReconnectOn),
		h.Resume.validate(h.Resumable, h.Share != nil),
		h.Share.validate(h.Resumable),
		h.UpstreamRetry.validate(),
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
	if err := validateText("heartbeat", "comment", hb.Comment); err != nil {
		return err
	}
	if hb.Comment != "" && hb.Interval == off && hb.Prelude <= 0 {
		return fmt.Errorf("sse: heartbeat: the comment %q is sent by no frame, since heartbeats are off", hb.Comment)
	}
	if err := validateStyle(hb.Style, hb.Event, hb.Data); err != nil {
		return err
	}
	return validatePad(hb.Style, hb.Pad)
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
	if e.Any && e.Delay <= 0 {
		return errors.New("sse: early_start: any does nothing without a delay")
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

func (u *UpstreamRetry) validate() error {
	if u == nil {
		return nil
	}
	if u.Live && u.Window <= 0 {
		return errors.New("sse: upstream_retry: live does nothing without a window")
	}
	return validateDuration("upstream_retry", u.Window)
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

// validateMilliseconds accepts what validateDuration does, except durations below
// the unit of a reconnection time, and silences so short that only frames would
// be sent.
func validateMilliseconds(setting string, d caddy.Duration) error {
	if err := validateDuration(setting, d); err != nil {
		return err
	}
	if d > 0 && time.Duration(d) < time.Millisecond {
		return fmt.Errorf("sse: %s: %q is below one millisecond", setting, time.Duration(d))
	}
	return nil
}

// validateText refuses what would not stay one line of an event stream, and
// placeholders of a request.
func validateText(setting, what, text string) error {
	if err := validateLine(setting, what, text); err != nil {
		return err
	}
	return validateGlobals(setting, what, text)
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
		if err := validateText("heartbeat_style", "event name", event); err != nil {
			return err
		}
		return validateText("heartbeat_style", "data", data)
	case "", styleAuto, styleBlock, styleLine:
		if event != "" || data != "" {
			return fmt.Errorf("sse: heartbeat_style: an event name or data goes with style %s only", styleEvent)
		}
		return nil
	default:
		return fmt.Errorf("sse: heartbeat_style: unknown style %q; it is one of %s, %s, %s, %s", style, styleAuto, styleBlock, styleLine, styleEvent)
	}
}

// maxPad is the largest padded comment: larger than any known buffer on the way.
const maxPad = 64 << 10

func validatePad(style string, pad int) error {
	switch {
	case pad < -1 || pad > maxPad:
		return fmt.Errorf("sse: heartbeat_style: pad: %d is not a size from 1 to %d bytes", pad, maxPad)
	case pad > 0 && style == styleEvent:
		return fmt.Errorf("sse: heartbeat_style: pad fills comments, and style %s sends none", styleEvent)
	}
	return nil
}

func validateCacheControl(value string) error {
	return validateText("cache_control", "value", value)
}

func validateResumable(value string) error {
	switch value {
	case "", resumableAuto, resumableAlways, resumableNever:
		return nil
	}
	return fmt.Errorf("sse: resumable: unknown value %q; it is one of %s, %s, %s", value, resumableAuto, resumableAlways, resumableNever)
}

func validateClientKey(key string, perClient int) error {
	switch {
	case key == "":
		return nil
	case perClient <= 0:
		return errors.New("sse: client_key: it does nothing without max_streams_per_client")
	case !hasPlaceholder(key):
		return fmt.Errorf("sse: client_key: %q has no placeholder, so all clients would count as one", key)
	}
	return nil
}

func validateCompression(value string) error {
	switch value {
	case "", compressionAllow, compressionDeny:
		return nil
	}
	return fmt.Errorf("sse: compression: unknown value %q; it is %s or %s", value, compressionAllow, compressionDeny)
}
