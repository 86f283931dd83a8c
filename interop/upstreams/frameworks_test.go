//go:build interop

package upstreams

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// These tests check what docs/upstreams.md says about a framework or server,
// with the program itself.

// gunicorn runs the Flask example under gunicorn with these arguments.
func gunicorn(t *testing.T, arguments ...string) (process *harness.Process, addr string) {
	t.Helper()
	dir := harness.Root(t, "examples", "flask")
	bin := filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin")
	addr = harness.FreeAddr(t)
	command := harness.Command(filepath.Join(bin, "python"), "-B", filepath.Join(bin, "gunicorn"), "--bind", addr)
	process = harness.Start(t, append(append(command, arguments...), "app:app"), harness.In(dir))
	process.AwaitHTTP(t, "http://"+addr+"/clients")
	return process, addr
}

// pageIn requests a page that is not a stream, and waits this long for it.
func pageIn(t *testing.T, within time.Duration, url string) error {
	t.Helper()
	client := *harness.Client(t, "h1")
	client.Timeout = within
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", response.Status)
	}
	return nil
}

func TestPagesLoadWhileStreamsTakeGunicornsWorkers(t *testing.T) {
	t.Parallel()
	_, addr := gunicorn(t, "--workers", "2")
	client := harness.Client(t, "h1")

	// Two streams occupy both workers.
	caddy := harness.StartSite(t, "sse\nreverse_proxy "+addr)
	both := []*harness.Stream{harness.Open(t, client, caddy.URL+"/events"), harness.Open(t, client, caddy.URL+"/events")}
	for _, stream := range both {
		stream.Next(t, harness.Patience)
	}
	if err := pageIn(t, 3*time.Second, caddy.URL+"/clients"); err == nil {
		t.Error("without a limit a page was answered: two streams don't take two sync workers any more")
	}
	for _, stream := range both {
		stream.Close()
	}

	caddy = harness.StartSite(t, `
	sse {
		max_streams 1
		reconnect_on 503
		retry 2s 5s
	}
	reverse_proxy `+addr)
	// The workers of clients that have left become free at their next write.
	harness.Eventually(t, harness.Patience, "a page is answered again", func() bool {
		return pageIn(t, 3*time.Second, caddy.URL+"/clients") == nil
	})
	first := harness.Open(t, client, caddy.URL+"/events")
	first.Next(t, harness.Patience)

	second := harness.Open(t, client, caddy.URL+"/events")
	if err := second.AwaitEnd(t, harness.Patience); err != nil || second.Response.StatusCode != http.StatusOK {
		t.Errorf("the second: %s, %v", second.Response.Status, err)
	}
	if body := second.Body(); !strings.HasPrefix(body, "retry: ") || len(second.Events()) > 0 {
		t.Errorf("the second: %q", body)
	}
	if err := pageIn(t, harness.Patience, caddy.URL+"/clients"); err != nil {
		t.Errorf("a page while a stream takes a worker: %v", err)
	}
	first.Next(t, harness.Patience)

	first.Close()
	caddy.AwaitClosed(t, "/events")
	second = harness.Open(t, client, caddy.URL+"/events")
	second.Next(t, harness.Patience)
}

func TestGunicornEndsStreamsOfSyncWorkersAfterItsTimeout(t *testing.T) {
	t.Parallel()
	// Without --preload, a worker that starts slowly would be killed too.
	process, addr := gunicorn(t, "--workers", "2", "--timeout", "3", "--preload")
	caddy := harness.StartSite(t, "sse\nreverse_proxy "+addr)
	client := harness.Client(t, "h1")
	stream := harness.Open(t, client, caddy.URL+"/events")
	if err := stream.AwaitEnd(t, harness.Patience); err == nil {
		t.Error("a clean end")
	}
	if closed := caddy.AwaitClosed(t, "/events"); closed.Reason != "upstream_error" || closed.Events < 2 {
		t.Errorf("%+v", closed)
	}
	process.AwaitOutput(t, "WORKER TIMEOUT")

	_, addr = gunicorn(t, "--threads", "10", "--timeout", "3", "--preload")
	stream = harness.Open(t, client, "http://"+addr+"/events")
	for range 8 { // one a second
		stream.Next(t, harness.Patience)
	}
}

func TestGunicornBreaksStreamsOffAfterItsGracefulTimeout(t *testing.T) {
	t.Parallel()
	for _, workers := range []string{"--workers", "--threads"} {
		process, addr := gunicorn(t, workers, "2", "--graceful-timeout", "2")
		caddy := harness.StartSite(t, "sse\nreverse_proxy "+addr)
		stream := harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/events")
		stream.Next(t, harness.Patience)
		process.Signal(syscall.SIGTERM)
		if closed := caddy.AwaitClosed(t, "/events"); closed.Reason != "upstream_error" || closed.Events < 2 {
			t.Errorf("%s: %+v", workers, closed)
		}
	}
}

func TestGunicornsDefaults(t *testing.T) {
	t.Parallel()
	dir := harness.Root(t, "examples", "flask")
	bin := filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin")
	command := harness.Command(filepath.Join(bin, "python"), "-B", filepath.Join(bin, "gunicorn"), "--print-config", "app:app")
	output := harness.Run(t, command, harness.In(dir))
	for _, want := range []string{"timeout = 30", "graceful_timeout = 30", "worker_class = sync"} {
		found := false
		for line := range strings.Lines(output) {
			found = found || strings.Join(strings.Fields(line), " ") == want
		}
		if !found {
			t.Errorf("not %s", want)
		}
	}
}

// streamsPython returns the Python that runs streams.py, and the folder of
// streams.py.
func streamsPython(t *testing.T) (python, dir string) {
	dir = harness.Root(t, "interop", "upstreams", "python")
	return filepath.Join(harness.Python(t, filepath.Join(dir, "requirements.txt")), "bin", "python"), dir
}

// uvicorn runs the streams of Django and Starlette.
func uvicorn(t *testing.T, arguments ...string) (process *harness.Process, addr string) {
	t.Helper()
	python, dir := streamsPython(t)
	addr = harness.FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	command := harness.Command(python, "-B", "-m", "uvicorn", "--host", "127.0.0.1", "--port", port)
	process = harness.Start(t, append(append(command, arguments...), "streams:app"), harness.In(dir))
	process.AwaitHTTP(t, "http://"+addr+"/events")
	return process, addr
}

// heldFor returns how long the first event of a stream was delayed. It reads
// the stream to its end.
func heldFor(t *testing.T, url string, options ...harness.RequestOption) (time.Duration, *harness.Stream) {
	t.Helper()
	stream := harness.Open(t, harness.Client(t, "h1"), url, options...)
	if err := stream.AwaitEnd(t, harness.Patience); err != nil {
		t.Errorf("%s: %v", url, err)
	}
	if stream.Response.Header.Get("Content-Encoding") == "gzip" {
		var body bytes.Buffer
		for _, chunk := range stream.Chunks() {
			body.WriteString(chunk.Data)
			if reader, err := gzip.NewReader(bytes.NewReader(body.Bytes())); err == nil {
				if n, _ := reader.Read(make([]byte, 1)); n > 0 {
					return chunk.At.Sub(stream.HeadersAt), stream
				}
			}
		}
		t.Fatalf("%s: nothing in %q", url, stream.Body())
	}
	events := stream.Events()
	if len(events) != 5 {
		t.Fatalf("%s: %d events", url, len(events))
	}
	var data struct{ Time float64 }
	if err := json.Unmarshal([]byte(events[0].Data), &data); err != nil {
		t.Fatalf("%v: %q", err, events[0].Data)
	}
	return events[0].At.Sub(time.UnixMicro(int64(data.Time * 1e6))), stream
}

// atEnd is for an event that has waited for the four after it, which takes two
// seconds.
const atEnd = 1500 * time.Millisecond

func TestWhatHoldsStreamsBackInPython(t *testing.T) {
	t.Parallel()
	process, asgi := uvicorn(t)
	python, dir := streamsPython(t)
	wsgi := harness.FreeAddr(t)
	_, port, _ := strings.Cut(wsgi, ":")
	harness.Start(t, harness.Command(python, "-B", "streams.py", port), harness.In(dir)).AwaitPort(t, wsgi)

	caddy := harness.StartSite(t, `
	handle_path /wsgi/* {
		sse
		reverse_proxy `+wsgi+`
	}
	handle {
		sse
		reverse_proxy `+asgi+`
	}`)
	acceptGzip := harness.Header("Accept-Encoding", "gzip")
	for _, test := range []struct {
		what, url string
		atEnd     bool
		encoding  string
	}{
		{"Django, ASGI, a plain generator", caddy.URL + "/django/plain", true, ""},
		{"Django, ASGI, an async generator", caddy.URL + "/django/async", false, ""},
		{"Django, WSGI, a plain generator", caddy.URL + "/wsgi/django/plain", false, ""},
		{"Django's GZipMiddleware, WSGI, without the proxy", "http://" + wsgi + "/django/plain-gzip", true, "gzip"},
		{"Django's GZipMiddleware, WSGI", caddy.URL + "/wsgi/django/plain-gzip", false, ""},
		{"Django's GZipMiddleware, ASGI, without the proxy", "http://" + asgi + "/django/async-gzip", false, "gzip"},
		{"Django's GZipMiddleware, ASGI", caddy.URL + "/django/async-gzip", false, ""},
		{"Starlette's GZipMiddleware, without the proxy", "http://" + asgi + "/events", false, ""},
	} {
		t.Run(test.what, func(t *testing.T) {
			t.Parallel()
			held, stream := heldFor(t, test.url, acceptGzip)
			if (held > atEnd) != test.atEnd {
				t.Errorf("the first event took %v; want it to wait for the end: %v", held, test.atEnd)
			}
			if encoding := stream.Response.Header.Get("Content-Encoding"); encoding != test.encoding {
				t.Errorf("Content-Encoding %q, want %q", encoding, test.encoding)
			}
		})
	}
	t.Run("the headers leave at once", func(t *testing.T) {
		t.Parallel()
		harness.Open(t, harness.Client(t, "h1"), "http://"+asgi+"/silent").Close()
	})
	t.Cleanup(func() {
		const warning = "StreamingHttpResponse must consume synchronous iterators"
		if !strings.Contains(process.Output(), warning) {
			t.Errorf("Django did not warn: %s", warning)
		}
	})
}

func TestUvicornWaitsForStreamsWhenItExits(t *testing.T) {
	t.Parallel()
	waits, addr := uvicorn(t)
	leaves, leavesAddr := uvicorn(t, "--timeout-graceful-shutdown", "1")
	client := harness.Client(t, "h1")
	stream := harness.Open(t, client, "http://"+addr+"/endless")
	other := harness.Open(t, client, "http://"+leavesAddr+"/endless")
	stream.Next(t, harness.Patience)
	other.Next(t, harness.Patience)
	waits.Signal(syscall.SIGTERM)
	leaves.Signal(syscall.SIGTERM)
	other.AwaitEnd(t, harness.Patience)
	harness.Eventually(t, harness.Patience, "uvicorn with a limit has ended", func() bool { return !leaves.Running() })
	for range 6 { // half a second apart
		stream.Next(t, harness.Patience)
	}
	if !waits.Running() {
		t.Error("uvicorn without a limit has ended")
	}
}

const phpHeader = "<?php header('Content-Type: text/event-stream');\n"

// phpEvents sends five events, half a second apart.
const phpEvents = `for ($n = 1; $n <= 5; $n++) {
	echo "id: $n\ndata: " . json_encode(['n' => $n, 'time' => microtime(true)]) . "\n\n";
	flush();
	usleep(500000);
}`

const phpEndless = `for (;;) {
	echo "data: 1\n\n";
	flush();
	usleep(100000);
}`

func TestWhatHoldsStreamsBackInPHP(t *testing.T) {
	t.Parallel()
	dir := harness.ShortTempDir(t)
	const unbuffered = "while (ob_get_level()) { ob_end_flush(); }\n"
	for name, script := range map[string]string{
		"page.php":     `<?php echo 'page';`,
		"flush.php":    phpHeader + phpEvents,
		"ended.php":    phpHeader + unbuffered + phpEvents,
		"endless.php":  phpHeader + unbuffered + phpEndless,
		"locked.php":   phpHeader + "session_id('locked'); session_start();\n" + unbuffered + phpEvents,
		"unlocked.php": phpHeader + "session_id('unlocked'); session_start(); session_write_close();\n" + unbuffered + phpEndless,
		"session.php":  "<?php session_id($_GET['id']); session_start(); echo 'page';",
		"finished.php": phpHeader + "echo \"data: 1\\n\\n\"; fastcgi_finish_request(); sleep(1); touch(__DIR__ . '/went-on');",
	} {
		harness.WriteFile(t, dir, name, script)
	}
	caddy := harness.StartSite(t, "root "+dir+"\nsse\nphp_fastcgi unix/"+dir+"/socket")
	// Debian's name for it contains the version.
	fpm := harness.Program(t, "php-fpm8.2", "php8.2-fpm")
	config := harness.WriteFile(t, dir, "fpm.conf", fmt.Sprintf(`[global]
error_log = %[1]s/log
daemonize = no
[www]
listen = %[1]s/socket
user = root
group = root
pm = static
pm.max_children = 12
request_terminate_timeout = 8s
php_value[output_buffering] = 4096
php_value[session.save_path] = %[1]s
`, dir))
	process := harness.Start(t, harness.Command(fpm, "--nodaemonize", "--allow-to-run-as-root", "--no-php-ini", "--fpm-config", config))
	process.AwaitHTTP(t, caddy.URL+"/page.php")

	for _, test := range []struct {
		what, script string
		atEnd        bool
	}{
		{"output_buffering and flush()", "flush.php", true},
		{"output_buffering ended", "ended.php", false},
	} {
		t.Run(test.what, func(t *testing.T) {
			t.Parallel()
			if held, _ := heldFor(t, caddy.URL+"/"+test.script); (held > atEnd) != test.atEnd {
				t.Errorf("the first event took %v; want it to wait for the end: %v", held, test.atEnd)
			}
		})
	}
	t.Run("request_terminate_timeout", func(t *testing.T) {
		t.Parallel()
		stream := harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/endless.php")
		if err := stream.AwaitEnd(t, harness.Patience); err == nil {
			t.Error("a clean end")
		}
		if closed := caddy.AwaitClosed(t, "/endless.php"); closed.Reason != "upstream_error" {
			t.Errorf("%+v", closed)
		}
		harness.Eventually(t, harness.Patience, "FPM logs it", func() bool {
			return strings.Contains(harness.ReadFile(t, filepath.Join(dir, "log")), "execution timed out")
		})
	})
	t.Run("an open session is locked", func(t *testing.T) {
		t.Parallel()
		stream := harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/locked.php")
		stream.Next(t, harness.Patience)
		if err := pageIn(t, harness.Patience, caddy.URL+"/session.php?id=locked"); err != nil {
			t.Error(err)
		}
		if n := len(stream.Events()); n != 5 {
			t.Errorf("a page of the session came after %d of 5 events: the session is not locked any more", n)
		}

		stream = harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/unlocked.php")
		stream.Next(t, harness.Patience)
		if err := pageIn(t, harness.Patience, caddy.URL+"/session.php?id=unlocked"); err != nil {
			t.Error(err)
		}
		if stream.Ended() {
			t.Error("a page of the session came after the stream that had closed its session")
		}
	})
	t.Run("fastcgi_finish_request() ends the stream", func(t *testing.T) {
		t.Parallel()
		stream := harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/finished.php")
		if err := stream.AwaitEnd(t, harness.Patience); err != nil || len(stream.Events()) != 1 {
			t.Errorf("%q, %v", stream.Body(), err)
		}
		harness.Eventually(t, harness.Patience, "the script has gone on", func() bool {
			found, _ := filepath.Glob(filepath.Join(dir, "went-on"))
			return len(found) == 1
		})
	})
}

// Rack::ETag of Rack 2.2, which Rails includes, first reads a stream to its
// end.
func TestRailsHoldsStreamsBackForTheirETag(t *testing.T) {
	t.Parallel()
	ruby := harness.Program(t, "ruby", "ruby", "ruby-railties", "puma")
	rack := harness.Run(t, harness.Command(ruby, "-e", `require "rack"; print Rack.release`))
	holds := strings.HasPrefix(rack, "2.2.")
	addr := harness.FreeAddr(t)
	puma := harness.Program(t, "puma", "puma", "ruby-railties")
	dir := harness.Root(t, "interop", "upstreams", "rails")
	harness.Start(t, harness.Command(puma, "--bind", "tcp://"+addr, "config.ru"), harness.In(dir)).AwaitHTTP(t, "http://"+addr)
	caddy := harness.StartSite(t, "sse\nreverse_proxy "+addr)
	for query, want := range map[string]bool{"": holds, "?last_modified=1": false} {
		t.Run("/events"+query, func(t *testing.T) {
			t.Parallel()
			if held, _ := heldFor(t, caddy.URL+"/events"+query); (held > atEnd) != want {
				t.Errorf("Rack %s: the first event took %v; want it to wait for the end: %v", rack, held, want)
			}
		})
	}
}

// The time is Tomcat's default for asynchronous requests.
func TestSpringEndsAnEmitterWithoutATimeoutAfter30Seconds(t *testing.T) {
	t.Parallel()
	example := harness.Root(t, "examples", "spring-boot")
	project := t.TempDir()
	if err := os.CopyFS(project, os.DirFS(example)); err != nil {
		t.Fatal(err)
	}
	const controller = "src/main/java/events/EventsController.java"
	harness.WriteFile(t, project, controller, harness.Replace(t, harness.ReadFile(t, filepath.Join(example, controller)),
		"new SseEmitter(Long.MAX_VALUE)", "new SseEmitter()"))
	java, jar := harness.Maven(t, project)
	addr := harness.FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	process := harness.Start(t, harness.Command(java, "-jar", jar, "--server.port="+port), harness.In(t.TempDir()))
	process.AwaitHTTP(t, "http://"+addr+"/clients")

	caddy := harness.StartSite(t, "sse\nreverse_proxy "+addr)
	stream := harness.Open(t, harness.Client(t, "h1"), caddy.URL+"/events")
	if err := stream.AwaitEnd(t, harness.Patience); err != nil {
		t.Errorf("not a clean end: %v", err)
	}
	closed := caddy.AwaitClosed(t, "/events")
	// One event a second, the first at once.
	if closed.Reason != "upstream_closed" || closed.Events < 25 || closed.Events > 32 {
		t.Errorf("%+v", closed)
	}
	process.AwaitOutput(t, "AsyncRequestTimeoutException")
}
