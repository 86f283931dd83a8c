// Package jsonflag follows a JSON document as it passes, in pieces of any size,
// and finds out whether it asks for a stream: whether it is an object with
// "stream": true. It does not delay, copy or change anything, and its memory does
// not grow with the document. It knows neither HTTP nor clocks.
package jsonflag

// key is the name of the member. Only this spelling counts: JSON also allows its
// letters as escapes, but no encoder writes them so.
const key = "stream"

// wanted is the value that it must have.
const wanted = "true"

// Scanner follows one document. Its zero value is ready for the first byte.
//
// The first member named stream decides, at the top level only: in a nested
// object or in a string it is part of a value. A document that is not JSON (RFC
// 8259) asks for nothing from the first wrong byte on; inside strings, numbers
// and nested values the scanner does not look for wrong bytes.
type Scanner struct {
	state   state
	settled bool
	asks    bool

	escaped bool   // in a string: the next byte follows a backslash
	matched int8   // bytes of key or wanted that agree so far; mismatch: they do not
	found   bool   // the member's name is key
	depth   uint64 // of objects and arrays around the place, the top level not counted
}

const mismatch = -1

// state is where in the document the next byte is.
type state uint8

const (
	beforeObject   state = iota
	beforeFirstKey       // after the brace
	beforeKey            // after a comma
	inKey
	beforeColon
	beforeValue
	inString   // a value
	inScalar   // a value: a number, true, false or null
	inNested   // a value: an object or an array
	nestedText // a string in it
	afterValue
)

// Scan follows the next bytes of the document.
func (s *Scanner) Scan(p []byte) {
	for i := 0; i < len(p) && !s.settled; i++ {
		if !s.escaped && (s.state == inString || s.state == nestedText) {
			i += plain(p[i:]) // most of a request is text
			if i == len(p) {
				return
			}
		}
		s.next(p[i])
	}
}

// plain returns how many bytes at the start of a piece of a string have no
// special meaning.
func plain(p []byte) int {
	for i, c := range p {
		if c == '"' || c == '\\' {
			return i
		}
	}
	return len(p)
}

// Settled reports whether the answer can't change any more.
func (s *Scanner) Settled() bool { return s.settled }

// AsksForStream reports whether the document so far asks for a stream. Once it
// does, that is settled.
func (s *Scanner) AsksForStream() bool { return s.asks }

func (s *Scanner) next(c byte) {
	switch s.state {
	case inKey, inString, nestedText:
		s.nextInString(c)
		return
	case inNested:
		s.nextInNested(c)
		return
	case inScalar:
		if !isSpace(c) && c != ',' && c != '}' {
			s.match(wanted, c)
			return
		}
		if s.found {
			s.settle(s.matched == int8(len(wanted)))
			return
		}
		s.state = afterValue
	}
	if isSpace(c) {
		return
	}
	switch {
	case s.state == beforeObject && c == '{':
		s.state = beforeFirstKey
	case (s.state == beforeFirstKey || s.state == beforeKey) && c == '"':
		s.state, s.matched = inKey, 0
	case s.state == beforeColon && c == ':':
		s.state = beforeValue
	case s.state == beforeValue:
		s.beginValue(c)
	case s.state == afterValue && c == ',':
		s.state = beforeKey
	default: // the end of the object, or not JSON
		s.settle(false)
	}
}

func (s *Scanner) beginValue(c byte) {
	switch c {
	case '"':
		s.state = inString
	case '{', '[':
		s.state, s.depth = inNested, 1
	case ',', '}', ']', ':':
		s.settle(false) // not JSON
		return
	default:
		s.state, s.matched = inScalar, 0
		s.match(wanted, c)
		return
	}
	if s.found {
		s.settle(false)
	}
}

// nextInString follows a string to its end. Only a key is compared.
func (s *Scanner) nextInString(c byte) {
	switch {
	case s.escaped:
		s.escaped = false
	case c == '\\':
		s.escaped = true
		s.matched = mismatch
	case c != '"':
		if s.state == inKey {
			s.match(key, c)
		}
	case s.state == inKey:
		s.found = s.matched == int8(len(key))
		s.state = beforeColon
	case s.state == nestedText:
		s.state = inNested
	default:
		s.state = afterValue
	}
}

func (s *Scanner) nextInNested(c byte) {
	switch c {
	case '"':
		s.state = nestedText
	case '{', '[':
		s.depth++
	case '}', ']':
		if s.depth--; s.depth == 0 {
			s.state = afterValue
		}
	}
}

// match records whether the next byte of text is c.
func (s *Scanner) match(text string, c byte) {
	if s.matched < 0 || int(s.matched) >= len(text) || text[s.matched] != c {
		s.matched = mismatch
		return
	}
	s.matched++
}

func (s *Scanner) settle(asks bool) { s.settled, s.asks = true, asks }

// isSpace is the white space of RFC 8259, section 2.
func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }
