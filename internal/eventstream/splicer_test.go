package eventstream

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// play plays a script to a client as a stream does. Each part of it is a write:
// "/" ends a write, and "|" ends one and stands for a silence in which a frame
// is due. An overdue frame follows if nothing else did. play returns what the
// client got.
func play(s *Splicer, f *Frames, script string) string {
	var client []byte
	write := func(p []byte) {
		if len(p) == 0 {
			return
		}
		lead, body := s.Splice(f, p)
		if len(lead) == 0 && len(body) == 0 && s.Overdue() {
			client, _ = s.Frame(f, client)
		}
		client = append(append(client, lead...), body...)
	}
	for script != "" {
		n := strings.IndexAny(script, "/|")
		if n < 0 {
			write([]byte(script))
			break
		}
		write([]byte(script[:n]))
		if script[n] == '|' {
			client, _ = s.Frame(f, client)
		}
		script = script[n+1:]
	}
	return string(append(client, s.Rest(f)...))
}

func expectPlayed(t *testing.T, f *Frames, script, want string) {
	t.Helper()
	var s Splicer
	if got := play(&s, f, script); got != want {
		t.Errorf("%q:\ngot  %q\nwant %q", script, got, want)
	}
}

func TestAFrameBetweenCRAndLFMakesNoBlankLine(t *testing.T) {
	for _, test := range []struct{ style, script, want string }{
		// The client gets the LF before the frame, and not again after it.
		{"block", "data: a\r|\n\r\n", "data: a\r\n:heartbeat\r\n\r\n"},
		{"block", "data: a\r||\n\r\n", "data: a\r\n:heartbeat\r\n:heartbeat\r\n\r\n"},
		{"block", "data: a\r\n\r|\ndata: b", "data: a\r\n\r\n:heartbeat\r\n\r\ndata: b"},
		{"block", "data: a\r\n\r||\ndata: b", "data: a\r\n\r\n:heartbeat\r\n\r\n:heartbeat\r\n\r\ndata: b"},
		{"block", "data: a\r|\n|\r|\n|", "data: a\r\n:heartbeat\r\n:heartbeat\r\n\r\n:heartbeat\r\n\r\n:heartbeat\r\n\r\n"},
		{"line", "data: a\r|\n\r\n", "data: a\r\n:heartbeat\r\n\r\n"},
		{"line", "data: a\r\n\r|\n", "data: a\r\n\r\n:heartbeat\r\n"},
		{"event", "data: a\r|\n\r|\n", "data: a\r\n\r\nevent: ping\r\ndata:\r\n\r\n"},
		{"block", ":\r|\ndata: a", ":\r\n:heartbeat\r\n\r\ndata: a"},
		{"block", "\r|\ndata: a", "\r\n:heartbeat\r\n\r\ndata: a"},
		{"block", "data: a\r|\n/\r\n", "data: a\r\n:heartbeat\r\n\r\n"},
		// The LF never comes. A CRLF instead of the CR changes nothing.
		{"block", "data: a\r|\r", "data: a\r\n:heartbeat\r\n\r"},
		{"block", "data: a\r|data: b", "data: a\r\n:heartbeat\r\ndata: b"},
		{"block", "data: a\r|", "data: a\r\n:heartbeat\r\n"},
		// Earlier lines have ended in LF.
		{"block", "data: a\ndata: b\r|\n\n", "data: a\ndata: b\r\n:heartbeat\n\n"},
		{"block", "data: a\ndata: b\r|data: c", "data: a\ndata: b\r\n:heartbeat\ndata: c"},
		// If lines end in CR, an LF would merge with the CR of the frame.
		{"block", "data: a\r\r|data: b\r\r|", "data: a\r\r:heartbeat\r\rdata: b\r\r:heartbeat\r\r"},
		{"block", "data: a\rdata: b\r|\r", "data: a\rdata: b\r:heartbeat\r\r"},
		{"block", "data: a\rdata: b\r|\ndata: c", "data: a\rdata: b\r:heartbeat\r\ndata: c"},
		// The body turns out to be JSON.
		{"block", "\r|\n{}", "\r\n:heartbeat\r\n\r\n{}"},
	} {
		t.Run(fmt.Sprintf("%s %q", test.style, test.script), func(t *testing.T) {
			expectPlayed(t, styles[test.style], test.script, test.want)
		})
	}
}

func TestAByteOrderMarkAfterAFrameIsDropped(t *testing.T) {
	for _, test := range []struct{ script, want string }{
		{"|\xEF\xBB\xBFdata: a\n\n", ":heartbeat\n\ndata: a\n\n"},
		{"|\xEF\xBB\xBF", ":heartbeat\n\n"},
		{"|\xEF/\xBB/\xBF/data: a\n\n", ":heartbeat\n\ndata: a\n\n"},
		// While its bytes are incomplete, nothing has reached the client, so
		// the frame that was due follows at once.
		{"|\xEF|\xBB|\xBFdata: a\n\n", ":heartbeat\n\ndata: a\n\n"},
		{"|\xEF\xBB|\xBF", ":heartbeat\n\n:heartbeat\n\n"},
		{"|\xEF\xBB\xBF|data: a\n\n", ":heartbeat\n\n:heartbeat\n\ndata: a\n\n"},
		// It is not a byte order mark.
		{"|\xEF|data: a\n\n", ":heartbeat\n\n\xEFdata: a\n\n"},
		{"|\xEF\xBBdata: a\n\n", ":heartbeat\n\n\xEF\xBBdata: a\n\n"},
		{"|\xEF|\xBB|data: a\n\n", ":heartbeat\n\n\xEF\xBBdata: a\n\n"},
		{"|\xEF\xBB\xBE", ":heartbeat\n\n\xEF\xBB\xBE"},
		{"|\xEF\xEF\xBB\xBF", ":heartbeat\n\n\xEF\xEF\xBB\xBF"},
		{"|\xEF", ":heartbeat\n\n\xEF"},
		{"|\xEF\xBB", ":heartbeat\n\n\xEF\xBB"},
		{"|\xEF\xBB|", ":heartbeat\n\n\xEF\xBB"},
		// Anywhere else it is not a byte order mark.
		{"|\xEF\xBB\xBF\xEF\xBB\xBFdata: a\n\n", ":heartbeat\n\n\xEF\xBB\xBFdata: a\n\n"},
		{"|\xEF\xBB\xBF/\xEF\xBB\xBFdata: a\n\n", ":heartbeat\n\n\xEF\xBB\xBFdata: a\n\n"},
		{"|\n\xEF\xBB\xBFdata: a\n\n", ":heartbeat\n\n\n\xEF\xBB\xBFdata: a\n\n"},
		{"|data: a\n\n|\xEF\xBB\xBFdata: b\n\n", ":heartbeat\n\ndata: a\n\n:heartbeat\n\n\xEF\xBB\xBFdata: b\n\n"},
		// Nothing was sent before it.
		{"\xEF\xBB\xBFdata: a\n\n|", "\xEF\xBB\xBFdata: a\n\n:heartbeat\n\n"},
		{"\xEF|\xBB|\xBF|data: a\n\n", "\xEF\xBB\xBF:heartbeat\n\ndata: a\n\n"},
		// Before JSON, it is sent with the bytes that follow.
		{"|\xEF\xBB\xBF{}", ":heartbeat\n\n\xEF\xBB\xBF{}"},
		{"|\xEF\xBB/\xBF{}", ":heartbeat\n\n\xEF\xBB\xBF{}"},
		{"|\xEF\xBB\xBF/{}", ":heartbeat\n\n{}"},
	} {
		t.Run(fmt.Sprintf("%q", test.script), func(t *testing.T) {
			expectPlayed(t, styles["block"], test.script, test.want)
		})
	}
}

func TestTheReconnectionTimeIsToldBeforeAnythingElse(t *testing.T) {
	for _, test := range []struct{ style, script, want string }{
		// With the upstream's first bytes.
		{"block", "data: a\n\n|", "retry: 2500\n\ndata: a\n\n:heartbeat\n\n"},
		{"block", ":\n\ndata: a\n\n", "retry: 2500\n\n:\n\ndata: a\n\n"},
		{"block", "retry: 1\n\n", "retry: 2500\n\nretry: 1\n\n"},
		{"line", "data: a\n\n|", "retry: 2500\ndata: a\n\n:heartbeat\n"},
		{"event", "data: a\n\n|", "retry: 2500\n\ndata: a\n\nevent: ping\ndata:\n\n"},
		// With the first frame.
		{"block", "|data: a\n\n|", "retry: 2500\n\n:heartbeat\n\ndata: a\n\n:heartbeat\n\n"},
		{"block", "||data: a\n\n", "retry: 2500\n\n:heartbeat\n\n:heartbeat\n\ndata: a\n\n"},
		{"line", "|data: a\n\n", "retry: 2500\n:heartbeat\ndata: a\n\n"},
		{"event", "|data: a\n\n", "retry: 2500\n\nevent: ping\ndata:\n\ndata: a\n\n"},
		// With the upstream's line endings, as far as they are known.
		{"block", "data: a\r\n\r\n", "retry: 2500\r\n\r\ndata: a\r\n\r\n"},
		{"block", "data: a\rdata: b\r", "retry: 2500\r\rdata: a\rdata: b\r"},
		{"block", "d", "retry: 2500\n\nd"},
		{"block", "\r/\n", "retry: 2500\n\n\r\n"},
		// Instead of a byte order mark, which must not follow anything.
		{"block", "\xEF\xBB\xBFdata: a\n\n", "retry: 2500\n\ndata: a\n\n"},
		{"block", "\xEF\xBB\xBF/data: a\n\n", "retry: 2500\n\ndata: a\n\n"},
		{"block", "\xEF\xBB\xBF/\xEF\xBB\xBFdata: a\n\n", "retry: 2500\n\n\xEF\xBB\xBFdata: a\n\n"},
		{"block", "\xEF\xBB\xBF|data: a\n\n", "retry: 2500\n\n:heartbeat\n\ndata: a\n\n"},
		{"block", "\xEF|\xBB\xBF|data: a\n\n", "retry: 2500\n\n:heartbeat\n\n:heartbeat\n\ndata: a\n\n"},
		{"block", "\xEF\xBBdata: a\n\n", "retry: 2500\n\n\xEF\xBBdata: a\n\n"},
		{"block", "\xEF", "retry: 2500\n\n\xEF"},
		// Not if the body is not an event stream.
		{"block", "{}", "{}"},
		{"block", "{}/{}|", "{}{}"},
		{"block", " \n{}|", " \n{}"},
		{"block", "\xEF\xBB\xBF[]|", "\xEF\xBB\xBF[]"},
		{"block", "\xEF\xBB/\xBF[]|", "\xEF\xBB\xBF[]"},
		{"block", " \n/{}|", "retry: 2500\n\n \n{}"},
		// Not if nothing is sent.
		{"block", "", ""},
		{"block", "\xEF\xBB\xBF", ""},
	} {
		t.Run(fmt.Sprintf("%s %q", test.style, test.script), func(t *testing.T) {
			var s Splicer
			s.OweRetry(2500 * time.Millisecond)
			if got := play(&s, styles[test.style], test.script); got != test.want {
				t.Errorf("\ngot  %q\nwant %q", got, test.want)
			}
		})
	}
}

func TestALeadFollowsTheReconnectionTimeAndPrecedesTheRest(t *testing.T) {
	for _, test := range []struct {
		style, script string
		retry         time.Duration
		want          string
	}{
		{"block", "data: a\n\n|", 0, "event: sse\nid: 0\ndata:\n\ndata: a\n\n:heartbeat\n\n"},
		{"block", "|data: a\n\n", 0, "event: sse\nid: 0\ndata:\n\n:heartbeat\n\ndata: a\n\n"},
		{"block", "data: a\n\n", time.Second, "retry: 1000\n\nevent: sse\nid: 0\ndata:\n\ndata: a\n\n"},
		{"line", "|data: a\n\n", time.Second, "retry: 1000\nevent: sse\nid: 0\ndata:\n\n:heartbeat\ndata: a\n\n"},
		{"block", "data: a\r\n\r\n", time.Second, "retry: 1000\r\n\r\nevent: sse\nid: 0\ndata:\n\ndata: a\r\n\r\n"},
		{"block", "\xEF\xBB\xBFdata: a\n\n", 0, "event: sse\nid: 0\ndata:\n\ndata: a\n\n"},
		{"block", "\xEF\xBBx", 0, "event: sse\nid: 0\ndata:\n\n\xEF\xBBx"},
		{"block", "\xEF\xBB", 0, "event: sse\nid: 0\ndata:\n\n\xEF\xBB"},
		{"block", " {}", time.Second, " {}"},
		{"block", "", time.Second, ""},
	} {
		t.Run(fmt.Sprintf("%s %q", test.style, test.script), func(t *testing.T) {
			var s Splicer
			s.OweLead([]byte("event: sse\nid: 0\ndata:\n\n"))
			if test.retry > 0 {
				s.OweRetry(test.retry)
			}
			if got := play(&s, styles[test.style], test.script); got != test.want {
				t.Errorf("\ngot  %q\nwant %q", got, test.want)
			}
		})
	}
}

func TestABlockOfOurOwnGoesWhereTheStreamMayEnd(t *testing.T) {
	const text = "event: lost\ndata:\n\n"
	for _, test := range []struct {
		before, frame string // "|" means the same as in play
		after, want   string
	}{
		{"", text, "data: a\n\n", text + "data: a\n\n"},
		{"", text, "\xEF\xBB\xBFdata: a\n\n", text + "data: a\n\n"},
		{"|", text, "data: a\n\n", ":heartbeat\n\n" + text + "data: a\n\n"},
		{"data: a\n\n", text, "data: b\n\n", "data: a\n\n" + text + "data: b\n\n"},
		{"data: a\r\n\r\n", text, "\r\n", "data: a\r\n\r\n" + text + "\r\n"},
		// If lines end in CR, an LF that follows belongs to the CR before it.
		{"data: a\r\r", text, "\rdata: b\r\r", "data: a\r\r" + text + "\rdata: b\r\r"},
		{"data: a\r\r", text, "\ndata: b\r\r", "data: a\r\r" + text + "data: b\r\r"},
		{"data: a\r\r", text, "|\ndata: b\r\r", "data: a\r\r" + text + ":heartbeat\r\r\ndata: b\r\r"},
		// The LF was sent with a frame.
		{"data: a\r\n\r|", text, "\ndata: b", "data: a\r\n\r\n:heartbeat\r\n\r\n" + text + "data: b"},
		{"data: a\r\n\r|", text, "|\ndata: b", "data: a\r\n\r\n:heartbeat\r\n\r\n" + text + ":heartbeat\r\n\r\ndata: b"},
	} {
		t.Run(fmt.Sprintf("%q %q", test.before, test.after), func(t *testing.T) {
			var s Splicer
			f := styles["block"]
			got := []byte(play(&s, f, test.before))
			if !s.MayEnd() {
				t.Error("the stream may not end there")
			}
			got = s.Block(f, got, []byte(test.frame))
			if got = append(got, play(&s, f, test.after)...); string(got) != test.want {
				t.Errorf("\ngot  %q\nwant %q", got, test.want)
			}
		})
	}
	t.Run("with what is owed before it", func(t *testing.T) {
		var s Splicer
		s.OweRetry(time.Second)
		if got := string(s.Block(styles["block"], nil, []byte(text))); got != "retry: 1000\n\n"+text {
			t.Errorf("got %q", got)
		}
		if got := play(&s, styles["block"], "data: a\n\n"); got != "data: a\n\n" {
			t.Errorf("after it: got %q", got)
		}
	})
}

func TestAFrameThatMayNotGoIsOverdueUntilTheClientGetsSomething(t *testing.T) {
	var s Splicer
	f := styles["block"]
	expect := func(after string, spoken, overdue bool) {
		t.Helper()
		if s.Spoken() != spoken || s.Overdue() != overdue {
			t.Errorf("after %s: spoken %v, overdue %v; want %v, %v", after, s.Spoken(), s.Overdue(), spoken, overdue)
		}
	}
	frame := func(may bool) {
		t.Helper()
		before := []byte("before")
		got, ok := s.Frame(f, before)
		if ok != may || !bytes.HasPrefix(got, before) || ok == (len(got) == len(before)) {
			t.Errorf("the frame was %q, %v", got, ok)
		}
	}
	expect("nothing", false, false)
	s.OweRetry(time.Second)
	s.Splice(f, []byte("\xEF"))
	expect("the first byte of a byte order mark, which is held", false, false)
	frame(false)
	expect("a frame that may not go", false, true)
	s.Splice(f, []byte("\xBB"))
	expect("the second byte", false, true)
	s.Splice(f, []byte("\xBF"))
	expect("the third one", false, true)
	frame(true)
	expect("the frame", true, false)
	s.Splice(f, []byte("data: a"))
	frame(false)
	expect("a frame in mid-line", true, true)
	s.Splice(f, []byte("b"))
	expect("more of the line", true, false)
	frame(false)
	s.SpliceToEnd(f, []byte("b"))
	expect("more of it to the end", true, false)
	frame(false)
	s.Splice(f, []byte("b\n"))
	expect("the end of the line", true, false)
	frame(true)
	expect("a frame in mid-event", true, false)

	s = Splicer{}
	s.Splice(f, []byte("d"))
	expect("the first byte, which is not held", true, false)

	s = Splicer{}
	s.OweRetry(time.Second)
	s.Splice(f, []byte("\xEF"))
	frame(false)
	s.Splice(f, []byte("\xBB\xBF"))
	expect("a byte order mark, which is dropped", false, true)
	s.Block(f, nil, []byte(":\n\n"))
	expect("a block of our own", true, false)
}

func TestNoFrameGoesIntoJSON(t *testing.T) {
	for _, body := range []string{"{", "[\n\n", " \n{}\n\n", "\uFEFF{}\n"} {
		var s Splicer
		f := styles["block"]
		play(&s, f, body)
		if frame, ok := s.Frame(f, nil); ok || len(frame) > 0 || s.Overdue() || !s.Opaque() || !s.MayEnd() {
			t.Errorf("after %q: frame %q, %v, overdue %v, opaque %v, may end %v", body, frame, ok, s.Overdue(), s.Opaque(), s.MayEnd())
		}
		if got, want := play(&s, f, "\n\ndata: a\n\n|\n\n"), "\n\ndata: a\n\n\n\n"; got != want {
			t.Errorf("after %q: got %q, want %q", body, got, want)
		}
		if _, body, n, done := s.SpliceToEnd(f, []byte("data: a\n\ndata: b\n\n")); len(body) != 18 || n != 18 || !done {
			t.Errorf("to the end: %q, %d, %v", body, n, done)
		}
	}
}

func TestAnEarlyEndHarmsNoEventAndTearsNoCRLF(t *testing.T) {
	for _, test := range []struct {
		before, body string
		n            int
		done         bool
	}{
		{"data: a", "\n\ndata: b\n\n", 2, true},
		{"data: a\n", "\ndata: b\n\n", 1, true},
		{"data: a\n", "\n", 1, true},
		{"data: a\n", "data: b", 7, false},
		{"data: a\n", ": b\n", 4, false},
		{":", " b\n:", 3, true},
		{"\xEF", "\xBB\xBFdata: a\n\n", 2, true},
		{"\xEF", "\xBB", 1, false},
		{"\xEF", "a\n\n", 3, true},
		// An LF after a CR belongs to the event.
		{"data: a\r\n", "\r\ndata: b", 2, true},
		{"data: a\r\n", "\r", 1, false},
		{"data: a\r\n\r", "\ndata: b", 1, true},
		{"data: a\r\n\r", "data: b", 0, true},
		{"data: a\r", "\ndata: b\r\n\r\n", 12, true},
		{"data: a\n", "\r\ndata: b", 2, true},
		{"data: a\n", "\r", 1, false},
		{"data: a\n", "\r\r\n", 1, true},
		{"\r", "\n", 1, true},
		{"\r", "\r", 0, true},
		// If lines end in CR, no LF is expected.
		{"data: a\rdata: b\r", "\r", 1, true},
		{"data: a\r", "\rdata: b\r\r", 1, true},
		{"data: a\r", "\r\ndata: b\r\r", 2, true},
		// The LF was sent with a frame.
		{"data: a\r\n\r|", "\ndata: b", 1, true},
		{"data: a\r|", "\n\r\n", 3, true},
	} {
		t.Run(fmt.Sprintf("%q %q", test.before, test.body), func(t *testing.T) {
			f := styles["block"]
			var s Splicer
			play(&s, f, test.before)
			lead, body, n, done := s.SpliceToEnd(f, []byte(test.body))
			if n != test.n || done != test.done {
				t.Errorf("%d bytes, %v; want %d, %v", n, done, test.n, test.done)
			}
			if len(lead) > 0 || !strings.HasSuffix(test.body[:n], string(body)) {
				t.Errorf("lead %q, body %q", lead, body)
			}
		})
	}
}

func TestAStreamMayEndAtAnEventBoundary(t *testing.T) {
	for _, test := range []struct {
		script string
		want   bool
	}{
		{"", true},
		{"|", true},
		{"data: a\n\n", true},
		{"data: a\n\n:\n", true},
		{"data: a\n\n|", true},
		{"data: a\n\n:", false},
		{"data: a\n", false},
		{"data: a\n|", false},
		{"d", false},
		{"\xEF", false},
		{"|\xEF", false},
		{"\xEF\xBB\xBF", true},
		{"|\xEF\xBB\xBF", true},
		{"data: a\r\n\r\n", true},
		{"data: a\r\n\r", false},
		{"data: a\r\n\r|", true},
		{"data: a\r\n\r|\n", true},
		{"data: a\r\r", true},
		{"\r", false},
		{"{", true},
		{" {", true},
	} {
		var s Splicer
		// Rest is not called, because a byte order mark that is held back counts.
		for part := range strings.SplitAfterSeq(test.script, "|") {
			s.Splice(styles["block"], []byte(strings.TrimSuffix(part, "|")))
			if strings.HasSuffix(part, "|") {
				s.Frame(styles["block"], nil)
			}
		}
		if got := s.MayEnd(); got != test.want {
			t.Errorf("after %q: %v", test.script, got)
		}
	}
}

// numberer adds IDs to the events of an upstream, as a run does. No body
// contains such IDs.
type numberer struct {
	s Splicer
	n int
}

func (n *numberer) add(dst, p []byte) []byte {
	for len(p) > 0 {
		size, idAt, _ := n.s.ScanBlock(p)
		if idAt >= 0 {
			dst = append(dst, p[:idAt]...)
			dst = n.s.AppendID(dst, n.next())
			dst = append(dst, p[idAt:size]...)
		} else {
			dst = append(dst, p[:size]...)
		}
		p = p[size:]
	}
	return dst
}

func (n *numberer) next() []byte {
	n.n++
	return strconv.AppendInt([]byte{mark}, int64(n.n), 10)
}

var addedID = regexp.MustCompile("id: \x01([0-9]+)(\r\n|\r|\n)")

// withLF returns text in which the added ID lines end in LF. While the LF of a
// CR may still come, the scanner does not know that lines end in CRLF.
func withLF(text string) string { return addedID.ReplaceAllString(text, "id: \x01$1\n") }

// The names are sentences of the HTML Standard, sections 9.2.5 and 9.2.6, and
// consequences of them.
func TestABlockThatDispatchesAnEventGetsAnIDAsItsLastLine(t *testing.T) {
	for _, test := range []struct{ sentence, body, want string }{
		{"if the line is empty, dispatch the event", "data: a\n\ndata: b\n\n", "data: a\nid: \x011\n\ndata: b\nid: \x012\n\n"},
		{"if the data buffer is an empty string, return", "event: a\n\nfoo\n\n: c\n\nretry: 1\n\n\n", "event: a\n\nfoo\n\n: c\n\nretry: 1\n\n\n"},
		{"a bare data line makes an event", "data\n\n", "data\nid: \x011\n\n"},
		{"data: on several lines is one event", "data: a\ndata: b\nevent: c\n\n", "data: a\ndata: b\nevent: c\nid: \x011\n\n"},
		{"if the line starts with a colon, ignore the line", "data: a\n: b\n\n", "data: a\n: b\nid: \x011\n\n"},
		{"once the end of the file is reached, any pending data must be discarded", "data: a\n\ndata: b\n", "data: a\nid: \x011\n\ndata: b\n"},

		{"lines are separated by a CRLF pair", "data: a\r\n\r\ndata: b\r\n\r\n", "data: a\r\nid: \x011\r\n\r\ndata: b\r\nid: \x012\r\n\r\n"},
		{"or a single CR not followed by LF", "data: a\r\rdata: b\r\r", "data: a\rid: \x011\r\rdata: b\rid: \x012\r\r"},
		{"CR, then CRLF", "data: a\r\r\ndata: b\r\r\n", "data: a\rid: \x011\r\r\ndata: b\rid: \x012\r\r\n"},
		{"LF, then CRLF", "data: a\n\r\ndata: b\n\r\n", "data: a\nid: \x011\n\r\ndata: b\nid: \x012\n\r\n"},
		{"LF, then CR", "data: a\n\rdata: b\n\r", "data: a\nid: \x011\n\rdata: b\nid: \x012\n\r"},
		{"CRLF, then LF", "data: a\r\n\ndata: b\r\n\n", "data: a\r\nid: \x011\n\ndata: b\r\nid: \x012\n\n"},
		{"CRLF, then CR", "data: a\r\n\rdata: b\r\n\r", "data: a\r\nid: \x011\r\n\rdata: b\r\nid: \x012\r\n\r"},

		{"if the field name is id, set the last event ID buffer: from here on none is added", "data: a\n\nid: 7\ndata: b\n\ndata: c\n\n", "data: a\nid: \x011\n\nid: 7\ndata: b\n\ndata: c\n\n"},
		{"otherwise the whole line is the field name: an empty ID is one", "data: a\nid\n\ndata: b\n\n", "data: a\nid\n\ndata: b\n\n"},
		{"an ID in a block without data is one", "id: 7\n\ndata: b\n\n", "id: 7\n\ndata: b\n\n"},
		{"an ID as the last line is one", "data: a\nid:7\n\n", "data: a\nid:7\n\n"},
		{"if the value has NUL, ignore the field", "id: \x00\ndata: a\n\n", "id: \x00\ndata: a\nid: \x011\n\n"},
		{"field names must be compared literally", "ID: 7\nid : 7\ni\nidd\ndata: a\n\n", "ID: 7\nid : 7\ni\nidd\ndata: a\nid: \x011\n\n"},
		{"a comment has no fields", ":id: 7\ndata: a\n\n", ":id: 7\ndata: a\nid: \x011\n\n"},

		{"one leading byte order mark is stripped", "\uFEFFdata: a\n\n\uFEFFdata: b\n\n", "\uFEFFdata: a\nid: \x011\n\n\uFEFFdata: b\n\n"},
		{"ours: JSON is passed on untouched", " {\ndata: a\n\n", " {\ndata: a\n\n"},
	} {
		t.Run(test.sentence, func(t *testing.T) {
			for cut := range len(test.body) + 1 {
				var n numberer
				got := n.add(nil, []byte(test.body[:cut]))
				// The ID of an event is sent with the byte that dispatches it,
				// and nothing is held back.
				if bare := addedID.ReplaceAllString(string(got), ""); bare != test.body[:cut] {
					t.Errorf("%q became %q", test.body[:cut], got)
				}
				if got := string(n.add(got, []byte(test.body[cut:]))); withLF(got) != withLF(test.want) {
					t.Errorf("cut at byte %d:\ngot  %q\nwant %q", cut, got, test.want)
				}
			}
		})
	}
}

func TestAnUpstreamHasIDsFromTheEndOfItsFirstIDLineOn(t *testing.T) {
	for _, test := range []struct {
		body string
		want bool
	}{
		{"", false},
		{"data: a\n\n", false},
		{"id: 7", false},
		{"id: 7\n", true},
		{"id: 7\ndata: a\n\n", true},
		{"id: 7\n\ndata: a\n\n", true},
		{"id: 7\n\nid: \x00", true},
		{"id", false},
		{"id\r", true},
		{"id:\n", true},
		{"id: \x00\n\n", false},
		{":id: 7\n\n", false},
		{"ID: 7\n\n", false},
	} {
		var s Splicer
		s.Splice(styles["block"], []byte(test.body))
		if got := s.HasOwnIDs(); got != test.want {
			t.Errorf("after %q: %v", test.body, got)
		}
	}
}

func TestIDsAndFramesGoTogether(t *testing.T) {
	for _, test := range []struct{ style, script, want string }{
		{"block", "data: a\n|\n|", "data: a\n:heartbeat\nid: \x011\n\n:heartbeat\n\n"},
		{"line", "|data: a\n\n|", ":heartbeat\ndata: a\nid: \x011\n\n:heartbeat\n"},
		{"event", "data: a\n|\n|data: b\n\n", "data: a\nid: \x011\n\nevent: ping\ndata:\n\ndata: b\nid: \x012\n\n"},
		{"block", "|\uFEFFdata: a\n\n", ":heartbeat\n\ndata: a\nid: \x011\n\n"},
		{"block", "|\xEF|\xBB|\xBF|data: a\n\n", ":heartbeat\n\n:heartbeat\n\ndata: a\nid: \x011\n\n"},
		{"block", "|\xEF|data: a\n\ndata\n\n", ":heartbeat\n\n\xEFdata: a\n\ndata\nid: \x011\n\n"},
		// The LF of a CR is sent with a frame.
		{"block", "data: a\r|\n\r\n", "data: a\r\n:heartbeat\r\nid: \x011\r\n\r\n"},
		{"block", "data: a\r|\n\r|\n", "data: a\r\n:heartbeat\r\nid: \x011\r\n\r\n:heartbeat\r\n\r\n"},
		{"block", "data: a\r|\r", "data: a\r\n:heartbeat\r\nid: \x011\r\r"},
		{"block", "data: a\n\r|\n", "data: a\nid: \x011\n\r\n:heartbeat\n\n"},
		// If lines end in CR, the LF merges with the frame's line end.
		{"block", ":\rdata: a\r|\r", ":\rdata: a\r:heartbeat\rid: \x011\r\r"},
		{"block", ":\rdata: a\r|\n\n", ":\rdata: a\r:heartbeat\r\nid: \x011\n\n"},
		{"block", ":\rdata: a\r\r|\n", ":\rdata: a\rid: \x011\r\r:heartbeat\r\r\n"},
	} {
		t.Run(fmt.Sprintf("%s %q", test.style, test.script), func(t *testing.T) {
			var s Splicer
			var n numberer
			var got []byte
			f := styles[test.style]
			for i, part := range strings.Split(test.script, "|") {
				if i > 0 {
					got, _ = s.Frame(f, got)
				}
				lead, body := s.Splice(f, n.add(nil, []byte(part)))
				got = append(append(got, lead...), body...)
			}
			if string(got) != test.want {
				t.Errorf("\ngot  %q\nwant %q", got, test.want)
			}
		})
	}
	t.Run("with what is owed before them", func(t *testing.T) {
		var s Splicer
		var n numberer
		s.OweRetry(time.Second)
		s.OweLead([]byte("event: sse\ndata:\n\n"))
		lead, body := s.Splice(styles["block"], n.add(nil, []byte("\uFEFFdata: a\r\n\r\ndata: b")))
		got := append(lead, body...)
		if want := "retry: 1000\r\n\r\nevent: sse\ndata:\n\ndata: a\r\nid: \x011\r\n\r\ndata: b"; string(got) != want {
			t.Errorf("\ngot  %q\nwant %q", got, want)
		}
	})
}

func TestTheIDOfAnEventThatIsTheLastGoesOutWithIt(t *testing.T) {
	for _, test := range []struct {
		before, body, want string
	}{
		{"data: a", "\n\ndata: b\n\n", "\nid: \x011\n\n"},
		{"data: a\r\n", "\r\ndata: b", "id: \x011\r\n\r\n"},
		{"data: a\r\n", "data: b", "data: b"},
		{"data: a\r", "\rdata: b", "id: \x011\r\r"},
		{"id: 7\ndata: a\n", "\ndata: b", "\n"},
		{"event: a\n", "\ndata: b", "\n"},
	} {
		t.Run(fmt.Sprintf("%q %q", test.before, test.body), func(t *testing.T) {
			var s Splicer
			var n numberer
			f := styles["block"]
			s.Splice(f, n.add(nil, []byte(test.before)))
			if _, got, _, _ := s.SpliceToEnd(f, n.add(nil, []byte(test.body))); string(got) != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestWhatIsNotAskedForIsNotThere(t *testing.T) {
	f := styles["block"]
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			step := 1 + len(body.Text)/500
			for cut := 0; cut <= len(body.Text); cut += step {
				pieces := []string{body.Text[:cut], body.Text[cut:]}
				var plain, toEnd Splicer
				var client []byte
				var ids numberer
				for _, piece := range pieces {
					lead, body := plain.Splice(f, []byte(piece))
					if len(lead) > 0 || string(body) != piece {
						t.Fatalf("%q became %q, %q", piece, lead, body)
					}
					for len(piece) > 0 {
						lead, body, n, done := toEnd.SpliceToEnd(f, []byte(piece))
						if len(lead) > 0 || string(body) != piece[:n] || n < len(piece) && !done {
							t.Fatalf("to the end, %q became %q, %q, %d, %v", piece, lead, body, n, done)
						}
						if n == 0 { // no LF follows the CR: the stream need not end any more
							toEnd.Splice(f, []byte(piece[:1]))
							n = 1
						}
						piece = piece[n:]
					}
				}
				for _, piece := range pieces {
					client = ids.add(client, []byte(piece))
				}
				if got := addedID.ReplaceAllString(string(client), ""); got != body.Text {
					t.Fatalf("cut at byte %d, with IDs and without them again: %q became %q", cut, body.Text, got)
				}
				if len(plain.Rest(f))+len(toEnd.Rest(f)) > 0 {
					t.Error("there is a rest")
				}
			}
		})
	}
}

func TestAClientSeesTheIDsThatAreAdded(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			var ids, n numberer
			client := ids.add(nil, []byte(body.Text))
			var want []eventstreamtest.Event
			for _, event := range eventsWithout(body.Text) {
				if event.LastEventID == noOwnID {
					event.LastEventID = string(n.next())
				}
				want = append(want, event)
			}
			if ids.s.Opaque() {
				want = eventstreamtest.Parse([]byte(body.Text)).Events
			}
			if got := eventstreamtest.Parse(client).Events; !slices.Equal(got, want) {
				t.Errorf("%q\ngot  %q\nwant %q", client, got, want)
			}
		})
	}
}

// eventsWithout returns the events of body, with noOwnID for those before the
// first id field.
func eventsWithout(body string) []eventstreamtest.Event {
	body = strings.TrimPrefix(body, bom)
	return eventstreamtest.Parse([]byte("id: " + noOwnID + "\n\n" + body)).Events
}

// The scanner searches all that it gets for line ends. If each event were
// searched for in all that is left, this would take 400 times as long as
// without IDs, not three times.
func TestTheWorkOnALongWriteGrowsWithItsLength(t *testing.T) {
	body := bytes.Repeat([]byte("data\n\n"), 1<<20/6)
	dst := make([]byte, 0, 2<<20)
	without, with := time.Hour, time.Hour
	for range 3 {
		var s Splicer
		var withIDs numberer
		began := time.Now()
		s.Splice(styles["block"], body)
		without = min(without, time.Since(began))
		began = time.Now()
		withIDs.add(dst, body)
		with = min(with, time.Since(began))
	}
	if with > 50*without {
		t.Errorf("1 MiB of small events took %v, and without IDs %v", with, without)
	}
}

func TestNothingIsAllocatedForPlainBytes(t *testing.T) {
	f := styles["block"]
	event := []byte("event: a\ndata: b\r\n\r\n")
	buffer := make([]byte, 0, 1<<10)
	for name, prepare := range map[string]func(s *Splicer){
		"at once":                   func(*Splicer) {},
		"after a frame":             func(s *Splicer) { s.Frame(f, buffer) },
		"after a frame in mid-line": func(s *Splicer) { s.Splice(f, []byte(":")); s.Frame(f, buffer) },
		"after a retry field":       func(s *Splicer) { s.OweRetry(1); s.Splice(f, event) },
		"in JSON":                   func(s *Splicer) { s.Splice(f, []byte("{")) },
	} {
		var s Splicer
		prepare(&s)
		if n := testing.AllocsPerRun(100, func() { s.Splice(f, event) }); n != 0 {
			t.Errorf("%s: %v allocations a write", name, n)
		}
		if n := testing.AllocsPerRun(100, func() { s.SpliceToEnd(f, event) }); n != 0 {
			t.Errorf("%s: %v allocations a write to the end", name, n)
		}
		if n := testing.AllocsPerRun(100, func() { s.Frame(f, buffer); s.Splice(f, event) }); n != 0 {
			t.Errorf("%s: %v allocations a frame", name, n)
		}
	}
	var s Splicer
	if n := testing.AllocsPerRun(100, func() { s.ScanBlock(event); s.AppendID(buffer, event[:5]) }); n != 0 {
		t.Errorf("%v allocations a block with an ID", n)
	}
}
