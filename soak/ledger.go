//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// ledger compares both sides of every stream: what its client saw and what Caddy
// logged. It keeps only streams of which one side is missing.
type ledger struct {
	mu       sync.Mutex
	open     map[string]*entry // by path, which no two streams share
	judged   int
	events   int // that clients have received
	late     int // early ends that waited in vain for an event or a write
	received int64
	reasons  map[string]int
	problems []string
	lastLine []byte    // of Caddy's log
	died     time.Time // when the upstream was killed last
	more     int       // problems that are not kept
}

type entry struct {
	seen   *sighting
	closed *closedLine
	// dying: it was closed while the upstream was being killed. That takes the
	// system a while, in which an upstream with many streams is silent in the
	// middle of an event.
	dying bool
}

const dyingTakes = 5 * time.Second

func (l *ledger) upstreamDies() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.died = time.Now()
}

// sighting is what a client saw of one response.
type sighting struct {
	site   site
	kind   string
	seed   uint64
	method string
	proto  string
	ending ending
	err    error // with which the body ended, if it was aborted
	body   []byte
}

// ending is how a response ended for its client.
type ending int

const (
	complete ending = iota // as the protocol says that a body ends
	aborted                // broken off
	left                   // by the client
	refused                // another status than 200
	unopened               // the client left, or the connection broke, before there were headers
)

var endings = [...]string{"complete", "aborted", "left", "refused", "unopened"}

func (e ending) String() string { return endings[e] }

// closedLine is what the soak reads of a log line of the module.
type closedLine struct {
	Level  string `json:"level"`
	Logger string `json:"logger"`
	Msg    string `json:"msg"`
	Path   string `json:"path"`
	Reason string `json:"reason"`
	Events int    `json:"events"`
	Error  string `json:"error"`
	Cause  string `json:"cause"`
}

func newLedger() *ledger {
	return &ledger{open: make(map[string]*entry), reasons: make(map[string]int)}
}

const problemsKept = 200

func (l *ledger) problem(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problemLocked(format, args...)
}

func (l *ledger) problemLocked(format string, args ...any) {
	if len(l.problems) == problemsKept {
		l.more++
		return
	}
	l.problems = append(l.problems, time.Now().Format(time.TimeOnly)+" "+fmt.Sprintf(format, args...))
}

// readLog reads Caddy's log until it ends. Caddy does not wait while a line is
// processed: a stream ends when its line has been written.
func (l *ledger) readLog(log *bufio.Reader) error {
	var lines sync.WaitGroup
	defer lines.Wait()
	for {
		line, err := log.ReadBytes('\n')
		if len(line) > 0 {
			lines.Go(func() { l.line(line) })
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (l *ledger) last() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastLine
}

// line processes one line of Caddy's log. A line that is not a log line is a
// problem: a panic or a message of the runtime.
func (l *ledger) line(text []byte) {
	l.mu.Lock()
	l.lastLine = text
	l.mu.Unlock()
	var line closedLine
	if err := json.Unmarshal(text, &line); err != nil {
		l.problem("Caddy printed: %s", bytes.TrimSpace(text))
		return
	}
	ours := strings.HasPrefix(line.Logger, "http.handlers.sse")
	switch {
	case ours && line.Msg == "stream closed":
		l.closed(&line)
	case ours && line.Cause == "not_an_event_stream": // some of the bodies are not
	case ours && line.Level != "info" && line.Level != "debug",
		strings.Contains(string(text), "panic"):
		l.problem("Caddy logged: %s", bytes.TrimSpace(text))
	}
}

func (l *ledger) closed(line *closedLine) {
	l.mu.Lock()
	l.reasons[line.Reason]++
	e := l.entryLocked(line.Path)
	if e.closed != nil {
		l.problemLocked("%s was closed twice, as %s and as %s", line.Path, e.closed.Reason, line.Reason)
	}
	e.closed = line
	e.dying = time.Since(l.died) < dyingTakes
	l.mu.Unlock()
	l.judge(line.Path, e)
}

func (l *ledger) saw(path string, s *sighting) {
	l.mu.Lock()
	e := l.entryLocked(path)
	e.seen = s
	l.mu.Unlock()
	l.judge(path, e)
}

func (l *ledger) entryLocked(path string) *entry {
	e := l.open[path]
	if e == nil {
		e = new(entry)
		l.open[path] = e
	}
	return e
}

// judge compares the two sides when both are there.
func (l *ledger) judge(path string, e *entry) {
	l.mu.Lock()
	both := e.seen != nil && e.closed != nil && l.open[path] == e
	if both {
		delete(l.open, path)
	}
	l.mu.Unlock()
	if !both {
		return
	}
	events, err := e.compare()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.judged++
	l.events += events
	l.received += int64(len(e.seen.body))
	if errors.Is(err, errLate) {
		l.late++
		return
	}
	if err != nil {
		l.problemLocked("%s %s over %s, %s, closed as %s (%s), %d bytes: %v",
			e.seen.method, path, e.seen.proto, e.seen.ending, e.closed.Reason, e.closed.Error, len(e.seen.body), err)
	}
}

// settle judges, at the end, streams of which one side never came. If a client
// left before it had headers, either may be missing. An answer that asks the
// client to reconnect is not a stream: between atLeast and atMost of those were
// seen.
func (l *ledger) settle() (atLeast, atMost int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for path, e := range l.open {
		switch s := e.seen; {
		case s == nil:
			l.problemLocked("%s was closed as %s, and no client has seen it", path, e.closed.Reason)
		case s.ending == unopened || s.ending == left && s.mayReconnect():
			atMost++
		case s.ending == complete && s.mayReconnect() && len(s.body) > 0:
			atLeast++
			atMost++
		case s.ending != refused:
			l.problemLocked("%s %s over %s, %s after %d bytes, was never closed", s.method, path, s.proto, s.ending, len(s.body))
		}
	}
	clear(l.open)
	return atLeast, atMost
}

var retryOnly = regexp.MustCompile(`^retry: \d+\n\n$`)

// mayReconnect reports whether a response may be such an answer, as far as it
// was read.
func (s *sighting) mayReconnect() bool {
	return s.site.retryMax > 0 && s.comesBack() && (len(s.body) == 0 || retryOnly.Match(s.body))
}

// compare returns the number of events that the client got.
func (e *entry) compare() (int, error) {
	s, line := e.seen, e.closed
	switch s.ending {
	case unopened:
		return 0, nil // it left while its stream began
	case refused:
		return 0, errors.New("a stream was logged for what is none")
	}
	got, err := s.parse()
	if err != nil {
		return 0, err
	}
	events := len(got.Events)
	if s.kind == "flood" {
		return events, s.compareFlood(got, line)
	}
	script := newScript(s.seed)
	want := eventstreamtest.Parse([]byte(script.text()))
	if len(got.Events) > len(want.Events) || !slices.Equal(got.Events, want.Events[:len(got.Events)]) {
		return events, fmt.Errorf("not the upstream's events: %s", difference(got.Events, want.Events))
	}
	if len(got.Retries) > len(want.Retries) || !slices.Equal(got.Retries, want.Retries[:len(got.Retries)]) {
		return events, fmt.Errorf("reconnection times %v, the upstream's are %v", got.Retries, want.Retries)
	}
	if events > line.Events {
		return events, fmt.Errorf("the client got %d events, %d were logged", events, line.Events)
	}
	if err := line.explains(s, script); err != nil {
		return events, err
	}
	if s.ending != complete {
		return events, nil
	}
	switch line.Reason {
	case "upstream_closed":
		if events != len(want.Events) || len(got.Retries) != len(want.Retries) {
			return events, fmt.Errorf("%d events and %d reconnection times, the upstream sent %d and %d", events, len(got.Retries), len(want.Events), len(want.Retries))
		}
	case "drained", "max_duration", "admin":
		finished := eventstreamtest.Parse(append(slices.Clone(s.body), "\n\n"...))
		if !script.lingers && !e.dying && len(s.withoutHeartbeats(finished.Events)) != events {
			return events, errLate
		}
	}
	if events != line.Events {
		return events, fmt.Errorf("the client got %d events to the end, %d were logged", events, line.Events)
	}
	return events, nil
}

// errLate is what happens when the module has waited long enough: it ends a
// stream inside an event, or breaks a write off. On an overloaded machine this
// may happen, but rarely.
var errLate = errors.New("an early end came inside an event or a write")

// explains requires that the reason can be the cause of what the client saw.
func (line *closedLine) explains(s *sighting, script script) error {
	var can []string
	switch s.ending {
	case complete:
		if !script.broken {
			can = append(can, "upstream_closed")
		}
		if s.comesBack() {
			can = append(can, "drained", "max_duration", "admin")
		}
		if s.site.early {
			can = append(can, "upstream_error") // told in the stream
		}
	case aborted:
		can = []string{"upstream_error", "admin"} // admin aborts what is no event stream
		if s.kind == "flood" {
			can = append(can, "write_timeout", "drained", "max_duration") // whatever it is, a write is in the way
		} else if !s.comesBack() {
			can = append(can, "drained", "max_duration") // a clean end would pass for a whole answer
		}
	case left:
		return nil // something else may have been faster
	}
	switch {
	case slices.Contains(can, line.Reason):
		return nil
	case s.ending == aborted && (line.Reason == "drained" || line.Reason == "max_duration"):
		return errLate
	}
	return fmt.Errorf("expected a reason of %v (the client: %v)", can, s.err)
}

// parse returns what a client sees of the body, without what the configuration
// adds: the reconnection time, heartbeats that are events, and the error event of
// a failed early start.
func (s *sighting) parse() (eventstreamtest.Result, error) {
	got := eventstreamtest.Parse(s.body)
	got.Events = s.withoutHeartbeats(got.Events)
	if n := len(got.Events); s.site.early && n > 0 && got.Events[n-1].Type == "error" && strings.HasPrefix(got.Events[n-1].Data, `{"status":502,`) {
		got.Events = got.Events[:n-1]
	}
	if !s.getsRetry() {
		return got, nil
	}
	if len(got.Retries) > 0 && got.Retries[0] >= s.site.retryMin && got.Retries[0] <= s.site.retryMax {
		got.Retries = got.Retries[1:]
		return got, nil
	}
	return got, fmt.Errorf("reconnection times %v: the configured one is not the first", got.Retries)
}

// comesBack reports whether the client reconnects when its stream ends: it sends
// what an EventSource sends, and no body.
func (s *sighting) comesBack() bool {
	return s.method == http.MethodGet
}

// getsRetry reports whether the configured reconnection time comes first: only
// for a client that reconnects, and not in a body whose first byte shows that it
// is JSON.
func (s *sighting) getsRetry() bool {
	first := bytes.TrimLeft(bytes.TrimPrefix(s.body, []byte("\uFEFF")), " \t\r\n")
	return s.site.retryMax > 0 && s.comesBack() && len(first) > 0 && first[0] != '{' && first[0] != '['
}

func (s *sighting) withoutHeartbeats(events []eventstreamtest.Event) []eventstreamtest.Event {
	if s.site.event == "" {
		return events
	}
	return slices.DeleteFunc(events, func(e eventstreamtest.Event) bool { return e.Type == s.site.event })
}

// compareFlood is for a client that stalled: what it got before and after.
func (s *sighting) compareFlood(got eventstreamtest.Result, line *closedLine) error {
	for i, event := range got.Events {
		want := eventstreamtest.Parse([]byte(floodEvent(i))).Events[0]
		if event != want {
			return fmt.Errorf("event %d of the flood is not the upstream's", i)
		}
	}
	if len(got.Events) > line.Events {
		return fmt.Errorf("the client got %d events, %d were logged", len(got.Events), line.Events)
	}
	return line.explains(s, script{})
}

func difference(got, want []eventstreamtest.Event) string {
	for i, event := range got {
		if i >= len(want) {
			return fmt.Sprintf("%d instead of %d; the first one too many is %.200q", len(got), len(want), event)
		}
		if event != want[i] {
			return fmt.Sprintf("number %d is %.200q instead of %.200q", i, event, want[i])
		}
	}
	return "none"
}
