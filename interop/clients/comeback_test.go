//go:build interop

package clients

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// teller is an upstream without ids and without a replay. On each path, each
// request is answered with the numbers from 1 up to the one that the test has
// told it.
type teller struct {
	addr  string
	whole int // the number after which an answer ends; 0: never

	mutex   sync.Mutex
	changed chan struct{}
	told    map[string]int // up to which number, by path
	asked   map[string]int // how often
	had     map[string][]string
}

func serveTeller(t *testing.T) *teller {
	u := &teller{changed: make(chan struct{}), told: make(map[string]int), asked: make(map[string]int), had: make(map[string][]string)}
	u.addr = harness.Serve(t, u.serve)
	return u
}

func (u *teller) serve(w http.ResponseWriter, r *http.Request) {
	// Pages of other origins may request it.
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Access-Control-Allow-Headers", "Content-Type, Last-Event-ID")
	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	u.mutex.Lock()
	u.asked[r.URL.Path]++
	if id := r.Header.Get("Last-Event-ID"); id != "" {
		u.had[r.URL.Path] = append(u.had[r.URL.Path], id)
	}
	u.mutex.Unlock()
	io.Copy(io.Discard, r.Body)
	harness.Begin(w)
	for n := 0; ; {
		u.mutex.Lock()
		told, changed := u.told[r.URL.Path], u.changed
		u.mutex.Unlock()
		for ; n < told; n++ {
			harness.Send(w, fmt.Sprintf("data: %d\n\n", n+1))
		}
		if n > 0 && n == u.whole {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// tell makes the upstream count further on a path.
func (u *teller) tell(path string, to int) {
	u.mutex.Lock()
	defer u.mutex.Unlock()
	u.told[path] = to
	close(u.changed)
	u.changed = make(chan struct{})
}

// requests returns how often a path has been requested, and with which ids.
func (u *teller) requests(path string) (asked int, ids []string) {
	u.mutex.Lock()
	defer u.mutex.Unlock()
	return u.asked[path], u.had[path]
}

// TestAClientThatWasCutComesBackAndMissesNothing cuts the connection of each
// client twice, before its first event and after the third, while the upstream
// continues.
func TestAClientThatWasCutComesBackAndMissesNothing(t *testing.T) {
	t.Parallel()
	upstream := serveTeller(t)
	pages := make(map[string]*telling) // by folder
	inPage := func(start func(t *testing.T, address, rootCA string)) func(*testing.T, *harness.Caddy, string, string, []string) watched {
		return func(t *testing.T, caddy *harness.Caddy, base, folder string, streams []string) watched {
			rootCA := ""
			if strings.HasPrefix(base, "https:") {
				rootCA = caddy.RootCA
			}
			start(t, pages[folder].address(base, folder, streams...), rootCA)
			return pages[folder]
		}
	}
	inNode := func(client string) func(*testing.T, *harness.Caddy, string, string, []string) watched {
		return func(t *testing.T, caddy *harness.Caddy, _, _ string, streams []string) watched {
			return nodeClient(client)(t, caddy, streams)
		}
	}
	inChromium := func(t *testing.T, _ *harness.Caddy, base, _ string, streams []string) watched {
		return startBrowser(t, base+"/page", streams...)
	}
	rows := []struct {
		name  string
		tls   bool
		start func(t *testing.T, caddy *harness.Caddy, base, folder string, streams []string) watched
	}{
		{"Chromium, HTTP/1.1", false, inChromium},
		{"Chromium, HTTP/2", true, inChromium},
		{"Firefox, HTTP/1.1", false, inPage(startFirefox)},
		{"Firefox, HTTP/2", true, inPage(startFirefox)},
		// Not over HTTP/2: libsoup 3.2, which WebKitGTK 2.50 uses, does not
		// notice that such a connection is gone, and keeps waiting.
		{"WebKit, HTTP/1.1", false, inPage(startSurf)},
		{"npm eventsource", false, inNode("eventsource")},
		{"undici EventSource, HTTP/1.1", false, inNode("undici")},
		{"undici EventSource, HTTP/2", true, inNode("undici-h2")},
	}

	site := page
	for i := range rows {
		folder := fmt.Sprint("row", i)
		pages[folder] = serveTelling(t)
		site += pages[folder].route(folder)
	}
	uses := []string{"resume", "share"}
	for use, setting := range map[string]string{"resume": "resume 1m", "share": "share {\nlinger 1m\n}"} {
		site += `
	handle /` + use + `/* {
		sse {
			name ` + use + `
			retry 100ms 300ms
			` + setting + `
		}
		reverse_proxy ` + upstream.addr + `
	}`
	}
	caddy := harness.StartSite(t, site)
	awaitTLS(t, caddy.TLSURL)

	t.Run("clients", func(t *testing.T) {
		for i, row := range rows {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				hop := harness.StartHop(t, strings.TrimPrefix(caddy.URL, "http://"))
				base, proto := "http://"+hop.Addr, "HTTP/1.1"
				if row.tls {
					hop = harness.StartHop(t, strings.Replace(strings.TrimPrefix(caddy.TLSURL, "https://"), "localhost", "127.0.0.1", 1))
					base, proto = fmt.Sprintf("https://localhost:%d", hop.Port()), "HTTP/2.0"
				}
				path := func(use string) string { return fmt.Sprintf("/%s/%d", use, i) }
				var streams []string
				for _, use := range uses {
					streams = append(streams, use+"="+base+path(use))
				}
				running := row.start(t, caddy, base, fmt.Sprint("row", i), streams)
				await := func(what string, kind string, count int) {
					t.Helper()
					harness.Eventually(t, harness.Patience, what, func() bool {
						for _, use := range uses {
							if len(of(running.reports(), use, kind)) < count {
								return false
							}
						}
						return true
					})
				}
				cutWhile := func(told int) {
					hop.Cut()
					for _, use := range uses {
						harness.Eventually(t, harness.Patience, path(use)+" has lost its client", func() bool {
							return len(caddy.OpenStreams(t, path(use))) == 0
						})
						upstream.tell(path(use), told)
					}
					hop.Rejoin()
				}

				await("their places", "place", 1)
				cutWhile(3)
				await("what was sent before the first event came", "event", 3)
				cutWhile(6)
				await("what was sent after the third", "event", 6)
				for _, use := range uses {
					upstream.tell(path(use), 7)
				}
				await("what is sent to a client that is back", "event", 7)

				for _, use := range uses {
					var run string
					for n, e := range append(of(running.reports(), use, "place"), of(running.reports(), use, "event")...) {
						data := fmt.Sprint(n)
						if n == 0 {
							data = ""
							run, _, _ = strings.Cut(e.ID, ".")
						}
						if want := fmt.Sprintf("%s.%d", run, n); e.Data != data || e.ID != want || !strings.HasPrefix(e.ID, "sse1-") {
							t.Errorf("%s: %+v, want data %q and id %s", use, e, data, want)
						}
					}
					if asked, ids := upstream.requests(path(use)); asked != 1 || len(ids) > 0 {
						t.Errorf("%s: the upstream was asked %d times, with the ids %q", use, asked, ids)
					}
					left := []harness.Closed{caddy.AwaitClosed(t, path(use)), caddy.AwaitClosed(t, path(use))}
					slices.SortFunc(left, func(a, b harness.Closed) int { return strings.Compare(a.LastEventID, b.LastEventID) })
					if first, second := left[0], left[1]; first.Resumed || !second.Resumed || first.Run == "" || second.Run != first.Run || first.Proto != proto || second.Proto != proto ||
						!strings.HasSuffix(second.LastEventID, ".3") {
						t.Errorf("%s: %+v", use, left)
					}
				}
				if all := of(running.reports(), "page", "loaded"); len(all) > 0 {
					t.Logf("%s", all[0].Data)
				}
			})
		}
	})
	caddy.CheckNoErrors(t)
}
