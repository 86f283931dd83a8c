//go:build linux

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// whole is a seed whose script ends well, has a few events and no more than a
// second of silence inside one.
func whole(t *testing.T) (seed uint64, body string, events int) {
	t.Helper()
	for seed := range uint64(100) {
		s := newScript(seed)
		text := s.text()
		sighting := sighting{body: []byte(text), site: sites[0], method: "GET"}
		if n := len(eventstreamtest.Parse([]byte(text)).Events); n > 5 && !s.broken && !s.lingers && sighting.getsRetry() && !strings.HasPrefix(text, "\uFEFF") {
			return seed, text, n
		}
	}
	t.Fatal("no script like that")
	return 0, "", 0
}

func siteOf(t *testing.T, name string) site {
	for _, s := range sites {
		if s.name == name {
			return s
		}
	}
	t.Fatalf("no site %q", name)
	return site{}
}

// problems settles a ledger with one stream in it.
func problems(s sighting, reason string, events int) []string {
	s.kind, s.proto = "script", "h1"
	if s.method == "" {
		s.method = "GET"
	}
	path := fmt.Sprintf("/%s/script/%d", s.site.name, s.seed)
	l := newLedger()
	l.saw(path, &s)
	if reason != "" {
		l.line(fmt.Appendf(nil, `{"level":"info","logger":"http.handlers.sse","msg":"stream closed","path":%q,"reason":%q,"events":%d}`, path, reason, events))
	}
	l.settle()
	return l.problems
}

func TestWhatIsRightIsNoProblem(t *testing.T) {
	seed, body, n := whole(t)
	half := body[:len(body)/2]
	for name, test := range map[string]struct {
		s      sighting
		reason string
		events int
	}{
		"whole":              {sighting{site: siteOf(t, "line"), ending: complete, body: []byte(body)}, "upstream_closed", n},
		"with heartbeats":    {sighting{site: siteOf(t, "line"), ending: complete, body: []byte(":heartbeat\n" + body + ":heartbeat\n")}, "upstream_closed", n},
		"as events":          {sighting{site: siteOf(t, "event"), ending: complete, body: []byte("event: soak-heartbeat\ndata: beat\n\n" + body)}, "upstream_closed", n},
		"with retry":         {sighting{site: siteOf(t, "block"), ending: complete, body: []byte("retry: 500\n" + body)}, "upstream_closed", n},
		"left in the middle": {sighting{site: siteOf(t, "line"), ending: left, body: []byte(half)}, "client_closed", n},
		"left at once":       {sighting{site: siteOf(t, "line"), ending: left}, "client_closed", 0},
		"killed upstream":    {sighting{site: siteOf(t, "line"), ending: aborted, body: []byte(half)}, "upstream_error", n},
		"told of an early start that failed": {sighting{site: siteOf(t, "early"), ending: complete,
			body: []byte(":heartbeat\n\nevent: error\ndata: {\"status\":502,\"message\":\"no\"}\n\n")}, "upstream_error", 0},
		"asked to come back":          {sighting{site: siteOf(t, "block"), ending: complete, body: []byte("retry: 500\n\n")}, "", 0},
		"one that does not come back": {sighting{site: siteOf(t, "block"), method: "POST", ending: complete, body: []byte(body)}, "upstream_closed", n},
		"one that is cut for a drain": {sighting{site: siteOf(t, "block"), method: "POST", ending: aborted, body: []byte(half)}, "drained", n},
		"refused":                     {sighting{site: siteOf(t, "line"), ending: refused}, "", 0},
		"never opened":                {sighting{site: siteOf(t, "line"), ending: unopened}, "client_closed", 0},
	} {
		test.s.seed = seed
		for _, problem := range problems(test.s, test.reason, test.events) {
			t.Errorf("%s: %s", name, problem)
		}
	}
}

func TestWhatIsWrongIsAProblem(t *testing.T) {
	seed, body, n := whole(t)
	line := siteOf(t, "line")
	second := strings.Index(body, "data")
	for name, test := range map[string]struct {
		s      sighting
		reason string
		events int
		want   string
	}{
		"an event is lost":        {sighting{site: line, ending: complete, body: nil}, "upstream_closed", n, "events and"},
		"one is too many":         {sighting{site: line, ending: complete, body: []byte("data: x\n\n" + body)}, "upstream_closed", n, "not the upstream's events"},
		"one is changed":          {sighting{site: line, ending: aborted, body: []byte(body[:second] + "data: x\n" + body[second:])}, "upstream_error", n, "not the upstream's events"},
		"one has another id":      {sighting{site: line, ending: left, body: []byte("id: x\n" + body)}, "client_closed", n, "not the upstream's events"},
		"a reconnection time":     {sighting{site: line, ending: left, body: []byte("retry: 1\n" + body)}, "client_closed", n, "reconnection times"},
		"none":                    {sighting{site: siteOf(t, "block"), ending: complete, body: []byte(body)}, "upstream_closed", n, "reconnection times"},
		"heartbeats of another":   {sighting{site: line, ending: complete, body: []byte("event: soak-heartbeat\ndata: beat\n\n" + body)}, "upstream_closed", n, "not the upstream's events"},
		"too few are counted":     {sighting{site: line, ending: complete, body: []byte(body)}, "upstream_closed", n - 1, "were logged"},
		"too many are counted":    {sighting{site: line, ending: complete, body: []byte(body)}, "upstream_closed", n + 1, "were logged"},
		"an unexplained end":      {sighting{site: line, ending: complete, body: []byte(body)}, "client_closed", n, "expected a reason"},
		"an unexplained abort":    {sighting{site: line, ending: aborted, body: []byte(body)}, "upstream_closed", n, "expected a reason"},
		"a clean end of a half":   {sighting{site: line, method: "POST", ending: complete, body: []byte(body)}, "drained", n, "expected a reason"},
		"retry for nobody":        {sighting{site: siteOf(t, "block"), method: "POST", ending: complete, body: []byte("retry: 500\n" + body)}, "upstream_closed", n, "reconnection times"},
		"never closed":            {sighting{site: line, ending: complete, body: []byte(body)}, "", 0, "never closed"},
		"told of what is refused": {sighting{site: line, ending: refused}, "upstream_closed", 0, "for what is none"},
	} {
		test.s.seed = seed
		got := problems(test.s, test.reason, test.events)
		if len(got) != 1 || !strings.Contains(got[0], test.want) {
			t.Errorf("%s: got %q, want one problem with %q", name, got, test.want)
		}
	}
}

func TestLateEndsAreCounted(t *testing.T) {
	seed, body, n := whole(t)
	for name, s := range map[string]*sighting{
		"inside an event": {ending: complete, body: []byte("data: x\n")},
		"inside a write":  {ending: aborted, body: []byte(body)},
	} {
		s.site, s.kind, s.seed, s.method = siteOf(t, "line"), "script", seed, "GET"
		l := newLedger()
		l.saw("/", s)
		events := 0
		if s.ending == aborted {
			events = n
		}
		l.line(fmt.Appendf(nil, `{"logger":"http.handlers.sse","level":"info","msg":"stream closed","path":"/","reason":"drained","events":%d}`, events))
		if l.late != 1 || len(l.problems) > 0 {
			t.Errorf("%s: %d late, %q", name, l.late, l.problems)
		}
	}
}

func TestWhatCaddyLogsIsJudged(t *testing.T) {
	for text, want := range map[string]bool{
		`{"level":"info","logger":"http.handlers.sse","msg":"stream closed","path":"/line/script/1","reason":"drained"}`: true, // nobody saw it
		`{"level":"warn","logger":"http.handlers.sse","msg":"x"}`:                                                        true,
		`{"level":"warn","logger":"http.handlers.sse","msg":"x","cause":"not_an_event_stream"}`:                          false,
		`{"level":"error","logger":"http.stdlib","msg":"http: panic serving"}`:                                           true,
		`{"level":"error","logger":"http.log.error","msg":"dial tcp: connection refused"}`:                               false,
		`fatal error: concurrent map writes`:                                                                             true,
	} {
		l := newLedger()
		l.line([]byte(text))
		l.settle()
		if got := len(l.problems) > 0; got != want {
			t.Errorf("%s: %q", text, l.problems)
		}
	}
}

func TestAScriptIsTheSameEveryTime(t *testing.T) {
	longest := time.Duration(0)
	for seed := range uint64(50) {
		a, b := newScript(seed), newScript(seed)
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("seed %d makes two scripts", seed)
		}
		var total time.Duration
		for _, p := range a.pieces {
			total += p.pause
		}
		longest = max(longest, total)
	}
	if longest < 15*time.Second || longest > 2*time.Minute {
		t.Errorf("the longest takes %v", longest)
	}
}

func TestMetricsAreSummed(t *testing.T) {
	got, err := readMetrics(`# TYPE caddy_sse_streams gauge
caddy_sse_streams{name="a",proto="HTTP/1.1"} 2
caddy_sse_streams{name="b",proto="HTTP/2.0"} 3
caddy_sse_streams_closed_total{name="a",reason="admin"} 4
caddy_sse_streams_closed_total{name="b",reason="admin"} 1
caddy_sse_streams_closed_total{name="b",reason="drained"} 7
go_goroutines 9
`)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]float64{"streams": 5, "streams_closed_total": 12, "closed/admin": 5, "closed/drained": 7, "go_goroutines": 0} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}

func TestAStalledClientNeedsAReasonToo(t *testing.T) {
	flood := []byte(floodEvent(0))
	for reason, explains := range map[string]bool{"write_timeout": true, "drained": true, "upstream_closed": false, "upstream_timeout": false} {
		e := entry{
			seen:   &sighting{site: siteOf(t, "line"), kind: "flood", method: "POST", ending: aborted, body: flood},
			closed: &closedLine{Reason: reason, Events: 1},
		}
		if _, err := e.compare(); explains != (err == nil) {
			t.Errorf("%s: %v", reason, err)
		}
	}
}
