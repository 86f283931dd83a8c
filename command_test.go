package caddysse

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	"github.com/caddy-sse/caddy-sse/internal/demo"
)

func TestTheDemosConfigurationIsValid(t *testing.T) {
	config := func() *caddy.Config {
		return demoConfig("localhost:2019", "127.0.0.1:9", "127.0.0.1:10", "127.0.0.1:11")
	}
	if err := caddy.Validate(config()); err != nil {
		t.Error(err)
	}
	// Validate does not go through JSON, but Run does.
	text, err := json.Marshal(config())
	if err != nil {
		t.Fatal(err)
	}
	var again caddy.Config
	if err := caddy.StrictUnmarshalJSON(text, &again); err != nil {
		t.Fatal(err)
	}
	if again.Admin.Listen != "localhost:2019" || *again.Admin.Config.Persist {
		t.Errorf("%s", text)
	}
}

func TestTheDemoTakesAnotherPortOnlyIfNobodyChoseOne(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	listen := taken.Addr().String()

	other, err := demoListen(listen, false)
	if err != nil || !strings.HasPrefix(other.Addr().String(), "127.0.0.1:") {
		t.Fatalf("not chosen: %v, %v", other, err)
	}
	other.Close()
	if _, err := demoListen(listen, true); err == nil || !strings.Contains(err.Error(), listen) {
		t.Errorf("chosen: error %v does not name %s", err, listen)
	}
}

func TestTheDemosAdminAPIMovesWhereItsAddressIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	usual := taken.Addr().String()
	if admin, err := demoAdmin(usual); err != nil || admin == usual || !strings.HasPrefix(admin, "127.0.0.1:") {
		t.Errorf("taken: %s, %v", admin, err)
	}
	taken.Close()
	if admin, err := demoAdmin(usual); err != nil || admin != usual {
		t.Errorf("free: %s, %v", admin, err)
	}
}

func TestTheDemoListensOnOneTCPPort(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "localhost:0", ":0", "tcp4/127.0.0.1:0"} {
		listener, err := demoListen(listen, true)
		if err != nil {
			t.Errorf("%s: %v", listen, err)
			continue
		}
		listener.Close()
	}
	for _, listen := range []string{"unix//tmp/demo.sock", "udp/127.0.0.1:0", "127.0.0.1:8000-8010", "127.0.0.1:port"} {
		if listener, err := demoListen(listen, true); err == nil {
			t.Errorf("%s: taken as %v", listen, listener.Addr())
		}
	}
}

func TestTheDemoSaysWhatAPortAloneLacks(t *testing.T) {
	if _, err := demoListen("22003", true); err == nil || !strings.Contains(err.Error(), "write :22003") {
		t.Errorf("got %v", err)
	}
}

func TestTheDemoSaysWhatToTry(t *testing.T) {
	text := demoText(demoURL(&net.TCPAddr{IP: net.IPv6unspecified, Port: 8080}), "localhost:2019")
	for _, want := range []string{
		"http://localhost:8080/ ", "curl -N http://localhost:8080/events", "curl http://localhost:8080/metrics",
		"caddy sse list --address localhost:2019", "caddy sse close --address localhost:2019 --all",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}

// runningDemo starts a demo. It returns a client, the URL of the page, the
// address of the admin API, and a function that ends everything except Caddy.
func runningDemo(t *testing.T, parts demo.Parts) (client *http.Client, url, admin string, end context.CancelFunc) {
	t.Helper()
	listener, err := demoListen("127.0.0.1:0", true)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "demo") // the path of a Unix socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	admin = "unix/" + dir + "/admin"
	ctx, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	if err := startDemo(ctx, listener, admin, parts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		caddy.Stop()
		// caddy.Stop does not stop the admin API.
		if err := caddy.Load([]byte(`{"admin": {"disabled": true, "config": {"persist": false}}}`), true); err != nil {
			t.Error(err)
		}
		caddy.Stop()
	})
	client = &http.Client{Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	return client, demoURL(listener.Addr()), admin, end
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
	parts := demo.NewParts()
	parts.Upstream = &demo.Upstream{Burst: 5, Step: time.Hour, Silence: time.Hour, Lifetime: time.Hour}
	client, url, admin, _ := runningDemo(t, parts)
	for path, cacheControl := range map[string]string{
		"events":       "no-cache, no-store, no-transform",
		"plain/events": "",
	} {
		response := openDemo(t, client, url+path)
		if got := response.Header.Get("Cache-Control"); got != cacheControl {
			t.Errorf("%s: Cache-Control is %q, want %q", path, got, cacheControl)
		}
		lines := bufio.NewReader(response.Body)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if line == "data: {\"n\": 1,\n" {
				break
			}
		}
	}

	list, err := findAdmin(adminFlags(t, "--address", admin))
	if err != nil {
		t.Fatal(err)
	}
	if answer, err := list.call(http.MethodGet, streamsPath); err != nil || !strings.Contains(string(answer), `"total":1`) {
		t.Errorf("the list is %s, %v", answer, err)
	}
	metrics, err := io.ReadAll(openDemo(t, client, url+"metrics").Body)
	if want := `caddy_sse_streams{name="demo",proto="HTTP/1.1"} 1`; err != nil || !strings.Contains(string(metrics), want) {
		t.Errorf("%s is not among the metrics (%d bytes, %v)", want, len(metrics), err)
	}
	page, err := io.ReadAll(openDemo(t, client, url).Body)
	if err != nil || !strings.Contains(string(page), "Restart the upstream") {
		t.Errorf("the page is %q, %v", page, err)
	}
}

func TestTheDemosRestartIsFinalOnlyWithoutSSE(t *testing.T) {
	parts := demo.NewParts()
	parts.Upstream = &demo.Upstream{Burst: 5, Step: time.Hour, Silence: time.Hour, Lifetime: time.Hour, Away: time.Hour}
	client, url, _, _ := runningDemo(t, parts)
	restarted, err := client.Post(url+"restart", "", nil)
	if err != nil || restarted.StatusCode != http.StatusAccepted {
		t.Fatalf("%v, %v", restarted, err)
	}
	restarted.Body.Close()
	for path, want := range map[string]int{"events": 200, "plain/events": 502} {
		request, err := http.NewRequest("GET", url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header = http.Header{"Accept": {"text/event-stream"}, "Cache-Control": {"no-cache"}}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if response.StatusCode != want || err != nil || strings.HasPrefix(string(body), "retry: ") != (want == 200) {
			t.Errorf("%s: %s %q, %v", path, response.Status, body, err)
		}
	}
}

func TestTheDemosPlugCostsEventsOnlyWithoutResume(t *testing.T) {
	parts := demo.NewParts()
	parts.Numbers.Step, parts.Plug.Out = 10*time.Millisecond, 200*time.Millisecond
	client, url, _, _ := runningDemo(t, parts)
	follow := func(path, lastEventID string) *demoNumbers {
		request, err := http.NewRequest("GET", url+path+"?client="+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header = http.Header{"Accept": {"text/event-stream"}, "Cache-Control": {"no-cache"}}
		if lastEventID != "" {
			request.Header.Set("Last-Event-ID", lastEventID)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { response.Body.Close() })
		return &demoNumbers{lines: bufio.NewReader(response.Body)}
	}
	paths := []string{"plug/plain", "plug/resume"}
	before := make(map[string]*demoNumbers)
	for _, path := range paths {
		before[path] = follow(path, "")
		if !before[path].next() {
			t.Fatalf("%s: no number", path)
		}
	}
	pulled, err := client.Post(url+"pull", "", nil)
	if err != nil || pulled.StatusCode != http.StatusAccepted {
		t.Fatalf("%v, %v", pulled, err)
	}
	pulled.Body.Close()
	for _, path := range paths {
		for before[path].next() {
		}
		if before[path].err == io.EOF {
			t.Errorf("%s: it ended cleanly", path)
		}
		after := follow(path, before[path].id)
		after.next()
		missing := after.n - before[path].n - 1
		if resumed := path == "plug/resume"; (missing == 0) != resumed || (after.asked == 1) != resumed {
			t.Errorf("%s: %d numbers are missing, and the upstream was asked %d times", path, missing, after.asked)
		}
	}
}

// demoNumbers reads what the demo's second upstream counts.
type demoNumbers struct {
	lines    *bufio.Reader
	n, asked int
	id       string
	err      error
}

// next reads up to the next number. It returns false at the end.
func (d *demoNumbers) next() bool {
	var data, id string
	for {
		line, err := d.lines.ReadString('\n')
		if err != nil {
			d.err = err
			return false
		}
		switch field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); {
		case field == "data":
			data = value
		case field == "id":
			id = value
		case line == "\n" && data != "":
			d.id = id
			_, d.err = fmt.Sscanf(data, `{"n": %d, "asked": %d}`, &d.n, &d.asked)
			return d.err == nil
		}
	}
}

func TestTheDemosStreamsEndWithIt(t *testing.T) {
	client, url, _, end := runningDemo(t, demo.NewParts())
	paths := []string{"events", "plain/events", "plug/plain", "plug/resume"}
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
