package caddysse_test

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// sentHeaders returns the headers of a stream whose upstream sends the given
// ones.
func sentHeaders(t *testing.T, config *caddysse.Handler, upstream http.Header) http.Header {
	t.Helper()
	config.Heartbeat = silent().Heartbeat
	c := newClient(t)
	err := serve(provision(t, config), c, get(), func(w http.ResponseWriter, _ *http.Request) error {
		maps.Copy(w.Header(), upstream)
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(200)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return c.sent
}

func TestCacheControlOfAStream(t *testing.T) {
	for _, test := range []struct {
		cacheControl, compression string
		upstream                  []string
		want                      string
	}{
		{"", "", nil, "no-cache, no-store, no-transform"},
		{"", "", []string{"public, max-age=60"}, "no-cache, no-store, no-transform"},
		{"", "", []string{"public", "max-age=60"}, "no-cache, no-store, no-transform"},
		{"", "deny", []string{"no-cache"}, "no-cache, no-store, no-transform"},
		{"", "allow", nil, "no-cache, no-store"},
		{"", "allow", []string{"no-transform"}, "no-cache, no-store"},

		{"private", "", nil, "private, no-transform"},
		{"private", "deny", []string{"no-cache"}, "private, no-transform"},
		{"private", "allow", []string{"no-cache, no-transform"}, "private"},
		{"no-transform", "", nil, "no-transform"},
		{"no-cache,NO-TRANSFORM", "", nil, "no-cache,NO-TRANSFORM"},
		{"no-cache , No-Transform ,private", "deny", nil, "no-cache , No-Transform ,private"},
		{"x-no-transform", "", nil, "x-no-transform, no-transform"},
		{"no-transforms", "", nil, "no-transforms, no-transform"},
		{"no-transform", "allow", nil, "no-transform"},

		{"keep", "", nil, "no-transform"},
		{"keep", "deny", []string{""}, "no-transform"},
		{"keep", "", []string{"private"}, "private, no-transform"},
		{"keep", "", []string{"private, no-transform"}, "private, no-transform"},
		{"keep", "", []string{"No-Transform"}, "No-Transform"},
		{"keep", "", []string{"private", "max-age=60"}, "private, max-age=60, no-transform"},
		{"keep", "", []string{"private", "no-transform", "max-age=60"}, "private|no-transform|max-age=60"},
		{"keep", "allow", nil, ""},
		{"keep", "allow", []string{"public, max-age=60"}, "public, max-age=60"},
		{"keep", "allow", []string{"public", "max-age=60"}, "public|max-age=60"},
		{"keep", "", []string{"private, no-transform", "max-age=60"}, "private, no-transform|max-age=60"},
		{"keep", "allow", []string{"no-transform"}, "no-transform"},
	} {
		t.Run(fmt.Sprintf("cache_control %q, compression %q, upstream %q", test.cacheControl, test.compression, test.upstream), func(t *testing.T) {
			upstream := http.Header{}
			if test.upstream != nil {
				upstream["Cache-Control"] = test.upstream
			}
			sent := sentHeaders(t, &caddysse.Handler{CacheControl: test.cacheControl, Compression: test.compression}, upstream)
			if got := strings.Join(sent["Cache-Control"], "|"); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestHeadersOfAStream(t *testing.T) {
	removed := []string{
		"Content-Length", "Content-Digest", "Repr-Digest", "Content-MD5", "Expires", "Pragma", "Age", "ETag",
		"Last-Modified", "Accept-Ranges", "CDN-Cache-Control", "Surrogate-Control", "Connection", "Keep-Alive",
	}
	kept := []string{
		"Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Alt-Svc", "Content-Language",
		"Content-Location", "Content-Security-Policy", "Date", "Link", "Mcp-Session-Id", "Retry-After", "Server",
		"Server-Timing", "Set-Cookie", "Strict-Transport-Security", "Trailer", "Transfer-Encoding", "Vary", "Via", "Warning",
		"X-Request-Id", "X-Content-Type-Options", "Content-Encoding",
	}
	for _, policy := range []caddysse.Handler{{}, {CacheControl: "keep", Compression: "allow"}} {
		t.Run(fmt.Sprintf("cache_control %q", policy.CacheControl), func(t *testing.T) {
			upstream := http.Header{
				// The upstream's values of these are ignored.
				"X-Accel-Buffering": {"yes", "maybe"},
				"Incremental":       {"?0"},
			}
			for _, field := range slices.Concat(removed, kept) {
				upstream.Add(field, "a")
				upstream.Add(field, "b")
			}
			sent := sentHeaders(t, &policy, upstream)
			for _, field := range removed {
				if values, there := sent[http.CanonicalHeaderKey(field)]; there {
					t.Errorf("%s: %q is still there", field, values)
				}
			}
			for _, field := range kept {
				if values := sent.Values(field); !slices.Equal(values, []string{"a", "b"}) {
					t.Errorf("%s: got %q", field, values)
				}
			}
			want := map[string]string{"X-Accel-Buffering": "no", "Incremental": "?1", "Content-Type": "text/event-stream"}
			for field, value := range want {
				if values := sent[field]; !slices.Equal(values, []string{value}) {
					t.Errorf("%s: got %q, want %q", field, values, value)
				}
			}
			for field := range sent {
				if !slices.Contains(kept, field) && want[field] == "" && field != "Cache-Control" {
					t.Errorf("%s: %q came from nowhere", field, sent[field])
				}
			}
		})
	}
}

func TestTheContentTypeOfAStreamStaysAsItIs(t *testing.T) {
	for _, contentType := range []string{"text/event-stream", "Text/Event-Stream;Charset=UTF-8; x=\"y\"", "text/event-stream; charset=iso-8859-1"} {
		c := newClient(t)
		_ = serve(provision(t, silent()), c, get(), func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(200)
			return nil
		})
		if got := c.sent["Content-Type"]; !slices.Equal(got, []string{contentType}) {
			t.Errorf("got %q, want %q", got, contentType)
		}
	}
}
