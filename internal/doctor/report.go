package doctor

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// The results of a check.
const (
	Clean    = "clean"    // all tests ran, and found nothing
	Findings = "findings" // there is at least one finding
	Unknown  = "unknown"  // nothing was found, but some tests have no result
)

// Report is what a check has found.
type Report struct {
	Version  int       `json:"version"`
	URL      string    `json:"url"` // without user and query
	Result   string    `json:"result"`
	Error    string    `json:"error"` // why nothing could be tested; empty: it could
	Seconds  float64   `json:"seconds"`
	Covered  Covered   `json:"covered"`
	Tests    []Test    `json:"tests"`
	Untold   []string  `json:"untold"` // what remained unknown, and why
	Findings []Finding `json:"findings"`

	notes []string // about a stream without a probe
}

// Covered is how far a check has looked.
type Covered struct {
	SilenceSeconds float64 `json:"silence_seconds"`
	AgeSeconds     float64 `json:"age_seconds"`
	Bytes          int64   `json:"bytes"` // of an event
}

// Test is one request of a check.
type Test struct {
	Name           string  `json:"name"`
	HTTP           string  `json:"http"`
	Status         int     `json:"status"`
	HeadersSeconds float64 `json:"headers_seconds"`
	Seconds        float64 `json:"seconds"`
	Bytes          int64   `json:"bytes"`
	Events         int     `json:"events"`
	EventsWanted   int     `json:"events_wanted"`
	Clean          bool    `json:"clean"` // it ended cleanly
}

func testOf(t *Trace) Test {
	test := Test{
		Name: t.Name, HTTP: t.Proto, Status: t.Status, Seconds: round(t.Ended - t.Started),
		Bytes: t.bytes(), Events: len(t.Events), EventsWanted: t.Wanted, Clean: t.Clean,
	}
	if t.Status > 0 {
		test.HeadersSeconds = round(t.Headers - t.Started)
	}
	return test
}

func (r *Report) add(c *check, t *Trace) {
	test := testOf(t)
	r.Tests = append(r.Tests, test)
	c.config.Done(test)
}

func (r *Report) finish(age time.Duration) {
	r.Seconds = round(age)
	switch {
	case len(r.Findings) > 0:
		r.Result = Findings
	case r.Error != "" || len(r.Untold) > 0:
		r.Result = Unknown
	default:
		r.Result = Clean
	}
}

// Status is the exit status for the report.
func (r *Report) Status() int {
	switch r.Result {
	case Clean:
		return 0
	case Findings:
		return 1
	}
	return 2
}

// Line is a line about the test, for people.
func (t Test) Line() string {
	var line strings.Builder
	fmt.Fprintf(&line, "%-9s", t.Name)
	if t.Status == 0 {
		fmt.Fprintf(&line, " no answer in %s", secondsOf(t.Seconds))
		return line.String()
	}
	fmt.Fprintf(&line, " HTTP/%s %d, headers after %s", t.HTTP, t.Status, secondsOf(t.HeadersSeconds))
	if t.EventsWanted > 0 {
		fmt.Fprintf(&line, ", %d of %s", t.Events, countOf(t.EventsWanted, "event"))
	} else {
		fmt.Fprintf(&line, ", %s", countOf(t.Events, "event"))
	}
	fmt.Fprintf(&line, ", %s in %s", countOf(int(t.Bytes), "byte"), secondsOf(t.Seconds))
	return line.String()
}

// WriteText writes the findings, for people. The tests have been reported while
// they ran.
func (r *Report) WriteText(out io.Writer) error {
	var text strings.Builder
	for _, note := range r.notes {
		fmt.Fprintln(&text, note)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(&text, "\n%s\n  %s\n  %s\n", f.Code, f.Seen, f.Means)
		for _, set := range f.Set {
			fmt.Fprintf(&text, "  - %s\n", set)
		}
		fmt.Fprintf(&text, "  More: %s\n", f.Docs)
	}
	text.WriteString("\n")
	if r.Error != "" {
		fmt.Fprintf(&text, "Could not tell: %s.\n", strings.TrimSuffix(r.Error, "."))
	}
	for _, untold := range r.Untold {
		fmt.Fprintf(&text, "Could not tell: %s.\n", strings.TrimSuffix(untold, "."))
	}
	upTo := fmt.Sprintf("up to a silence of %s, an age of %s and events of %s",
		secondsOf(r.Covered.SilenceSeconds), secondsOf(r.Covered.AgeSeconds), bytesOf(r.Covered.Bytes))
	switch {
	case len(r.Findings) > 0:
		fmt.Fprintf(&text, "%s. Looked %s, in %s.\n", countOf(len(r.Findings), "finding"), upTo, secondsOf(r.Seconds))
	case r.Error == "":
		fmt.Fprintf(&text, "Nothing found, %s, in %s.\n", upTo, secondsOf(r.Seconds))
	}
	_, err := io.WriteString(out, text.String())
	return err
}
