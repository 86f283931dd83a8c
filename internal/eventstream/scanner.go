// Package eventstream implements the text/event-stream format (HTML Standard,
// section 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event
// stream"). Its [Scanner] follows a body as it passes and says where in the
// format it is, without storing the body. Its [Splicer] decides which bytes of
// the body a client gets, and inserts others.
package eventstream

import (
	"bytes"
	"math"
)

// Place says where in the stream the next byte would go.
type Place uint8

const (
	// Start is the start of the stream: nothing has passed but, at most, a
	// complete byte order mark. It is an event boundary.
	Start Place = iota

	// Boundary is an event boundary: a line start with no field line since the
	// last blank line. Comment lines do not matter.
	Boundary

	// LineStart is a line start inside an unfinished event: there has been a
	// field line since the last blank line.
	LineStart

	// MidLine is everywhere else, the inside of a byte order mark included.
	MidLine
)

func (p Place) isBoundary() bool {
	return p == Start || p == Boundary
}

// LineEnding is one of the three ways in which a line of an event stream ends
// (section 9.2.5).
type LineEnding uint8

const (
	NoLineEnding LineEnding = iota // none seen yet
	LF
	CRLF
	CR
)

// Text returns the bytes of the line ending; LF where none has been seen yet.
func (e LineEnding) Text() string {
	switch e {
	case CRLF:
		return "\r\n"
	case CR:
		return "\r"
	default:
		return "\n"
	}
}

// Scanner follows the body of one event stream. It gives the same answers whether
// the body comes in one piece or byte by byte.
//
// The zero value is ready for the first byte. A Scanner stores nothing of the
// body except the last event IDs, so its memory is bounded by them (see
// [MaxIDLength]), and it allocates only while the longest ID so far grows. It
// must not be copied after first use, nor used by two goroutines at a time.
type Scanner struct {
	id     lastEventID
	events uint64

	utf8 utf8Checker

	name       [len("retry")]byte // of the field being read; no known name is longer
	nameLength uint8

	opening    opening
	line       line
	block      block
	lineEnding LineEnding
	pendingCR  bool
	hasRetry   bool

	// Last, because few bodies have such a field.
	retry     uint64 // milliseconds
	retryLine uint64 // the retry field being read
}

// opening is what the body begins with. The states up to bomRead count the
// bytes of a byte order mark.
type opening uint8

const (
	bodyStart opening = iota
	bom1
	bom2
	bomRead
	blankOpening // nothing but white space so far
	textOpening
	jsonOpening
)

const bom = "\uFEFF"

// line is what the line being read has turned out to be.
type line uint8

const (
	lineStart line = iota
	comment
	fieldName
	ignoredField // has no effect, for its name or its value
	dataField
	idColon // one space may follow that is not part of the value
	idValue
	retryColon // as idColon
	retryEmpty
	retryDigits
)

// block is what the lines since the last blank line add up to.
type block uint8

const (
	noFields block = iota
	fieldsOnly
	dataSeen // the data buffer is not empty: a blank line dispatches
)

// Scan follows the next bytes of the body.
func (s *Scanner) Scan(p []byte) {
	s.scan(p, false)
}

// ScanToBoundary follows p up to and including the first byte after which the
// place is an event boundary, and returns how many bytes that is. It follows
// all of p when there is no such byte; Place tells the two apart. Where the
// place is a boundary already, ScanToBoundary moves on to the next one.
//
// The byte may be a CR whose LF is still to come: see [Scanner.PendingCR].
func (s *Scanner) ScanToBoundary(p []byte) int {
	return s.scan(p, true)
}

// Place says where the next byte would go.
func (s *Scanner) Place() Place {
	switch {
	case s.opening == bodyStart || s.opening == bomRead:
		return Start
	case s.line != lineStart:
		return MidLine
	case s.block == noFields:
		return Boundary
	default:
		return LineStart
	}
}

// PendingCR reports whether the last byte was a CR whose LF may still come.
// The line counts as ended already, but a LF that is put after any other
// bytes would end a second one.
func (s *Scanner) PendingCR() bool {
	return s.pendingCR
}

// LineEnding returns how the last line ended of which that is certain. A
// pending CR does not count: it may become a CRLF.
func (s *Scanner) LineEnding() LineEnding {
	return s.lineEnding
}

// Events returns how many events a client has dispatched: one for every blank
// line that finds a data buffer which is not empty (section 9.2.6). A bare
// `data` line is enough.
func (s *Scanner) Events() uint64 {
	return s.events
}

// LastEventID returns the last event ID string as the last blank line left it,
// also when that line dispatched nothing (section 9.2.6, "dispatch the event",
// step 1), decoded as UTF-8 and with replacement characters for what is none.
// It is [TooLongID] for one longer than [MaxIDLength]. ok is false when no
// blank line has followed an id field yet; an empty ID is an ID.
func (s *Scanner) LastEventID() (id string, ok bool) {
	return s.id.string(), s.id.isCommitted
}

// hasID reports whether an id field has set the last event ID buffer.
func (s *Scanner) hasID() bool {
	return s.id.isBuffered || s.id.isCommitted
}

// Retry returns the last reconnection time in milliseconds, as the last valid
// retry field set it at the end of its line (section 9.2.6). A time beyond
// uint64 is the largest one. ok is false when there has been none.
func (s *Scanner) Retry() (ms uint64, ok bool) {
	return s.retry, s.hasRetry
}

// Incomplete reports whether there are field bytes after the last blank line:
// an unfinished event, or an unfinished line that is not a comment. Clients
// discard them if the body ends here (section 9.2.6).
func (s *Scanner) Incomplete() bool {
	return s.block != noFields || s.line != lineStart && s.line != comment
}

// ValidUTF8 reports whether the body is valid UTF-8 so far. A sequence that is
// still open counts as valid.
func (s *Scanner) ValidUTF8() bool {
	return !s.utf8.invalid
}

// TruncatedUTF8 reports whether the body, valid so far, stops inside a UTF-8
// sequence. One that ends here is not valid UTF-8.
func (s *Scanner) TruncatedUTF8() bool {
	return s.utf8.length > 0
}

// LooksLikeJSON reports whether the first byte of the body that is not white
// space is { or [. A leading byte order mark is skipped.
func (s *Scanner) LooksLikeJSON() bool {
	return s.opening == jsonOpening
}

// resume makes the next byte the first one of another body. The place must be an
// event boundary, where no line and no event is incomplete.
func (s *Scanner) resume() {
	s.opening = bodyStart
	s.pendingCR = false
}

func (s *Scanner) scan(p []byte, toBoundary bool) int {
	text := 0 // where it begins after the byte order mark
	if s.opening < bomRead {
		text = s.followBOM(p)
	}
	n := text
	boundaryBehindBOM := text > 0 && s.opening == bomRead
	if !toBoundary || !boundaryBehindBOM {
		n += s.followLines(p[text:], toBoundary)
	}
	if s.opening < textOpening {
		s.judgeOpening(p[text:n])
	}
	s.utf8.follow(p[:n])
	return n
}

// passed follows whole blocks without scanning them.
func (s *Scanner) passed(p []byte, events uint64, invalid bool) {
	s.opening = textOpening
	s.events += events
	s.utf8.invalid = s.utf8.invalid || invalid
	switch last := len(p) - 1; {
	case p[last] == '\r':
		s.lineEnding = CR
	case last > 0 && p[last-1] == '\r':
		s.lineEnding = CRLF
	default:
		s.lineEnding = LF
	}
}

// followBOM follows a byte order mark, which the decoder strips once, from the
// very first bytes (Encoding Standard, section 6, "UTF-8 decode"). It returns
// how many bytes of p belong to the mark.
func (s *Scanner) followBOM(p []byte) int {
	for i, b := range p {
		if b != bom[s.opening] {
			if s.opening != bodyStart {
				s.opening = textOpening
			}
			return i
		}
		s.opening++
		if s.opening == bomRead {
			s.line = lineStart
			return i + 1
		}
		// Without the rest of the mark this is a field with a strange name.
		s.line = ignoredField
	}
	return len(p)
}

func (s *Scanner) judgeOpening(p []byte) {
	for _, b := range p {
		switch b {
		case ' ', '\t', '\r', '\n':
			s.opening = blankOpening
		case '{', '[':
			s.opening = jsonOpening
			return
		default:
			s.opening = textOpening
			return
		}
	}
}

func (s *Scanner) followLines(p []byte, toBoundary bool) int {
	// The next LF and CR at or after i are searched only once each, so that a body
	// that has only one kind is not searched for the other at every line.
	lf, cr := -1, -1
	for i := 0; i < len(p); {
		if s.pendingCR {
			s.pendingCR = false
			s.lineEnding = CR
			if p[i] == '\n' {
				s.lineEnding = CRLF
				i++
				if toBoundary && s.block == noFields {
					return i
				}
				continue
			}
		}
		if lf < i {
			lf = indexFrom(p, i, '\n')
		}
		if cr < i {
			cr = indexFrom(p, i, '\r')
		}
		end := min(lf, cr)
		s.followLine(p[i:end])
		if end == len(p) {
			break
		}
		s.endLine()
		if end == cr {
			s.pendingCR = true
		} else {
			s.lineEnding = LF
		}
		i = end + 1
		if toBoundary && s.block == noFields {
			return i
		}
	}
	return len(p)
}

// indexFrom returns the index of the first b in p at or after from, and
// len(p) when there is none.
func indexFrom(p []byte, from int, b byte) int {
	if i := bytes.IndexByte(p[from:], b); i >= 0 {
		return from + i
	}
	return len(p)
}

// followLine follows the next bytes of one line, without its end.
func (s *Scanner) followLine(p []byte) {
	if len(p) == 0 {
		return
	}
	if s.line == lineStart {
		if p[0] == ':' {
			s.line = comment
			return
		}
		s.line = fieldName
		s.nameLength = 0
	}
	if s.line == fieldName {
		p = s.followName(p)
		if len(p) == 0 {
			return
		}
	}
	switch s.line {
	case idColon:
		s.line = idValue
		p = withoutSpace(p)
		fallthrough
	case idValue:
		if bytes.IndexByte(p, 0) >= 0 {
			s.line = ignoredField
			return
		}
		s.id.extendLine(p)
	case retryColon:
		s.line = retryEmpty
		p = withoutSpace(p)
		fallthrough
	case retryEmpty, retryDigits:
		s.followRetry(p)
	}
}

// followName follows the name of a field and returns what comes after its
// colon.
func (s *Scanner) followName(p []byte) (value []byte) {
	room := len(s.name) - int(s.nameLength)
	n := bytes.IndexByte(p[:min(len(p), room+1)], ':')
	if n < 0 && len(p) > room {
		s.line = ignoredField // longer than any known name
		return nil
	}
	if n < 0 {
		s.nameLength += uint8(copy(s.name[s.nameLength:], p))
		return nil
	}
	s.nameLength += uint8(copy(s.name[s.nameLength:], p[:n]))
	s.line = s.beginValue()
	return p[n+1:]
}

// beginValue decides what happens to the value of a field, once its name is
// complete. The standard compares names literally, without case folding. The
// event field is among the ignored ones: it does not decide whether there is an
// event.
func (s *Scanner) beginValue() line {
	switch string(s.name[:s.nameLength]) {
	case "data":
		return dataField
	case "id":
		s.id.beginLine()
		return idColon
	case "retry":
		s.retryLine = 0
		return retryColon
	default:
		return ignoredField
	}
}

func withoutSpace(value []byte) []byte {
	if value[0] == ' ' {
		return value[1:]
	}
	return value
}

func (s *Scanner) followRetry(p []byte) {
	for _, b := range p {
		if b < '0' || b > '9' {
			s.line = ignoredField
			return
		}
		s.line = retryDigits
		digit := uint64(b - '0')
		if s.retryLine > (math.MaxUint64-digit)/10 {
			s.retryLine = math.MaxUint64
		} else {
			s.retryLine = s.retryLine*10 + digit
		}
	}
}

// endLine processes the line that has just ended.
func (s *Scanner) endLine() {
	switch s.line {
	case lineStart:
		s.endBlock()
		return
	case comment:
		s.line = lineStart
		return
	case fieldName:
		// The whole line is the name, the value is empty.
		s.line = s.beginValue()
	}
	s.block = max(s.block, fieldsOnly)
	switch s.line {
	case dataField:
		s.block = dataSeen
	case idColon, idValue:
		s.id.buffer()
	case retryDigits:
		s.retry, s.hasRetry = s.retryLine, true
	}
	s.line = lineStart
}

// endBlock is what a blank line does: "dispatch the event", section 9.2.6.
func (s *Scanner) endBlock() {
	s.id.commit()
	if s.block == dataSeen {
		s.events++
	}
	s.block = noFields
}
