package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Caddy is a running Caddy process with this module.
type Caddy struct {
	*Process

	URL    string // "http://127.0.0.1:…" of StartSite, HTTP/1.1 and HTTP/2 without TLS
	TLSURL string // "https://localhost:…" of StartSite, HTTP/1.1 and HTTP/2
	RootCA string // path of a PEM file with the certificate of Caddy's internal CA; it exists once there is a TLS site

	// AdminAddress is the value for `caddy … --address`.
	AdminAddress string

	binary string
	dir    string
	taken  map[string]bool // streams that AwaitClosed has returned, by their ids
	takes  sync.Mutex
}

var (
	buildMutex sync.Mutex
	built      string // path of the binary, once built
)

// CaddyBinary returns the path of a Caddy with this module, either built from
// the checkout or named by CADDY_SSE_INTEROP_CADDY.
func CaddyBinary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("CADDY_SSE_INTEROP_CADDY"); path != "" {
		return path
	}
	buildMutex.Lock()
	defer buildMutex.Unlock()
	if built == "" {
		defer lock(t, "caddy")()
		root := Root(t)
		binary := filepath.Join(cache(t, "caddy", digest(root)), "caddy")
		// go build leaves a binary alone if it is up to date.
		if err := run(t, Command("go", "build", "-o", binary, "./cmd/caddy"), In(root), Env("GOWORK=off")); err != nil {
			t.Fatal(err)
		}
		built = binary
	}
	return built
}

// StartCaddy runs Caddy with a complete Caddyfile until the test ends. Any
// Caddyfile works: the admin API moves to a Unix socket, certificates and other
// state go to a temporary folder, and the logs become JSON, with this module's
// from DEBUG on.
func StartCaddy(t testing.TB, caddyfile string) *Caddy {
	t.Helper()
	dir := ShortTempDir(t)
	c := &Caddy{
		binary:       CaddyBinary(t),
		dir:          dir,
		taken:        make(map[string]bool),
		AdminAddress: "unix/" + filepath.Join(dir, "admin"),
		RootCA:       filepath.Join(dir, "data", "caddy", "pki", "authorities", "local", "root.crt"),
	}
	config := WriteFile(t, dir, "caddy.json", c.adapt(t, caddyfile))
	c.Process = Start(t, Command(c.binary, "run", "--config", config), c.environment(), In(dir))
	c.AwaitOutput(t, `"serving initial configuration"`)
	return c
}

// StartSite is StartCaddy with the directives of one site, which answers at URL
// and TLSURL. Global options may follow.
//
//	c := harness.StartSite(t, "sse\nreverse_proxy "+addr)
func StartSite(t testing.TB, site string, global ...string) *Caddy {
	t.Helper()
	plain, tls := FreeAddr(t), FreePort(t)
	c := StartCaddy(t, SiteCaddyfile(plain, tls, site, global...))
	c.URL, c.TLSURL = "http://"+plain, fmt.Sprintf("https://localhost:%d", tls)
	return c
}

// SiteCaddyfile returns the Caddyfile that StartSite uses, for Reload.
func SiteCaddyfile(plain string, tls int, site string, global ...string) string {
	return fmt.Sprintf(`{
	auto_https disable_redirects
	servers {
		protocols h1 h2 h2c
	}
	%s
}
http://%s {
	%s
}
https://localhost:%d, https://127.0.0.1:%[4]d {
	bind 127.0.0.1
	tls internal
	%[3]s
}
`, strings.Join(global, "\n"), plain, site, tls)
}

// Reload loads another Caddyfile, as `caddy reload` does.
func (c *Caddy) Reload(t testing.TB, caddyfile string) {
	t.Helper()
	status, answer := c.Admin(t, http.MethodPost, "/load", c.adapt(t, caddyfile))
	if status != http.StatusOK {
		t.Fatalf("reload: %d %s", status, answer)
	}
}

// Admin calls Caddy's admin API.
func (c *Caddy) Admin(t testing.TB, method, path, body string) (status int, answer string) {
	t.Helper()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", strings.TrimPrefix(c.AdminAddress, "unix/"))
		},
	}
	request, err := http.NewRequest(method, "http://127.0.0.1"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := (&http.Client{Transport: transport, Timeout: Patience}).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(content)
}

// OpenStreams returns the ids of the streams that Caddy lists. With a path, it
// returns only streams whose path begins with it.
func (c *Caddy) OpenStreams(t testing.TB, path ...string) []string {
	t.Helper()
	query := ""
	if len(path) > 0 {
		query = "?path=" + url.QueryEscape(path[0])
	}
	_, answer := c.Admin(t, http.MethodGet, "/sse/streams"+query, "")
	var list struct{ Streams []struct{ ID string } }
	if err := json.Unmarshal([]byte(answer), &list); err != nil {
		t.Fatalf("%v: %s", err, answer)
	}
	var ids []string
	for _, stream := range list.Streams {
		ids = append(ids, stream.ID)
	}
	return ids
}

// adapt converts a Caddyfile to JSON and adds what a test needs.
func (c *Caddy) adapt(t testing.TB, caddyfile string) string {
	t.Helper()
	path := WriteFile(t, c.dir, "Caddyfile", caddyfile)
	command := exec.Command(c.binary, "adapt", "--adapter", "caddyfile", "--config", path)
	c.environment()(command)
	var complaints bytes.Buffer
	command.Stderr = &complaints
	adapted, err := command.Output()
	if err != nil {
		t.Fatalf("caddy adapt: %v\n%s\n%s", err, complaints.String(), caddyfile)
	}
	var config map[string]any
	if err := json.Unmarshal(adapted, &config); err != nil {
		t.Fatal(err)
	}
	object(config, "admin")["listen"] = c.AdminAddress
	object(config, "admin", "config")["persist"] = false
	// Otherwise it would be added to the system's trust store.
	object(config, "apps", "pki", "certificate_authorities", "local")["install_trust"] = false
	logs := object(config, "logging", "logs")
	everything := object(logs, "default")
	everything["encoder"] = map[string]any{"format": "json"}
	exclude, _ := everything["exclude"].([]any)
	everything["exclude"] = append(exclude, "http.handlers.sse")
	logs["interop"] = map[string]any{
		"encoder": map[string]any{"format": "json"},
		"level":   "DEBUG",
		"include": []string{"http.handlers.sse"},
	}
	changed, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return string(changed)
}

// object returns the JSON object at a path in another one, and creates it if
// needed.
func object(in map[string]any, path ...string) map[string]any {
	for _, key := range path {
		next, ok := in[key].(map[string]any)
		if !ok {
			next = make(map[string]any)
			in[key] = next
		}
		in = next
	}
	return in
}

func (c *Caddy) environment() Setting {
	return Env(
		"XDG_DATA_HOME="+filepath.Join(c.dir, "data"),
		"XDG_CONFIG_HOME="+filepath.Join(c.dir, "config"),
	)
}

// Closed is a `stream closed` line of the log.
type Closed struct {
	Reason            string  `json:"reason"`
	Method            string  `json:"method"`
	Path              string  `json:"path"`
	Proto             string  `json:"proto"`
	Level             string  `json:"level"`
	Name              string  `json:"name"`
	ID                string  `json:"id"`
	UserAgent         string  `json:"user_agent"`
	Resumable         bool    `json:"resumable"`
	Status            int     `json:"status"`
	Duration          float64 `json:"duration"`    // seconds
	LongestGap        float64 `json:"longest_gap"` // seconds
	Events            int     `json:"events"`
	Bytes             int     `json:"bytes"`
	Heartbeats        int     `json:"heartbeats"`
	LastEventID       string  `json:"last_event_id"`
	IncompleteEvent   bool    `json:"incomplete_event"`
	Error             string  `json:"error"`
	HeartbeatDeferred int     `json:"heartbeats_deferred"`
	Run               string  `json:"run"`
	Resumed           bool    `json:"resumed"`
	Missed            int     `json:"missed"`
}

// Log returns the log lines so far whose message is msg, or all if msg is "".
func (c *Caddy) Log(msg string) []map[string]any {
	var lines []map[string]any
	c.eachLine(func(line []byte) {
		var fields map[string]any
		if json.Unmarshal(line, &fields) == nil && (msg == "" || fields["msg"] == msg) {
			lines = append(lines, fields)
		}
	})
	return lines
}

// ClosedStreams returns the streams that have ended so far.
func (c *Caddy) ClosedStreams() []Closed {
	var closed []Closed
	c.eachLine(func(line []byte) {
		var entry struct {
			Closed
			Message string `json:"msg"`
		}
		if json.Unmarshal(line, &entry) == nil && entry.Message == "stream closed" {
			closed = append(closed, entry.Closed)
		}
	})
	return closed
}

// eachLine skips the last line while it is incomplete.
func (c *Caddy) eachLine(do func(line []byte)) {
	for line := range strings.Lines(c.Output()) {
		if strings.HasSuffix(line, "\n") {
			do([]byte(line))
		}
	}
}

// AwaitClosed waits for the next stream to end; with a path, for the next one
// of that path. Each stream is returned once, in the order in which they ended.
func (c *Caddy) AwaitClosed(t testing.TB, path ...string) Closed {
	t.Helper()
	var next Closed
	Eventually(t, Patience, strings.Join(append([]string{"another stream ends"}, path...), " "), func() bool {
		c.takes.Lock()
		defer c.takes.Unlock()
		for _, closed := range c.ClosedStreams() {
			if !c.taken[closed.ID] && (len(path) == 0 || path[0] == closed.Path) {
				c.taken[closed.ID] = true
				next = closed
				return true
			}
		}
		return false
	})
	return next
}

// CheckNoErrors fails the test if this module has logged a warning or an error.
func (c *Caddy) CheckNoErrors(t testing.TB) {
	t.Helper()
	for _, line := range c.Log("") {
		level, logger := fmt.Sprint(line["level"]), fmt.Sprint(line["logger"])
		if (level == "warn" || level == "error") && strings.HasPrefix(logger, "http.handlers.sse") {
			t.Errorf("logged: %v", line)
		}
	}
}
