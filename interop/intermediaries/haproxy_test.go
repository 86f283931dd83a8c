//go:build interop

package intermediaries_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// startHAProxy runs HAProxy with timeouts of 2 s in front of a Caddy. server
// selects the protocol between them: "" is HTTP/1.1, "proto h2" is HTTP/2
// without TLS.
func startHAProxy(t *testing.T, caddy, server string, options ...string) []address {
	t.Helper()
	haproxy := harness.Program(t, "haproxy", "haproxy")
	certificate, _, both := harness.Certificate(t)
	dir := harness.ShortTempDir(t)
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	conf := harness.WriteFile(t, dir, "haproxy.cfg", fmt.Sprintf(`
global
	log stdout format raw daemon warning
	maxconn 500
	nbthread 1
defaults
	mode http
	log global
	timeout connect 2s
	timeout client 2s
	timeout server 2s
	%s
frontend all
	bind %s
	bind 127.0.0.1:%d ssl crt %s alpn h2,http/1.1
	default_backend caddy
backend caddy
	server caddy %s %s
`, strings.Join(options, "\n\t"), plain, tls, both, strings.TrimPrefix(caddy, "http://"), server))
	p := harness.Start(t, harness.Command(haproxy, "-db", "-f", conf), harness.In(dir))
	p.AwaitPort(t, plain)
	secure := fmt.Sprintf("https://localhost:%d", tls)
	return []address{
		{name: "h1", protocol: "h1", url: "http://" + plain},
		{name: "h1-tls", protocol: "h1", url: secure, rootCA: certificate},
		{name: "h2", protocol: "h2", url: secure, rootCA: certificate},
		{name: "h2c", protocol: "h2c", url: "http://" + plain},
	}
}

// servers are the protocols that HAProxy can use to Caddy.
var servers = []struct{ name, setting string }{
	{"haproxy-http11", ""},
	{"haproxy-http2", "proto h2"},
}

// HAProxy 2.6 ends an HTTP/2 response with END_STREAM even if the response that
// it passes on was aborted.
func TestHAProxyInFrontPassesEventsAtOnce(t *testing.T) {
	t.Parallel()
	for _, server := range servers {
		t.Run(server.name, func(t *testing.T) {
			t.Parallel()
			upstream := startOrigin(t)
			caddy := startSite(t, "sse 1s {\n drain 1s\n}\nreverse_proxy "+upstream.addr)
			entrances := startHAProxy(t, caddy.URL, server.setting, "option abortonclose", "option http-no-delay")
			c := chain{name: server.name, caddy: caddy, origin: upstream, hidesAborts: "HTTP/2.0", leaves: 2 * time.Second}
			t.Run("passes", func(t *testing.T) { c.passes(t, entrances) })
			t.Run("drains", func(t *testing.T) { c.drains(t, entrances) })
		})
	}
}

func TestHeartbeatsOutliveHAProxysTimeouts(t *testing.T) {
	t.Parallel()
	for _, server := range servers {
		t.Run(server.name, func(t *testing.T) {
			t.Parallel()
			upstream := startOrigin(t)
			beating := startSite(t, "sse 1s\nreverse_proxy "+upstream.addr)
			silent := startSite(t, "sse {\n heartbeat off\n}\nreverse_proxy "+upstream.addr)
			without := startSite(t, "reverse_proxy "+upstream.addr)
			for _, a := range startHAProxy(t, beating.URL, server.setting) {
				t.Run("heartbeats/"+a.name, func(t *testing.T) { t.Parallel(); outlives(t, a, "/quiet/beating-"+a.name) })
			}
			for _, a := range startHAProxy(t, silent.URL, server.setting) {
				t.Run("heartbeats off/"+a.name, func(t *testing.T) { t.Parallel(); isCut(t, a, "/quiet/silent-"+a.name) })
			}
			for _, a := range startHAProxy(t, without.URL, server.setting) {
				t.Run("no module/"+a.name, func(t *testing.T) { t.Parallel(); isCut(t, a, "/quiet/without-"+a.name) })
			}
		})
	}
}

// Without `option abortonclose`, HAProxy does not react to a client that leaves
// over HTTP/1.1. Only the next heartbeat shows that the client has left.
func TestHeartbeatsFindClientsThatHAProxyDoesNotMiss(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	caddy := startSite(t, "sse 1s\nreverse_proxy "+upstream.addr)
	c := chain{caddy: caddy, origin: upstream, leaves: 5 * time.Second}
	for _, a := range startHAProxy(t, caddy.URL, "") {
		t.Run(a.name, func(t *testing.T) { t.Parallel(); c.heartbeatsAndLeaving(t, a, "/quiet/missed-"+a.name) })
	}
}

// Without `option http-no-delay`, HAProxy makes the kernel wait for more data
// when it can't tell whether more follows. In a slow stream that takes 200 ms.
func TestHAProxyWithoutNoDelayKeepsAnEventForAMomentOnly(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	caddy := startSite(t, "sse 1s\nreverse_proxy "+upstream.addr)
	for _, server := range servers {
		for _, a := range startHAProxy(t, caddy.URL, server.setting) {
			t.Run(server.name+"/"+a.name, func(t *testing.T) {
				t.Parallel()
				if worst := worstLateness(t, a.open(t, "/ticks/kept")); worst > atOnce {
					t.Errorf("an event came %v late", worst)
				}
			})
		}
	}
}
