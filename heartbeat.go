package caddysse

import (
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
)

const (
	styleBlock = "block"
	styleLine  = "line"
	styleEvent = "event"
)

// maxReserve bounds the part of an interval that is left for the way from a
// timer to the wire.
const maxReserve = 500 * time.Millisecond

// frames is what the configuration says of the bytes that this module adds to
// a stream: when one is due and what it looks like.
type frames struct {
	interval time.Duration // the longest silence; 0: no heartbeats
	prelude  time.Duration // silence behind the headers before the first frame; 0: none
	reserve  time.Duration // the part of the interval left for the way from a timer to the wire
	style    string
	comment  string
	event    string
	data     string

	retryMin, retryMax time.Duration // the reconnection time to tell; 0: none
}

func newFrames(hb *Heartbeat, retry *Retry) frames {
	if hb == nil {
		hb = new(Heartbeat)
	}
	f := frames{
		interval: time.Duration(hb.Interval),
		prelude:  time.Duration(hb.Prelude),
		style:    hb.Style,
		comment:  hb.Comment,
		event:    hb.Event,
		data:     hb.Data,
	}
	switch hb.Interval {
	case 0:
		f.interval = defaultHeartbeatInterval
	case off:
		f.interval = 0
	}
	switch {
	case hb.Prelude == off, hb.Prelude == 0 && f.interval == 0:
		f.prelude = 0
	case hb.Prelude == 0:
		f.prelude = defaultPrelude
	}
	if f.interval > 0 && f.prelude >= f.interval {
		f.prelude = 0 // the heartbeat comes first
	}
	f.reserve = maxReserve
	if period := max(f.interval, f.prelude); period > 0 {
		f.reserve = min(period/10, maxReserve)
	}
	if f.style == "" {
		f.style = styleBlock
	}
	if f.comment == "" {
		f.comment = defaultHeartbeatComment
	}
	if retry != nil && retry.Min > 0 {
		f.retryMin, f.retryMax = time.Duration(retry.Min), time.Duration(max(retry.Min, retry.Max))
	}
	return f
}

// wait draws how long a client may hear nothing before a frame is due: from the
// last quarter below the interval, so that streams opened together do not tick
// together, but for the reserve at its end, so that no silence exceeds it.
func (f *frames) wait() time.Duration {
	if f.interval == 0 {
		return 0
	}
	return f.interval - f.reserve - rand.N(f.interval/4-f.reserve+1)
}

// heartbeat appends the frame that may go at place, with the line ends in use;
// ok is false where none may.
func (f *frames) heartbeat(dst []byte, place eventstream.Place, eol string) (frame []byte, ok bool) {
	switch {
	case place == eventstream.MidLine:
		return dst, false
	case f.style == styleEvent:
		if place == eventstream.LineStart {
			return dst, false
		}
		dst = append(dst, "event: "...)
		dst = append(dst, f.event...)
		dst = append(dst, eol...)
		dst = append(dst, "data:"...)
		if f.data != "" {
			dst = append(dst, ' ')
			dst = append(dst, f.data...)
		}
		dst = append(dst, eol...)
		return append(dst, eol...), true
	}
	dst = append(dst, ':')
	dst = append(dst, f.comment...)
	dst = append(dst, eol...)
	if f.style == styleBlock && place != eventstream.LineStart {
		dst = append(dst, eol...)
	}
	return dst, true
}

// retry appends the field that tells the client its reconnection time. It gets
// a block of its own, as clients that split on blank lines and look at how a
// block starts would lose the first event behind it; except in style `line`,
// which is for clients that take a blank line for an event.
func (f *frames) retry(dst []byte, eol string) []byte {
	reconnectIn := f.retryMin + rand.N(f.retryMax-f.retryMin+1)
	dst = append(dst, "retry: "...)
	dst = strconv.AppendInt(dst, reconnectIn.Milliseconds(), 10)
	dst = append(dst, eol...)
	if f.style != styleLine {
		dst = append(dst, eol...)
	}
	return dst
}
