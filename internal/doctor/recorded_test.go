package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A recording is what one check has measured. Those in testdata are of real
// hops. This command makes another one:
//
//	CADDY_SSE_RECORD=http://127.0.0.1:8080/probe,haproxy SSE_PROBE_TOKEN=… go test -run Record ./internal/doctor
type recording struct {
	Sent   [4]string // Accept, Cache-Control, Last-Event-ID, bytes of the POST
	Traces []*Trace
}

func TestRecord(t *testing.T) {
	where, name, found := strings.Cut(os.Getenv("CADDY_SSE_RECORD"), ",")
	if !found {
		t.Skip("nothing to record")
	}
	config := Config{URL: where, Token: os.Getenv("SSE_PROBE_TOKEN"), Insecure: true, For: 20 * time.Second}
	u, err := config.complete()
	if err != nil {
		t.Fatal(err)
	}
	c := &check{config: config, url: u, began: time.Now()}
	c.stalls = watchStalls(c.began)
	defer c.stalls.close()
	ctx, cancel := context.WithTimeout(context.Background(), config.For)
	defer cancel()
	s := c.ask(ctx, new(Report))
	if s == nil {
		t.Fatal("there is no probe")
	}
	r := recording{Sent: [4]string{s.sent.accept, s.sent.cacheControl, s.sent.lastEventID, fmt.Sprint(s.sent.postBody)}, Traces: s.all()}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("testdata", name+".json"), append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// recorded returns what a check has measured of a hop.
func recorded(t *testing.T, name string) *seen {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var r recording
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	s := &seen{sent: sent{accept: r.Sent[0], cacheControl: r.Sent[1], lastEventID: r.Sent[2]}}
	fmt.Sscan(r.Sent[3], &s.sent.postBody)
	for _, trace := range r.Traces {
		if trace.Name == testRequest {
			s.request = trace
		}
		s.put(trace.Name, trace)
	}
	return s
}

func copyOf(s *seen) *seen {
	c := &seen{sent: s.sent}
	for _, trace := range s.all() {
		own := *trace
		own.Arrivals, own.Raw, own.Stalls = slices.Clone(own.Arrivals), slices.Clone(own.Raw), slices.Clone(own.Stalls)
		if own.Name == testRequest {
			c.request = &own
		}
		c.put(own.Name, &own)
	}
	return c
}

// recordings are the hops in testdata, with the conclusions that must follow.
var recordings = map[string]string{
	"clean":           "",
	"clean-loaded":    "",
	"nginx":           "http_1_0",
	"nginx-buffer":    "buffered http_1_0",
	"nginx-http2":     "headers_held",
	"haproxy":         "delayed idle_timeout",
	"haproxy-nodelay": "idle_timeout",
	"apache-deflate":  "compressed",
}

func codesOf(findings []Finding) string {
	var codes []string
	for _, f := range findings {
		codes = append(codes, f.Code)
	}
	slices.Sort(codes)
	return strings.Join(codes, " ")
}

func TestRecordedHopsAreNamed(t *testing.T) {
	for name, want := range recordings {
		v := recorded(t, name).conclude()
		if got := codesOf(v.findings); got != want || len(v.untold)+len(v.again) > 0 {
			t.Errorf("%s: %q, untold %q, again %q, want %q", name, got, v.untold, v.again, want)
		}
	}
}

func TestTheSizeOfNginxsBufferIsExact(t *testing.T) {
	for _, f := range recorded(t, "nginx-buffer").conclude().findings {
		if b, ok := f.Evidence.(Buffered); ok && (b.BufferBytes != 4096 || !b.Exact || b.HeldSeconds < 0.4) {
			t.Errorf("%+v", b)
		}
	}
}

func TestABufferThatSmallEventsDoNotSeeIsMeasuredAgain(t *testing.T) {
	s := recorded(t, "nginx-buffer")
	s.drip = recorded(t, "clean").delay // nothing was held back in this trace
	if v := s.conclude(); codesOf(v.findings) != "http_1_0" || !slices.Contains(v.again, testSizes) {
		t.Errorf("%q, again %q", codesOf(v.findings), v.again)
	}
}

// stop changes a trace to what it would be if the doctor had not run for a
// time: what arrived then is noticed at its end.
func (t *Trace) stop(from, to time.Duration) {
	late := func(at *time.Duration) {
		if *at >= from && *at < to {
			*at = to
		}
	}
	late(&t.Headers)
	late(&t.Ended)
	for i := range t.Arrivals {
		late(&t.Arrivals[i].At)
	}
	for i := range t.Raw {
		late(&t.Raw[i].At)
	}
	if t.Started < to && t.Ended >= from {
		t.Stalls = append(t.Stalls, Span{from, to})
	}
}

// Whenever the doctor is stopped, and for however long, its findings must be a
// subset of those without the stop, and what is missing must be measured again.
func TestADoctorThatIsStoppedConcludesNothingFromIt(t *testing.T) {
	for name, want := range recordings {
		original := recorded(t, name)
		for _, length := range []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second} {
			for from := time.Duration(0); from < 18*time.Second; from += 130 * time.Millisecond {
				s := copyOf(original)
				for _, trace := range s.all() {
					trace.stop(from, from+length)
				}
				v := s.conclude()
				all := strings.Fields(want)
				for _, f := range v.findings {
					if !slices.Contains(all, f.Code) {
						t.Errorf("%s, stopped at %v for %v: %s %+v", name, from, length, f.Code, f.Evidence)
					}
				}
				if len(v.findings) < len(all) && len(v.again) == 0 {
					t.Errorf("%s, stopped at %v for %v: %q is left of %q, and nothing is measured again", name, from, length, codesOf(v.findings), want)
				}
			}
		}
	}
}
