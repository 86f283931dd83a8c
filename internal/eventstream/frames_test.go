package eventstream

import (
	"fmt"
	"strings"
	"testing"
)

// styles are the ways in which a frame can look.
var styles = map[string]*Frames{
	"block":             {Comment: "heartbeat"},
	"block, comment":    {Comment: " still here: ü "},
	"block, no comment": {},
	"line":              {Style: Line, Comment: "heartbeat"},
	"line, comment":     {Style: Line, Comment: "x"},
	"event":             {Style: Event, Event: "ping"},
	"event with data":   {Style: Event, Event: "ping", Data: `{"a":1}`},
	"event with spaces": {Style: Event, Event: " ping ", Data: " a ", Comment: "unused", Pad: 100},
}

func TestFramesByStyleAndPlace(t *testing.T) {
	for _, test := range []struct {
		style, before, frame string
	}{
		{"block", "", ":heartbeat\n\n"},
		{"block, comment", "", ": still here: ü \n\n"},
		{"block, no comment", "", ":\n\n"},
		{"line", "", ":heartbeat\n"},
		{"line, comment", "", ":x\n"},
		{"event", "", "event: ping\ndata:\n\n"},
		{"event with data", "", "event: ping\ndata: {\"a\":1}\n\n"},
		{"event with spaces", "", "event:  ping \ndata:  a \n\n"},

		// At an event boundary.
		{"block", "data: a\n\n", ":heartbeat\n\n"},
		{"block", "\n", ":heartbeat\n\n"},
		{"block", ":\n", ":heartbeat\n\n"},
		{"block", "data: a\n\n: b\n: c\n", ":heartbeat\n\n"},
		{"block", "\uFEFF", ":heartbeat\n\n"},
		{"block", "\uFEFF:\n", ":heartbeat\n\n"},
		{"line", "data: a\n\n", ":heartbeat\n"},
		{"event", "data: a\n\n", "event: ping\ndata:\n\n"},
		{"event", "data: a\n\n:\n", "event: ping\ndata:\n\n"},
		{"event", "\uFEFF", "event: ping\ndata:\n\n"},

		// Inside an event.
		{"block", "data: a\n", ":heartbeat\n"},
		{"block", "id: 1\n", ":heartbeat\n"},
		{"block", "x\n", ":heartbeat\n"},
		{"block", "data: a\n:\n", ":heartbeat\n"},
		{"block, comment", "data: a\n", ": still here: ü \n"},
		{"line", "data: a\n", ":heartbeat\n"},
		{"event", "data: a\n", ""},
		{"event", "data: a\n:\n", ""},
		{"event with data", "data: a\n\nid: 1\n", ""},

		// Inside a line.
		{"block", "data: a", ""},
		{"block", "data: a\n\nd", ""},
		{"block", ":", ""},
		{"block", "data: a\n\n: b", ""},
		{"block", " ", ""},
		{"block", "\x00", ""},
		{"block", "\xEF", ""},
		{"block", "\xEF\xBB", ""},
		{"line", "data: a", ""},
		{"line", ":", ""},
		{"event", "data: a", ""},
		{"event", ":", ""},

		// With the upstream's line endings.
		{"block", "data: a\r\n\r\n", ":heartbeat\r\n\r\n"},
		{"block", "data: a\r\n", ":heartbeat\r\n"},
		{"line", "data: a\r\n\r\n", ":heartbeat\r\n"},
		{"event with data", "data: a\r\n\r\n", "event: ping\r\ndata: {\"a\":1}\r\n\r\n"},
		{"block", "data: a\r\r:\r", ":heartbeat\r\r"},
		{"block", "data: a\rdata: b\r", ":heartbeat\r"},
		{"line", "data: a\rdata: b\r", ":heartbeat\r"},
		{"event", "data: a\r\r:\r", "event: ping\rdata:\r\r"},
		{"block", "data: a\n\ndata: b\r\n\r\n", ":heartbeat\r\n\r\n"},
		{"block", "data: a\r\n\r\ndata: b\n\n", ":heartbeat\n\n"},
	} {
		t.Run(fmt.Sprintf("%s after %q", test.style, test.before), func(t *testing.T) {
			want := test.before + test.frame
			expectPlayed(t, styles[test.style], test.before+"|", want)
			expectPlayed(t, styles[test.style], byteByByte(test.before)+"|", want)
		})
	}
}

// byteByByte makes a script in which each byte of a body is a write.
func byteByByte(body string) string {
	var script strings.Builder
	for i := range len(body) {
		script.WriteString(body[i : i+1])
		script.WriteByte('/')
	}
	return script.String()
}

func TestACommentIsFilledWithSpaces(t *testing.T) {
	for _, test := range []struct {
		style         Style
		pad           int
		before, frame string
	}{
		{Block, 10, "", ":12345  \n\n"},
		{Block, 9, "", ":12345 \n\n"},
		{Line, 10, "", ":12345   \n"},
		{Block, 10, "data: a\n", ":12345   \n"},
		{Block, 10, "data: a\r\n\r\n", ":12345\r\n\r\n"},
		{Block, 11, "data: a\r\n\r\n", ":12345 \r\n\r\n"},
		{Line, 11, "data: a\r\n\r\n", ":12345   \r\n"},
		{Block, 10, "data: a\r\rdata: b\r", ":12345   \r"},
		// What goes before the frame does not count towards its length.
		{Block, 11, "data: a\r\n\r", "\n:12345 \r\n\r\n"},
		// A frame that is longer stays unchanged.
		{Block, 8, "", ":12345\n\n"},
		{Block, 7, "", ":12345\n\n"},
		{Line, 1, "", ":12345\n"},
		{Block, 1000, "", ":12345" + strings.Repeat(" ", 1000-8) + "\n\n"},
		{Line, 64 << 10, "", ":12345" + strings.Repeat(" ", 64<<10-7) + "\n"},
	} {
		t.Run(fmt.Sprintf("style %d to %d bytes after %q", test.style, test.pad, test.before), func(t *testing.T) {
			f := &Frames{Style: test.style, Comment: "12345", Pad: test.pad}
			expectPlayed(t, f, test.before+"|", test.before+test.frame)
		})
	}
}
