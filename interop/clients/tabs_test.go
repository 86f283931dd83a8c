//go:build interop

package clients

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

//go:embed posts.html
var pageOfPosts string

// tabs is a Chromium with two tabs, one of which is visible. Drivers can't be
// used, because they keep every page visible.
type tabs struct {
	debugger    string // its URL
	page, other string // the ids of the page's tab and of an empty one
}

var debuggerAddress = regexp.MustCompile(`DevTools listening on ws://([^/]+)/`)

func openTabs(t *testing.T, address string) *tabs {
	chromium := harness.Program(t, "chromium", "chromium")
	home := harness.ShortTempDir(t)
	process := harness.Start(t, harness.Command(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--ignore-certificate-errors",
		"--remote-debugging-port=0", "--user-data-dir="+filepath.Join(home, "profile"), address), harness.Env("HOME="+home, "TMPDIR="+home))
	b := new(tabs)
	harness.Eventually(t, harness.Patience, "Chromium says where it can be told to change tabs", func() bool {
		match := debuggerAddress.FindStringSubmatch(process.Output())
		if match != nil {
			b.debugger = "http://" + match[1]
		}
		return match != nil
	})
	var list []struct{ ID, URL, Type string }
	harness.Eventually(t, harness.Patience, "there is the page's tab", func() bool {
		if err := json.Unmarshal(b.call(t, http.MethodGet, "/json/list"), &list); err != nil {
			t.Fatal(err)
		}
		for _, tab := range list {
			if tab.URL == address {
				b.page = tab.ID
			}
		}
		return b.page != ""
	})
	return b
}

func (b *tabs) call(t *testing.T, method, path string) []byte {
	t.Helper()
	request, err := http.NewRequest(method, b.debugger+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", path, response.Status, err)
	}
	return body
}

// away shows the other tab.
func (b *tabs) away(t *testing.T) {
	t.Helper()
	if b.other != "" {
		b.call(t, http.MethodGet, "/json/activate/"+b.other)
		return
	}
	var tab struct{ ID string }
	if err := json.Unmarshal(b.call(t, http.MethodPut, "/json/new?about:blank"), &tab); err != nil {
		t.Fatal(err)
	}
	b.other = tab.ID
}

// back shows the page again.
func (b *tabs) back(t *testing.T) {
	t.Helper()
	b.call(t, http.MethodGet, "/json/activate/"+b.page)
}

// servePosts serves a page that sends POSTs with the real fetch-event-source,
// installed by npm.
func servePosts(t *testing.T) *telling {
	_, dir := harness.Node(t, harness.Root(t, "interop", "clients", "node"))
	library := filepath.Join(dir, "node_modules", "@microsoft", "fetch-event-source", "lib", "esm")
	p := &telling{seen: make(map[int]bool)}
	p.addr = harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		name, isLibrary := strings.CutPrefix(r.URL.Path, "/lib/")
		switch {
		case r.Method == http.MethodPost:
			p.add(t, r.Body)
		case isLibrary:
			// It imports "./parse" without an extension, which only bundlers
			// resolve.
			content, err := os.ReadFile(filepath.Join(library, strings.TrimSuffix(filepath.Base(name), ".js")+".js"))
			if err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Type", "text/javascript")
			w.Write(content)
		default:
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, pageOfPosts)
		}
	})
	return p
}

// TestFetchEventSourceOnTabSwitches has a page request answers by POST with an
// unchanged fetch-event-source. It closes its requests when its tab is hidden,
// and sends each again, with the last id, when the tab is visible.
func TestFetchEventSourceOnTabSwitches(t *testing.T) {
	for _, test := range []struct {
		name           string
		tls, elsewhere bool // the streams have another origin than the page
		streams        int  // over HTTP/1.1, Chromium opens only six connections to a host
	}{
		{"HTTP/1.1", false, false, 4},
		{"HTTP/2", true, false, 20},
		{"HTTP/2, another origin", true, true, 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			const whole = 12
			upstream, posts := serveTeller(t), servePosts(t)
			upstream.whole = whole
			caddy := harness.StartSite(t, posts.route("page")+`
	handle /kept/* {
		sse {
			name kept
			resume 5m any
		}
		reverse_proxy `+upstream.addr+`
	}
	handle /late {
		# The answer that says that a stream is lost is Caddy's own.
		header >Access-Control-Allow-Origin *
		sse {
			name late
			resume 1s any
		}
		reverse_proxy `+upstream.addr+`
	}`)
			awaitTLS(t, caddy.TLSURL)
			base := caddy.URL
			if test.tls {
				base = caddy.TLSURL
			}
			origin := base
			if test.elsewhere {
				origin = strings.Replace(base, "localhost", "127.0.0.1", 1)
			}
			paths := []string{"/late"}
			for i := range test.streams {
				paths = append(paths, fmt.Sprint("/kept/", i))
			}
			kept := paths[1:]
			var streams []string
			for _, path := range paths {
				streams = append(streams, path+"="+origin+path)
			}
			tell := func(to int, paths ...string) {
				for _, path := range paths {
					upstream.tell(path, to)
				}
			}
			await := func(kind string, count int, paths ...string) {
				t.Helper()
				harness.Eventually(t, harness.Patience, fmt.Sprintf("%d × %s of %v", count, kind, paths), func() bool {
					all := posts.reports()
					for _, path := range paths {
						if len(of(all, path, kind)) < count {
							return false
						}
					}
					return true
				})
			}
			browser := openTabs(t, posts.address(base, "page", streams...))
			hide := func() {
				t.Helper()
				hidden := len(of(posts.reports(), "page", "hidden"))
				browser.away(t)
				await("hidden", hidden+1, "page")
				harness.Eventually(t, harness.Patience, "every client has left", func() bool { return len(caddy.OpenStreams(t)) == 0 })
			}

			tell(2, paths...)
			await("event", 2, paths...)
			hide()
			tell(5, paths...)
			// The resume window of /late must be over.
			harness.Eventually(t, harness.Patience, "what /late has had is gone", func() bool { return len(caddy.Log("run ended")) == 1 })
			browser.back(t)
			await("event", 5, kept...)
			await("end", 1, "/late")

			for n := 6; n < whole; n += 2 {
				hide()
				tell(n, kept...)
				browser.back(t)
				await("event", n, kept...)
			}
			// The answers end while the page is hidden.
			hide()
			tell(whole, kept...)
			browser.back(t)
			await("end", 1, kept...)
			// A request that has ended is not sent again.
			browser.away(t)
			await("hidden", 6, "page")
			browser.back(t)
			await("visible", 7, "page")

			all := posts.reports()
			for _, path := range kept {
				var numbers []string
				for _, e := range of(all, path, "event") {
					numbers = append(numbers, e.Data)
				}
				if inOrder(t, path, numbers); len(numbers) != whole {
					t.Errorf("%s: %d events, want %d", path, len(numbers), whole)
				}
				if asked, ids := upstream.requests(path); asked != 1 || len(ids) > 0 {
					t.Errorf("%s: the upstream was asked %d times, with the ids %q", path, asked, ids)
				}
				if requests := of(all, path, "request"); len(requests) != 6 || !strings.HasSuffix(requests[5].ID, ".10") {
					t.Errorf("%s: the page asked %+v", path, requests)
				}
			}
			// An answer is requested from the upstream only once.
			late := of(all, "/late", "event")
			if last := late[len(late)-1]; len(late) != 3 || last.Type != "error" || !strings.Contains(last.Data, `"type":"stream_lost"`) {
				t.Errorf("/late: %+v", late)
			}
			if requests := of(all, "/late", "request"); len(requests) != 2 || !strings.HasSuffix(requests[1].ID, ".2") {
				t.Errorf("/late: the page asked %+v", requests)
			}
			if asked, _ := upstream.requests("/late"); asked != 1 {
				t.Errorf("/late: the upstream was asked %d times", asked)
			}
			for _, r := range all {
				if r.Kind == "error" || r.Kind == "failure" {
					t.Errorf("%+v", r)
				}
			}
			caddy.CheckNoErrors(t)
		})
	}
}
