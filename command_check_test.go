package caddysse_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/caddy-sse/caddy-sse/internal/doctor"
)

// checkCommand returns `caddy sse check` in its own process.
func checkCommand(args []string, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], append([]string{"sse", "check"}, args...)...)
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			cmd.Env = append(cmd.Env, variable)
		}
	}
	cmd.Env = append(append(cmd.Env, caddyVariable+"=1"), env...)
	return cmd
}

// runCheck runs a command to its end.
func runCheck(t *testing.T, cmd *exec.Cmd) (status int, stdout, stderr string) {
	t.Helper()
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return status, out.String(), complaints.String()
}

func TestTheCheckFindsNothingOnTheWayToThisCaddy(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as a check")
	}
	t.Parallel()
	c := startCaddyProcess(t, strings.Replace(probeSite, "token sesame", "token sesame\nmax_probes 100", 1), "")
	var wg sync.WaitGroup
	for name, config := range map[string]doctor.Config{
		"HTTP/1.1":          {URL: c.url + "/probe"},
		"HTTP/1.1 with TLS": {URL: c.tlsURL + "/probe", HTTP: doctor.HTTP1},
		"what TLS agrees":   {URL: c.tlsURL + "/probe"},
		"HTTP/3":            {URL: "https://" + c.findHTTP3() + "/probe", HTTP: doctor.HTTP3},
	} {
		config.Token, config.Insecure, config.For = "sesame", true, doctor.ShortestFor
		wg.Go(func() {
			r, err := doctor.Check(t.Context(), config)
			// On a busy machine, this Caddy can be late. It is not so every time.
			for range 2 {
				if err != nil || len(r.Findings) == 0 {
					break
				}
				r, err = doctor.Check(t.Context(), config)
			}
			if err != nil {
				t.Error(err)
				return
			}
			version := map[string]string{"HTTP/1.1": "1.1", "HTTP/1.1 with TLS": "1.1", "what TLS agrees": "2", "HTTP/3": "3"}[name]
			if r.Error != "" || r.Tests[0].HTTP != version || r.Tests[0].Status != 200 {
				t.Errorf("%s: %q, HTTP/%s %d", name, r.Error, r.Tests[0].HTTP, r.Tests[0].Status)
			}
			for _, finding := range r.Findings {
				t.Errorf("%s: %s: %s", name, finding.Code, finding.Seen)
			}
		})
	}
	wg.Wait()
}

// site gives the answers that its paths describe.
func site(t *testing.T) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/page":
			io.WriteString(w, "<html>")
			return
		case "/echo":
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Server", fmt.Sprintf("%s %s %q", r.Method, r.Header.Get("X-Sent"), body))
			w.WriteHeader(http.StatusTeapot)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "data: 1\n\n")
		http.NewResponseController(w).Flush()
		if r.URL.Path == "/cut" {
			panic(http.ErrAbortHandler)
		}
	}))
	s.Config.ErrorLog = discardLog
	t.Cleanup(s.Close)
	return s
}

func TestTheChecksExitStatusSaysWhatItHasFound(t *testing.T) {
	s := site(t)
	for _, test := range []struct {
		name   string
		args   []string
		status int
		stdout string
		stderr string
	}{
		{"a stream that is fine", []string{s.URL + "/events?key=secret"}, 0, "Nothing found", ""},
		{"a stream that is broken off", []string{s.URL + "/cut?key=secret"}, 1, "\ncut\n", ""},
		{"no stream", []string{s.URL + "/page?key=secret"}, 2, "it is no event stream", ""},
		{"no probe", []string{"--token", "secret", s.URL + "/page?key=secret"}, 2, "it is no event stream", ""},
		{"nobody there", []string{"http://127.0.0.1:1/?key=secret"}, 2, "refused", ""},
		{"no URL", nil, 2, "", "say one URL"},
		{"two URLs", []string{s.URL, s.URL}, 2, "", "say one URL"},
		{"an unknown flag", []string{"--tokn", "secret"}, 2, "", "--tokn"},
		{"a flag without its value", []string{s.URL, "--for"}, 2, "", "--for"},
		{"no duration", []string{s.URL, "--for", "long"}, 2, "", "--for"},
		{"no time", []string{s.URL, "--for", "0s"}, 2, "", "--for"},
		{"a version that is none", []string{s.URL, "--http", "9"}, 2, "", "--http"},
		{"a header that is none", []string{s.URL, "-H", "secret"}, 2, "", "--header"},
		{"a file that is not there", []string{s.URL, "-d", "@/does/not/exist"}, 2, "", "--data"},
		{"no address to resolve", []string{s.URL, "--resolve", "host:80"}, 2, "", "--resolve"},
		{"help", []string{"--help"}, 0, "--resolve", ""},
	} {
		status, stdout, stderr := runCheck(t, checkCommand(test.args))
		if status != test.status || !strings.Contains(stdout, test.stdout) || !strings.Contains(stderr, test.stderr) {
			t.Errorf("%s: %d\n%s\n%s", test.name, status, stdout, stderr)
		}
		if strings.Contains(stdout+stderr, "secret") {
			t.Errorf("%s: a secret is told:\n%s\n%s", test.name, stdout, stderr)
		}
		if test.stderr == "" && strings.Contains(stderr, "rror") {
			t.Errorf("%s: more is said than should be: %s", test.name, stderr)
		}
	}
}

func TestTheChecksJSONIsAlone(t *testing.T) {
	s := site(t)
	status, stdout, _ := runCheck(t, checkCommand([]string{"--json", s.URL + "/cut?key=secret"}))
	var report map[string]any
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != 1 {
		t.Fatalf("%d %v in %q", status, err, stdout)
	}
	for _, key := range []string{"version", "url", "result", "error", "seconds", "covered", "tests", "untold", "findings"} {
		if report[key] == nil {
			t.Errorf("no %s in %s", key, stdout)
		}
	}
	finding := report["findings"].([]any)[0].(map[string]any)
	for _, key := range []string{"code", "seen", "means", "set", "docs", "evidence"} {
		if finding[key] == nil {
			t.Errorf("no %s in %v", key, finding)
		}
	}
	if report["version"] != 1.0 || report["url"] != s.URL+"/cut" || report["result"] != "findings" || finding["code"] != "cut" {
		t.Error(stdout)
	}
	if _, numbers := finding["evidence"].(map[string]any)["age_seconds"].(float64); !numbers {
		t.Error(finding)
	}
}

func TestTheCheckSendsWhatTheCommandLineSays(t *testing.T) {
	s := site(t)
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte("of a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", "proxied "+r.URL.Host+r.Header.Get("Proxy-Authorization"))
		w.WriteHeader(http.StatusTeapot)
	}))
	defer proxy.Close()
	for _, test := range []struct {
		args  []string
		env   string
		named string
	}{
		{[]string{s.URL + "/echo", "-H", "X-Sent: yes", "--header", "X-Other: 1"}, "", `GET yes ""`},
		{[]string{s.URL + "/echo", "-d", "{}"}, "", `POST  "{}"`},
		{[]string{s.URL + "/echo", "-d", "@" + file, "-X", "put"}, "", `PUT  "of a file"`},
		{[]string{"http://example.invalid:" + port + "/echo", "--resolve", "example.invalid:" + port + ":127.0.0.1"}, "", "GET"},
		{[]string{"http://example.invalid/echo"}, "http_proxy=" + proxy.URL, "proxied example.invalid"},
		{[]string{"http://127.0.0.1/echo"}, "all_proxy=" + proxy.URL, "proxied 127.0.0.1"},
		{[]string{s.URL + "/echo", "--http", "1.1"}, "http_proxy=" + proxy.URL + " no_proxy=127.0.0.1", "GET"},
	} {
		status, stdout, stderr := runCheck(t, checkCommand(test.args, strings.Fields(test.env)...))
		if status != 2 || !strings.Contains(stdout, test.named) {
			t.Errorf("%q %s: %d\n%s\n%s", test.args, test.env, status, stdout, stderr)
		}
	}
}

func TestTheTokenOfACheckMayBeInTheEnvironment(t *testing.T) {
	var given []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		given = append(given, r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusNotFound)
	}))
	defer s.Close()
	for _, args := range [][]string{{s.URL}, {s.URL, "--token", "flag"}, {s.URL, "--token", ""}} {
		runCheck(t, checkCommand(args, "SSE_PROBE_TOKEN=variable"))
	}
	if got := strings.Join(given, ","); got != "Bearer variable,Bearer flag," {
		t.Error(got)
	}
}

func TestACheckThatIsInterruptedSaysSo(t *testing.T) {
	asked := make(chan struct{}, 1)
	ctx, leave := context.WithCancel(context.Background())
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		http.NewResponseController(w).Flush()
		asked <- struct{}{}
		select {
		case <-r.Context().Done():
		case <-ctx.Done():
		}
	}))
	defer s.Close()
	defer leave()
	cmd := checkCommand([]string{s.URL})
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-asked
	_ = cmd.Process.Signal(syscall.SIGINT)
	_ = cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != 2 || !strings.Contains(out.String(), "interrupted") {
		t.Errorf("%d %s", status, out.String())
	}
}
