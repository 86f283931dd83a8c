package caddysse

import (
	"net/http"
	"strings"
)

const eventStreamType = "text/event-stream"

func hasEventStreamType(header http.Header) bool {
	return strings.EqualFold(mediaType(header["Content-Type"]), eventStreamType)
}

// mediaType returns the essence of the type that Content-Type names, in the
// upstream's spelling: if there are several, the last valid one, as in browsers
// (Fetch, section 2.2.2, "extract a MIME type"). It is empty if there is none.
func mediaType(contentType []string) (essence string) {
	for rest, more := joinLines(contentType), true; more; {
		var value string
		value, rest, more = cutItem(rest)
		if found := essenceOf(value); found != "" && found != "*/*" {
			essence = found
		}
	}
	return essence
}

// essenceOf returns type and subtype of a MIME type, empty if it is not valid
// (MIME Sniffing Standard, section 4.4, "parse a MIME type"; parameters do not
// matter).
func essenceOf(value string) string {
	value, _, _ = strings.Cut(strings.Trim(value, httpWhitespace), ";")
	value = strings.TrimRight(value, httpWhitespace)
	kind, subtype, _ := strings.Cut(value, "/")
	if !isToken(kind) || !isToken(subtype) {
		return ""
	}
	return value
}

const httpWhitespace = "\t\n\r "

// isToken reports whether text is a token (RFC 9110, section 5.6.2).
func isToken(text string) bool {
	for i := range len(text) {
		c := text[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return text != ""
}

// joinLines makes one list of a header's lines, which are only parts of it
// (Fetch, section 2.2.2, "get, decode, and split").
func joinLines(lines []string) string { return strings.Join(lines, ", ") }

// cutItem returns the first element of a list, the rest of the list, and whether
// there was an element. A comma in a quoted string is not a separator, and a
// string that is not closed in one line continues in the next.
func cutItem(list string) (item, rest string, more bool) {
	end := itemEnd(list)
	item = strings.Trim(list[:end], "\t ")
	if end == len(list) {
		return item, "", false
	}
	return item, list[end+1:], true
}

// itemEnd returns where the first element of a list ends.
func itemEnd(list string) int {
	quoted := false
	for i := 0; i < len(list); i++ {
		switch c := list[i]; {
		case c == '"':
			quoted = !quoted
		case c == '\\' && quoted:
			i++ // the next character is literal
		case c == ',' && !quoted:
			return i
		}
	}
	return len(list)
}

// isMediaType compares without parameters and letter case (RFC 9110, section
// 8.3.1).
func isMediaType(value, mediaType string) bool {
	name, _, _ := strings.Cut(value, ";")
	return strings.EqualFold(strings.TrimSpace(name), mediaType)
}
