//go:build interop

package clients

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	r3labs "github.com/r3labs/sse/v2"
	tmaxmax "github.com/tmaxmax/go-sse"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// silence is long enough for a heartbeat at an interval of one second, even on
// a busy machine.
const silence = 1800 * time.Millisecond

// script is what the upstream sends on a first request, with silences before
// the first event, between two events and in the middle of one.
var script = []string{
	"",
	"retry: 200\ndata: first\n\n",
	"id: 1\nevent: named\ndata: a\ndata: b\n\n",
	"",
	"id: 2\ndata: {\"n\":2}\n\n",
	"event: half\ndata: begins\n",
	"",
	"data: ends\nid: 3\n\n",
}

var scriptEvents = []event{
	{"message", "first", ""},
	{"named", "a\nb", "1"},
	{"message", `{"n":2}`, "2"},
	{"half", "begins\nends", "3"},
}

// backEvent is the answer to a request with Last-Event-ID 3, and to no other.
var backEvent = event{"message", "back after 3", "4"}

func serveScript(t *testing.T) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		eol := "\n"
		if strings.HasPrefix(r.URL.Path, "/crlf/") {
			eol = "\r\n"
		}
		send := func(text string) { harness.Send(w, strings.ReplaceAll(text, "\n", eol)) }
		harness.Begin(w)
		if id := r.Header.Get("Last-Event-ID"); id != "" {
			send("id: 4\ndata: back after " + id + "\n\n")
			<-r.Context().Done()
			return
		}
		for _, text := range script {
			if text == "" {
				time.Sleep(silence)
			} else {
				send(text)
			}
		}
	})
}

// watched is a client that reports what it has seen so far.
type watched interface{ reports() []report }

type client struct {
	name string
	tls  bool
	// start follows streams, given as name=url.
	start func(t *testing.T, caddy *harness.Caddy, streams []string) watched
	// back says who sends the next request, with Last-Event-ID, after a clean
	// end; "" means nobody.
	back string
	// noise is what the client is known to report besides the events, by style,
	// the same for CRLF and LF. An application that listens to events of all
	// names sees the heartbeats of the style "event", as expected.
	noise map[string]string
}

const (
	itself   = "comes back"
	byCaller = "its caller's job"
)

// ignoresComments follows the standard.
var ignoresComments = map[string]string{"block": "", "line": "", "event": "ping"}

// blankLineIsAnEvent reports an event without data at the blank line after a
// comment, with some clients only once the stream has had an id.
var blankLineIsAnEvent = map[string]string{"block": "empty", "line": "", "event": "ping"}

func nodeClient(name string) func(*testing.T, *harness.Caddy, []string) watched {
	return func(t *testing.T, caddy *harness.Caddy, streams []string) watched {
		return startNode(t, "clients.mjs", append([]string{name}, streams...), rootCA(caddy))
	}
}

func browserClient(t *testing.T, caddy *harness.Caddy, streams []string) watched {
	_, url, _ := strings.Cut(streams[0], "=")
	page := caddy.URL
	if strings.HasPrefix(url, "https:") {
		page = caddy.TLSURL
	}
	return startBrowser(t, page+"/page", streams...)
}

func pythonClient(t *testing.T, caddy *harness.Caddy, streams []string) watched {
	return startPython(t, "clients.py", append([]string{"httpx-sse"}, streams...), rootCA(caddy))
}

var everyClient = []client{
	{"Chromium EventSource, HTTP/1.1", false, browserClient, itself, ignoresComments},
	{"Chromium EventSource, HTTP/2", true, browserClient, itself, ignoresComments},
	{"npm eventsource", false, nodeClient("eventsource"), itself, ignoresComments},
	{"npm fetch-event-source", false, nodeClient("fetch-event-source"), "comes back if onclose throws", blankLineIsAnEvent},
	{"npm fetch-event-source, no onclose", false, nodeClient("fetch-event-source-plain"), "", blankLineIsAnEvent},
	{"npm eventsource-parser, fetch", false, nodeClient("eventsource-parser"), "", ignoresComments},
	{"undici EventSource, HTTP/1.1", false, nodeClient("undici"), itself, ignoresComments},
	{"undici EventSource, HTTP/2", true, nodeClient("undici-h2"), itself, ignoresComments},
	{"Python httpx-sse, HTTP/1.1", false, pythonClient, byCaller, blankLineIsAnEvent},
	{"Python httpx-sse, HTTP/2", true, pythonClient, byCaller, blankLineIsAnEvent},
	{"Go tmaxmax/go-sse", false, goClient(followTmaxmax), itself, ignoresComments},
	{"Go r3labs/sse", false, goClient(followR3labs), byCaller, blankLineIsAnEvent},
}

// cleanEnd is the column for what a client does after a clean end, such as
// those by drain and max_duration.
const cleanEnd = "after a clean end"

var lineEnds = []string{"lf", "crlf"}

func TestEveryClientInEveryStyle(t *testing.T) {
	caddy := harness.StartSite(t, styleSite(serveScript(t), ""))
	awaitTLS(t, caddy.TLSURL)
	cells := newMatrix(append(slices.Clone(styles), cleanEnd)...)
	for _, c := range everyClient {
		cells.row(c.name)
	}
	cells.row("curl -N, HTTP/1.1")
	cells.row("curl -N, HTTP/2")
	cells.cells["curl -N, HTTP/1.1"][cleanEnd] = "STAYS AWAY"
	cells.cells["curl -N, HTTP/2"][cleanEnd] = "STAYS AWAY"
	t.Run("clients", func(t *testing.T) {
		for i, c := range everyClient {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				testClient(t, caddy, c, fmt.Sprint(i), cells.cells[c.name])
			})
		}
		t.Run("curl HTTP/1.1", func(t *testing.T) {
			t.Parallel()
			testCurl(t, caddy, cells.cells["curl -N, HTTP/1.1"], "--http1.1", caddy.URL)
		})
		t.Run("curl HTTP/2", func(t *testing.T) {
			t.Parallel()
			testCurl(t, caddy, cells.cells["curl -N, HTTP/2"], "--http2", caddy.TLSURL)
		})
	})
	t.Logf("what each client shows its application of each heartbeat style:\n%s", cells)
	caddy.CheckNoErrors(t)
}

func testClient(t *testing.T, caddy *harness.Caddy, c client, tag string, cells map[string]string) {
	base, proto := caddy.URL, "HTTP/1.1"
	if c.tls {
		base, proto = caddy.TLSURL, "HTTP/2.0"
	}
	var streams []string
	for _, style := range styles {
		for _, eol := range lineEnds {
			streams = append(streams, fmt.Sprintf("%s-%s=%s/%[1]s/%[2]s/%[4]s", style, eol, base, tag))
		}
	}
	running := c.start(t, caddy, streams)
	want := scriptEvents
	if c.back != "" {
		want = append(slices.Clone(want), backEvent)
	}
	harness.Eventually(t, harness.Patience, "every stream has been read", func() bool {
		all := running.reports()
		for _, stream := range streams {
			name, _, _ := strings.Cut(stream, "=")
			// Pings may follow backEvent before the other streams have
			// reconnected.
			back := slices.Contains(events(all, name), backEvent)
			if !back && len(of(all, name, "end")) == 0 {
				return false
			}
		}
		return true
	})
	all := running.reports()
	cells[cleanEnd] = c.back
	if c.back == "" {
		cells[cleanEnd] = "STAYS AWAY"
	}
	for _, style := range styles {
		for _, eol := range lineEnds {
			name := style + "-" + eol
			text, noise := verdict(events(all, name), want)
			if cells[style] == "" {
				cells[style] = text
			} else if cells[style] != text {
				cells[style] += " (LF), " + text + " (CRLF)"
			}
			if noise != c.noise[style] {
				t.Errorf("%s: %s; known is %q", name, text, c.noise[style])
			}
			for _, r := range of(all, name, "error") {
				if r.State == closedForGood {
					t.Errorf("%s: closed for good", name)
				}
			}
			checkClosed(t, caddy, proto, style, fmt.Sprintf("/%s/%s/%s", style, eol, tag))
		}
	}
}

// checkClosed checks what the module logs about the scripted stream.
func checkClosed(t *testing.T, caddy *harness.Caddy, proto, style, path string) {
	t.Helper()
	var scripted *harness.Closed
	harness.Eventually(t, harness.Patience, path+" is logged", func() bool {
		for _, closed := range caddy.ClosedStreams() {
			if closed.Path == path && closed.LastEventID == "3" {
				scripted = &closed
				return true
			}
		}
		return false
	})
	if scripted.Reason != "upstream_closed" || scripted.Events != len(scriptEvents) || scripted.Proto != proto || scripted.IncompleteEvent {
		t.Errorf("%s: %+v", path, scripted)
	}
	beats, deferred := 3, 0
	if style == "event" {
		beats, deferred = 2, 1 // none is allowed in the incomplete event
	}
	if scripted.Heartbeats < beats || scripted.HeartbeatDeferred < deferred {
		t.Errorf("%s: %d heartbeats, %d deferred", path, scripted.Heartbeats, scripted.HeartbeatDeferred)
	}
}

// frame is a heartbeat of any style.
var frame = regexp.MustCompile(`(?m)^(?::heartbeat\r?\n(?:\r?\n)?|event: ping\r?\ndata: \{\}\r?\n\r?\n)`)

func testCurl(t *testing.T, caddy *harness.Caddy, cells map[string]string, protocol, base string) {
	curl := harness.Program(t, "curl", "curl")
	running := make(map[string]*harness.Process)
	for _, style := range styles {
		for _, eol := range lineEnds {
			url := fmt.Sprintf("%s/%s/%s/curl%s", base, style, eol, protocol)
			running[style+"-"+eol] = harness.Start(t, harness.Command(curl, "-sSN", protocol, "--cacert", caddy.RootCA, url))
		}
	}
	proto := map[string]string{"--http1.1": "HTTP/1.1", "--http2": "HTTP/2.0"}[protocol]
	for _, style := range styles {
		for _, eol := range lineEnds {
			name := style + "-" + eol
			body := running[name].Wait(t)
			want := strings.Join(script, "")
			if eol == "crlf" {
				want = strings.ReplaceAll(want, "\n", "\r\n")
			}
			if got := frame.ReplaceAllString(body, ""); got != want {
				t.Errorf("%s: got %q without the heartbeats, want %q", name, got, want)
				cells[style] = "OTHER BYTES"
			} else if cells[style] == "" {
				cells[style] = "exact bytes, and comments"
				if style == "event" {
					cells[style] = "exact bytes, and pings"
				}
			}
			checkClosed(t, caddy, proto, style, fmt.Sprintf("/%s/%s/curl%s", style, eol, protocol))
		}
	}
}

// goWatched is a client library that runs in this process.
type goWatched struct {
	mutex sync.Mutex
	all   []report
}

func (w *goWatched) add(r report) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.all = append(w.all, r)
}

func (w *goWatched) reports() []report {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return append([]report(nil), w.all...)
}

func goClient(follow func(ctx context.Context, url string, report func(typ, data, id string)) error) func(*testing.T, *harness.Caddy, []string) watched {
	return func(t *testing.T, _ *harness.Caddy, streams []string) watched {
		w := new(goWatched)
		ctx, cancel := context.WithCancel(context.Background())
		var following sync.WaitGroup
		t.Cleanup(following.Wait)
		t.Cleanup(cancel)
		for _, stream := range streams {
			name, url, _ := strings.Cut(stream, "=")
			following.Go(func() {
				err := follow(ctx, url, func(typ, data, id string) {
					if typ == "" {
						typ = "message"
					}
					w.add(report{Stream: name, Kind: "event", Type: typ, Data: data, ID: id})
				})
				if ctx.Err() == nil {
					t.Errorf("%s: %v", name, err)
				}
				w.add(report{Stream: name, Kind: "end"})
			})
		}
		return w
	}
}

func followTmaxmax(ctx context.Context, url string, report func(typ, data, id string)) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	connection := tmaxmax.NewConnection(request)
	connection.SubscribeToAll(func(e tmaxmax.Event) { report(e.Type, e.Data, e.LastEventID) })
	return connection.Connect()
}

// followR3labs subscribes again after each clean end. The library itself does
// that only after an error.
func followR3labs(ctx context.Context, url string, report func(typ, data, id string)) error {
	client := r3labs.NewClient(url)
	for ctx.Err() == nil {
		err := client.SubscribeRawWithContext(ctx, func(e *r3labs.Event) { report(string(e.Event), string(e.Data), string(e.ID)) })
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}
