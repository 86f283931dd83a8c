package caddysse_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// Caddy's FastCGI client ignores the request's context while it waits for the
// application, so streams must be ended without it.
func TestPHPStreams(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	next := make(map[string]chan string)
	for _, proto := range clientProtocols {
		next["/"+proto] = make(chan string)
	}
	go fcgi.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		for text := "data: 1\n\n"; text != ""; text = <-next[r.URL.Path] {
			io.WriteString(w, text)
			w.(http.Flusher).Flush()
		}
	}))
	defer ln.Close()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "index.php"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := startCaddyProcess(t, `
		root `+root+`
		sse 200ms {
			prelude off
			write_timeout 1m
		}
		php_fastcgi `+ln.Addr().String(), "")
	var all sync.WaitGroup
	for _, proto := range clientProtocols {
		all.Go(func() {
			path := "/" + proto
			defer close(next[path])
			body := c.client(proto).get(t, path, acceptStream).follow()
			has := func(text string) {
				if got, err := body.wait(func(unread string) bool { return strings.Contains(unread, text) }); err != nil {
					t.Errorf("%s: after %q: %v", proto, got, err)
				}
			}
			has("data: 1\n\n")
			has(":heartbeat\n\n")
			next[path] <- "data: 2\n\n"
			has("data: 2\n\n")

			c.adminJSON(t, "DELETE", "/sse/streams/"+c.listed(t, path)["id"].(string), 202)
			began := time.Now()
			ending := make(chan struct{})
			go func() {
				defer close(ending)
				got, err := body.rest()
				// Only HTTP/3 can't be reset from outside.
				if clean := err == io.EOF; err == errNothingMore || clean != (proto == "h3") {
					t.Errorf("%s: it ended with %v", proto, err)
				}
				if events := strings.ReplaceAll(got, ":heartbeat\n\n", ""); events != "data: 1\n\ndata: 2\n\n" {
					t.Errorf("%s: got %q", proto, got)
				}
			}()
			if proto != "h3" {
				<-ending
				if took := time.Since(began); took < 4*time.Second {
					t.Errorf("%s: it was broken off after %v", proto, took)
				}
			}
			next[path] <- "data: 3\n\n"
			<-ending
			expectEnd(t, c.closedLine(t, path), "admin", "info")
		})
	}
	all.Wait()
}

// requirePHP makes the tests with a real php-fpm fail if there is none, instead
// of being skipped.
const requirePHP = "CADDY_SSE_REQUIRE_PHP"

// phpFPM is a php-fpm for one test.
type phpFPM struct {
	program, dir string
	directive    string // in the Caddyfile
	stop         func()
}

// findPHP finds php-fpm; Debian's name for it contains the version. It does not
// start it yet: Caddy can stop only after php-fpm has ended its requests, so
// php-fpm must start after Caddy.
func findPHP(t testing.TB) *phpFPM {
	t.Helper()
	p := new(phpFPM)
	for _, pattern := range []string{"php-fpm", "/usr/sbin/php-fpm*", "/usr/local/sbin/php-fpm*", "/opt/homebrew/sbin/php-fpm"} {
		if path, err := exec.LookPath(pattern); err == nil {
			p.program = path
		} else if paths, _ := filepath.Glob(pattern); len(paths) > 0 {
			p.program = paths[0]
		}
		if p.program != "" {
			break
		}
	}
	if p.program == "" {
		if os.Getenv(requirePHP) != "" {
			t.Fatal("there is no php-fpm")
		}
		t.Skip("there is no php-fpm")
	}
	dir, err := os.MkdirTemp("", "php") // the path of a Unix socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p.dir = dir
	p.directive = "root " + dir + "\nphp_fastcgi unix/" + filepath.Join(dir, "socket")
	const headers = "<?php header('Content-Type: text/event-stream');\n"
	for name, text := range map[string]string{
		"stream.php": headers + "echo \"data: 1\\n\\n\"; flush(); sleep(120);",
		"silent.php": headers + "touch(__DIR__.'/silent'); sleep(120); echo \"data: 1\\n\\n\";",
		"config": "[global]\nerror_log = " + dir + "/log\ndaemonize = no\n[www]\nlisten = " + dir + "/socket\n" +
			"user = root\ngroup = root\npm = static\npm.max_children = 24\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// start runs php-fpm until the test ends or it is stopped.
func (p *phpFPM) start(t testing.TB) {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(p.program, "--nodaemonize", "--allow-to-run-as-root", "--no-php-ini", "--fpm-config", filepath.Join(p.dir, "config"))
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = patience
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // this also ends its children at once
		_ = cmd.Wait()
	})
	t.Cleanup(p.stop)
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(p.dir, "socket"))
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			p.stop()
			log, _ := os.ReadFile(filepath.Join(p.dir, "log"))
			t.Fatalf("php-fpm does not listen: %v\n%s%s", err, &output, log)
		}
	}
}

// A script that sleeps does not notice that its client has left, and nothing
// waits for it.
func TestAClientOfASilentScriptIsGoneWhenItLeaves(t *testing.T) {
	checkLeaks(t)
	php := findPHP(t)
	c := startCaddy(t, `
		sse 1h {
			prelude off
			max_streams_per_client 1
		}
		`+php.directive, withAdmin())
	php.start(t)
	comeBack := func(t *testing.T, cl *testClient, path string) *reply {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			res := cl.get(t, path, acceptStream)
			if res.StatusCode == 200 {
				return res
			}
			res.text()
			if res.StatusCode != 429 || time.Now().After(deadline) {
				t.Fatalf("who comes back gets %s", res.Status)
			}
		}
	}
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			cl := c.client(proto)
			for _, method := range []string{"GET", "POST"} {
				path := "/stream.php/" + proto + method
				began := time.Now()
				e := cl.begin(cl.request(t, method, path, nil, acceptStream))
				res := e.headers(t)
				if res.StatusCode != 200 {
					t.Fatal(res.Status)
				}
				res.follow().expect(t, "data: 1\n\n")
				opened := time.Now()
				c.listed(t, path)
				atLeast := time.Since(opened)
				e.leave()
				line := c.closedLine(t, path)
				expectEnd(t, line, "client_closed", "info")
				if took := seconds(line["duration"]); took < atLeast || took > time.Since(began) {
					t.Errorf("it is told to have taken %v, of %v", took, time.Since(began))
				}
				c.waitForStreams(t, 0)
				res = comeBack(t, cl, "/stream.php/again"+proto+method)
				res.leave()
				c.closedLine(t, "/stream.php/again"+proto+method)
			}

			// Before there are headers, the request only holds a place.
			silent := cl.begin(cl.request(t, "GET", "/silent.php/"+proto, nil, acceptStream))
			eventually(t, "the script runs", func() bool { return os.Remove(filepath.Join(php.dir, "silent")) == nil })
			expectRefusal(t, cl.begin(cl.request(t, "GET", "/stream.php", nil, acceptStream)), 429)
			silent.leave()
			res := comeBack(t, cl, "/stream.php/after"+proto)
			res.leave()
			c.closedLine(t, "/stream.php/after"+proto)
			c.waitForStreams(t, 0)
		})
	}
}

func TestAnExitDoesNotWaitForSilentScripts(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		method, drain, reason string
		protocols             []string
	}{
		{"POST", "drain 1m 500ms", "server_closed", []string{"h1", "h2"}},
		{"GET", "drain off", "server_closed", []string{"h1", "h2"}},
		{"GET", "drain 1m 500ms", "drained", []string{"h1", "h2"}},
		{"POST", "drain off", "server_closed", []string{"h3"}},
	} {
		t.Run(fmt.Sprint(test.method, " ", test.drain, " ", test.protocols), func(t *testing.T) {
			t.Parallel()
			php := findPHP(t)
			c := startCaddyProcess(t, "sse {\n"+test.drain+"\n}\n"+php.directive, "grace_period 1500ms")
			php.start(t)
			for _, proto := range test.protocols {
				cl := c.client(proto)
				cl.do(t, cl.request(t, test.method, "/stream.php", nil, acceptStream, "Cache-Control: no-cache")).follow().expect(t, "data: 1\n\n")
			}
			if test.protocols[0] == "h3" {
				// Caddy itself waits for handlers of HTTP/3, but the ends are
				// reported without that wait.
				if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the end is told", func() bool { return c.closedReasons()[test.reason] > 0 })
				php.stop()
				<-c.exited
			} else {
				c.stop("SIGTERM") // the scripts sleep for longer than this may take
			}
			if reasons := c.closedReasons(); reasons[test.reason] != len(test.protocols) || len(reasons) != 1 {
				t.Errorf("told: %v", reasons)
			}
		})
	}
}

// The same without a process: a handler that ignores its context.
func TestWhatIsLeftAtTheExitIsRecordedWithoutItsHandlers(t *testing.T) {
	config := silent()
	config.Name = "left at the exit"
	deaf := newHush()
	over := make(chan any)
	c := newClient(t)
	h := provision(t, config)
	go func() {
		panicked, err := serveRecovering(h, c, get(eventStream), deaf.serve)
		if err != nil {
			panicked = err
		}
		over <- panicked
	}()
	close(deaf.answer)
	<-deaf.called
	listed := func() bool {
		return bytes.Contains(callAdmin(t, "/sse/streams?name=left+at+the+exit").Body.Bytes(), []byte(`"total":1`))
	}
	eventually(t, "it is listed", listed)
	caddysse.EndHandler(h)
	if listed() {
		t.Error("it is still listed")
	}
	close(deaf.leave)
	if panicked := <-over; panicked != http.ErrAbortHandler {
		t.Errorf("its client gets %v, want an abort", panicked)
	}
}
