//go:build interop

package intermediaries_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// startNginx runs nginx with a server that passes everything on to Caddy, with
// additional settings. It does not configure buffering, which is on by default.
func startNginx(t *testing.T, name, caddy, settings string) []address {
	t.Helper()
	nginx := harness.Program(t, "nginx", "nginx-light")
	certificate, key, _ := harness.Certificate(t)
	dir := harness.ShortTempDir(t)
	h1, h2c, tls := harness.FreeAddr(t), harness.FreeAddr(t), harness.FreePort(t)
	conf := harness.WriteFile(t, dir, "nginx.conf", fmt.Sprintf(`
daemon off;
worker_processes 1;
pid %[1]s/pid;
error_log stderr warn;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen %[2]s;
		listen %[3]s http2;
		listen 127.0.0.1:%[4]d ssl http2;
		ssl_certificate %[5]s;
		ssl_certificate_key %[6]s;
		location / {
			proxy_pass %[7]s;
			%[8]s
		}
	}
}
`, dir, h1, h2c, tls, certificate, key, caddy, settings))
	p := harness.Start(t, harness.Command(nginx, "-p", dir, "-e", "stderr", "-c", conf), harness.In(dir))
	p.AwaitPort(t, h1)
	secure := fmt.Sprintf("https://localhost:%d", tls)
	return []address{
		{name: "h1", protocol: "h1", url: "http://" + h1},
		{name: "h1-tls", protocol: "h1", url: secure, rootCA: certificate},
		{name: "h2", protocol: "h2", url: secure, rootCA: certificate},
		{name: "h2c", protocol: "h2c", url: "http://" + h2c},
	}
}

func TestNginxInFrontPassesEventsAtOnce(t *testing.T) {
	t.Parallel()
	for _, version := range []struct {
		name, settings, hidesAborts string
	}{
		// By default nginx sends HTTP/1.0 requests. Over HTTP/1.0, a response
		// without a length ends with the connection, complete or not.
		{"nginx-http10", "", "all"},
		{"nginx-http11", "proxy_http_version 1.1;\nproxy_set_header Connection \"\";", ""},
	} {
		t.Run(version.name, func(t *testing.T) {
			t.Parallel()
			upstream := startOrigin(t)
			caddy := startSite(t, "sse 1s {\n drain 1s\n}\nreverse_proxy "+upstream.addr)
			entrances := startNginx(t, version.name, caddy.URL, version.settings)
			c := chain{name: version.name, caddy: caddy, origin: upstream, hidesAborts: version.hidesAborts, leaves: 2 * time.Second, holdsHeaders: "h2"}
			t.Run("passes", func(t *testing.T) { c.passes(t, entrances) })
			t.Run("drains", func(t *testing.T) { c.drains(t, entrances) })
		})
	}
}

// Without the module, the same chain delays the events, so the test above shows
// what the module does. Over HTTP/1.0, its default for upstreams, nginx can't
// tell where a piece of the body ends and waits for a full buffer. Over
// HTTP/1.1 it passes chunks on, but keeps them in its TLS buffer.
func TestNginxHoldsEventsBackWithoutTheModule(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	caddy := startSite(t, "reverse_proxy "+upstream.addr)
	for _, version := range []struct{ name, settings, held string }{
		{"http10", "", "h1 h1-tls h2 h2c"},
		{"http11", "proxy_http_version 1.1;", "h1-tls"},
	} {
		for _, a := range startNginx(t, version.name, caddy.URL, version.settings) {
			t.Run(version.name+"/"+a.name, func(t *testing.T) {
				t.Parallel()
				stream := a.open(t, "/ticks/without")
				worst := worstLateness(t, stream)
				// The first event comes with the last one.
				if all := (ticks - 1) * tickTime; slices.Contains(strings.Fields(version.held), a.name) && worst < all-tickTime {
					t.Errorf("the first event came only %v late, and the stream took %v", worst, all)
				}
			})
		}
	}
}

// Over HTTP/2 with TLS, nginx also delays the headers, whatever its buffering,
// until something follows them; an EventSource stays CONNECTING. The first
// heartbeat, one second after the headers, makes nginx send them.
func TestNginxHoldsHeadersBackUntilABodyFollows(t *testing.T) {
	t.Parallel()
	upstream := startOrigin(t)
	for _, to := range []struct {
		name, site string
		open       bool
	}{
		{"prelude", "sse\nreverse_proxy " + upstream.addr, true},
		{"no prelude", "sse {\n prelude off\n}\nreverse_proxy " + upstream.addr, false},
		{"no module", "header X-Accel-Buffering no\nreverse_proxy " + upstream.addr, false},
	} {
		caddy := startSite(t, to.site)
		for _, a := range startNginx(t, "headers", caddy.URL, "proxy_http_version 1.1;") {
			if a.protocol != "h2" {
				continue
			}
			t.Run(to.name, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
				defer cancel()
				request, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+"/silent/headers", nil)
				if err != nil {
					t.Fatal(err)
				}
				request.Header.Set("Accept", "text/event-stream")
				start := time.Now()
				response, err := a.client(t).Do(request)
				t.Logf("%v: %v", time.Since(start).Round(time.Millisecond), err)
				if err == nil {
					response.Body.Close()
				}
				if (err == nil) != to.open {
					t.Error("headers:", err == nil)
				}
			})
		}
	}
}

// nginx gives up if it has received nothing for proxy_read_timeout, 60 s by
// default.
func TestHeartbeatsOutliveNginxsReadTimeout(t *testing.T) {
	t.Parallel()
	const settings = "proxy_http_version 1.1;\nproxy_read_timeout 2s;"
	upstream := startOrigin(t)
	beating := startSite(t, "sse 1s\nreverse_proxy "+upstream.addr)
	without := startSite(t, "reverse_proxy "+upstream.addr)
	t.Run("heartbeats", func(t *testing.T) {
		for _, a := range startNginx(t, "beating", beating.URL, settings) {
			t.Run(a.name, func(t *testing.T) { t.Parallel(); outlives(t, a, "/quiet/beating-"+a.name) })
		}
	})
	t.Run("none", func(t *testing.T) {
		for _, a := range startNginx(t, "none", without.URL, settings) {
			t.Run(a.name, func(t *testing.T) { t.Parallel(); isCut(t, a, "/quiet/none-"+a.name) })
		}
	})
}

// outlives checks that a quiet stream is still open long after timeouts of 2 s.
func outlives(t *testing.T, a address, path string) {
	t.Helper()
	stream := a.open(t, path)
	stream.Next(t, harness.Patience)
	for time.Since(stream.HeadersAt) < 11*time.Second {
		stream.NextComment(t, 2*time.Second)
	}
	if stream.Ended() {
		t.Errorf("ended after %v", time.Since(stream.HeadersAt))
	}
	t.Logf("%d heartbeats in %v, the longest silence %v",
		len(stream.Comments()), time.Since(stream.HeadersAt).Round(time.Millisecond), stream.LongestSilence().Round(time.Millisecond))
}

// isCut checks that a quiet stream without heartbeats is cut off.
func isCut(t *testing.T, a address, path string) {
	t.Helper()
	stream := a.open(t, path)
	stream.Next(t, harness.Patience)
	err := stream.AwaitEnd(t, 8*time.Second)
	lived := time.Since(stream.Asked)
	if lived < 1500*time.Millisecond {
		t.Errorf("ended after %v, which is not the timeout's doing", lived)
	}
	t.Logf("ended after %v: %v", lived.Round(time.Millisecond), err)
}
