package caddysse_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// caddyVariable makes a test binary a Caddy that gets the arguments. The value
// leashed is for one that must end with the process that started it, however
// that ends.
const (
	caddyVariable = "CADDYSSE_TEST_CADDY"
	leashed       = "leashed"
)

// playCaddy runs the caddy command if this process was started for that.
func playCaddy() {
	how := os.Getenv(caddyVariable)
	if how == "" {
		return
	}
	if how == leashed {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
	}
	caddycmd.Main()
	os.Exit(0)
}

// caddyProcess is a Caddy in its own process, which can exit. Like testCaddy,
// it has one site with and without TLS.
type caddyProcess struct {
	*testCaddy
	cmd    *exec.Cmd
	stderr bytes.Buffer
	exited chan struct{}
	logs   string // the file
}

// startCaddyProcess runs `caddy run` with the directives of one site.
func startCaddyProcess(t testing.TB, site, global string) *caddyProcess {
	t.Helper()
	dir, err := os.MkdirTemp("", "caddy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &caddyProcess{testCaddy: &testCaddy{t: t, dir: dir}, exited: make(chan struct{}), logs: filepath.Join(dir, "log")}
	c.addr, c.tlsAddr = freeAddress(t), freeAddress(t)
	c.url, c.tlsURL = "http://"+c.addr, "https://"+c.tlsAddr
	c.h3Once.Do(func() { c.h3Addr = c.tlsAddr })
	certificate, err := testCertificate()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"cert.pem": certificate.cert, "key.pem": certificate.key, "Caddyfile": []byte(c.config(site, global)),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.cmd = c.command("run", "--config", filepath.Join(dir, "Caddyfile"))
	c.cmd.Stderr = &c.stderr
	c.cmd.Env = append(c.cmd.Env, caddyVariable+"="+leashed)
	if _, err := c.cmd.StdinPipe(); err != nil { // Wait closes it
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.exited)
		_ = c.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.exited
	})
	eventually(t, "Caddy answers", func() bool {
		res, err := http.Get(c.url + "/up")
		if err != nil {
			return false
		}
		res.Body.Close()
		http.DefaultClient.CloseIdleConnections()
		if site == "" {
			return true
		}
		conn, err := net.Dial("tcp", c.tlsAddr) // this port may open a little later
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return c
}

// The ports that freeAddress tries. It returns none twice, because two Caddys
// can share one without noticing (SO_REUSEPORT).
var (
	firstPort = rand.IntN(22_000)
	ports     atomic.Int64
)

// freeAddress returns an address on which nothing listens. Its port is below the
// ephemeral ports of common systems, so no connection can take it before the process
// does.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		addr := fmt.Sprint("127.0.0.1:", 10_000+(firstPort+int(ports.Add(1)))%22_000)
		if reservePort(t, addr) && !inUse(addr) {
			return addr
		}
	}
	t.Fatal("no port is free")
	return ""
}

// reservePort keeps an address for this test, and reports whether that succeeded:
// other processes of the tests look for addresses at the same time. The socket is in
// the abstract namespace of Linux, so that nothing is left of it (unix(7)).
func reservePort(t testing.TB, addr string) bool {
	if runtime.GOOS != "linux" {
		return true
	}
	reservation, err := net.Listen("unix", "@caddy-sse-test-"+addr)
	if err != nil {
		return false
	}
	t.Cleanup(func() { reservation.Close() })
	return true
}

// inUse reports whether something listens on an address. It does not try to listen
// there: a process that is being started shares all sockets of this one until it runs
// its program, so the address could stay taken for a moment.
func inUse(addr string) bool {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func (c *caddyProcess) command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), caddyVariable+"=1")
	if raceEnabled {
		cmd.Env = append(cmd.Env, "GORACE="+strings.TrimSpace(os.Getenv("GORACE")+" suppressions="+suppressions(c.t)))
	}
	return cmd
}

// suppressions returns the file that lists races in other projects' code.
func suppressions(t testing.TB) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", "race.suppressions"))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func (c *caddyProcess) config(site, global string) string {
	text := fmt.Sprintf(`{
	admin unix/%[1]s/admin
	persist_config off
	auto_https off
	skip_install_trust
	storage file_system %[1]s
	log default {
		output file %[2]s
		format json
		level INFO
	}
	%[3]s
}
`, c.dir, c.logs, global)
	if site == "" {
		return text // not an HTTP server at all
	}
	for _, addr := range []string{"http://" + c.addr, "https://" + c.tlsAddr} {
		_, port, _ := net.SplitHostPort(addr[strings.LastIndex(addr, "/")+1:])
		scheme, _, _ := strings.Cut(addr, ":")
		tls := ""
		if scheme == "https" {
			tls = fmt.Sprintf("tls %[1]s/cert.pem %[1]s/key.pem", c.dir)
		}
		text += fmt.Sprintf("%s://:%s {\n\tbind 127.0.0.1\n\t%s\n\trespond /up 204\n\t%s\n}\n", scheme, port, tls, site)
	}
	return text
}

// reload replaces the configuration through the admin API.
func (c *caddyProcess) reload(site, global string) {
	c.t.Helper()
	res := askAdmin(c.t, c.adminSocket(), "POST", "/load", c.config(site, global))
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); res.StatusCode != 200 {
		c.t.Fatalf("reloading: %s %s", res.Status, body)
	}
	// Until the listeners of the replaced configuration are closed, a new
	// connection may still reach them. Plain Caddy loses such a connection, or,
	// with HTTP/2, never tells it to go away and waits for it at exit.
	for _, addr := range []string{c.addr, c.tlsAddr} {
		eventually(c.t, "one socket listens on "+addr, func() bool { return listeners(addr) <= 1 })
	}
}

// listeners returns how many sockets listen on an address of 127.0.0.1, if the
// platform tells.
func listeners(addr string) (n int) {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0
	}
	_, port, _ := net.SplitHostPort(addr)
	number, _ := strconv.Atoi(port)
	for line := range strings.Lines(string(table)) {
		// The local address, and the state LISTEN.
		if fields := strings.Fields(line); len(fields) > 3 && fields[1] == fmt.Sprintf("0100007F:%04X", number) && fields[3] == "0A" {
			n++
		}
	}
	return n
}

// stop asks Caddy to exit and returns how long that took.
func (c *caddyProcess) stop(how string) time.Duration {
	c.t.Helper()
	began := time.Now()
	if how == "caddy stop" {
		go func() { _ = c.command("stop", "--address", "unix/"+c.adminSocket()).Run() }()
	} else if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	select {
	case <-c.exited:
	case <-time.After(patience):
		_ = c.cmd.Process.Signal(syscall.SIGABRT) // its output then shows where it waits
		<-c.exited
		c.t.Fatalf("%s: Caddy still ran after %v\nclosed: %v\n%s", how, patience, c.closedReasons(), c.stderr.String())
	}
	if code := c.cmd.ProcessState.ExitCode(); code != 0 {
		c.t.Errorf("%s: exit status %d\n%s", how, code, c.stderr.String()) // 66: the output is the race detector's
	}
	return time.Since(began)
}

// closedLines returns the `stream closed` lines so far.
func (c *caddyProcess) closedLines() (closed []logEntry) {
	c.t.Helper()
	text, err := os.ReadFile(c.logs)
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		var entry logEntry
		if json.Unmarshal(line, &entry) == nil && entry.message() == "stream closed" {
			closed = append(closed, entry)
		}
	}
	return closed
}

// closedLine waits for the `stream closed` line of the stream at path.
func (c *caddyProcess) closedLine(t testing.TB, path string) (line logEntry) {
	t.Helper()
	eventually(t, path+" is told", func() bool {
		for _, line = range c.closedLines() {
			if line["path"] == path {
				return true
			}
		}
		return false
	})
	return line
}

// closedReasons counts the ends in the log by reason.
func (c *caddyProcess) closedReasons() map[string]int {
	c.t.Helper()
	reasons := make(map[string]int)
	for _, line := range c.closedLines() {
		reasons[fmt.Sprint(line["reason"])]++
	}
	return reasons
}

// followMany opens streams over every protocol, a hundred on each connection,
// and waits for the first event of each.
func (c *caddyProcess) followMany(n int) []*follower {
	c.t.Helper()
	bodies := make([]*follower, n)
	clients := make(map[string]*testClient)
	var opening sync.WaitGroup
	slots := make(chan struct{}, 50)
	for i := range n {
		proto := clientProtocols[i%3]
		key := fmt.Sprint(proto, i/240)
		if clients[key] == nil {
			clients[key] = c.client(proto)
			// Many simultaneous first requests would open many connections. A
			// connection that is still in its handshake when a reload begins is
			// never told to go away, even by plain Caddy, which then waits for
			// it at exit.
			clients[key].get(c.t, "/up").text()
		}
		cl := clients[key]
		req := cl.request(c.t, "GET", fmt.Sprint("/", i), nil, acceptStream)
		slots <- struct{}{}
		opening.Go(func() {
			defer func() { <-slots }()
			res, err := cl.begin(req).outcome()
			if err != nil {
				c.t.Error(err)
				return
			}
			bodies[i] = res.follow()
			if text, err := bodies[i].wait(func(unread string) bool { return unread == "data: 1\n\n" }); text != "data: 1\n\n" {
				c.t.Errorf("got %q, %v", text, err)
			}
		})
	}
	opening.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
	return bodies
}

// eventThenSilence sends one event and then nothing.
func eventThenSilence(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", eventStream)
	io.WriteString(w, "data: 1\n\n")
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// exitingStreams is how many streams are open when Caddy exits. 5000 have been
// tried by hand.
func exitingStreams(t testing.TB) int {
	if n, err := strconv.Atoi(os.Getenv("CADDYSSE_TEST_EXIT_STREAMS")); err == nil {
		return n
	}
	return 500
}

// With one stream open, plain Caddy never exits: by default its grace period
// has no limit.
func TestCaddyExitsWithinTheExitWindowWithManyStreamsOpen(t *testing.T) {
	t.Parallel()
	up := newUpstreamFunc(t, eventThenSilence)
	for _, how := range []string{"SIGTERM", "caddy stop"} {
		t.Run(how, func(t *testing.T) {
			const window = time.Second
			c := startCaddyProcess(t, drainSite(up.addr, "drain 1m 1s"), "")
			streams := exitingStreams(t)
			bodies := c.followMany(streams)
			ends := make([]time.Duration, streams)
			began := time.Now()
			var waiting sync.WaitGroup
			for i, body := range bodies {
				waiting.Go(func() {
					at, err := endOf(t, body)
					if err != io.EOF {
						t.Errorf("a stream ended with %v", err)
					}
					ends[i] = at.Sub(began)
				})
			}
			took := c.stop(how) // shorter than a reload's window of one minute
			waiting.Wait()
			if reasons := c.closedReasons(); reasons["drained"] != streams || len(reasons) != 1 {
				t.Errorf("told: %v", reasons)
			}
			// There are two servers with a window each, whose start is random
			// within the first slot. A busy machine may make an end late, never
			// early.
			slices.Sort(ends)
			for i, end := range ends {
				if slot := window * time.Duration(i-2) / time.Duration(streams); end < slot {
					t.Errorf("the %dth stream of %d ended at %v, its turn was at %v", i, streams, end, slot)
				}
			}
			t.Logf("%d streams: %v", streams, took)
		})
	}
}

func TestCaddyExitsInTheMiddleOfAReloadsWindow(t *testing.T) {
	t.Parallel()
	up := newUpstreamFunc(t, eventThenSilence)
	for name, current := range map[string]struct{ site, global string }{
		"with sse":                     {drainSite(up.addr, "drain 1m 500ms\nname other"), ""},
		"without sse":                  {"respond hello", ""},
		"without any servers":          {"", ""},
		"with sse, without admin":      {drainSite(up.addr, "drain 1m 500ms\nname other"), "admin off"},
		"without sse and admin":        {"respond hello", "admin off"},
		"without any servers or admin": {"", "admin off"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startCaddyProcess(t, drainSite(up.addr, "drain 1m 1s"), "")
			first := c.followMany(30)
			c.reload(drainSite(up.addr, "drain 2m 1s\nname second"), "")
			second := c.followMany(30)
			c.reload(current.site, current.global)
			took := c.stop("SIGTERM") // shorter than a reload's window of one minute
			for _, body := range append(first, second...) {
				if _, err := body.rest(); err != io.EOF {
					t.Errorf("a stream ended with %v", err)
				}
			}
			if reasons := c.closedReasons(); reasons["drained"] != 60 || len(reasons) != 1 {
				t.Errorf("told: %v", reasons)
			}
			t.Log(took)
		})
	}
}

func TestAtExitRequestScopedStreamsHaveCaddysGracePeriod(t *testing.T) {
	t.Parallel()
	const grace = 2 * time.Second
	for _, test := range []struct {
		how      string
		reloaded bool
		ends     bool // before the end of the grace period
	}{
		{"SIGTERM", false, true},
		{"caddy stop", true, true},
		{"SIGTERM", true, false},
		{"caddy stop", false, false},
	} {
		t.Run(fmt.Sprintf("%s, reloaded %v, ends %v", test.how, test.reloaded, test.ends), func(t *testing.T) {
			t.Parallel()
			end := make(chan struct{})
			up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", eventStream)
				io.WriteString(w, "data: 1\n\n")
				w.(http.Flusher).Flush()
				select {
				case <-end:
					io.WriteString(w, "data: end\n\n")
				case <-r.Context().Done():
				}
			})
			global := "grace_period " + grace.String()
			if test.ends {
				global = "grace_period 10m"
			}
			c := startCaddyProcess(t, drainSite(up.addr, "drain 1m 500ms"), global)
			var bodies []*follower
			for _, proto := range clientProtocols {
				cl := c.client(proto)
				body := cl.do(t, cl.request(t, "POST", "/", nil, acceptStream)).follow()
				body.expect(t, "data: 1\n\n")
				bodies = append(bodies, body)
			}
			began := time.Now()
			if test.reloaded { // from here, the grace period counts for the streams that are open
				c.reload(drainSite(up.addr, "drain 1m 500ms\nname other"), global)
			}
			reason := "server_closed"
			if test.ends {
				reason = "upstream_closed"
				time.AfterFunc(200*time.Millisecond, func() { close(end) })
			}
			c.stop(test.how)
			if took := time.Since(began); took < grace && !test.ends {
				t.Errorf("it took %v", took)
			}
			for _, body := range bodies {
				if test.ends {
					body.expect(t, "data: end\n\n")
					body.expectEnd(t)
				} else {
					body.expectAbort(t)
				}
			}
			if reasons := c.closedReasons(); reasons[reason] != len(bodies) || len(reasons) != 1 {
				t.Errorf("told: %v", reasons)
			}
		})
	}
}
