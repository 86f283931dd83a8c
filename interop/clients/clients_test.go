//go:build interop

// Package clients tests event stream clients of other projects with a Caddy
// that has this module, and a scripted upstream.
package clients

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// report is a line that a client program prints.
type report struct {
	Stream string `json:"stream"` // its name
	Kind   string `json:"kind"`   // open, place (the event "sse"), event, error, end; failure: the program itself failed
	Type   string `json:"type"`
	Data   string `json:"data"`
	ID     string `json:"id"`
	Error  string `json:"error"`
	State  int    `json:"state"` // readyState of an EventSource
}

// closedForGood is the readyState of an EventSource that does not reconnect.
const closedForGood = 2

func parseReports(output string) []report {
	var all []report
	for line := range strings.Lines(output) {
		var r report
		if strings.HasSuffix(line, "\n") && json.Unmarshal([]byte(line), &r) == nil {
			all = append(all, r)
		}
	}
	return all
}

// of returns the reports of one stream that are of one of these kinds.
func of(reports []report, stream string, kinds ...string) []report {
	var chosen []report
	for _, r := range reports {
		for _, kind := range kinds {
			if r.Stream == stream && r.Kind == kind {
				chosen = append(chosen, r)
			}
		}
	}
	return chosen
}

// program is a running client program.
type program struct{ *harness.Process }

func (p program) reports() []report { return parseReports(p.Output()) }

func (p program) await(t testing.TB, what string, holds func([]report) bool) {
	t.Helper()
	harness.Eventually(t, harness.Patience, what, func() bool { return holds(p.reports()) })
}

// awaitCount waits until each stream has this many reports of a kind.
func (p program) awaitCount(t testing.TB, kind string, count int, streams ...string) {
	t.Helper()
	p.await(t, fmt.Sprintf("%d × %s of %v", count, kind, streams), func(all []report) bool {
		for _, stream := range streams {
			if len(of(all, stream, kind)) < count {
				return false
			}
		}
		return true
	})
}

func startNode(t testing.TB, file string, arguments []string, settings ...harness.Setting) program {
	t.Helper()
	node, dir := harness.Node(t, harness.Root(t, "interop", "clients", "node"))
	settings = append(settings, harness.In(dir))
	return program{harness.Start(t, append([]string{node, file}, arguments...), settings...)}
}

// startChromium starts a program in node/ that opens a page in Chromium.
func startChromium(t testing.TB, file string, arguments []string) program {
	t.Helper()
	chromium := harness.Program(t, "chromium", "chromium")
	return startNode(t, file, arguments, harness.Env("CHROMIUM="+chromium, "TMPDIR="+harness.ShortTempDir(t)))
}

func startBrowser(t testing.TB, page string, streams ...string) program {
	t.Helper()
	return startChromium(t, "browser.mjs", append([]string{page}, streams...))
}

func startPython(t testing.TB, file string, arguments []string, settings ...harness.Setting) program {
	t.Helper()
	dir := harness.Root(t, "interop", "clients", "python")
	python := filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin", "python")
	return program{harness.Start(t, append([]string{python, filepath.Join(dir, file)}, arguments...), settings...)}
}

func rootCA(c *harness.Caddy) harness.Setting { return harness.Env("ROOT_CA=" + c.RootCA) }

// event is what a client tells its application about an event.
type event struct{ Type, Data, ID string }

func events(reports []report, stream string) []event {
	var all []event
	for _, r := range of(reports, stream, "event") {
		all = append(all, event{r.Type, r.Data, r.ID})
	}
	return all
}

// compare returns the events that a client did not see, and those that it saw
// in addition.
func compare(got, want []event) (lost, besides []event) {
	for _, e := range got {
		if len(want) > 0 && e == want[0] {
			want = want[1:]
			continue
		}
		besides = append(besides, e)
	}
	return want, besides
}

// verdict returns a cell of a matrix: "exact", the noise that the client shows
// its application, or the data of events that are LOST.
func verdict(got, want []event) (text string, noise string) {
	lost, besides := compare(got, want)
	if len(lost) > 0 {
		text = "LOST"
		for _, e := range lost {
			text += fmt.Sprintf(" %q", e.Data)
		}
		return text, "lost"
	}
	if len(besides) == 0 {
		return "exact", ""
	}
	for _, e := range besides {
		kind := fmt.Sprintf("%q", e)
		switch {
		case e.Type == "ping" && e.Data == "{}":
			kind = "ping"
		case e.Type == "no choices" && e.Data == "{}":
			kind = "ping as a chunk"
		case e.Type == "no type":
			kind = "ping as an event"
		case e.Data == "":
			kind = "empty"
		}
		switch noise {
		case "", kind:
			noise = kind
		default:
			noise += ", " + kind
		}
	}
	return fmt.Sprintf("+%d %s", len(besides), noise), noise
}

// matrix prints what each client made of each style.
type matrix struct {
	columns []string
	rows    []string
	cells   map[string]map[string]string
}

func newMatrix(columns ...string) *matrix {
	return &matrix{columns: columns, cells: make(map[string]map[string]string)}
}

func (m *matrix) row(name string) {
	m.rows = append(m.rows, name)
	m.cells[name] = make(map[string]string)
}

func (m *matrix) String() string {
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\t"+strings.Join(m.columns, "\t"))
	for _, row := range m.rows {
		fmt.Fprint(table, row)
		for _, column := range m.columns {
			cell := m.cells[row][column]
			if cell == "" {
				cell = "NOT SHOWN"
			}
			fmt.Fprint(table, "\t"+cell)
		}
		fmt.Fprintln(table)
	}
	table.Flush()
	return text.String()
}

var styles = []string{"block", "line", "event"}

// styleSite has a route for each heartbeat style: /block/* and so on. The
// upstream does not see that part of the path.
func styleSite(upstream string, more string) string {
	var site strings.Builder
	for _, style := range styles {
		setting := style
		if style == "event" {
			setting = `event ping "{}"`
		}
		fmt.Fprintf(&site, `
	handle_path /%s/* {
		sse {
			name %[1]s
			heartbeat 1s
			heartbeat_style %s
			%s
		}
		reverse_proxy %s
	}`, style, setting, more, upstream)
	}
	return site.String() + page
}

// page is an empty page at /page. It names an icon, because otherwise browsers
// request /favicon.ico, which would be one more stream.
const page = `
	handle /page {
		header Content-Type text/html
		respond "<!doctype html><title>page</title><link rel=icon href=data:,>"
	}`

// awaitTLS waits until Caddy's internal CA has issued the site's certificate,
// which may happen after Caddy has begun to serve.
func awaitTLS(t testing.TB, tlsURL string) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "there is a certificate", func() bool {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(tlsURL, "https://"), &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}
