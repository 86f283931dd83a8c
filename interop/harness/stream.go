package harness

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// Stream is an event stream as a client sees it, read in the background. What
// it has received so far can be read at any time; Next and similar methods
// wait.
type Stream struct {
	Response  *http.Response
	Asked     time.Time // the request was sent
	HeadersAt time.Time // the response headers arrived

	cancel context.CancelFunc

	mutex    sync.Mutex
	changed  chan struct{} // closed and replaced at each change below
	chunks   []Chunk
	events   []Event
	comments []Comment
	ended    bool
	err      error
	next     int // index of the event that Next returns
	nextNote int // index of the comment that NextComment returns
}

// Chunk is the result of one read.
type Chunk struct {
	At   time.Time
	Data string
}

// Event is an event that a client following the standard dispatches.
type Event struct {
	At   time.Time // when its blank line arrived
	Type string    // "message" if the stream names none
	Data string
	ID   string // last event ID
}

// Comment is a comment line without its colon.
type Comment struct {
	At   time.Time
	Text string
}

// RequestOption changes a request before it is sent.
type RequestOption func(*http.Request)

// Header sets a header field.
func Header(name, value string) RequestOption {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

// Post makes the request a POST of JSON, as LLM and MCP clients send it.
func Post(body string) RequestOption {
	return func(r *http.Request) {
		r.Method = http.MethodPost
		r.Body = io.NopCloser(strings.NewReader(body))
		r.ContentLength = int64(len(body))
		r.Header.Set("Content-Type", "application/json")
	}
}

// Open requests an event stream as an EventSource does, and waits for the
// response headers. The stream is closed at the end of the test.
func Open(t testing.TB, client *http.Client, url string, options ...RequestOption) *Stream {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Accept", "text/event-stream")
	request.Header.Set("Cache-Control", "no-cache")
	for _, option := range options {
		option(request)
	}
	s := &Stream{cancel: cancel, changed: make(chan struct{}), Asked: time.Now()}
	late := time.AfterFunc(Patience, cancel)
	s.Response, err = client.Do(request)
	if err != nil {
		t.Fatalf("%s %s: %v after %v", request.Method, url, err, time.Since(s.Asked))
	}
	if !late.Stop() {
		t.Fatalf("%s %s: no headers within %v", request.Method, url, Patience)
	}
	s.HeadersAt = time.Now()
	read := make(chan struct{})
	go func() {
		defer close(read)
		s.read()
	}()
	t.Cleanup(func() {
		cancel()
		<-read
		if t.Failed() {
			t.Logf("%s %s: %s", request.Method, url, s)
		}
	})
	return s
}

func (s *Stream) read() {
	defer s.Response.Body.Close()
	var parser parser
	buffer := make([]byte, 32<<10)
	for {
		n, err := s.Response.Body.Read(buffer)
		now := time.Now()
		s.mutex.Lock()
		if n > 0 {
			s.chunks = append(s.chunks, Chunk{now, string(buffer[:n])})
			events, comments := parser.feed(buffer[:n], now)
			s.events = append(s.events, events...)
			s.comments = append(s.comments, comments...)
		}
		if err != nil {
			s.ended = true
			if !errors.Is(err, io.EOF) {
				s.err = err
			}
		}
		close(s.changed)
		s.changed = make(chan struct{})
		s.mutex.Unlock()
		if err != nil {
			return
		}
	}
}

// await waits until the condition is true. The caller must hold the lock.
func (s *Stream) await(within time.Duration, holds func() bool) bool {
	timeout := time.After(within)
	for !holds() {
		changed := s.changed
		s.mutex.Unlock()
		select {
		case <-changed:
			s.mutex.Lock()
		case <-timeout:
			s.mutex.Lock()
			return holds()
		}
	}
	return true
}

// Next waits for the next event. Each event is returned once.
func (s *Stream) Next(t testing.TB, within time.Duration) Event {
	t.Helper()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.await(within, func() bool { return s.next < len(s.events) || s.ended })
	if s.next == len(s.events) {
		t.Fatalf("no event within %v; ended: %v %v", within, s.ended, s.err)
	}
	s.next++
	return s.events[s.next-1]
}

// NextComment waits for the next comment line, such as a heartbeat. Each one is
// returned once.
func (s *Stream) NextComment(t testing.TB, within time.Duration) Comment {
	t.Helper()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.await(within, func() bool { return s.nextNote < len(s.comments) || s.ended })
	if s.nextNote == len(s.comments) {
		t.Fatalf("no comment within %v; ended: %v %v", within, s.ended, s.err)
	}
	s.nextNote++
	return s.comments[s.nextNote-1]
}

// AwaitEnd waits for the end of the response. It returns nil after a clean end.
func (s *Stream) AwaitEnd(t testing.TB, within time.Duration) error {
	t.Helper()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if !s.await(within, func() bool { return s.ended }) {
		t.Fatalf("the stream did not end within %v", within)
	}
	return s.err
}

// Ended reports whether the response has ended.
func (s *Stream) Ended() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.ended
}

// Close leaves the stream, as a closed tab does.
func (s *Stream) Close() { s.cancel() }

// Events returns all events so far.
func (s *Stream) Events() []Event {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return append([]Event(nil), s.events...)
}

// Comments returns all comments so far.
func (s *Stream) Comments() []Comment {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return append([]Comment(nil), s.comments...)
}

// Chunks returns all reads so far.
func (s *Stream) Chunks() []Chunk {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return append([]Chunk(nil), s.chunks...)
}

// LongestSilence returns the longest time without a byte, from the headers on.
func (s *Stream) LongestSilence() time.Duration {
	longest, last := time.Duration(0), s.HeadersAt
	for _, chunk := range s.Chunks() {
		longest, last = max(longest, chunk.At.Sub(last)), chunk.At
	}
	if !s.Ended() {
		longest = max(longest, time.Since(last))
	}
	return longest
}

// Body returns what has arrived so far.
func (s *Stream) Body() string {
	var body strings.Builder
	for _, chunk := range s.Chunks() {
		body.WriteString(chunk.Data)
	}
	return body.String()
}

// String describes the stream for the log of a failed test.
func (s *Stream) String() string {
	var text strings.Builder
	text.WriteString(s.Response.Proto + " " + s.Response.Status + "\n")
	s.Response.Header.Write(&text)
	chunks := s.Chunks()
	for i, chunk := range chunks {
		if i == 50 {
			text.WriteString("…\n")
			break
		}
		text.WriteString(chunk.At.Sub(s.HeadersAt).Round(time.Millisecond).String() + " ")
		text.WriteString(strings.ReplaceAll(chunk.Data, "\n", `\n`) + "\n")
	}
	return text.String()
}

// parser follows the WHATWG HTML standard, section 9.2.6. It is written for
// this suite, so that the module's own parser does not judge itself.
type parser struct {
	line      []byte
	afterCR   bool
	started   bool
	data      strings.Builder
	eventType string
	lastID    string
}

func (p *parser) feed(b []byte, now time.Time) (events []Event, comments []Comment) {
	for _, c := range b {
		if p.afterCR && c == '\n' {
			p.afterCR = false
			continue
		}
		p.afterCR = c == '\r'
		if c != '\r' && c != '\n' {
			p.line = append(p.line, c)
			continue
		}
		line := p.line
		if !p.started {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
			p.started = true
		}
		switch {
		case len(line) == 0:
			if data := p.data.String(); data != "" {
				event := Event{At: now, Type: p.eventType, Data: strings.TrimSuffix(data, "\n"), ID: p.lastID}
				if event.Type == "" {
					event.Type = "message"
				}
				events = append(events, event)
			}
			p.data.Reset()
			p.eventType = ""
		case line[0] == ':':
			comments = append(comments, Comment{now, string(line[1:])})
		default:
			name, value, _ := strings.Cut(string(line), ":")
			p.field(name, strings.TrimPrefix(value, " "))
		}
		p.line = p.line[:0]
	}
	return events, comments
}

func (p *parser) field(name, value string) {
	switch name {
	case "event":
		p.eventType = value
	case "data":
		p.data.WriteString(value + "\n")
	case "id":
		if !strings.Contains(value, "\x00") {
			p.lastID = value
		}
	}
}
