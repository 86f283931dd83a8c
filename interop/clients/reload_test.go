//go:build interop

package clients

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

const (
	half  = 5  // events before the reload
	whole = 12 // and in all
)

// serveAnswer is an answer by GET that takes until after the reload: half of it,
// the rest once reloaded is closed. Who comes back for more waits for ever.
func serveAnswer(t *testing.T, reloaded <-chan struct{}) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
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
			harness.Send(w, fmt.Sprintf("id: %d\ndata: {\"n\":%[1]d}\n\n", n))
		}
		if last == whole {
			<-r.Context().Done()
		}
	})
}

// TestNobodyTakesHalfAnAnswerForAWholeOne has clients ask by GET for an answer
// that a reload cuts in the middle: who comes back by itself has all of it in the
// end, and each event once; everybody else has an error and no quiet end.
func TestNobodyTakesHalfAnAnswerForAWholeOne(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		start func(t *testing.T, caddy *harness.Caddy, streams []string) watched
		back  bool
	}{
		{"Chromium EventSource", browserClient, true},
		{"npm eventsource", nodeClient("eventsource"), true},
		{"undici EventSource", nodeClient("undici"), true},
		{"npm fetch-event-source", nodeClient("fetch-event-source"), true},
		// It comes back after an abort, not after a clean end.
		{"npm fetch-event-source, no onclose", nodeClient("fetch-event-source-plain"), true},
		{"Go tmaxmax/go-sse", goClient(followTmaxmax), true},
		{"npm eventsource-parser, fetch", nodeClient("eventsource-parser"), false},
		{"Python httpx", pythonRequest("httpx"), false},
		{"Python httpx-sse", pythonRequest("httpx-sse"), false},
		{"openai-python, events of a session", pythonRequest("session"), false},
	}
	reloaded := make(chan struct{})
	site := page + `
	handle {
		sse {
			heartbeat off
			drain 300ms
		}
		reverse_proxy ` + serveAnswer(t, reloaded) + `
	}`
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, site))
	caddy.URL = "http://" + plain

	// seen are the numbers of the events that an application has got.
	seen := func(w watched, stream string) (numbers []int) {
		for _, e := range events(w.reports(), stream) {
			var data struct{ N int }
			if err := json.Unmarshal([]byte(e.Data), &data); err != nil {
				t.Errorf("%s: %v in %q", stream, err, e.Data)
			}
			numbers = append(numbers, data.N)
		}
		return numbers
	}
	running := make([]watched, len(rows))
	stream := func(i int) string { return fmt.Sprint("stream", i) }
	for i, row := range rows {
		running[i] = row.start(t, caddy, []string{fmt.Sprintf("%s=http://%s/%d", stream(i), plain, i)})
	}
	for i, row := range rows {
		harness.Eventually(t, patience, "half of the answer for "+row.name, func() bool { return len(seen(running[i], stream(i))) >= half })
	}
	caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+site))
	drained := 0
	for range rows {
		if closed := caddy.AwaitClosed(t); closed.Reason == "drained" {
			drained++
		}
	}
	if drained != len(rows) {
		t.Errorf("%d streams were drained, want %d", drained, len(rows))
	}
	close(reloaded)

	for i, row := range rows {
		numbers := func() []int { return seen(running[i], stream(i)) }
		failed := func() bool { return len(of(running[i].reports(), stream(i), "error")) > 0 }
		ended := func() bool { return len(of(running[i].reports(), stream(i), "end")) > 0 }
		want := half
		if row.back {
			want = whole
		}
		harness.Eventually(t, patience, row.name+" has come to an end", func() bool { return ended() || row.back && len(numbers()) >= whole })
		if got := numbers(); len(got) != want || got[0] != 1 || got[want-1] != want {
			t.Errorf("%s: events %v, want 1 to %d", row.name, got, want)
		}
		if !row.back && !failed() {
			t.Errorf("%s: no error", row.name)
		}
	}
}

func pythonRequest(client string) func(*testing.T, *harness.Caddy, []string) watched {
	return func(t *testing.T, _ *harness.Caddy, streams []string) watched {
		return startPython(t, "clients.py", append([]string{client}, streams...))
	}
}
