//go:build interop

package clients

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// TestAPageOfTheFlaskExampleMissesNothing uses the unchanged example and a page
// with an EventSource for each of its streams. The network between browser and
// Caddy is cut again and again, also before the first event. /events has ids
// and a replay; /notifications and /broadcast have neither.
func TestAPageOfTheFlaskExampleMissesNothing(t *testing.T) {
	dir := harness.Root(t, "examples", "flask")
	bin := filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin")
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			flask := harness.FreeAddr(t)
			harness.Start(t, harness.Command(filepath.Join(bin, "python"), "-B", filepath.Join(bin, "gunicorn"),
				"--bind", flask, "--threads", "100", "app:app"), harness.In(dir)).AwaitHTTP(t, "http://"+flask+"/clients")
			caddy := harness.StartSite(t, page+`
	handle {
		sse {
			early_start 1s
			retry 100ms 300ms
			resume 1m
		}
		reverse_proxy `+flask+`
	}`)
			awaitTLS(t, caddy.TLSURL)
			hop := harness.StartHop(t, strings.TrimPrefix(caddy.URL, "http://"))
			base := "http://" + hop.Addr
			if protocol == "HTTP/2" {
				hop = harness.StartHop(t, strings.Replace(strings.TrimPrefix(caddy.TLSURL, "https://"), "localhost", "127.0.0.1", 1))
				base = fmt.Sprintf("https://localhost:%d", hop.Port())
			}
			names := []string{"events", "notifications", "broadcast"}
			var streams []string
			for _, name := range names {
				streams = append(streams, name+"="+base+"/"+name)
			}
			browser := startBrowser(t, base+"/page", streams...)
			opened := make(map[string]int)
			cut := func(away time.Duration) {
				t.Helper()
				for _, name := range names {
					opened[name] = len(of(browser.reports(), name, "open"))
				}
				hop.Cut()
				time.Sleep(away)
				hop.Rejoin()
				browser.await(t, "all are back", func(all []report) bool {
					for _, name := range names {
						if len(of(all, name, "open")) <= opened[name] {
							return false
						}
					}
					return true
				})
			}
			// gunicorn has sent no headers for /broadcast yet.
			browser.awaitCount(t, "open", 1, names...)
			browser.awaitCount(t, "place", 1, "broadcast")
			cut(100 * time.Millisecond)

			const messages = 150
			published := make(chan error, 1)
			go func() {
				var err error
				for n := 1; n <= messages && err == nil; n++ {
					var response *http.Response
					response, err = http.Post("http://"+flask+"/publish", "application/json", strings.NewReader(fmt.Sprintf(`{"text":"%d"}`, n)))
					if err == nil {
						response.Body.Close()
						time.Sleep(50 * time.Millisecond)
					}
				}
				published <- err
			}()
			for range 4 {
				time.Sleep(rand.N(700 * time.Millisecond))
				cut(rand.N(500 * time.Millisecond))
			}
			if err := <-published; err != nil {
				t.Fatal(err)
			}
			browser.awaitCount(t, "event", messages, "broadcast")
			cut(100 * time.Millisecond)
			browser.awaitCount(t, "event", len(of(browser.reports(), "events", "event"))+2, "events")

			all := browser.reports()
			var broadcast []string
			for _, e := range of(all, "broadcast", "event") {
				var data struct{ Text string }
				json.Unmarshal([]byte(e.Data), &data)
				broadcast = append(broadcast, data.Text)
			}
			inOrder(t, "broadcast", broadcast)
			if len(broadcast) != messages {
				t.Errorf("broadcast: %d messages, want %d", len(broadcast), messages)
			}
			var numbers []string
			for _, e := range of(all, "events", "event") {
				var data struct{ N int }
				json.Unmarshal([]byte(e.Data), &data)
				numbers = append(numbers, fmt.Sprint(data.N))
			}
			inOrder(t, "events", numbers)
			var kinds []string
			for _, e := range of(all, "notifications", "event") {
				kinds = append(kinds, e.Type)
			}
			if got := strings.Join(kinds, " "); got != "info warning alert" {
				t.Errorf("notifications: %s", got)
			}
			for _, name := range names {
				for _, e := range of(all, name, "error") {
					if e.State == closedForGood {
						t.Errorf("%s: closed for good", name)
					}
				}
			}
			t.Logf("%d messages, %d numbered events, each stream opened %d times",
				len(broadcast), len(numbers), len(of(all, "broadcast", "open")))
		})
	}
}

// inOrder checks that numbers start with 1, and that none is missing or
// duplicated.
func inOrder(t *testing.T, what string, numbers []string) {
	t.Helper()
	for i, n := range numbers {
		if n != fmt.Sprint(i+1) {
			t.Errorf("%s: %q", what, numbers)
			return
		}
	}
}
