package caddysse_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

var retryBody = regexp.MustCompile(`^retry: (\d+)\n\n$`)

// reconnectionTime expects an answer with a reconnection time and nothing else.
func reconnectionTime(t testing.TB, status int, body string) time.Duration {
	t.Helper()
	match := retryBody.FindStringSubmatch(body)
	if status != 200 || match == nil {
		t.Fatalf("got %d %q, want a reconnection time", status, body)
	}
	ms, _ := strconv.Atoi(match[1])
	return time.Duration(ms) * time.Millisecond
}

func TestAnEventSourceIsToldToComeBackFromAnUpstreamThatFails(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "https://app.example")
		w.Header().Set("Content-Language", "en")
		w.Header().Set("Content-Security-Policy", "default-src 'none'")
		w.Header().Set("Retry-After", "3")
		w.Header().Set("ETag", `"a"`)
		http.Error(w, "bad gateway", http.StatusBadGateway)
	})
	c := startCaddy(t, `
		handle /gone/* {
			sse {
				prelude off
				name reconnect
				reconnect_on 502 503
			}
			reverse_proxy 127.0.0.1:1
		}
		handle {
			sse {
				prelude off
				name reconnect
				reconnect_on 502 503
			}
			reverse_proxy `+up.addr+`
		}
		handle_errors {
			respond "rendered" 500
		}`, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, path := range []string{"/", "/gone/"} {
			before := c.scrape(t)
			res := cl.get(t, path, acceptStream)
			text, err := res.text()
			if err != nil {
				t.Error(err)
			}
			shortest, longest := 2*time.Second, 10*time.Second
			if path == "/" {
				shortest, longest = 5*time.Second, 13*time.Second // with the upstream's Retry-After added
				for field, want := range map[string]string{
					"Access-Control-Allow-Origin": "https://app.example", "Content-Security-Policy": "default-src 'none'",
					"Content-Language": "", "Content-Length": "", "Retry-After": "", "Etag": "",
				} {
					if got := res.Header.Get(field); got != want && !(field == "Content-Length" && got == strconv.Itoa(len(text))) {
						t.Errorf("%s: got %q, want %q", field, got, want)
					}
				}
			}
			if d := reconnectionTime(t, res.StatusCode, text); d < shortest || d > longest {
				t.Errorf("the client is asked to come back in %v", d)
			}
			if res.Header.Get("Content-Type") != eventStream || res.Header.Get("Cache-Control") != "no-cache, no-store, no-transform" {
				t.Errorf("got %v", res.Header)
			}
			after := c.scrape(t)
			if n := after.sum("reconnects_answered_total", "reconnect", `status="502"`) - before.sum("reconnects_answered_total", "reconnect"); n != 1 {
				t.Errorf("%v are counted", n)
			}
			if after.sum("streams_opened_total", "reconnect") != 0 || after.sum("streams_closed_total", "reconnect") != 0 {
				t.Error("it counts as a stream")
			}
		}
		// Others get the answer unchanged.
		for _, accept := range []string{
			"", "Accept: */*", "Accept: text/event-stream;q=0",
			"Accept: text/html, text/event-stream", "Accept: text/event-stream, text/html, application/json",
			"an SDK", "MCP",
		} {
			req := cl.request(t, "GET", "/", nil)
			switch accept {
			case "":
			case "an SDK":
				req = cl.request(t, "GET", "/", nil, acceptStream, notEventSource)
			case "MCP":
				req = cl.request(t, "GET", "/", nil, acceptStream, "MCP-Protocol-Version: 2025-11-25")
			default:
				req.Header.Set("Accept", strings.TrimPrefix(accept, "Accept: "))
				req.Header.Set("Cache-Control", "no-cache")
			}
			res := cl.do(t, req)
			if text, _ := res.text(); res.StatusCode != 502 || text != "bad gateway\n" || res.Header.Get("Retry-After") != "3" {
				t.Errorf("%s: got %s %q", accept, res.Status, text)
			}
		}
		res := cl.do(t, cl.request(t, "POST", "/gone/", nil, acceptStream))
		if text, _ := res.text(); res.StatusCode != 500 || text != "rendered" {
			t.Errorf("got %s %q", res.Status, text)
		}
	})
	for _, entry := range c.ourLines() {
		if strings.HasPrefix(entry.message(), "stream ") {
			t.Errorf("told: %v", entry)
		}
	}
}

func TestALimitsRefusalCanBeAReconnectionTime(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	for limit, status := range map[string]int{"max_streams": 503, "max_streams_per_client": 429} {
		t.Run(limit, func(t *testing.T) {
			name := "reconnect" + limit
			c := startCaddy(t, fmt.Sprintf(`
				sse {
					name %s
					%s 1
					heartbeat off
					retry 1s 6s
					reconnect_on %d
				}
				reverse_proxy %s`, name, limit, status, up.addr), withAdmin())
			overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				o := c.open(t, cl, up, "/"+cl.proto, acceptStream)
				before := c.scrape(t)
				res := cl.get(t, "/", acceptStream)
				text, _ := res.text()
				// The limits add five seconds.
				if d := reconnectionTime(t, res.StatusCode, text); d < 6*time.Second || d > 11*time.Second {
					t.Errorf("the client is asked to come back in %v", d)
				}
				after := c.scrape(t)
				for metric, label := range map[string]string{
					"reconnects_answered_total": fmt.Sprintf("status=%q", strconv.Itoa(status)),
					"streams_refused_total":     fmt.Sprintf("limit=%q", limit),
				} {
					if n := after.sum(metric, name, label) - before.sum(metric, name, label); n != 1 {
						t.Errorf("%s: %v", metric, n)
					}
				}
				o.call.end()
				o.body.expectEnd(t)
				c.waitForStreams(t, 0)
			})
		})
	}
}

func TestAReconnectionTimeIsRandomInItsRangeOnTopOfARetryAfter(t *testing.T) {
	const s = time.Second
	for _, test := range []struct {
		retry            *caddysse.Retry
		after            string
		shortest, longer time.Duration
	}{
		{nil, "", 2 * s, 10 * s},
		{&caddysse.Retry{Min: caddy.Duration(s), Max: caddy.Duration(4 * s)}, "", s, 4 * s},
		{&caddysse.Retry{Min: caddy.Duration(s)}, "", s, s},
		{nil, "7", 9 * s, 17 * s},
		{nil, "3600", 62 * s, 70 * s},
		{&caddysse.Retry{Min: caddy.Duration(s), Max: caddy.Duration(10 * s)}, "30", 31 * s, 40 * s},
		{nil, "99999999999999999999", 2 * s, 10 * s},
		{nil, "-5", 2 * s, 10 * s},
		{nil, "soon", 2 * s, 10 * s},
		{nil, "0", 2 * s, 10 * s},
		{nil, time.Now().Add(45 * s).UTC().Format(http.TimeFormat), 40 * s, 55 * s},
		{nil, time.Now().Add(time.Hour).UTC().Format(http.TimeFormat), 62 * s, 70 * s},
		{nil, time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat), 2 * s, 10 * s},
		{&caddysse.Retry{Min: caddy.Duration(90 * s)}, "3600", 150 * s, 150 * s},
	} {
		config := silent()
		config.Retry, config.ReconnectOn = test.retry, []int{503}
		h := provision(t, config)
		seen := make(map[time.Duration]bool)
		for i := range 40 {
			c := newClient(t)
			if test.after != "" {
				c.header.Set("Retry-After", test.after)
			}
			err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, r *http.Request) error {
				if i%2 == 0 {
					return caddyhttp.Error(503, errors.New("it failed"))
				}
				http.Error(w, "no", 503)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			d := reconnectionTime(t, c.status, c.body.String())
			if d < test.shortest || d > test.longer {
				t.Errorf("%+v: %v", test, d)
			}
			seen[d] = true
		}
		if test.longer > test.shortest && len(seen) < 5 {
			t.Errorf("%+v: only %v", test, seen)
		}
	}
}

func TestStatusesThatAreNotListedStay(t *testing.T) {
	config := silent()
	config.ReconnectOn = []int{502, 503, 429}
	h := provision(t, config)
	for _, status := range []int{200, 204, 301, 400, 401, 403, 404, 500, 504} {
		c := newClient(t)
		if err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(status)
			_, err := io.WriteString(w, "text")
			return err
		}); err != nil || c.status != status || c.body.String() != "text" {
			t.Errorf("%d: got %d %q, %v", status, c.status, c.body.String(), err)
		}
		c = newClient(t)
		want := caddyhttp.Error(status, errors.New("it failed"))
		if err := serve(h, c, get("text/event-stream"), func(http.ResponseWriter, *http.Request) error { return want }); !errors.Is(err, want) || c.status != 0 {
			t.Errorf("%d: got %d, %v", status, c.status, err)
		}
	}
	// If an error comes after the headers, they can no longer be replaced.
	c := newClient(t)
	err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(200)
		return caddyhttp.Error(502, errors.New("it failed"))
	})
	if err == nil || c.body.Len() != 0 {
		t.Errorf("got %q, %v", c.body.String(), err)
	}
	// A body that is discarded may be endless.
	c = newClient(t)
	if err := serve(h, c, get("text/event-stream"), func(w http.ResponseWriter, r *http.Request) error {
		w.WriteHeader(502)
		for r.Context().Err() == nil {
			if n, err := w.Write(make([]byte, 1000)); n != 1000 || err != nil {
				return err
			}
		}
		return r.Context().Err()
	}); err != nil {
		t.Error(err)
	}
	reconnectionTime(t, c.status, c.body.String())
	// A HEAD request gets the answer as it is.
	c = newClient(t)
	if err := serve(h, c, httptest.NewRequest("HEAD", "/", nil), func(w http.ResponseWriter, _ *http.Request) error {
		w.WriteHeader(502)
		return nil
	}); err != nil || c.status != 502 {
		t.Errorf("got %d, %v", c.status, err)
	}
}
