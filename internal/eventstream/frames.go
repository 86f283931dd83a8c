package eventstream

import (
	"slices"
	"strconv"
	"time"
)

// Style is the form of a heartbeat.
type Style uint8

const (
	// Block is a comment line and a blank line; inside an unfinished event just
	// the comment line. It is the zero value.
	Block Style = iota

	// Line is a comment line.
	Line

	// Event is an event with a name of its own. It goes at event boundaries only.
	Event
)

// Frames is what the bytes that are added to a stream look like. It does not
// change after it is made, so that all streams of a handler can share it.
type Frames struct {
	Style       Style
	Comment     string // without its colon; Block and Line only
	Event, Data string // Event only

	// Pad is how many bytes a comment is filled up to with spaces, line ends
	// and blank line included. A longer one stays as it is. 0: none.
	Pad int
}

// mayGo reports whether a heartbeat may go at place.
func (f *Frames) mayGo(place Place) bool {
	return place != MidLine && (f.Style != Event || place != LineStart)
}

// heartbeat appends a heartbeat for place, where one may go.
func (f *Frames) heartbeat(dst []byte, place Place, eol string) []byte {
	if f.Style == Event {
		return f.event(dst, eol)
	}
	if f.Style == Block && place != LineStart {
		return f.comment(dst, eol, eol)
	}
	return f.comment(dst, eol, "")
}

func (f *Frames) event(dst []byte, eol string) []byte {
	dst = append(dst, "event: "...)
	dst = append(dst, f.Event...)
	dst = append(dst, eol...)
	dst = append(dst, "data:"...)
	if f.Data != "" {
		dst = append(dst, ' ')
		dst = append(dst, f.Data...)
	}
	dst = append(dst, eol...)
	return append(dst, eol...)
}

func (f *Frames) comment(dst []byte, eol, blankLine string) []byte {
	end := len(dst) + f.Pad - len(eol) - len(blankLine)
	dst = append(dst, ':')
	dst = append(dst, f.Comment...)
	dst = fill(dst, end)
	dst = append(dst, eol...)
	return append(dst, blankLine...)
}

// fill appends spaces until dst has the given length.
func fill(dst []byte, length int) []byte {
	const spaces = "                                                                "
	dst = slices.Grow(dst, max(length-len(dst), 0))
	for len(dst) < length {
		dst = append(dst, spaces[:min(length-len(dst), len(spaces))]...)
	}
	return dst
}

// retry appends the field that tells the client its reconnection time. It gets
// a block of its own, as clients that split on blank lines and look at how a
// block starts would lose the first event after it; except in style Line, which
// is for clients that take a blank line for an event.
func (f *Frames) retry(dst []byte, d time.Duration, eol string) []byte {
	dst = append(dst, "retry: "...)
	dst = strconv.AppendInt(dst, d.Milliseconds(), 10)
	dst = append(dst, eol...)
	if f.Style != Line {
		dst = append(dst, eol...)
	}
	return dst
}
