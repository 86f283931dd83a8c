package caddysse_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
)

func TestGlobalPlaceholdersAreReplacedWhenTheConfigurationIsLoaded(t *testing.T) {
	t.Setenv("SSE_TEST_NAME", "chat {env.SSE_TEST_OTHER}")
	t.Setenv("SSE_TEST_OTHER", "replaced twice")
	t.Setenv("SSE_TEST_EMPTY", "")
	file := filepath.Join(t.TempDir(), "comment")
	if err := os.WriteFile(file, []byte("from a file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	second := caddy.Duration(time.Second)
	for _, test := range []struct {
		what         string
		config       *caddysse.Handler
		name         string
		cacheControl string
		frame        string
	}{
		{
			"all of them",
			&caddysse.Handler{Name: "{env.SSE_TEST_NAME}!", CacheControl: "private, {env.SSE_TEST_OTHER}",
				Heartbeat: &caddysse.Heartbeat{Interval: second, Comment: "{file." + file + "}"}},
			"chat {env.SSE_TEST_OTHER}!", "private, replaced twice, no-transform", ":from a file\n\n",
		},
		{
			"an event",
			&caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: second, Style: "event",
				Event: "{env.SSE_TEST_OTHER}", Data: `{"at":{"x":"{env.SSE_TEST_NAME}"}}`}},
			"sse", "no-cache, no-store, no-transform", "event: replaced twice\ndata: {\"at\":{\"x\":\"chat {env.SSE_TEST_OTHER}\"}}\n\n",
		},
		{
			"empty ones, which stand for the defaults",
			&caddysse.Handler{Name: "{env.SSE_TEST_EMPTY}", CacheControl: "{env.SSE_TEST_UNSET}",
				Heartbeat: &caddysse.Heartbeat{Interval: second, Comment: "{env.SSE_TEST_EMPTY}"}},
			"sse", "no-cache, no-store, no-transform", ":heartbeat\n\n",
		},
		{
			"what Caddy does not know",
			&caddysse.Handler{Name: "{no.such} {x}", CacheControl: "{y}",
				Heartbeat: &caddysse.Heartbeat{Interval: second, Comment: `{"a":1} \{env.SSE_TEST_NAME}`}},
			"{no.such} {x}", "{y}, no-transform", ":{\"a\":1} {env.SSE_TEST_NAME}\n\n",
		},
		{
			"no-transform from the environment, and keep",
			&caddysse.Handler{CacheControl: "{env.SSE_TEST_KEEP}", Compression: "allow", Heartbeat: &caddysse.Heartbeat{Interval: second}},
			"sse", "", ":heartbeat\n\n",
		},
	} {
		t.Setenv("SSE_TEST_KEEP", "keep")
		t.Run(test.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := provision(t, test.config)
				if h.Name != test.name {
					t.Errorf("the name is %q, want %q", h.Name, test.name)
				}
				c := newClient(t)
				_ = serve(h, c, get(), func(w http.ResponseWriter, _ *http.Request) error {
					w.Header().Set("Content-Type", "text/event-stream")
					w.WriteHeader(200)
					quiet(time.Second)
					return nil
				})
				if got := c.sent.Get("Cache-Control"); got != test.cacheControl {
					t.Errorf("Cache-Control is %q, want %q", got, test.cacheControl)
				}
				if got := c.body.String(); got != test.frame {
					t.Errorf("the frame is %q, want %q", got, test.frame)
				}
			})
		})
	}
}

func TestWhatAPlaceholderStandsForKeepsToTheRules(t *testing.T) {
	t.Setenv("SSE_TEST_LINES", "a\nb")
	t.Setenv("SSE_TEST_LATIN1", "caf\xe9")
	t.Setenv("SSE_TEST_EMPTY", "")
	for config, says := range map[string]string{
		`{"heartbeat": {"comment": "{env.SSE_TEST_LINES}"}}`:                                "line break",
		`{"heartbeat": {"style": "event", "event": "{env.SSE_TEST_LINES}"}}`:                "line break",
		`{"heartbeat": {"style": "event", "event": "a", "data": "{env.SSE_TEST_LINES}"}}`:   "line break",
		`{"cache_control": "{env.SSE_TEST_LINES}"}`:                                         "line break",
		`{"name": "{env.SSE_TEST_LATIN1}"}`:                                                 "not valid UTF-8",
		`{"heartbeat": {"style": "event", "event": "{env.SSE_TEST_EMPTY}"}}`:                "is empty once its placeholders are replaced",
		`{"heartbeat": {"style": "event", "event": "{env.SSE_TEST_UNSET}", "data": "{x}"}}`: "is empty once its placeholders are replaced",
	} {
		if _, err := load(t, config); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %s", config, err, says)
		}
	}
}
