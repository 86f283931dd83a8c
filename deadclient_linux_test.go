package caddysse_test

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/peer/peertest"
)

// deadTimeout is the dead_client_timeout of these tests.
const deadTimeout = time.Second

// from makes a client connect from a host.
func (cl *testClient) from(host *peertest.Host) *testClient {
	cl.Transport.(*http.Transport).DialContext = host.Dial
	return cl
}

func TestAClientThatVanishesEndsAsDeadClient(t *testing.T) {
	if apart(t) {
		return
	}
	for _, test := range []struct {
		name    string
		options []siteOption
	}{
		{"plain listeners", nil},
		{"wrapped listeners", []siteOption{
			withGlobal("servers :58080 {\nprotocols h1\n}"),
			withGlobal("servers :58443 {\nlistener_wrappers {\nhttp_redirect\ntls\n}\n}"),
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			checkLeaks(t)
			stopped := peertest.WatchStops(t)
			host := peertest.NewHost(t)
			up := newUpstream(t)
			c := startCaddy(t, `
				sse {
					heartbeat 500ms
					dead_client_timeout `+deadTimeout.String()+`
					drain off
				}
				reverse_proxy `+up.addr, test.options...)

			type open struct {
				call *upstreamCall
				path string
			}
			var vanishing []open
			for path, client := range map[string]*testClient{
				"/plain": c.client("h1").from(host),
				"/tls":   c.client("h2").overTLS().from(host),
				"/h2":    c.client("h2").from(host),
			} {
				exchange := client.begin(client.request(t, "GET", path, nil))
				call := up.accept(t)
				call.start(eventStream)
				body := exchange.headers(t).follow()
				call.send("data: 1\n\n")
				body.expect(t, "data: 1\n\n")
				vanishing = append(vanishing, open{call, path})
			}
			staying := c.client("h2")
			exchange := staying.begin(staying.request(t, "GET", "/staying", nil))
			call := up.accept(t)
			call.start(eventStream)
			stays := exchange.headers(t)

			host.Vanish()
			vanished := time.Now()
			for _, open := range vanishing {
				open.call.expectGone()
			}
			// The kernel alone would take a quarter of an hour.
			if took := time.Since(vanished); took < deadTimeout-500*time.Millisecond {
				t.Errorf("they ended after %v", took)
			}
			for i := range vanishing {
				entry := c.waitForLog("stream closed", i)
				if entry["reason"] != "dead_client" || entry.level() != "info" {
					peertest.SkipIfStopped(t, stopped, deadTimeout/8)
					t.Errorf("%s of %s at %s, want dead_client at info", entry["reason"], entry["path"], entry.level())
				}
			}
			stays.leave()
			call.expectGone()
			entry := c.waitForLog("stream closed", len(vanishing))
			if entry["path"] != "/staying" || entry["reason"] != "client_closed" {
				t.Errorf("%s of %s, want client_closed of /staying", entry["reason"], entry["path"])
			}
		})
	}
}

func TestAClientThatTakesNothingIsNoDeadClient(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			heartbeat off
			write_timeout off
			dead_client_timeout `+deadTimeout.String()+`
			drain off
		}
		reverse_proxy `+up.addr)
	for _, vanishes := range []bool{false, true} {
		for _, proto := range []string{"h1", "TLS"} {
			name := proto
			if vanishes {
				name += ", whose host vanishes"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				stopped := peertest.WatchStops(t)
				host := peertest.NewHost(t)
				client := c.client("h1").from(host)
				if proto == "TLS" {
					client = c.client("h2").overTLS().from(host)
				}
				path := fmt.Sprint("/", proto, vanishes)
				exchange, call := open(t, client, up, path)
				call.start(eventStream)
				stalls := exchange.headers(t)
				defer stalls.leave()
				call.floodUntilStuck()
				if vanishes {
					host.Vanish()
				}
				call.expectGone()
				line := c.closedLine(t, path)
				if line["reason"] == "client_closed" {
					peertest.SkipIfStopped(t, stopped, deadTimeout/8)
				}
				expectEnd(t, line, "write_timeout", "info")
			})
		}
	}
}
