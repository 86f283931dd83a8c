package eventstream

import (
	"strings"
	"unicode/utf8"
)

const (
	// MaxIDLength is how many bytes of UTF-8 a last event ID may have to be
	// told in full.
	MaxIDLength = 1024

	// TooLongID stands for a last event ID longer than MaxIDLength.
	TooLongID = "(too long)"
)

// lastEventID holds the last event ID string, the last event ID buffer while
// it differs from that, and the value of an id line while it is being read:
// one after the other, so that a stream has one small allocation for its IDs.
type lastEventID struct {
	text        []byte
	committed   uint16 // where the string ends in text
	buffered    uint16 // where the buffer ends in text
	isCommitted bool   // there is a string
	isBuffered  bool   // there is a buffer
	isNew       bool   // a string has been committed since the last TakeCommit
}

func (id *lastEventID) beginLine() {
	id.text = id.text[:id.buffered]
}

// extendLine keeps one byte beyond the limit, which is enough to see that the
// value is too long.
func (id *lastEventID) extendLine(p []byte) {
	room := int(id.buffered) + MaxIDLength + 1 - len(id.text)
	id.text = append(id.text, p[:min(len(p), room)]...)
}

// buffer sets the buffer to the value of the line.
func (id *lastEventID) buffer() {
	line := id.text[id.buffered:]
	if len(line) > MaxIDLength {
		id.text = append(id.text[:id.committed], TooLongID...)
	} else {
		id.text = append(id.text[:id.committed], line...)
	}
	id.buffered = uint16(len(id.text))
	id.isBuffered = true
}

// commit sets the string to the buffer.
func (id *lastEventID) commit() {
	if !id.isBuffered {
		return
	}
	id.text = append(id.text[:0], id.text[id.committed:id.buffered]...)
	id.committed = uint16(len(id.text))
	id.buffered = id.committed
	id.isBuffered, id.isCommitted, id.isNew = false, true, true
}

// string returns the string, decoded as the standard has it. Decoding never
// makes it shorter, so an ID that extendLine has cut is too long in any case.
func (id *lastEventID) string() string {
	text := decode(id.text[:id.committed])
	if len(text) > MaxIDLength {
		return TooLongID
	}
	return text
}

// decode replaces every maximal part of p that could begin a UTF-8 sequence
// but does not, and every other stray byte, by one U+FFFD (Encoding Standard,
// section 8.1.1 "UTF-8 decoder"). Go's own conversions replace each byte, or
// each run of them.
func decode(p []byte) string {
	if utf8.Valid(p) {
		return string(p)
	}
	var text strings.Builder
	for len(p) > 0 {
		r, size := utf8.DecodeRune(p)
		if r == utf8.RuneError {
			for size < len(p) && !utf8.FullRune(p[:size+1]) {
				size++
			}
		}
		text.WriteRune(r)
		p = p[size:]
	}
	return text.String()
}
