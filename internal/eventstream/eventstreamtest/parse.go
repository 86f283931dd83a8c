// Package eventstreamtest judges what the module does to event streams: a
// parser written down from the standard, for tests only, and bodies to try.
package eventstreamtest

import (
	"math/big"
	"strings"
	"unicode/utf8"
)

// Result is what a client makes of one body.
type Result struct {
	Events      []Event
	Retries     []uint64 // every reconnection time that was set, in order, in milliseconds
	LastEventID string   // the last event ID string in the end
	IDCommitted bool     // a blank line has followed a valid id field
}

// Event is one dispatched event.
type Event struct {
	Type, Data, LastEventID string
}

// Parse parses a complete body. It follows the text of the HTML Standard,
// sections 9.2.5 and 9.2.6, sentence by sentence, and shares no code or idea
// with the scanner that it judges.
func Parse(body []byte) Result {
	var p parser
	for _, line := range lines(utf8Decode(body)) {
		p.process(line)
	}
	return p.result
}

// utf8Decode is "UTF-8 decode" of the Encoding Standard, section 6.
func utf8Decode(body []byte) string {
	text := string(body)
	text = strings.TrimPrefix(text, "\xEF\xBB\xBF")
	return utf8Decoder(text)
}

// utf8Decoder is the "UTF-8 decoder" of the Encoding Standard, section 8.1.1,
// with the error mode "replacement".
func utf8Decoder(bytes string) string {
	var (
		text                    strings.Builder
		codePoint               rune
		bytesSeen, bytesNeeded  int
		lowerBoundary, upperEnd byte = 0x80, 0xBF
	)
	text.Grow(len(bytes))
	for i := 0; i < len(bytes); i++ {
		b := bytes[i]
		if bytesNeeded == 0 {
			switch {
			case b <= 0x7F:
				text.WriteByte(b)
			case 0xC2 <= b && b <= 0xDF:
				bytesNeeded = 1
				codePoint = rune(b & 0x1F)
			case 0xE0 <= b && b <= 0xEF:
				if b == 0xE0 {
					lowerBoundary = 0xA0
				}
				if b == 0xED {
					upperEnd = 0x9F
				}
				bytesNeeded = 2
				codePoint = rune(b & 0xF)
			case 0xF0 <= b && b <= 0xF4:
				if b == 0xF0 {
					lowerBoundary = 0x90
				}
				if b == 0xF4 {
					upperEnd = 0x8F
				}
				bytesNeeded = 3
				codePoint = rune(b & 0x7)
			default:
				text.WriteRune(utf8.RuneError)
			}
			continue
		}
		if b < lowerBoundary || b > upperEnd {
			codePoint, bytesNeeded, bytesSeen = 0, 0, 0
			lowerBoundary, upperEnd = 0x80, 0xBF
			text.WriteRune(utf8.RuneError)
			i-- // "restore byte to ioQueue"
			continue
		}
		lowerBoundary, upperEnd = 0x80, 0xBF
		codePoint = codePoint<<6 | rune(b&0x3F)
		bytesSeen++
		if bytesSeen == bytesNeeded {
			text.WriteRune(codePoint)
			codePoint, bytesNeeded, bytesSeen = 0, 0, 0
		}
	}
	if bytesNeeded != 0 {
		text.WriteRune(utf8.RuneError)
	}
	return text.String()
}

// lines splits at CRLF pairs, at LF not preceded by CR, and at CR not followed
// by LF. What the end of the body cuts off is no line.
func lines(text string) []string {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	text = strings.ReplaceAll(text, "\r", "\n")
	split := strings.Split(text, "\n")
	return split[:len(split)-1]
}

type parser struct {
	data, eventType, lastEventID string // the buffers
	hasID                        bool   // an id field has set its buffer
	result                       Result
}

func (p *parser) process(line string) {
	// "If the line is empty (a blank line): dispatch the event."
	if line == "" {
		p.dispatch()
		return
	}
	// "If the line starts with a U+003A COLON character (:): ignore the line."
	if strings.HasPrefix(line, ":") {
		return
	}
	// "If the line contains a U+003A COLON character (:): collect the
	// characters on the line before the first colon, and let field be that
	// string. Collect the characters after it, and let value be that string.
	// If value starts with a U+0020 SPACE character, remove it from value."
	// Otherwise "using the whole line as the field name, and the empty string
	// as the field value".
	field, value, _ := strings.Cut(line, ":")
	value = strings.TrimPrefix(value, " ")
	p.field(field, value)
}

// field processes a field. "Field names must be compared literally, with no
// case folding performed."
func (p *parser) field(name, value string) {
	switch name {
	case "event":
		p.eventType = value
	case "data":
		p.data += value + "\n"
	case "id":
		if !strings.Contains(value, "\x00") {
			p.lastEventID = value
			p.hasID = true
		}
	case "retry":
		if ms, ok := reconnectionTime(value); ok {
			p.result.Retries = append(p.result.Retries, ms)
		}
	}
}

// reconnectionTime reads a value of "only ASCII digits" as "an integer in base
// ten". The standard leaves open what an empty value means; here it is none.
// A time beyond uint64 is the largest one.
func reconnectionTime(value string) (ms uint64, ok bool) {
	if value == "" || strings.Trim(value, "0123456789") != "" {
		return 0, false
	}
	integer, ok := new(big.Int).SetString(value, 10)
	if !ok || !integer.IsUint64() {
		return 1<<64 - 1, true
	}
	return integer.Uint64(), true
}

// dispatch takes the steps of "dispatch the event".
func (p *parser) dispatch() {
	p.result.LastEventID = p.lastEventID
	p.result.IDCommitted = p.hasID
	if p.data == "" {
		p.eventType = ""
		return
	}
	event := Event{Type: "message", Data: strings.TrimSuffix(p.data, "\n"), LastEventID: p.lastEventID}
	if p.eventType != "" {
		event.Type = p.eventType
	}
	p.data, p.eventType = "", ""
	p.result.Events = append(p.result.Events, event)
}
