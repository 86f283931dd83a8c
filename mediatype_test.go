package caddysse

import (
	"net/http"
	"slices"
	"testing"
)

// The cases with lists are from Fetch, section 2.2.2 ("extract a MIME type",
// "get, decode, and split"), those with single values from the MIME Sniffing
// Standard, section 4.4.
func TestTheTypeOfAResponseIsTheLastValidOne(t *testing.T) {
	for _, test := range []struct {
		lines []string
		want  string
	}{
		{nil, ""},
		{[]string{""}, ""},
		{[]string{"text/event-stream"}, "text/event-stream"},
		{[]string{"Text/Event-Stream; charset=utf-8"}, "Text/Event-Stream"},
		{[]string{"\t text/event-stream \t; x"}, "text/event-stream"},
		{[]string{"text/event-stream;"}, "text/event-stream"},
		{[]string{"text/event-stream; no parameter at all"}, "text/event-stream"},

		{[]string{"text/html", "text/event-stream"}, "text/event-stream"},
		{[]string{"text/event-stream", "text/html"}, "text/html"},
		{[]string{"text/html, text/event-stream"}, "text/event-stream"},
		{[]string{"text/event-stream, text/event-stream"}, "text/event-stream"},
		{[]string{"text/event-stream,"}, "text/event-stream"},
		{[]string{",text/event-stream"}, "text/event-stream"},
		{[]string{"", "text/event-stream"}, "text/event-stream"},
		{[]string{"text/event-stream", ""}, "text/event-stream"},
		{[]string{"text/event-stream", "*/*"}, "text/event-stream"},
		{[]string{"text/event-stream, text"}, "text/event-stream"},
		{[]string{"text/event-stream, cannot-parse; x=text/html"}, "text/event-stream"},
		{[]string{"text/event-stream, text/*"}, "text/*"},

		// Invalid.
		{[]string{"text/ event-stream"}, ""},
		{[]string{"text /event-stream"}, ""},
		{[]string{"text/event-stream charset=utf-8"}, ""},
		{[]string{"text/event-stream/x"}, ""},
		{[]string{"/event-stream"}, ""},
		{[]string{"text/"}, ""},
		{[]string{"text"}, ""},
		{[]string{"\"text/event-stream\""}, ""},
		{[]string{"text/event-stream\u00a0"}, ""},

		// A quoted string may contain commas and quotes, and continues in the
		// next line.
		{[]string{`text/html; x="a, text/event-stream"`}, "text/html"},
		{[]string{`text/html; x="a\", text/event-stream"`}, "text/html"},
		{[]string{`text/html; x="a\\", text/event-stream`}, "text/event-stream"},
		{[]string{`text/html; x="`, `text/event-stream`}, "text/html"},
		{[]string{`text/html; x="`, `", text/event-stream`}, "text/event-stream"},
		{[]string{`text/html; x="\`}, "text/html"},
	} {
		header := http.Header{"Content-Type": test.lines}
		if got := mediaType(header["Content-Type"]); got != test.want {
			t.Errorf("%q: got %q, want %q", test.lines, got, test.want)
		}
		isStream := test.want == "text/event-stream" || test.want == "Text/Event-Stream"
		if got := hasEventStreamType(header); got != isStream {
			t.Errorf("%q: an event stream: %t", test.lines, got)
		}
	}
}

func TestWhatIsNoContentCodingIsText(t *testing.T) {
	for _, test := range []struct {
		lines   []string
		encoded bool
	}{
		{nil, false},
		{[]string{"", " , "}, false},
		{[]string{"identity", "Identity"}, false},
		{[]string{"none"}, false},
		{[]string{"utf-8"}, false},
		{[]string{"utf8"}, false},
		{[]string{"binary"}, false},
		{[]string{"8bit"}, false},
		{[]string{"no"}, false},
		{[]string{"chunked"}, false},
		{[]string{"anything, *"}, false},
		{[]string{"brotli"}, false},
		{[]string{"GZip"}, true},
		{[]string{"none, gzip"}, true},
		{[]string{"none", "\tbr "}, true},
		{[]string{"gzip,identity"}, true},
	} {
		if got := isEncoded(http.Header{"Content-Encoding": test.lines}); got != test.encoded {
			t.Errorf("%q: got %t", test.lines, got)
		}
	}
	for _, coding := range []string{
		"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz", "exi", "aes128gcm", "pack200-gzip",
	} {
		if !isEncoded(http.Header{"Content-Encoding": {coding}}) {
			t.Errorf("%s is taken for text", coding)
		}
	}
}

func FuzzListItems(f *testing.F) {
	for _, list := range []string{"", ",", `a,"b,c",d`, `"\`, `a"b\"c,d"e, f`} {
		f.Add(list)
	}
	f.Fuzz(func(t *testing.T, list string) {
		// The same rule, written again for one byte at a time: quoted text is
		// skipped, and then every comma counts.
		want, item, quoted, literal := []string{}, []byte{}, false, false
		for i := range len(list) {
			switch c := list[i]; {
			case literal:
				literal = false
			case c == '\\':
				literal = quoted
			case c == '"':
				quoted = !quoted
			case c == ',' && !quoted:
				want, item = append(want, trimBlanks(string(item))), item[:0]
				continue
			}
			item = append(item, list[i])
		}
		want = append(want, trimBlanks(string(item)))
		var got []string
		for rest, more := list, true; more; {
			var item string
			item, rest, more = cutItem(rest)
			got = append(got, item)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func trimBlanks(text string) string {
	for len(text) > 0 && (text[0] == ' ' || text[0] == '\t') {
		text = text[1:]
	}
	for len(text) > 0 && (text[len(text)-1] == ' ' || text[len(text)-1] == '\t') {
		text = text[:len(text)-1]
	}
	return text
}
