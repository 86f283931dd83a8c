//go:build interop

package intermediaries_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

func entrancesOf(caddy *harness.Caddy) []address {
	return []address{
		{name: "h1", protocol: "h1", url: caddy.URL},
		{name: "h1-tls", protocol: "h1", url: caddy.TLSURL, rootCA: caddy.RootCA},
		{name: "h2", protocol: "h2", url: caddy.TLSURL, rootCA: caddy.RootCA},
		{name: "h2c", protocol: "h2c", url: caddy.URL},
	}
}

// fronts are the Caddys in front of the tested one, and how they speak to it.
var fronts = []struct {
	name, before string
	upstream     func(inner *site) string
}{
	{"plain-http11", "encode", plainHTTP},
	{"plain-h2c", "encode", h2c},
	{"plain-tls", "encode", overTLS},
	{"sse-on-both-http11", "encode\nsse 1s", plainHTTP},
	{"sse-on-both-h2c", "encode\nsse 1s", h2c},
}

func plainHTTP(inner *site) string { return "reverse_proxy " + inner.plain() }

func h2c(inner *site) string { return "reverse_proxy h2c://" + inner.plain() }

func overTLS(inner *site) string {
	return "reverse_proxy " + inner.TLSURL + ` {
		header_up Host localhost
		transport http {
			tls_trust_pool file ` + inner.RootCA + `
		}
	}`
}

func TestCaddyInFrontPassesEventsAtOnce(t *testing.T) {
	t.Parallel()
	for _, front := range fronts {
		t.Run(front.name, func(t *testing.T) {
			t.Parallel()
			upstream := startOrigin(t)
			inner := startSite(t, "sse 1s {\n drain 1s\n}\nreverse_proxy "+upstream.addr)
			outer := startSite(t, front.before+"\n"+front.upstream(inner))
			entrances := entrancesOf(outer.Caddy)
			c := chain{name: front.name, caddy: inner, origin: upstream, leaves: 2 * time.Second}
			t.Run("passes", func(t *testing.T) { c.passes(t, entrances) })
			t.Run("drains", func(t *testing.T) { c.drains(t, entrances) })
			if front.before == "encode" {
				return
			}
			t.Run("says the same in both logs", func(t *testing.T) {
				for _, a := range entrances {
					for path, reason := range map[string]string{
						"/ticks/":         "upstream_closed",
						"/quiet/":         "client_closed",
						"/abort/":         "upstream_error",
						"/quiet/drained-": "upstream_closed", // the inner Caddy drained it, not this one
					} {
						path += front.name + "-" + a.name
						if closed := awaitClosed(t, outer.Caddy, path); closed.Reason != reason {
							t.Errorf("%s: %+v", path, closed)
						}
					}
				}
			})
		})
	}
}

// A client that accepts gzip gets it from a Caddy with encode, except for
// streams that have passed through the module.
func TestEncodeInFrontLeavesStreamsAlone(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	inner := startSite(t, "sse\nreverse_proxy "+upstream.addr)
	bare := startSite(t, "reverse_proxy "+upstream.addr)
	for _, to := range []struct {
		name     string
		inner    *site
		encoding string
	}{
		{"module", inner, ""},
		{"no module", bare, "gzip"},
	} {
		outer := startSite(t, "encode gzip\nreverse_proxy "+to.inner.plain())
		for _, a := range entrancesOf(outer.Caddy) {
			t.Run(to.name+"/"+a.name, func(t *testing.T) {
				t.Parallel()
				stream := a.open(t, "/bulk/encode", harness.Header("Accept-Encoding", "gzip, deflate, br, zstd"))
				if got := stream.Response.Header.Get("Content-Encoding"); got != to.encoding {
					t.Errorf("Content-Encoding: %q", got)
				}
				if err := stream.AwaitEnd(t, harness.Patience); err != nil {
					t.Error(err)
				}
				if to.encoding == "" && stream.Body() != bulk {
					t.Errorf("%d bytes of %d", len(stream.Body()), len(bulk))
				}
			})
		}
	}
}

// A reload of the Caddy in front ends its stream, and so also the stream of the
// Caddy after it.
func TestAReloadInFrontReachesTheUpstream(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	inner := startSite(t, "sse 1s\nreverse_proxy "+upstream.addr)
	outer := startSite(t, "sse 1s {\n drain 1s\n}\nreverse_proxy "+inner.plain())
	stream := harness.Open(t, harness.Client(t, "h1"), outer.URL+"/quiet/front")
	stream.Next(t, harness.Patience)
	outer.reload(t)
	if err := stream.AwaitEnd(t, 10*time.Second); err != nil {
		t.Error(err)
	}
	upstream.awaitLeft(t, "/quiet/front", 5*time.Second)
	if closed := awaitClosed(t, outer.Caddy, "/quiet/front"); closed.Reason != "drained" || closed.Status != http.StatusOK {
		t.Errorf("in front: %+v", closed)
	}
	if closed := awaitClosed(t, inner.Caddy, "/quiet/front"); closed.Reason != "client_closed" {
		t.Errorf("behind: %+v", closed)
	}
}
