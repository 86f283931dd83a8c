package caddysse

import (
	"net/http"
	"slices"
	"strings"
)

// quirk is a family of clients that fail on a comment, or on the blank line after
// one, and that can be recognised. heartbeat_style auto sends them something
// else.
type quirk struct {
	client string   // for people
	says   []string // all of these are in one value of a header below
	gets   quirkFrames
	tried  string // versions that fail
	fixed  string // the first version that does not; empty: none known
}

// quirkFrames is what frames a client can take.
type quirkFrames uint8

const (
	anyFrames quirkFrames = iota // no quirk is known
	lineFrames
	noFrames
)

// quirks are the known ones. The interop suite runs each client with and without
// its entry, which shows entries that are no longer needed; docs/clients.md lists
// them.
//
// Google's SDKs treat any line that is not a data line as an error, even an id,
// so resume leaves them alone. The others treat a blank line after an id field as
// an event, whose data they then can't decode. langchain-openai sends the same as
// openai-python, and the class names AsyncOpenAI, AzureOpenAI, AsyncAzureOpenAI
// and AsyncGroq end in the same way.
var quirks = []quirk{
	{"Google GenAI SDK for Python", []string{"google-genai-sdk/", "gl-python/"}, noFrames, "3.6", ""},
	{"Google GenAI SDK for Go", []string{"google-genai-sdk/", "gl-go/"}, noFrames, "1.77", ""},
	{"openai-python, langchain-openai", []string{"OpenAI/Python"}, lineFrames, "3.54, 3.57; langchain-openai 1.7", ""},
	{"groq (Python)", []string{"Groq/Python"}, lineFrames, "1.7", ""},
	{"litellm", []string{"litellm/"}, lineFrames, "1.110", ""},
}

// quirkHeaders are the fields in which clients identify themselves. If a client
// has two User-Agent values, net/http sends only the first: Google's SDK for Go
// appears only in the other field.
var quirkHeaders = []string{"User-Agent", "X-Goog-Api-Client"}

// sparedFrames are the frames for clients with a quirk.
type sparedFrames struct {
	line, none frames
}

// newSparedFrames derives them from the configuration.
func newSparedFrames(hb Heartbeat, retry *Retry) *sparedFrames {
	spared := new(sparedFrames)
	hb.Style = styleLine
	spared.line = newFrames(&hb, retry)
	hb.Interval, hb.Prelude = off, off
	spared.none = newFrames(&hb, retry)
	return spared
}

// framesFor returns the frames for the client of a request.
func (h *Handler) framesFor(header http.Header) *frames {
	if h.spared != nil {
		switch quirkOf(header) {
		case lineFrames:
			return &h.spared.line
		case noFrames:
			return &h.spared.none
		}
	}
	return &h.frames
}

// quirkOf returns which frames the client of a request can take. If several
// entries match, the most restrictive one counts.
func quirkOf(header http.Header) quirkFrames {
	gets := anyFrames
	for _, field := range quirkHeaders {
		for _, value := range header[field] {
			for i := range quirks {
				if quirks[i].fits(value) {
					gets = max(gets, quirks[i].gets)
				}
			}
		}
	}
	return gets
}

func (q *quirk) fits(value string) bool {
	return !slices.ContainsFunc(q.says, func(word string) bool { return !strings.Contains(value, word) })
}
