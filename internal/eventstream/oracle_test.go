package eventstream

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// answers is everything that a Scanner reports.
type answers struct {
	place         Place
	pendingCR     bool
	lineEnding    LineEnding
	events        uint64
	id            string
	idCommitted   bool
	retry         uint64
	retrySet      bool
	incomplete    bool
	validUTF8     bool
	truncatedUTF8 bool
	looksLikeJSON bool
}

func answersOf(s *Scanner) answers {
	a := answers{
		place:         s.Place(),
		pendingCR:     s.PendingCR(),
		lineEnding:    s.LineEnding(),
		events:        s.Events(),
		incomplete:    s.Incomplete(),
		validUTF8:     s.ValidUTF8(),
		truncatedUTF8: s.TruncatedUTF8(),
		looksLikeJSON: s.LooksLikeJSON(),
	}
	a.id, a.idCommitted = s.LastEventID()
	a.retry, a.retrySet = s.Retry()
	return a
}

// oracle returns the right answers after body. It is slow: it reads all of
// body, and keeps no state.
func oracle(body []byte) answers {
	text := strings.TrimPrefix(string(body), bom)
	parsed := eventstreamtest.Parse(body)
	a := answers{
		pendingCR:   strings.HasSuffix(text, "\r"),
		lineEnding:  lastLineEnding(text),
		events:      uint64(len(parsed.Events)),
		id:          parsed.LastEventID,
		idCommitted: parsed.IDCommitted,
		retrySet:    len(parsed.Retries) > 0,
	}
	a.place, a.incomplete = placeBehind(body)
	if len(a.id) > MaxIDLength {
		a.id = TooLongID
	}
	if a.retrySet {
		a.retry = parsed.Retries[len(parsed.Retries)-1]
	}
	a.validUTF8, a.truncatedUTF8 = validity(body)
	if opening := strings.TrimLeft(text, " \t\r\n"); opening != "" {
		a.looksLikeJSON = opening[0] == '{' || opening[0] == '['
	}
	return a
}

func placeBehind(body []byte) (place Place, incomplete bool) {
	if len(body) == 0 || string(body) == bom {
		return Start, false
	}
	if strings.HasPrefix(bom, string(body)) {
		return MidLine, true
	}
	text := strings.TrimPrefix(string(body), bom)
	text = strings.ReplaceAll(text, "\r\n", "\n")
	text = strings.ReplaceAll(text, "\r", "\n")
	// Only what follows the last blank line matters. The first line may be that
	// one.
	if i := strings.LastIndex("\n"+text, "\n\n"); i >= 0 {
		text = text[i+1:]
	}
	lines := strings.Split(text, "\n")
	unfinished := lines[len(lines)-1]
	place = Boundary
	for _, line := range lines[:len(lines)-1] {
		if !strings.HasPrefix(line, ":") {
			place = LineStart
			incomplete = true
		}
	}
	if unfinished != "" {
		place = MidLine
		incomplete = incomplete || unfinished[0] != ':'
	}
	return place, incomplete
}

func lastLineEnding(text string) LineEnding {
	text = strings.TrimSuffix(text, "\r") // it may become a CRLF
	i := strings.LastIndexAny(text, "\r\n")
	switch {
	case i < 0:
		return NoLineEnding
	case text[i] == '\r':
		return CR
	case i > 0 && text[i-1] == '\r':
		return CRLF
	default:
		return LF
	}
}

// validity tries whether any continuation makes body valid.
func validity(body []byte) (valid, truncated bool) {
	if utf8.Valid(body) {
		return true, false
	}
	for _, end := range []string{
		"\x80", "\x80\x80", "\x80\x80\x80", "\x90\x80\x80", // after any first byte, except those that restrict the second one
		"\xA0\x80", // after E0
	} {
		if utf8.Valid(append(bytes.Clone(body), end...)) {
			return true, true
		}
	}
	return false, false
}

func checkAnswers(t *testing.T, s *Scanner, want answers, how string, args ...any) {
	t.Helper()
	if got := answersOf(s); got != want {
		t.Errorf(how, args...)
		t.Fatalf("\ngot  %+v\nwant %+v", got, want)
	}
}

// placesAfterEvery returns the place after each prefix of body.
func placesAfterEvery(body []byte) []Place {
	places := make([]Place, len(body)+1)
	for n := range places {
		places[n], _ = placeBehind(body[:n])
	}
	return places
}
