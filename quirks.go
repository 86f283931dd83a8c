package caddysse

import (
	"net/http"
	"slices"
	"strings"
)

// quirk is a family of clients that fail on a comment, or on the blank line after
// one, and say who they are. heartbeat_style auto spares them.
type quirk struct {
	client string   // for people
	says   []string // all of these are in one value of a header below
	gets   quirkFrames
	tried  string // versions that fail
	fixed  string // the first version that does not; empty: none known
}

// quirkFrames is what a client can take.
type quirkFrames uint8

const (
	anyFrames quirkFrames = iota // no quirk is known
	lineFrames
	noFrames
)

// quirks are the known ones. The interop suite runs each with and without
// its entry, so that one that is no longer needed shows; docs/clients.md has them.
//
// Google's SDKs take any line but one of data for an error, an id as well: resume
// leaves them alone. The others take a blank line after an id field for an event, whose data they then can't decode.
// langchain-openai says what openai-python says, and the names of the classes
// AsyncOpenAI, AzureOpenAI, AsyncAzureOpenAI and AsyncGroq end like these.
var quirks = []quirk{
	{"Google GenAI SDK for Python", []string{"google-genai-sdk/", "gl-python/"}, noFrames, "3.6", ""},
	{"Google GenAI SDK for Go", []string{"google-genai-sdk/", "gl-go/"}, noFrames, "1.77", ""},
	{"openai-python, langchain-openai", []string{"OpenAI/Python"}, lineFrames, "3.54, 3.57; langchain-openai 1.7", ""},
	{"groq (Python)", []string{"Groq/Python"}, lineFrames, "1.7", ""},
	{"litellm", []string{"litellm/"}, lineFrames, "1.110", ""},
}

// quirkHeaders are where clients say who they are. Some send two User-Agent
// values, of which net/http's client sends the first only: Google's SDK for Go
// shows in the other header alone.
var quirkHeaders = []string{"User-Agent", "X-Goog-Api-Client"}

// sparedFrames are those of clients with a quirk.
type sparedFrames struct {
	line, none frames
}

// newSparedFrames makes them of what everybody else gets.
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

// quirkOf tells which frames the client of a request can take, as far as it is
// known. Where more than one entry fits, the most careful one counts.
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
