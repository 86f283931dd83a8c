//go:build interop

// Package upstreams puts the module in front of the upstreams in examples/,
// which are written like the recipes that people copy.
package upstreams

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// atOnce limits the time from an upstream's clock reading, just before it sends
// an event, to the event's arrival. Events that are held back until the next
// one are at least one second late.
const atOnce = 750 * time.Millisecond

// slack is what a busy machine may need in addition to times that settings
// define.
const slack = 750 * time.Millisecond

// example is a running example of examples/, with Caddy and its Caddyfile in
// front.
type example struct {
	name   string
	addr   string // of the upstream
	direct string // its URL
	caddy  *harness.Caddy
	url    string // of Caddy
	client *http.Client
}

func TestMain(m *testing.M) { harness.Main(m) }

func TestFlask(t *testing.T) {
	t.Parallel()
	dir := harness.Root(t, "examples", "flask")
	gunicorn := filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin", "gunicorn")
	e := start(t, "flask", func(addr string) ([]string, harness.Setting) {
		// -B: create no __pycache__ in the checkout.
		return harness.Command(filepath.Join(filepath.Dir(gunicorn), "python"), "-B", gunicorn,
			"--bind", addr, "--threads", "100", "app:app"), harness.In(dir)
	})
	t.Run("headers come with the first event only", e.holdsHeadersBack)
	t.Run("through the proxy", e.passes)
}

func TestExpress(t *testing.T) {
	t.Parallel()
	node, dir := harness.Node(t, harness.Root(t, "examples", "express"))
	e := start(t, "express", func(addr string) ([]string, harness.Setting) {
		_, port, _ := strings.Cut(addr, ":")
		return harness.Command(node, "server.js"), harness.Settings(harness.In(dir), harness.Env("PORT="+port))
	})
	t.Run("its compression holds events back", e.compresses)
	t.Run("through the proxy", e.passes)
}

func TestSpringBoot(t *testing.T) {
	t.Parallel()
	java, jar := harness.Maven(t, harness.Root(t, "examples", "spring-boot"))
	e := start(t, "spring-boot", func(addr string) ([]string, harness.Setting) {
		_, port, _ := strings.Cut(addr, ":")
		return harness.Command(java, "-jar", jar, "--server.port="+port), harness.In(t.TempDir())
	})
	t.Run("headers come with the first event only", e.holdsHeadersBack)
	t.Run("through the proxy", e.passes)
}

// start runs an example with ports chosen for the test.
func start(t *testing.T, name string, command func(addr string) ([]string, harness.Setting)) *example {
	t.Helper()
	e := &example{name: name, addr: harness.FreeAddr(t), client: harness.Client(t, "h1")}
	e.direct = "http://" + e.addr
	words, setting := command(e.addr)
	began := time.Now()
	harness.Start(t, words, setting).AwaitHTTP(t, e.direct+"/clients")
	t.Logf("%s: ready after %v", name, round(time.Since(began)))

	site := "http://" + harness.FreeAddr(t)
	caddyfile := harness.ReadFile(t, harness.Root(t, "examples", name, "Caddyfile"))
	e.caddy = harness.StartCaddy(t, harness.Replace(t, caddyfile, ":8080", site, "127.0.0.1:8000", e.addr))
	e.url = site
	t.Cleanup(func() { e.caddy.CheckNoErrors(t) })
	return e
}

// holdsHeadersBack shows why the example's Caddyfile has early_start.
func (e *example) holdsHeadersBack(t *testing.T) {
	client := *e.client
	client.Timeout = 2 * time.Second
	response, err := client.Get(e.direct + "/broadcast")
	if err == nil {
		response.Body.Close()
		t.Error("without the proxy the headers came before the first event: early_start is not needed any more")
	}
	e.publishUntil(t, 0)
}

// compresses shows what a browser, which accepts gzip, gets without the proxy
// and with it.
func (e *example) compresses(t *testing.T) {
	gzip := harness.Header("Accept-Encoding", "gzip")
	direct := harness.Open(t, e.client, e.direct+"/events", gzip)
	proxied := harness.Open(t, e.client, e.url+"/events", gzip)
	for range 3 {
		e.checkAtOnce(t, proxied.Next(t, 3*time.Second))
	}
	if encoding := proxied.Response.Header.Get("Content-Encoding"); encoding != "" {
		t.Errorf("through the proxy: Content-Encoding %q", encoding)
	}
	if encoding := direct.Response.Header.Get("Content-Encoding"); encoding != "gzip" {
		t.Errorf("without the proxy: Content-Encoding %q: compression() does not compress streams any more", encoding)
	}
	// gzip's own header of ten bytes may arrive.
	if body := direct.Body(); len(body) > 10 {
		t.Errorf("without the proxy: %d bytes: compression() does not hold events back any more", len(body))
	}
	direct.Close()
	proxied.Close()
	e.caddy.AwaitClosed(t, "/events")
	e.awaitCount(t, "events", 0)
}

func (e *example) passes(t *testing.T) {
	t.Run("events", e.events)
	t.Run("notifications", e.notifications)
	t.Run("broadcast", e.broadcast)
}

// events checks that events arrive at once, one a second, that the upstream
// notices when a client leaves, and resumption.
func (e *example) events(t *testing.T) {
	t.Parallel()

	// First without the proxy, for comparison.
	direct := harness.Open(t, e.client, e.direct+"/events")
	direct.Next(t, 3*time.Second)
	left := time.Now()
	direct.Close()
	e.awaitCount(t, "events", 0)
	t.Logf("%s: without the proxy the upstream noticed after %v that its client had left", e.name, round(time.Since(left)))

	stream := harness.Open(t, e.client, e.url+"/events")
	checkHeaders(t, stream.Response)
	var latest time.Duration
	for n := 1; n <= 5; n++ {
		event := stream.Next(t, 3*time.Second)
		if event.Type != "message" || event.ID != strconv.Itoa(n) {
			t.Errorf("event %d: %+v", n, event)
		}
		latest = max(latest, e.checkAtOnce(t, event))
	}
	t.Logf("%s: /events: at most %v from the upstream's clock to the client", e.name, round(latest))
	e.awaitCount(t, "events", 1)
	if comments := stream.Comments(); len(comments) > 0 {
		t.Errorf("comments in a stream that is not silent: %v", comments)
	}

	left = time.Now()
	stream.Close()
	e.awaitCount(t, "events", 0)
	t.Logf("%s: /events: the upstream noticed after %v that the client had left", e.name, round(time.Since(left)))
	closed := e.caddy.AwaitClosed(t, "/events")
	if closed.Reason != "client_closed" || closed.Events < 5 || closed.LastEventID == "" {
		t.Errorf("closed: %+v", closed)
	}

	// The proxy ends the stream. The client reconnects and continues after its
	// last event, without a loss or a duplicate.
	stream = harness.Open(t, e.client, e.url+"/events", harness.Header("Last-Event-ID", "41"))
	if event := stream.Next(t, 3*time.Second); event.ID != "42" {
		t.Errorf("after Last-Event-ID 41: %+v", event)
	}
	stream.Next(t, 3*time.Second)
	for _, id := range e.caddy.OpenStreams(t, "/events") {
		if status, answer := e.caddy.Admin(t, http.MethodDelete, "/sse/streams/"+id, ""); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
	}
	if err := stream.AwaitEnd(t, 3*time.Second); err != nil {
		t.Errorf("not a clean end: %v", err)
	}
	if closed := e.caddy.AwaitClosed(t, "/events"); closed.Reason != "admin" || closed.IncompleteEvent {
		t.Errorf("closed: %+v", closed)
	}
	events := stream.Events()
	last := events[len(events)-1]
	stream = harness.Open(t, e.client, e.url+"/events", harness.Header("Last-Event-ID", last.ID))
	if event, want := stream.Next(t, 3*time.Second), plusOne(t, last.ID); event.ID != want {
		t.Errorf("after Last-Event-ID %s: %+v", last.ID, event)
	}
	stream.Close()
	e.awaitCount(t, "events", 0)
}

// notifications checks named events, and heartbeats in half a minute of
// silence, during which the upstream sleeps. It may notice only at its second
// write that its client has left: the first one succeeds and is answered with a
// reset.
func (e *example) notifications(t *testing.T) {
	t.Parallel()
	stream := harness.Open(t, e.client, e.url+"/notifications")
	checkHeaders(t, stream.Response)
	var latest time.Duration
	for _, kind := range []string{"info", "warning", "alert"} {
		event := stream.Next(t, 3*time.Second)
		if event.Type != kind || !strings.Contains(event.Data, "an unread "+kind) {
			t.Errorf("%s: %+v", kind, event)
		}
		latest = max(latest, e.checkAtOnce(t, event))
	}
	event := stream.Next(t, 40*time.Second)
	if event.Type != "reminder" {
		t.Errorf("%+v", event)
	}
	latest = max(latest, e.checkAtOnce(t, event))
	silence, beats := stream.LongestSilence(), stream.Comments()
	if silence > 15*time.Second+slack {
		t.Errorf("silent for %v", silence)
	}
	// The upstream is silent for 30 s; heartbeats are 11.25 s to 15 s apart.
	if len(beats) < 2 || len(beats) > 3 {
		t.Errorf("%d heartbeats", len(beats))
	}
	for _, beat := range beats {
		if beat.Text != "heartbeat" {
			t.Errorf("comment %q", beat.Text)
		}
	}
	t.Logf("%s: /notifications: at most %v to the client; %d heartbeats in 30 s, longest silence %v",
		e.name, round(latest), len(beats), round(silence))
	e.awaitCount(t, "notifications", 1)
	left := time.Now()
	stream.Close()
	if closed := e.caddy.AwaitClosed(t, "/notifications"); closed.Reason != "client_closed" || closed.Heartbeats != len(beats) {
		t.Errorf("closed: %+v", closed)
	}
	harness.Eventually(t, 75*time.Second, "the upstream has nobody at /notifications", func() bool {
		return e.count(t, "notifications") == 0
	})
	t.Logf("%s: /notifications: the upstream noticed after %v that the client had left", e.name, round(time.Since(left)))
}

// broadcast checks that one upstream message reaches all clients, and that an
// upstream that waits for messages, and so notices only by writing that a
// client has left, cleans up.
func (e *example) broadcast(t *testing.T) {
	t.Parallel()
	const clients = 3
	var streams []*harness.Stream
	for range clients {
		stream := harness.Open(t, e.client, e.url+"/broadcast")
		// early_start after 1 s if the upstream delays its headers
		if waited := stream.HeadersAt.Sub(stream.Asked); waited > time.Second+slack {
			t.Errorf("headers after %v", waited)
		}
		streams = append(streams, stream)
	}
	for _, stream := range streams {
		checkHeaders(t, stream.Response)
		// A first heartbeat comes before any event of the upstream.
		if beat := stream.NextComment(t, 3*time.Second); beat.At.Sub(stream.HeadersAt) > time.Second+slack {
			t.Errorf("the first heartbeat came %v after the headers", beat.At.Sub(stream.HeadersAt))
		}
	}
	e.awaitCount(t, "broadcast", clients)
	t.Logf("%s: /broadcast: headers after %v", e.name, round(streams[0].HeadersAt.Sub(streams[0].Asked)))

	e.publish(t, "hello")
	var latest time.Duration
	for _, stream := range streams {
		event := stream.Next(t, 3*time.Second)
		if event.Type != "broadcast" || !strings.Contains(event.Data, "hello") {
			t.Errorf("%+v", event)
		}
		latest = max(latest, e.checkAtOnce(t, event))
	}
	t.Logf("%s: /broadcast: at most %v from the upstream's clock to %d clients", e.name, round(latest), clients)

	left := time.Now()
	for _, stream := range streams[1:] {
		stream.Close()
	}
	for range streams[1:] {
		if closed := e.caddy.AwaitClosed(t, "/broadcast"); closed.Reason != "client_closed" || closed.Events != 1 {
			t.Errorf("closed: %+v", closed)
		}
	}
	messages := e.publishUntil(t, 1)
	t.Logf("%s: /broadcast: the upstream dropped %d clients that had left after %v and %d messages",
		e.name, clients-1, round(time.Since(left)), messages)
	for range messages {
		e.checkAtOnce(t, streams[0].Next(t, 3*time.Second))
	}
	streams[0].Close()
	e.publishUntil(t, 0)
}

// checkHeaders expects the headers that the recipes lack, and none that harms a
// stream.
func checkHeaders(t *testing.T, response *http.Response) {
	t.Helper()
	if response.StatusCode != http.StatusOK {
		t.Errorf("status %s", response.Status)
	}
	if mediaType, _, _ := strings.Cut(response.Header.Get("Content-Type"), ";"); mediaType != "text/event-stream" {
		t.Errorf("Content-Type %q", mediaType)
	}
	for name, want := range map[string]string{
		"Cache-Control":     "no-cache, no-store, no-transform",
		"X-Accel-Buffering": "no",
		"Incremental":       "?1",
		"Connection":        "",
		"Keep-Alive":        "",
		"Content-Length":    "",
		"Content-Encoding":  "",
		"ETag":              "",
	} {
		if got := strings.Join(response.Header.Values(name), " | "); got != want {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
}

// checkAtOnce returns how long an event was on its way.
func (e *example) checkAtOnce(t *testing.T, event harness.Event) time.Duration {
	t.Helper()
	var data struct{ Time float64 }
	if err := json.Unmarshal([]byte(event.Data), &data); err != nil {
		t.Fatalf("%v: %q", err, event.Data)
	}
	took := event.At.Sub(time.UnixMicro(int64(data.Time * 1e6)))
	if took > atOnce {
		t.Errorf("%s took %v from the upstream's clock to the client", event.Data, took)
	}
	return took
}

// awaitCount waits until the upstream itself counts this many clients.
func (e *example) awaitCount(t *testing.T, path string, want int) {
	t.Helper()
	harness.Eventually(t, 5*time.Second, fmt.Sprintf("the upstream has %d clients at /%s", want, path), func() bool {
		return e.count(t, path) == want
	})
}

func (e *example) count(t *testing.T, path string) int {
	t.Helper()
	var counts map[string]int
	if err := json.Unmarshal(get(t, e.client, e.direct+"/clients"), &counts); err != nil {
		t.Fatal(err)
	}
	return counts[path]
}

func (e *example) publish(t *testing.T, text string) {
	t.Helper()
	body := fmt.Sprintf(`{"text": %q}`, text)
	response, err := e.client.Post(e.url+"/publish", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if answer, _ := io.ReadAll(response.Body); response.StatusCode != http.StatusOK {
		t.Fatalf("%s %s", response.Status, answer)
	}
}

// publishUntil sends messages until the upstream counts this many clients at
// /broadcast, and returns how many messages that took. Some upstreams notice
// only at a write that a client has left, and the first write after that does
// not fail.
func (e *example) publishUntil(t *testing.T, want int) (messages int) {
	t.Helper()
	for next := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		count := e.count(t, "broadcast")
		if count == want {
			return messages
		}
		if messages == 20 {
			t.Fatalf("the upstream still has %d clients at /broadcast after %d messages", count, messages)
		}
		if time.Now().After(next) {
			e.publish(t, "is anybody there?")
			messages++
			next = time.Now().Add(500 * time.Millisecond)
		}
	}
}

func get(t *testing.T, client *http.Client, url string) []byte {
	t.Helper()
	response, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func plusOne(t *testing.T, id string) string {
	t.Helper()
	n, err := strconv.Atoi(id)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(n + 1)
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
