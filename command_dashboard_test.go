package caddysse

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// passedOn stands in for the admin API and records what it was called for.
type passedOn struct{ calls []string }

func (p *passedOn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.calls = append(p.calls, r.Method+" "+r.URL.String())
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.WriteHeader(http.StatusAccepted)
	io.WriteString(w, `{"ending":1}`)
}

func TestTheDashboardPassesOnWhatThePageCallsAndNothingElse(t *testing.T) {
	const id = "8e34097c-f1c1-4983-8b73-a5c0f0612c07"
	for _, test := range []struct {
		method, target string
		status         int
		passed         string
	}{
		{"GET", "/secret/", 200, ""},
		{"GET", "/secret/watch", 202, "GET /sse/watch"},
		{"GET", "/secret/watch?interval=1s&sort=-bytes&path=%2Fa%26b", 202, "GET /sse/watch?interval=1s&sort=-bytes&path=%2Fa%26b"},
		{"GET", "/secret/streams?limit=0", 202, "GET /sse/streams?limit=0"},
		{"DELETE", "/secret/streams/" + id, 202, "DELETE /sse/streams/" + id},
		{"GET", "/secret/runs?name=x", 202, "GET /sse/runs?name=x"},
		{"DELETE", "/secret/runs/" + id, 202, "DELETE /sse/runs/" + id},
		{"GET", "/secret/runs/" + id, 405, ""},
		{"DELETE", "/secret/runs", 405, ""},
		{"DELETE", "/secret/streams", 405, ""},
		{"DELETE", "/secret/streams?all=true", 405, ""},
		{"DELETE", "/secret/streams/", 404, ""},
		{"DELETE", "/secret/streams/%2e%2e", 404, ""},
		{"DELETE", "/secret/streams/..%2fstreams%3fall=true", 404, ""},
		{"DELETE", "/secret/streams/a%3Fall=true", 404, ""},
		{"GET", "/secret/streams/" + id, 405, ""},
		{"POST", "/secret/watch", 405, ""},
		{"GET", "/secret/handlers", 404, ""},
		{"GET", "/secret/config/", 404, ""},
		{"POST", "/secret/load", 404, ""},
		{"POST", "/secret/", 405, ""},
		{"GET", "/secret/nothing", 404, ""},
		{"GET", "/watch", 404, ""},
		{"GET", "/secre/watch", 404, ""},
		{"GET", "/other/watch", 404, ""},
		{"GET", "/", 404, ""},
		{"DELETE", "/streams/" + id, 404, ""},
	} {
		admin := new(passedOn)
		proxy := newDashboardProxy(adminServer(t, admin.ServeHTTP), "secret")
		r := httptest.NewRequest(test.method, test.target, nil)
		r.Host = "127.0.0.1:8081"
		w := httptest.NewRecorder()
		proxy.ServeHTTP(w, r)
		if passed := strings.Join(admin.calls, ", "); w.Code != test.status || passed != test.passed {
			t.Errorf("%s %s: status %d, passed on %q", test.method, test.target, w.Code, passed)
		}
		if w.Header().Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s %s: other pages may read the answer", test.method, test.target)
		}
	}
}

func TestTheDashboardAnswersToNamesOfThisMachineOnly(t *testing.T) {
	admin := new(passedOn)
	proxy := newDashboardProxy(adminServer(t, admin.ServeHTTP), "secret")
	for host, status := range map[string]int{
		"127.0.0.1:8081": 200, "localhost:8081": 200, "LOCALHOST": 200, "[::1]:8081": 200, "127.8.8.8": 200,
		"evil.example": 403, "evil.example:8081": 403, "127.0.0.1.evil.example:8081": 403, "localhost.evil.example": 403,
		"192.168.1.2:8081": 403, "0.0.0.0:8081": 403, "": 403, ":8081": 403,
	} {
		r := httptest.NewRequest("GET", "/secret/", nil)
		r.Host = host
		w := httptest.NewRecorder()
		if proxy.ServeHTTP(w, r); w.Code != status {
			t.Errorf("%q: status %d, want %d", host, w.Code, status)
		}
	}
}

func TestAnotherPageCanNotEndAStreamByTheDashboard(t *testing.T) {
	for header, status := range map[string]int{
		"Origin: http://127.0.0.1:8081": 202, "Sec-Fetch-Site: same-origin": 202, "X-None: x": 202,
		"Origin: http://evil.example": 403, "Origin: null": 403, "Origin: http://127.0.0.1:9999": 403,
		"Sec-Fetch-Site: cross-site": 403, "Sec-Fetch-Site: same-site": 403,
	} {
		admin := new(passedOn)
		proxy := newDashboardProxy(adminServer(t, admin.ServeHTTP), "secret")
		r := httptest.NewRequest("DELETE", "/secret/streams/abc", nil)
		r.Host = "127.0.0.1:8081"
		name, value, _ := strings.Cut(header, ": ")
		r.Header.Set(name, value)
		w := httptest.NewRecorder()
		if proxy.ServeHTTP(w, r); w.Code != status || (len(admin.calls) > 0) != (status == 202) {
			t.Errorf("%s: status %d, passed on %q", header, w.Code, admin.calls)
		}
	}
}

func TestTheDashboardListensOnLoopbackOnly(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "localhost:0", "tcp4/127.0.0.1:0"} {
		listener, err := listenOnLoopback(listen)
		if err != nil {
			t.Errorf("%s: %v", listen, err)
			continue
		}
		listener.Close()
	}
	for listen, says := range map[string]string{
		":0":                 "is not on the loopback interface",
		"0.0.0.0:0":          "is not on the loopback interface",
		"192.0.2.1:0":        "is not on the loopback interface",
		"example.com:0":      "is not on the loopback interface",
		"unix//tmp/x":        "is no TCP address",
		"127.0.0.1:80-90":    "is a range of ports",
		"8081":               "write :8081",
		"127.0.0.1:nonsense": "--listen",
	} {
		if listener, err := listenOnLoopback(listen); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, %v", listen, listener, err)
		}
	}
}

func TestTheDashboardsPathIsAnotherEachTime(t *testing.T) {
	if one, other := randomPath(), randomPath(); one == other || len(one) != 22 || strings.ContainsAny(one, "/+={}") {
		t.Errorf("%s, %s", one, other)
	}
}

// dashboardFlags returns the flags of the command.
func dashboardFlags(t *testing.T, args ...string) caddycmd.Flags {
	t.Helper()
	cmd := dashboardCommand()
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return caddycmd.Flags{FlagSet: cmd.Flags()}
}

func TestTheDashboardPrintsWhereItIsAndPassesAWatchOnAsItComes(t *testing.T) {
	dir, err := os.MkdirTemp("", "dashboard") // the path of a Unix socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "admin")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	next := make(chan struct{})
	admin := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != watchPath {
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for _, text := range []string{"data: 1\n", "data: 2\n"} {
			io.WriteString(w, text)
			http.NewResponseController(w).Flush()
			<-next
		}
	})}
	go admin.Serve(listener)
	t.Cleanup(func() { admin.Close() })

	reading, writing, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reading.Close()
	stdout := os.Stdout
	os.Stdout = writing
	ctx, end := context.WithCancel(t.Context())
	defer end()
	ended := make(chan error, 1)
	flags := dashboardFlags(t, "--address", "unix/"+socket)
	go func() { ended <- serveDashboardUntil(ctx, flags) }()
	var url string
	for lines := bufio.NewScanner(reading); url == "" && lines.Scan(); {
		url = regexp.MustCompile(`http://127\.0\.0\.1:\d+/[-\w]{22}/`).FindString(lines.Text())
	}
	os.Stdout = stdout
	writing.Close()

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	answer, err := client.Get(url + "watch")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if got := answer.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("Content-Type is %q", got)
	}
	lines := bufio.NewReader(answer.Body)
	for _, want := range []string{"data: 1\n", "data: 2\n"} {
		if got, err := lines.ReadString('\n'); got != want {
			t.Fatalf("got %q, %v", got, err)
		}
		next <- struct{}{}
	}
	if rest, err := io.ReadAll(lines); len(rest) > 0 || err != nil {
		t.Errorf("at the end: %q, %v", rest, err)
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestTheDashboardSaysPlainlyWhatIsWrong(t *testing.T) {
	for name, admin := range map[string]http.HandlerFunc{"has no sse module": likeCaddy, "is no admin API of Caddy": http.NotFound} {
		err := serveDashboardUntil(t.Context(), dashboardFlags(t, "--address", adminServer(t, admin).address))
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	gone := adminServer(t, likeCaddy)
	gone.network, gone.dial = "unix", filepath.Join(t.TempDir(), "nothing")
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/secret/watch", nil)
	r.Host = "localhost"
	newDashboardProxy(gone, "secret").ServeHTTP(w, r)
	if w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "no Caddy answers") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}
