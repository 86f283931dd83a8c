//go:build interop

package clients

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

const (
	half  = 5  // events before the reload
	whole = 12 // events in all
)

// dialect is how the events of an answer look to one kind of client.
type dialect struct {
	event string // %d is the event's number
	end   string // what follows the last event
}

const numbered = "id: %d\ndata: {\"n\":%[1]d}\n\n"

// dialects are the dialects by the first part of a URL's path.
var dialects = map[string]dialect{
	"plain":     {numbered, ""},
	"datastar":  {"id: %d\nevent: datastar-merge-signals\ndata: signals {\"n\":%[1]d}\n\n", ""},
	"langgraph": {"event: values\n" + numbered, "event: end\ndata: {}\n\n"},
	// LangGraph's SDKs reconnect to the URL in Location.
	"langgraph-location": {"event: values\n" + numbered, "event: end\ndata: {}\n\n"},
	"replicate":          {"event: output\n" + numbered, "id: done\nevent: done\ndata: {}\n\n"},
}

// serveAnswer answers a GET with half of an answer, and sends the rest once
// reloaded is closed. A client that has everything and asks for more waits
// forever.
func serveAnswer(t *testing.T, reloaded <-chan struct{}) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		path := strings.SplitN(r.URL.Path, "/", 4) // "", dialect, number, the client's own
		name := path[1]
		if r.Method == http.MethodPost {
			// Replicate's SDKs first create what they then read.
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"id":"1","model":"owner/model","version":"version","status":"starting","input":{},"urls":{"stream":"http://%s%s"}}`, r.Host, r.URL.Path)
			return
		}
		if name == "langgraph-location" {
			w.Header().Set("Location", "/"+path[3])
		}
		last, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
		harness.Begin(w)
		for n := last + 1; n <= whole; n++ {
			if n > half {
				select {
				case <-reloaded:
				case <-r.Context().Done():
					return
				}
			}
			harness.Send(w, fmt.Sprintf(dialects[name].event, n))
		}
		harness.Send(w, dialects[name].end)
		if last == whole {
			<-r.Context().Done()
		}
	})
}

// reader is a client program that reads one or more answers.
type reader struct {
	start   func(t *testing.T, caddy *harness.Caddy, streams []string) watched
	streams []string
	running watched
}

// TestNobodyTakesHalfAnAnswerForAWholeOne has clients request, by GET, an
// answer that a reload interrupts in the middle. Clients that reconnect by
// themselves get all of it, each event once. The others get an error, not a
// clean end. Requests that are not resumable keep their connection.
func TestNobodyTakesHalfAnAnswerForAWholeOne(t *testing.T) {
	t.Parallel()
	type outcome int
	const (
		comesBack outcome = iota
		fails
		stays
	)
	alone := func(start func(*testing.T, *harness.Caddy, []string) watched) *reader { return &reader{start: start} }
	// Importing these SDKs, and starting Chromium, takes longer than the
	// answers.
	hypermedia, inPython, inNode := alone(startHypermedia), alone(startByGetPython), alone(startByGetNode)
	rows := []struct {
		name   string
		reader *reader
		client string // for a reader with several clients
		path   string
		want   outcome
	}{
		{"Chromium EventSource", alone(browserClient), "", "plain", comesBack},
		{"npm eventsource", alone(nodeClient("eventsource")), "", "plain", comesBack},
		{"undici EventSource", alone(nodeClient("undici")), "", "plain", comesBack},
		{"npm fetch-event-source", alone(nodeClient("fetch-event-source")), "", "plain", comesBack},
		// It reconnects after an abort, but not after a clean end.
		{"npm fetch-event-source, no onclose", alone(nodeClient("fetch-event-source-plain")), "", "plain", comesBack},
		{"Go tmaxmax/go-sse", alone(goClient(followTmaxmax)), "", "plain", comesBack},
		{"npm eventsource-parser, fetch", alone(nodeClient("eventsource-parser")), "", "plain", fails},
		{"Python httpx", alone(pythonRequest("httpx")), "", "plain", fails},
		{"Python httpx-sse", alone(pythonRequest("httpx-sse")), "", "plain", fails},
		{"openai-python, events of a session", alone(pythonRequest("session")), "", "plain", fails},
		{"langgraph-sdk (Python)", inPython, "langgraph", "langgraph", fails},
		{"langgraph-sdk (Python), with Location", inPython, "langgraph", "langgraph-location", comesBack},
		// Its requests have no Accept header.
		{"@langchain/langgraph-sdk", inNode, "langgraph", "langgraph", stays},
		{"@langchain/langgraph-sdk, resumable always", inNode, "langgraph", "always/langgraph", fails},
		{"@langchain/langgraph-sdk, with Location, resumable always", inNode, "langgraph", "always/langgraph-location", comesBack},
		{"replicate (Python)", inPython, "replicate", "replicate", fails},
		{"replicate (npm)", inNode, "replicate", "replicate", fails},
		{"Datastar 1.0.0-beta.11", hypermedia, "datastar", "datastar", comesBack},
		{"Datastar with the Accept of 1.0", hypermedia, "datastar-1.0", "datastar", stays},
		{"Datastar with the Accept of 1.0, resumable always", hypermedia, "datastar-1.0", "always/datastar", comesBack},
		{"htmx 4", hypermedia, "htmx", "plain", stays},
		{"htmx 4, resumable always", hypermedia, "htmx", "always/plain", comesBack},
	}
	reloaded := make(chan struct{})
	upstream := serveAnswer(t, reloaded)
	site := page + `
	handle_path /always/* {
		sse {
			heartbeat off
			drain 300ms
			resumable always
		}
		reverse_proxy ` + upstream + `
	}
	handle {
		sse {
			heartbeat off
			drain 300ms
		}
		reverse_proxy ` + upstream + `
	}`
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, site))
	caddy.URL = "http://" + plain

	stream := func(i int) string { return fmt.Sprintf("%s/%d", rows[i].client, i) }
	var readers []*reader
	toDrain := 0
	for i, row := range rows {
		if len(row.reader.streams) == 0 {
			readers = append(readers, row.reader)
		}
		row.reader.streams = append(row.reader.streams, fmt.Sprintf("%s=%s/%s/%d", stream(i), caddy.URL, row.path, i))
		if row.want != stays {
			toDrain++
		}
	}
	for _, r := range readers {
		r.running = r.start(t, caddy, r.streams)
	}
	// seen returns the numbers of the events that an application has received.
	seen := func(i int) (numbers []int) {
		for _, e := range events(rows[i].reader.running.reports(), stream(i)) {
			var data struct{ N int }
			if err := json.Unmarshal([]byte(e.Data), &data); err != nil {
				t.Errorf("%s: %v in %q", rows[i].name, err, e.Data)
			}
			numbers = append(numbers, data.N)
		}
		return numbers
	}
	failures := func(i int) []report { return of(rows[i].reader.running.reports(), stream(i), "error") }
	ended := func(i int) bool { return len(of(rows[i].reader.running.reports(), stream(i), "end")) > 0 }

	for i, row := range rows {
		harness.Eventually(t, harness.Patience, "half of the answer for "+row.name, func() bool { return len(seen(i)) >= half })
	}
	caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+site))
	for range toDrain {
		if closed := caddy.AwaitClosed(t); closed.Reason != "drained" {
			t.Errorf("%s was closed as %s", closed.Path, closed.Reason)
		}
	}
	close(reloaded)

	for i, row := range rows {
		want := whole
		if row.want == fails {
			want = half
		}
		harness.Eventually(t, harness.Patience, row.name+" has come to an end", func() bool {
			return ended(i) || row.want != fails && len(seen(i)) >= whole
		})
		if got := seen(i); len(got) != want || got[0] != 1 || got[want-1] != want {
			t.Errorf("%s: events %v, want 1 to %d; errors %v", row.name, got, want, failures(i))
		}
		if row.want == fails && len(failures(i)) == 0 {
			t.Errorf("%s: no error", row.name)
		}
		if row.want == stays && len(failures(i)) > 0 {
			t.Errorf("%s: errors %v", row.name, failures(i))
		}
	}
	drained := 0
	for _, closed := range caddy.ClosedStreams() {
		if closed.Reason == "drained" {
			drained++
		}
	}
	if drained != toDrain {
		t.Errorf("%d streams were drained, want %d", drained, toDrain)
	}
}

func pythonRequest(client string) func(*testing.T, *harness.Caddy, []string) watched {
	return func(t *testing.T, _ *harness.Caddy, streams []string) watched {
		return startPython(t, "clients.py", append([]string{client}, streams...))
	}
}

func startByGetPython(t *testing.T, _ *harness.Caddy, streams []string) watched {
	return startPython(t, "by_get.py", streams)
}

func startByGetNode(t *testing.T, _ *harness.Caddy, streams []string) watched {
	return startNode(t, "by-get.mjs", streams)
}

func startHypermedia(t *testing.T, caddy *harness.Caddy, streams []string) watched {
	return startChromium(t, "hypermedia.mjs", append([]string{caddy.URL + "/page"}, streams...))
}
