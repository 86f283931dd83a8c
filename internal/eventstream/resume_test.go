package eventstream

import (
	"slices"
	"testing"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// resume plays bodies one after the other; see play. At the end of each, the
// splicer must be at an event boundary.
func resume(t *testing.T, s *Splicer, f *Frames, scripts ...string) (client string) {
	t.Helper()
	for i, script := range scripts {
		if i > 0 {
			if !s.MayResume() {
				t.Fatalf("%q: no other body may follow %q", scripts, scripts[i-1])
			}
			client += string(s.Resume(nil))
		}
		client += play(s, f, script)
	}
	return client
}

func TestABodyThatFollowsAnotherIsPartOfOneStream(t *testing.T) {
	for _, test := range []struct {
		name    string
		scripts []string
		want    string
	}{
		{"plain", []string{"data: a\n\n", "data: b\n\n"}, "data: a\n\ndata: b\n\n"},
		{"nothing before", []string{"", "data: b\n\n"}, "data: b\n\n"},
		{"a comment before", []string{":x\n", "data: b\n\n"}, ":x\ndata: b\n\n"},
		{"a BOM", []string{"data: a\n\n", "\ufeffdata: b\n\n"}, "data: a\n\ndata: b\n\n"},
		{"a BOM in pieces", []string{"data: a\n\n", "\xef/\xbb/\xbfdata: b\n\n"}, "data: a\n\ndata: b\n\n"},
		{"a BOM after a frame", []string{"data: a\n\n", "|\ufeffdata: b\n\n"}, "data: a\n\n:heartbeat\n\ndata: b\n\n"},
		{"a BOM before anything else", []string{"", "\ufeffdata: b\n\n"}, "data: b\n\n"},
		{"a BOM in each", []string{"\ufeffdata: a\n\n", "\ufeffdata: b\n\n", "\ufeffdata: c\n\n"}, "\ufeffdata: a\n\ndata: b\n\ndata: c\n\n"},
		{"no BOM", []string{"data: a\n\n", "\xef/\xbbdata: b\n\n"}, "data: a\n\n\xef\xbbdata: b\n\n"},
		{"an LF that is missing", []string{"data: a\r\n\r", "data: b\n\n"}, "data: a\r\n\r\ndata: b\n\n"},
		{"an LF that a frame brought", []string{"data: a\r\n\r|", "\ndata: b\n\n"}, "data: a\r\n\r\n:heartbeat\r\n\r\n\ndata: b\n\n"},
		{"lines that end in CR", []string{"data: a\r\r", "data: b\r\r"}, "data: a\r\rdata: b\r\r"},
		{"other line ends", []string{"data: a\r\n\r\n", "|data: b\n\n|"}, "data: a\r\n\r\n:heartbeat\r\n\r\ndata: b\n\n:heartbeat\n\n"},
	} {
		var s Splicer
		got := resume(t, &s, &Frames{Comment: "heartbeat"}, test.scripts...)
		if got != test.want {
			t.Errorf("%s:\ngot  %q\nwant %q", test.name, got, test.want)
		}
		if events := eventstreamtest.Parse([]byte(got)).Events; uint64(len(events)) != s.Scanner().Events() {
			t.Errorf("%s: a client sees %d events, and %d were counted", test.name, len(events), s.Scanner().Events())
		}
	}
}

func TestWhatAnUpstreamHasSaidStaysWhenAnotherBodyFollows(t *testing.T) {
	var s Splicer
	resume(t, &s, &Frames{}, "retry: 7\nid: 3\ndata: a\n\n", "data: b\n\n")
	id, committed := s.Scanner().LastEventID()
	retry, told := s.Scanner().Retry()
	if id != "3" || !committed || retry != 7 || !told || s.Scanner().Events() != 2 {
		t.Errorf("id %q %v, retry %d %v, %d events", id, committed, retry, told, s.Scanner().Events())
	}
	resume(t, &s, &Frames{}, "", "id: 4\n\n")
	if id, _ := s.Scanner().LastEventID(); id != "4" {
		t.Errorf("id %q", id)
	}
}

func TestAnotherBodyMayFollowAtAnEventBoundaryOnly(t *testing.T) {
	for body, want := range map[string]bool{
		"": true, "\ufeff": true, "\xef": false, "data: a\n\n": true, "data: a\r\n\r": true, "data: a\r\r": true,
		"data: a\n\n:x\n": true, "data: a\n\n:x": false, "data: a\n": false, "data: a": false, "\n": true, "id: 1\n": false,
		"{": false, " [": false,
	} {
		var s Splicer
		s.Splice(&Frames{}, []byte(body))
		if got := s.MayResume(); got != want {
			t.Errorf("%q: %v", body, got)
		}
	}
}

func TestABodyThatFollowsAnotherCanTurnOutToBeJSON(t *testing.T) {
	var s Splicer
	resume(t, &s, &Frames{}, "data: a\n\n", " {")
	if !s.Opaque() {
		t.Error("it did not")
	}
}

// The same for every pair of bodies in the collection.
func TestAClientSeesTheEventsOfBothBodies(t *testing.T) {
	bodies := eventstreamtest.Bodies()
	pairs := 0
	for _, first := range bodies {
		var whole Splicer
		whole.Splice(&Frames{}, []byte(first.Text))
		if !whole.MayResume() {
			continue
		}
		for _, second := range bodies {
			var s Splicer
			got := eventstreamtest.Parse([]byte(resume(t, &s, &Frames{Comment: "x"}, first.Text, "|"+second.Text)))
			if s.Opaque() {
				continue
			}
			pairs++
			before := eventstreamtest.Parse([]byte(first.Text))
			after := eventstreamtest.Parse([]byte(second.Text))
			want := slices.Concat(names(before.Events), names(after.Events))
			if !slices.Equal(names(got.Events), want) {
				t.Errorf("%q, %q:\ngot  %q\nwant %q", first.Text, second.Text, names(got.Events), want)
			}
		}
	}
	if pairs < 100 {
		t.Errorf("only %d pairs", pairs)
	}
}

// names returns the events without their IDs, which continue from one body to
// the next.
func names(events []eventstreamtest.Event) (all []string) {
	for _, event := range events {
		all = append(all, event.Type+"\n"+event.Data)
	}
	return all
}
