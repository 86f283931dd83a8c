package caddysse

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	"github.com/caddy-sse/caddy-sse/internal/demo"
)

func TestTheDemosConfigurationIsValid(t *testing.T) {
	address := caddy.NetworkAddress{Network: "tcp", Host: "127.0.0.1"}
	for _, admin := range []bool{true, false} {
		config := demoConfig(address, admin, "127.0.0.1:9")
		if err := caddy.Validate(config); err != nil {
			t.Errorf("admin %t: %v", admin, err)
		}
		// What Validate reads is not what Run reads: that goes through JSON.
		text, err := json.Marshal(demoConfig(address, admin, "127.0.0.1:9"))
		if err != nil {
			t.Fatal(err)
		}
		var again caddy.Config
		if err := caddy.StrictUnmarshalJSON(text, &again); err != nil {
			t.Fatal(err)
		}
		if again.Admin.Disabled == admin || *again.Admin.Config.Persist {
			t.Errorf("admin %t: %s", admin, text)
		}
	}
}

func TestTheDemoTakesAnotherPortOnlyIfNobodyChoseOne(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	listen := taken.Addr().String()

	address, err := demoAddress(listen, false)
	if err != nil || address.JoinHostPort(0) != "127.0.0.1:0" {
		t.Errorf("not chosen: %v, %v", address, err)
	}
	if _, err := demoAddress(listen, true); err == nil || !strings.Contains(err.Error(), listen) {
		t.Errorf("chosen: error %v does not name %s", err, listen)
	}
}

func TestTheDemoListensOnOneTCPPort(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "localhost:0", ":0", "tcp4/127.0.0.1:0"} {
		if _, err := demoAddress(listen, true); err != nil {
			t.Errorf("%s: %v", listen, err)
		}
	}
	for _, listen := range []string{"unix//tmp/demo.sock", "udp/127.0.0.1:0", "127.0.0.1:8000-8010", "127.0.0.1:port"} {
		if address, err := demoAddress(listen, true); err == nil {
			t.Errorf("%s: taken as %v", listen, address)
		}
	}
}

func TestTheDemoSaysWhatAPortAloneLacks(t *testing.T) {
	if _, err := demoAddress("22003", true); err == nil || !strings.Contains(err.Error(), "write :22003") {
		t.Errorf("got %v", err)
	}
}

// runningDemo starts a demo on a free port. It returns a client, the URL of
// the page and what ends the upstream.
func runningDemo(t *testing.T, upstream *demo.Upstream) (client *http.Client, url string, end context.CancelFunc) {
	t.Helper()
	address, err := demoAddress("127.0.0.1:0", true)
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	url, err = startDemo(ctx, address, false, upstream.Handler())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { caddy.Stop() })
	client = &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	return client, url, end
}

func openDemo(t *testing.T, client *http.Client, url string) *http.Response {
	t.Helper()
	response, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	return response
}

func TestTheDemoShowsTheSameUpstreamWithAndWithoutSSE(t *testing.T) {
	client, url, _ := runningDemo(t, &demo.Upstream{Burst: 5, Silence: time.Hour, Lifetime: time.Hour})
	for path, cacheControl := range map[string]string{
		"events":       "no-cache, no-store, no-transform",
		"plain/events": "",
	} {
		response := openDemo(t, client, url+path)
		if got := response.Header.Get("Cache-Control"); got != cacheControl {
			t.Errorf("%s: Cache-Control is %q, want %q", path, got, cacheControl)
		}
		body := bufio.NewReader(response.Body)
		for _, want := range []string{"id: 1\n", "data: {\"n\": 1,\n"} {
			if line, err := body.ReadString('\n'); err != nil || line != want {
				t.Errorf("%s: line %q, %v, want %q", path, line, err, want)
			}
		}
	}
}

func TestTheDemosStreamsEndWithTheirUpstream(t *testing.T) {
	client, url, end := runningDemo(t, demo.NewUpstream())
	paths := []string{"events", "plain/events"}
	ended := make(chan struct{}, len(paths))
	for _, path := range paths {
		response := openDemo(t, client, url+path)
		go func() {
			io.Copy(io.Discard, response.Body)
			ended <- struct{}{}
		}()
	}

	end()
	for range paths {
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Fatal("a stream is still open")
		}
	}
}
