//go:build interop

package intermediaries_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// startProbe runs a Caddy with a probe.
func startProbe(t *testing.T) *harness.Caddy {
	t.Helper()
	return harness.StartSite(t, "sse_probe {\n\ttoken sesame\n\tmax_probes 64\n}")
}

// diagnosis is the part of a check's report that the tests use.
type diagnosis struct {
	Result   string
	Error    string
	Untold   []string
	Findings []struct {
		Code     string
		Evidence map[string]any
	}

	status int
	text   string
}

func (d diagnosis) codes() string {
	var codes []string
	for _, finding := range d.Findings {
		codes = append(codes, finding.Code)
	}
	slices.Sort(codes)
	return strings.Join(codes, " ")
}

// ran reports whether the machine let the doctor run all the time. Otherwise it says
// so, and has to be asked again.
func (d diagnosis) ran() bool {
	return !slices.ContainsFunc(d.Untold, func(what string) bool {
		return strings.Contains(what, "did not run all the time")
	})
}

func (d diagnosis) evidence(code, key string) any {
	for _, finding := range d.Findings {
		if finding.Code == code {
			return finding.Evidence[key]
		}
	}
	return nil
}

// checking is a running `caddy sse check`.
type checking struct {
	cmd           *exec.Cmd
	out, progress bytes.Buffer
	limit         *time.Timer
}

func startCheck(t *testing.T, url string, flags ...string) *checking {
	t.Helper()
	args := append([]string{"sse", "check", url, "--token", "sesame", "--insecure", "--json"}, flags...)
	c := &checking{cmd: exec.Command(harness.CaddyBinary(t), args...)}
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.progress
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.cmd.Process.Kill() })
	c.limit = time.AfterFunc(3*time.Minute, func() { c.cmd.Process.Kill() })
	return c
}

func (c *checking) diagnosis(t *testing.T) diagnosis {
	t.Helper()
	err := c.cmd.Wait()
	c.limit.Stop()
	var d diagnosis
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		d.status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(c.out.Bytes(), &d); err != nil {
		t.Fatalf("%v in %q, after %s", err, c.out.String(), c.progress.String())
	}
	d.text = c.out.String() + c.progress.String()
	return d
}

// startApache runs Apache with mod_proxy in front of a Caddy.
func startApache(t *testing.T, caddy, settings string) string {
	t.Helper()
	apache := harness.Program(t, "apache2", "apache2")
	dir := harness.ShortTempDir(t)
	addr := harness.FreeAddr(t)
	var modules strings.Builder
	for _, name := range []string{"mpm_event", "authz_core", "proxy", "proxy_http", "filter", "deflate", "env", "setenvif"} {
		fmt.Fprintf(&modules, "LoadModule %s_module /usr/lib/apache2/modules/mod_%[1]s.so\n", name)
	}
	conf := harness.WriteFile(t, dir, "apache.conf", fmt.Sprintf(`
ServerRoot %[1]s
PidFile %[1]s/pid
ServerName localhost
Listen %[2]s
ErrorLog /dev/stderr
Mutex file:%[1]s
%[3]s
ProxyPass / %[4]s/
ProxyPreserveHost On
%[5]s
`, dir, addr, modules.String(), caddy, settings))
	p := harness.Start(t, harness.Command(apache, "-f", conf, "-DFOREGROUND"), harness.In(dir))
	p.AwaitPort(t, addr)
	return "http://" + addr
}

func entrance(t *testing.T, addresses []address, name string) string {
	t.Helper()
	for _, a := range addresses {
		if a.name == name {
			return a.url
		}
	}
	t.Fatalf("there is no %s", name)
	return ""
}

// haproxyTimers are startHAProxy's timeouts, made longer than any heartbeat
// interval in a test.
func haproxyTimers(options ...string) []string {
	return append([]string{"timeout client 10s", "timeout server 10s"}, options...)
}

func TestTheDoctorNamesWhatIsWrongOnTheWay(t *testing.T) {
	t.Parallel()
	caddy := startProbe(t)
	const http11 = "proxy_http_version 1.1;\nproxy_set_header Connection \"\";\n"
	between := func(t *testing.T, site string) string { return startSite(t, site).URL }
	tests := []struct {
		name  string
		url   func(t *testing.T) string
		flags []string
		codes string
		about func(t *testing.T, d diagnosis)
	}{
		{"nothing, HTTP/1.1", func(t *testing.T) string { return caddy.URL }, nil, "", covers},
		{"nothing, HTTP/2", func(t *testing.T) string { return caddy.TLSURL }, []string{"--http", "2"}, "", covers},
		{"nothing, HTTP/2 in clear", func(t *testing.T) string { return caddy.URL }, []string{"--http", "2"}, "", covers},
		{"nothing, a Caddy between", func(t *testing.T) string { return between(t, "reverse_proxy "+caddy.URL) }, nil, "", covers},
		{"nginx with its defaults", func(t *testing.T) string {
			return entrance(t, startNginx(t, "doctor", caddy.URL, ""), "h1")
		}, nil, "http_1_0 idle_timeout", func(t *testing.T, d diagnosis) { within(t, d, "idle_timeout", "seconds", 60, 1) }},
		{"nginx with HTTP/1.1", func(t *testing.T) string {
			return entrance(t, startNginx(t, "doctor", caddy.URL, http11), "h1")
		}, nil, "idle_timeout", func(t *testing.T, d diagnosis) { within(t, d, "idle_timeout", "seconds", 60, 1) }},
		{"nginx that ignores X-Accel-Buffering", func(t *testing.T) string {
			return entrance(t, startNginx(t, "doctor", caddy.URL, "proxy_ignore_headers X-Accel-Buffering;\nproxy_read_timeout 5m;"), "h1")
		}, nil, "buffered http_1_0", func(t *testing.T, d diagnosis) { within(t, d, "buffered", "buffer_bytes", 4096, 2048) }},
		{"nginx over HTTP/2", func(t *testing.T) string {
			return entrance(t, startNginx(t, "doctor", caddy.URL, http11+"proxy_read_timeout 5m;"), "h2")
		}, []string{"--http", "2"}, "headers_held", nil},
		{"HAProxy with timeouts of 10 s", func(t *testing.T) string {
			return entrance(t, startHAProxy(t, caddy.URL, "", haproxyTimers()...), "h1")
		}, nil, "delayed idle_timeout", func(t *testing.T, d diagnosis) {
			within(t, d, "delayed", "delay_seconds", 0.22, 0.08)
			within(t, d, "idle_timeout", "seconds", 10, 0.5)
		}},
		{"HAProxy with timeouts of 10 s and http-no-delay", func(t *testing.T) string {
			return entrance(t, startHAProxy(t, caddy.URL, "", haproxyTimers("option http-no-delay")...), "h1")
		}, nil, "idle_timeout", func(t *testing.T, d diagnosis) { within(t, d, "idle_timeout", "seconds", 10, 0.5) }},
		{"Apache with mod_deflate", func(t *testing.T) string {
			return startApache(t, caddy.URL, "ProxyTimeout 300\nSetOutputFilter DEFLATE")
		}, nil, "compressed", func(t *testing.T, d diagnosis) {
			if coding := d.evidence("compressed", "content_encoding"); coding != "gzip" {
				t.Errorf("%v", coding)
			}
		}},
	}
	// All checks at once, and not as parallel tests, where they would keep
	// other tests from running.
	var running []*checking
	var urls []string
	for _, test := range tests {
		url := test.url(t)
		urls = append(urls, url)
		running = append(running, startCheck(t, url, test.flags...))
	}
	for i, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := running[i].diagnosis(t)
			for range 2 {
				if d.ran() {
					break
				}
				d = startCheck(t, urls[i], test.flags...).diagnosis(t)
			}
			if got := d.codes(); got != test.codes {
				t.Errorf("found %q, want %q", got, test.codes)
			}
			if test.about != nil {
				test.about(t, d)
			}
			if want := map[bool]int{true: 0, false: 1}[test.codes == ""]; d.status != want {
				t.Errorf("status %d, want %d", d.status, want)
			}
			t.Log(d.text)
		})
	}
}

func covers(t *testing.T, d diagnosis) {
	if d.Result != "clean" || len(d.Untold) > 0 {
		t.Errorf("%s, untold %q", d.Result, d.Untold)
	}
}

// within checks a number in a finding's evidence.
func within(t *testing.T, d diagnosis, code, key string, want, tolerance float64) {
	t.Helper()
	got, ok := d.evidence(code, key).(float64)
	if !ok || got < want-tolerance || got > want+tolerance {
		t.Errorf("%s: %s is %v, want %v", code, key, d.evidence(code, key), want)
	}
}

func TestTheDoctorNamesACaddyThatRefuses(t *testing.T) {
	t.Parallel()
	caddy := startProbe(t)
	front := startSite(t, "reverse_proxy "+caddy.URL+" {\n\tresponse_buffers 4KiB\n}")
	d := startCheck(t, front.URL).diagnosis(t)
	for _, named := range []string{"501", "Caddy", "response_buffers"} {
		if !strings.Contains(d.Error, named) {
			t.Errorf("%q does not name %s", d.Error, named)
		}
	}
	if d.status != 2 || d.Result != "unknown" {
		t.Errorf("status %d, %s", d.status, d.Result)
	}
}

// A process that was stopped reads everything that arrived meanwhile at once,
// which looks like a buffer.
func TestADoctorThatIsStoppedFindsNothing(t *testing.T) {
	t.Parallel()
	caddy := startProbe(t)
	for _, after := range []time.Duration{1500 * time.Millisecond, 4 * time.Second, 30 * time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			c := startCheck(t, caddy.URL)
			time.Sleep(after)
			syscall.Kill(c.cmd.Process.Pid, syscall.SIGSTOP)
			time.Sleep(2 * time.Second)
			syscall.Kill(c.cmd.Process.Pid, syscall.SIGCONT)
			d := c.diagnosis(t)
			if d.status != 0 || d.codes() != "" {
				t.Errorf("status %d, found %q\n%s", d.status, d.codes(), d.text)
			}
		})
	}
}
