package top

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
)

// seen is a view with everything in it.
func seen(streams int) View {
	v := View{Address: "localhost:2019", Asked: "sort bytes", Snapshot: Snapshot{
		At: time.Date(2026, 11, 25, 22, 36, 40, 0, time.UTC), Seconds: 2,
		Totals: Figures{
			Open: 10_000, Opened: 1_234_567, Events: 374_203, Bytes: 28 << 20, Heartbeats: 332_276,
			Closed: map[string]int64{"client_closed": 2000, "drained": 10_001, "admin": 0},
		},
		Deltas:   Figures{Open: -3, Opened: 9, Events: 1154, Bytes: 88 << 10, Heartbeats: 0, Closed: map[string]int64{"drained": 12}},
		Names:    []Name{{"chat", 10}, {"feed", 9990}},
		Matching: 10_000,
	}}
	for i := range streams {
		v.Snapshot.Streams = append(v.Snapshot.Streams, Stream{
			Name: "feed", State: "open", ClientIP: fmt.Sprint("203.0.113.", i), Path: fmt.Sprint("/feed/", i), Proto: "HTTP/1.1",
			UserAgent: "tests/1", Upstream: "127.0.0.1:9000", DurationSeconds: 274, IdleSeconds: 2.84, Events: 27, Bytes: 2150, Heartbeats: 1,
		})
	}
	return v
}

func texts(lines []Line) (texts []string) {
	for _, line := range lines {
		texts = append(texts, strings.TrimRight(line.Text, " "))
	}
	return texts
}

func TestAScreenOf80By24ShowsFiguresAndStreams(t *testing.T) {
	lines := seen(200).Lines(80, 24)
	want := []string{
		"caddy sse top  localhost:2019                                          22:36:40",
		"open 10,000  -3           opened 1,234,567  4.5/s   ended 12,001  6.0/s",
		"events 374,203  577/s     bytes 28 MiB  44 KiB/s    heartbeats 332,276  0/s",
		"ended: drained 10,001  client_closed 2,000",
		"open: feed 9,990  chat 10",
		"10,000 match, the first 16 shown  sort bytes",
		"CLIENT       PROTO      AGE IDLE EVENTS   BYTES BEATS PATH",
		"203.0.113.0  HTTP/1.1 4m34s 2.8s     27 2.1 KiB     1 /feed/0",
	}
	if got := texts(lines); !slices.Equal(got[:len(want)], want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(lines) != 24 || lines[22].Text != "203.0.113.15 HTTP/1.1 4m34s 2.8s     27 2.1 KiB     1 /feed/15" || lines[23].Text != "q or Ctrl-C ends this" {
		t.Errorf("%d lines, at the end %q", len(lines), texts(lines[22:]))
	}
	if lines[0].Style != Bold || lines[6].Style != Reverse || lines[7].Style != Plain {
		t.Error("the styles are others")
	}
}

func TestWiderScreensShowMoreColumns(t *testing.T) {
	for columns, heads := range map[int]string{
		40:  "CLIENT AGE IDLE PATH",
		60:  "CLIENT AGE IDLE EVENTS BYTES PATH",
		80:  "CLIENT PROTO AGE IDLE EVENTS BYTES BEATS PATH",
		100: "CLIENT NAME PROTO STATE AGE IDLE EVENTS BYTES BEATS PATH",
		160: "CLIENT NAME PROTO STATE AGE IDLE EVENTS BYTES BEATS UPSTREAM USER AGENT PATH",
	} {
		lines := texts(seen(3).Lines(columns, 24))
		if got := strings.Join(strings.Fields(lines[6]), " "); got != heads {
			t.Errorf("%d columns: %s", columns, got)
		}
	}
}

func TestNoLineLeavesTheScreen(t *testing.T) {
	v := seen(100)
	v.Trouble = strings.Repeat("trouble ", 100)
	v.Asked = strings.Repeat("路", 100)
	for i := range v.Snapshot.Streams {
		s := &v.Snapshot.Streams[i]
		s.Path, s.Name, s.UserAgent = strings.Repeat("/日本語é", i), strings.Repeat("n", i), strings.Repeat("👩‍🚀", i)
		s.ClientIP, s.Upstream = "2001:db8:1111:2222:3333:4444:5555:6666", strings.Repeat("u", 2*i)
	}
	for columns := range 200 {
		for _, rows := range []int{0, 1, 2, 5, 8, 24, 60} {
			lines := v.Lines(columns, rows)
			if len(lines) > rows || columns > 1 && len(lines) != rows {
				t.Fatalf("%d×%d: %d lines", columns, rows, len(lines))
			}
			for _, line := range lines {
				if displayed(line.Text) > columns-1 {
					t.Fatalf("%d×%d: %q takes %d columns", columns, rows, line.Text, displayed(line.Text))
				}
			}
		}
	}
}

func TestWhatOthersHaveSentMovesNoCursor(t *testing.T) {
	const evil = "a\x1b[31m\x1b]0;title\x07\r\n\t\x9b2J\u202eb\xff\x00"
	v := View{Address: evil, Asked: evil, Trouble: evil}
	v.Snapshot = Snapshot{
		Matching: 1,
		Totals:   Figures{Closed: map[string]int64{evil: 1}},
		Names:    []Name{{evil, 1}, {"b", 1}},
		Streams:  []Stream{{evil, evil, evil, evil, evil, evil, evil, 1, 1, 1, 1, 1}},
	}
	for _, line := range v.Lines(250, 24) {
		if strings.ContainsFunc(line.Text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q", line.Text)
		}
	}
}

func TestAViewWithoutASnapshotSaysWhyThereIsNone(t *testing.T) {
	lines := View{Address: "localhost:2019", Trouble: "trying again"}.Lines(80, 24)
	if last := lines[23]; strings.TrimRight(last.Text, " ") != "trying again" || last.Style != Reverse {
		t.Errorf("the last line is %q", last.Text)
	}
	if strings.Contains(lines[0].Text, "00:00:00") {
		t.Errorf("the first line is %q", lines[0].Text)
	}
}

func TestNumbersAreForPeople(t *testing.T) {
	for got, want := range map[string]string{
		grouped(0): "0", grouped(-999): "-999", grouped(1000): "1,000", grouped(-1234567): "-1,234,567",
		size(0): "0 B", size(1023): "1023 B", size(1024): "1.0 KiB", size(20 << 20): "20 MiB", size(3 << 60): "3.0 EiB",
		span(0): "0.0s", span(9.94): "9.9s", span(59.9): "59s", span(61): "1m01s", span(7322): "2h02m", span(90_000): "1d01h",
		fit("日本語", 4): "日…", fit("abc", 3): "abc", fit("abcd", 3): "ab…", fit("e\u0301e\u0301", 2): "e\u0301e\u0301",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
