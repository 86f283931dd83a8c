package eventstream

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"unsafe"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// The names are sentences of the HTML Standard, sections 9.2.5 and 9.2.6.
func TestSentencesOfTheStandard(t *testing.T) {
	long := strings.Repeat("x", MaxIDLength)
	const noID, noRetry = "none", math.MaxUint64 - 1
	for _, test := range []struct {
		sentence, body string
		events         uint64
		id             string
		retry          uint64
	}{
		{"streams must be decoded using the UTF-8 decode algorithm, which strips one leading BOM", "\uFEFFdata\n\n\uFEFFdata\n\n", 1, noID, noRetry},
		{"lines are separated by a CRLF pair", "data\r\n\r\ndata\r\n\r\n", 2, noID, noRetry},
		{"or a single LF not preceded by CR", "data\n\ndata\n\n", 2, noID, noRetry},
		{"or a single CR not followed by LF", "data\r\rdata\r\r", 2, noID, noRetry},
		{"if the line is empty, dispatch the event", "data: a\n\n\n\n", 1, noID, noRetry},
		{"if the line starts with a colon, ignore the line", ":data: a\n: data: a\n\n", 0, noID, noRetry},
		{"if the line contains a colon, the characters before the first one are the field", "id: a:b\n\n", 0, "a:b", noRetry},
		{"if value starts with a space, remove it from value", "id: a\n\n", 0, "a", noRetry},
		{"only one space", "id:  a \n\n", 0, " a ", noRetry},
		{"otherwise the whole line is the field name and the value is empty", "id: a\n\nid\ndata\n\n", 1, "", noRetry},
		{"once the end of the file is reached, any pending data must be discarded", "id: 1\ndata: a\n\nid: 2\ndata: b\n", 1, "1", noRetry},
		{"field names must be compared literally, with no case folding performed", "Data: a\nID: 1\nRETRY: 1\n\n", 0, noID, noRetry},
		{"if the field name is data, append the value and a LF to the data buffer", "data\ndata\n\n", 1, noID, noRetry},
		{"if the field name is id and the value has no NUL, set the last event ID buffer to the value", "id: 1\nid: 2\n\n", 0, "2", noRetry},
		{"otherwise ignore the field", "id: 1\nid: 2\x00\n\n", 0, "1", noRetry},
		{"if the field value is only ASCII digits, set the reconnection time", "retry: 0250", 0, noID, noRetry},
		{"and do so when the line has ended", "retry: 0250\n", 0, noID, 250},
		{"otherwise ignore the field, retry", "retry: 250\nretry: 1x\nretry:  1\nretry: -1\nretry:\nretry\n", 0, noID, 250},
		{"otherwise the field is ignored", "dat: a\ndataa: a\nfoo\n\n", 0, noID, noRetry},
		{"set the last event ID string to the last event ID buffer", "id: 1\ndata: a\n\n", 1, "1", noRetry},
		{"the buffer does not get reset, so the value remains until the next time it is set", "id: 1\ndata: a\n\ndata: b\n\n", 2, "1", noRetry},
		{"if the data buffer is an empty string, return: the ID is set nevertheless", "id: 1\n\n", 0, "1", noRetry},
		{"if the data buffer is an empty string, set the event type buffer to the empty string", "event: a\n\nevent: b\n\n", 0, noID, noRetry},

		{"ours: an ID of 1024 bytes is told in full", "id: " + long + "\n\n", 0, long, noRetry},
		{"ours: a longer one is said to be so", "id: " + long + "x\n\n", 0, TooLongID, noRetry},
		{"ours: length is counted in decoded bytes", "id: " + long[2:] + "\xFF\n\n", 0, TooLongID, noRetry},
		{"ours: an ID with NUL is ignored at any length", "id: 1\nid: " + long + "x\x00\n\n", 0, "1", noRetry},
		{"ours: a time beyond uint64 is the largest", "retry: 99999999999999999999\n", 0, noID, math.MaxUint64},
	} {
		t.Run(test.sentence, func(t *testing.T) {
			var s Scanner
			s.Scan([]byte(test.body))
			if got := s.Events(); got != test.events {
				t.Errorf("%d events, want %d", got, test.events)
			}
			if id, ok := s.LastEventID(); ok != (test.id != noID) || ok && id != test.id {
				t.Errorf("last event ID %q, %t, want %q", id, ok, test.id)
			}
			if ms, ok := s.Retry(); ok != (test.retry != noRetry) || ok && ms != test.retry {
				t.Errorf("reconnection time %d, %t, want %d", ms, ok, test.retry)
			}
		})
	}
}

func TestPlace(t *testing.T) {
	for _, test := range []struct {
		where, body string
		want        Place
	}{
		{"nothing yet", "", Start},
		{"inside a byte order mark", "\xEF\xBB", MidLine},
		{"after a byte order mark", "\uFEFF", Start},
		{"after a blank line", "data: a\n\n", Boundary},
		{"after a blank first line", "\n", Boundary},
		{"after a comment at the start", ":\n", Boundary},
		{"after comments between events", "data: a\n\n: x\n: y\n", Boundary},
		{"inside a comment", ": x", MidLine},
		{"after a field line", "data: a\n", LineStart},
		{"after a field line with an unknown name", "foo\n", LineStart},
		{"after a comment inside an event", "data: a\n: x\n", LineStart},
		{"inside a field line", "data: a\ndata", MidLine},
		{"after a CR that ends a field line", "data: a\r", LineStart},
		{"after a CR that ends a blank line", "data: a\r\n\r", Boundary},
		{"after that CR's LF", "data: a\r\n\r\n", Boundary},
	} {
		t.Run(test.where, func(t *testing.T) {
			var s Scanner
			s.Scan([]byte(test.body))
			if got := s.Place(); got != test.want {
				t.Errorf("after %q: %d, want %d", test.body, got, test.want)
			}
		})
	}
}

func TestLineEnding(t *testing.T) {
	for _, test := range []struct {
		body      string
		want      LineEnding
		text      string
		pendingCR bool
	}{
		{"", NoLineEnding, "\n", false},
		{"data: a", NoLineEnding, "\n", false},
		{"data: a\n", LF, "\n", false},
		{"data: a\r", NoLineEnding, "\n", true},
		{"data: a\r\n", CRLF, "\r\n", false},
		{"data: a\r\n\r", CRLF, "\r\n", true},
		{"data: a\r\r", CR, "\r", true},
		{"data: a\rd", CR, "\r", false},
		{"data: a\n\r", LF, "\n", true},
	} {
		var s Scanner
		s.Scan([]byte(test.body))
		if s.LineEnding() != test.want || s.LineEnding().Text() != test.text || s.PendingCR() != test.pendingCR {
			t.Errorf("after %q: %q (%d), pending CR %t; want %q (%d), %t", test.body,
				s.LineEnding().Text(), s.LineEnding(), s.PendingCR(), test.text, test.want, test.pendingCR)
		}
	}
}

func TestAnswersAreRightAfterEveryByte(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			text := []byte(body.Text)
			// The oracle's work is quadratic. For a long body, it is asked only
			// at intervals, and at every byte near the end.
			const closely = 600
			var s Scanner
			for n := range len(text) + 1 {
				if n > 0 {
					s.Scan(text[n-1 : n])
				}
				if n < closely || n > len(text)-closely/6 || n%97 == 0 {
					checkAnswers(t, &s, oracle(text[:n]), "after byte %d of %.80q", n, text)
				}
			}
		})
	}
}

func TestAnyCutGivesTheSameAnswers(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			text := []byte(body.Text)
			want := oracle(text)
			for cut := range len(text) + 1 {
				var s Scanner
				s.Scan(text[:cut])
				s.Scan(nil)
				s.Scan(text[cut:])
				checkAnswers(t, &s, want, "%.80q cut at byte %d", text, cut)
			}
		})
	}
}

func TestScanToBoundaryStopsAfterTheFirstByteThatReachesOne(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			text := []byte(body.Text)
			want := oracle(text)
			places := placesAfterEvery(text)
			next, wantNext := len(text), want // the first boundary after from, and the answers there
			for from := len(text); from >= 0; from-- {
				if from < len(text) && places[from+1].isBoundary() {
					next, wantNext = from+1, oracle(text[:from+1])
				}
				var s Scanner
				s.Scan(text[:from])
				if got := s.ScanToBoundary(text[from:]); from+got != next {
					t.Fatalf("%.80q: from byte %d it stopped after byte %d, want %d", text, from, from+got, next)
				}
				checkAnswers(t, &s, wantNext, "%.80q: from byte %d to byte %d", text, from, next)
				s.Scan(text[next:])
				checkAnswers(t, &s, want, "%.80q: stopped at byte %d", text, next)
			}
		})
	}
}

func TestScanToBoundaryFollowsAllWhereThereIsNone(t *testing.T) {
	var s Scanner
	s.Scan([]byte("data: a\n"))
	if n := s.ScanToBoundary([]byte("data: b\n: x\nda")); n != 14 || s.Place() != MidLine {
		t.Errorf("followed %d bytes to place %d", n, s.Place())
	}
	if n := s.ScanToBoundary(nil); n != 0 {
		t.Errorf("followed %d bytes of none", n)
	}
}

func TestAScannerDoesNotAllocateOnceItsIDsHaveBeenSeen(t *testing.T) {
	long := "id: " + strings.Repeat("x", 2*MaxIDLength) + "\n"
	body := []byte("id: 1\nevent: a\ndata: é\n\n: x\r\nretry: 10\r\n\r\nid: 22\n" + long + "id: \x00\ndata\n\n\xFF")
	var s Scanner
	s.Scan(body)
	s.Scan(body)
	if n := testing.AllocsPerRun(100, func() { s.Scan(body) }); n != 0 {
		t.Errorf("%v allocations in one piece", n)
	}
	if n := testing.AllocsPerRun(20, func() {
		for i := range body {
			s.Scan(body[i : i+1])
		}
	}); n != 0 {
		t.Errorf("%v allocations byte by byte", n)
	}
}

func TestAScannerKeepsNothingOfLongFields(t *testing.T) {
	var s Scanner
	chunk := bytes.Repeat([]byte("x"), 1<<16)
	for _, begin := range []string{"id: ", "\n\nid: ", "\nid: ", "\n\ndata: ", "\n", "\n: ", "\nretry: "} {
		s.Scan([]byte(begin))
		for range 16 {
			s.Scan(chunk)
		}
	}
	if got := cap(s.id.text); got > 4*MaxIDLength {
		t.Errorf("%d bytes are held", got)
	}
}

// There is one scanner for each open stream.
func TestAScannerIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(Scanner{}); size > 80 {
		t.Errorf("%d bytes", size)
	}
}
