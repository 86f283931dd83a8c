package caddysse_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

const probeSite = `
	sse_probe /probe {
		token sesame
	}
	sse 1s
	respond 418`

const withToken = "Authorization: Bearer sesame"

// probeEvent is the data of a probe's event.
type probeEvent struct {
	N         int
	At        float64
	Sent      int
	Probe     int
	Method    string
	Proto     string
	Host      string
	ClientIP  string `json:"client_ip"`
	Headers   map[string]string
	BodyBytes int `json:"body_bytes"`
	Limits    probeLimits
}

type probeLimits struct {
	DurationSeconds float64 `json:"duration_seconds"`
	Probes, Bytes   int
}

func probePath(script string) string { return "/probe?script=" + url.QueryEscape(script) }

// probeEvents returns the events of an answer, with what comes before each.
func probeEvents(t *testing.T, body string) (events []probeEvent) {
	t.Helper()
	for block := range strings.SplitSeq(strings.TrimSuffix(body, "\n\n"), "\n\n") {
		_, data, found := strings.Cut(block, "data: ")
		if !found {
			t.Fatalf("no data in %q", block)
		}
		var event probeEvent
		if err := json.Unmarshal([]byte(data), &event); err != nil {
			t.Fatalf("%v in %q", err, data)
		}
		if id := fmt.Sprintf("id: %d\n", event.N); !strings.Contains(block, id) {
			t.Errorf("no %q in %q", id, block)
		}
		events = append(events, event)
	}
	return events
}

func TestAProbeAnswersWithItsScriptAndTheHeadersOfAStream(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, probeSite)
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		res := cl.get(t, probePath("e200,w30ms,e300,c20,e"), withToken)
		for field, want := range map[string]string{
			"Content-Type":      "text/event-stream",
			"Cache-Control":     "no-cache, no-store, no-transform",
			"X-Accel-Buffering": "no",
			"Incremental":       "?1",
		} {
			if got := res.Header.Get(field); got != want {
				t.Errorf("%s: %s: %q, want %q", proto, field, got, want)
			}
		}
		body, err := res.text()
		if err != nil {
			t.Errorf("%s: the end is not clean: %v", proto, err)
		}
		before, after, found := strings.Cut(body, ":"+strings.Repeat("x", 18)+"\n")
		if !found {
			t.Fatalf("%s: no comment of 20 bytes in %q", proto, body)
		}
		events := probeEvents(t, before+after)
		if len(events) != 3 {
			t.Fatalf("%s: %+v", proto, events)
		}
		for i, sent := range []int{0, 200, 520} {
			if events[i].N != i+1 || events[i].Sent != sent {
				t.Errorf("%s: event %d is %+v, want %d bytes before it", proto, i+1, events[i], sent)
			}
		}
		if at := events[1].At - events[0].At; events[0].At < 0 || at < 0.03 {
			t.Errorf("%s: events at %v and %v", proto, events[0].At, events[1].At)
		}
	}
}

func TestAProbeSendsItsHeadersAtOnce(t *testing.T) {
	c := startCaddy(t, probeSite)
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		res := cl.get(t, probePath("w1m,e"), withToken)
		res.leave() // nothing would come for a minute
	}
}

func TestAProbeTellsWhatArrivedOfItsRequest(t *testing.T) {
	c := startCaddy(t, probeSite)
	for proto, version := range map[string]string{"h1": "HTTP/1.1", "h2": "HTTP/2.0", "h3": "HTTP/3.0"} {
		cl := c.client(proto)
		res := cl.do(t, cl.request(t, "POST", probePath("r"), strings.NewReader("hello"), withToken,
			"Accept: text/event-stream", "Last-Event-ID: 7", "X-Forwarded-For: 192.0.2.7", "Cookie: secret=1", "X-Other: no", "Via: "+strings.Repeat("v", 300)))
		body, err := res.text()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(body, "event: request\nid: 1\ndata: ") {
			t.Errorf("%s: %q", proto, body)
		}
		event := probeEvents(t, body)[0]
		if event.Probe != 1 || event.Method != "POST" || event.Proto != version || event.BodyBytes != 5 || event.ClientIP != "127.0.0.1" || event.Host == "" {
			t.Errorf("%s: %+v", proto, event)
		}
		if event.Limits != (probeLimits{300, 16, 1 << 20}) {
			t.Errorf("%s: limits %+v", proto, event.Limits)
		}
		for name, want := range map[string]string{
			"accept": "text/event-stream", "last-event-id": "7", "x-forwarded-for": "192.0.2.7", "via": strings.Repeat("v", 256),
			"cookie": "", "x-other": "", "authorization": "",
		} {
			if event.Headers[name] != want {
				t.Errorf("%s: %s is %q, want %q", proto, name, event.Headers[name], want)
			}
		}
		for _, secret := range []string{"sesame", "secret"} {
			if strings.Contains(body, secret) {
				t.Errorf("%s: %q is in %q", proto, secret, body)
			}
		}
	}
}

func TestAProbeAbortsWhereItsScriptSaysSo(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, probeSite)
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		body, err := cl.get(t, probePath("e100,x,e100"), withToken).text()
		if err == nil || len(body) != 100 {
			t.Errorf("%s: %d bytes, then %v", proto, len(body), err)
		}
	}
}

func TestWithoutItsTokenAProbeIsTheSitesOwn404(t *testing.T) {
	c := startCaddy(t, probeSite+`
		handle_errors {
			respond "site {err.status_code}" {err.status_code}
		}`)
	cl := c.client("h1")
	for name, header := range map[string][]string{
		"none":           nil,
		"another":        {"Authorization: Bearer sesam"},
		"longer":         {"Authorization: Bearer sesame2"},
		"another scheme": {"Authorization: Basic sesame"},
		"empty":          {"Authorization: Bearer ", "Sse-Probe-Token: "},
	} {
		for _, method := range []string{"GET", "PUT"} {
			res := cl.do(t, cl.request(t, method, probePath("e")+"&token=sesame", nil, header...))
			if text, _ := res.text(); res.StatusCode != 404 || text != "site 404" {
				t.Errorf("%s %s: %s %q", method, name, res.Status, text)
			}
		}
	}
	for name, header := range map[string][]string{
		"authorization":     {withToken},
		"any letter case":   {"Authorization: bearer sesame"},
		"its own":           {"Sse-Probe-Token: sesame"},
		"beside another":    {"Authorization: Basic YTpi", "Sse-Probe-Token: sesame"},
		"one of two tokens": {"Authorization: Bearer site", "Sse-Probe-Token: sesame"},
	} {
		res := cl.get(t, probePath("e"), header...)
		if res.text(); res.StatusCode != 200 {
			t.Errorf("%s: %s", name, res.Status)
		}
	}
}

func TestAProbeRefusesBeforeItSendsAnything(t *testing.T) {
	c := startCaddy(t, strings.Replace(probeSite, "token sesame", "token sesame\nmax_duration 3s", 1))
	cl := c.client("h1")
	for _, test := range []struct{ query, named string }{
		{"", "missing"},
		{"script=", "missing"},
		{"script=z", "is not a step"},
		{"script=e&script=e", "more than one"},
		{"script=w3001ms", "at most 3s"},
		{"script=4*(w1s)", "at most 3s"},
		{"script=17*(e65536)", "1048576"},
		{"script=16*(e65536),r", "1048576"},
	} {
		res := cl.get(t, "/probe?"+test.query, withToken)
		text, _ := res.text()
		var answer struct {
			Error  string
			Limits probeLimits
		}
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Errorf("%s: %v in %q", test.query, err, text)
		}
		if res.StatusCode != 400 || !strings.Contains(answer.Error, test.named) || answer.Limits != (probeLimits{3, 16, 1 << 20}) {
			t.Errorf("%s: %s %q", test.query, res.Status, text)
		}
	}
	for _, method := range []string{"PUT", "HEAD", "OPTIONS"} {
		res := cl.do(t, cl.request(t, method, probePath("e"), nil, withToken))
		if res.text(); res.StatusCode != 405 || res.Header.Get("Allow") != "GET, POST" {
			t.Errorf("%s: %s, Allow %q", method, res.Status, res.Header.Get("Allow"))
		}
	}
	if body, err := cl.get(t, probePath("16*(e65536)"), withToken).text(); len(body) != 1<<20 || err != nil {
		t.Errorf("%d bytes of the largest answer, %v", len(body), err)
	}
}

func TestAProbeThatIsOneTooManyIsAskedToComeBack(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, strings.Replace(probeSite, "token sesame", "token sesame\nmax_probes 2", 1))
	cl := c.client("h1")
	first, second := cl.get(t, probePath("w1m"), withToken), cl.get(t, probePath("w1m"), withToken)
	res := cl.get(t, probePath("e"), withToken)
	text, _ := res.text()
	if res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" || !strings.Contains(text, `"probes":2`) {
		t.Errorf("%s, Retry-After %q, %q", res.Status, res.Header.Get("Retry-After"), text)
	}
	first.leave()
	defer second.leave()
	eventually(t, "the place of a client that has left is given back", func() bool {
		res := cl.get(t, probePath("e"), withToken)
		res.text()
		return res.StatusCode == 200
	})
}

func TestAnSSEHandlerAroundAProbeStandsAside(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, `
		log
		route {
			sse {
				name around
				heartbeat 20ms
				retry 1s
				max_streams 1
				early_start 10s
			}
			sse_probe {
				token sesame
			}
		}`, withAdmin())
	cl := c.client("h1")
	running := cl.get(t, probePath("e100,w1m"), withToken, "Accept: text/event-stream").follow()
	body, err := cl.get(t, probePath("w200ms,e100"), withToken, "Accept: text/event-stream").text()
	if err != nil || len(body) != 100 {
		t.Errorf("%q, %v: the answer is not the script's alone", body, err)
	}
	if _, list := c.admin("GET", "/sse/streams"); !strings.Contains(list, `"total":0`) {
		t.Errorf("listed: %s", list)
	}
	entry := c.accessLog(t, "/probe")
	if figures, _ := entry["sse"].(map[string]any); len(figures) != 1 || figures["probe"] != true {
		t.Errorf("the access log says %v", entry["sse"])
	}
	for _, entry := range c.logs() {
		if strings.HasPrefix(entry.logger(), "http.handlers.sse") {
			t.Errorf("logged: %v", entry)
		}
	}
	if _, err := running.wait(func(unread string) bool { return len(unread) == 100 }); err != nil {
		t.Error(err)
	}
}

func TestAReloadLetsProbesEnd(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	c := startCaddy(t, probeSite)
	for _, proto := range []string{"h1", "h2"} {
		body := c.client(proto).get(t, probePath("e100,w300ms,e100"), withToken).follow()
		if _, err := body.wait(func(unread string) bool { return len(unread) >= 100 }); err != nil {
			t.Fatal(err)
		}
		c.reload("respond 204")
		if text, err := body.rest(); len(text) != 200 || err != io.EOF {
			t.Errorf("%s: %d bytes, then %v", proto, len(text), err)
		}
		c.reload(probeSite)
	}
}

func TestAnExitBreaksProbesOff(t *testing.T) {
	c := startCaddyProcess(t, probeSite, "")
	body := c.client("h1").get(t, probePath("e100,w1m,e100"), withToken).follow()
	if _, err := body.wait(func(unread string) bool { return len(unread) >= 100 }); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	text, err := body.rest()
	if len(text) != 100 || err == io.EOF || errors.Is(err, errNothingMore) {
		t.Errorf("%d bytes, then %v", len(text), err)
	}
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Error("the process does not end")
	}
}

func TestTheServersTimeoutsDoNotEndAProbe(t *testing.T) {
	if apart(t) {
		return
	}
	// net/http also applies the write timeout to the TLS handshake, which is
	// slow on a busy machine.
	c := startCaddy(t, probeSite, withGlobal(`servers {
		timeouts {
			read_body 250ms
			write 250ms
			write_idle 250ms
		}
	}`))
	for _, proto := range []string{"h1", "h2"} {
		cl := c.client(proto)
		for range 2 { // on one connection
			body, err := cl.get(t, probePath("3*(w350ms,e100)"), withToken).text()
			if len(body) != 300 || err != nil {
				t.Errorf("%s: %d bytes, then %v", proto, len(body), err)
			}
		}
	}
}

func TestAProbeIsOrderedBetweenEncodeAndSSE(t *testing.T) {
	handlers, err := adapt(":80 {\nreverse_proxy 127.0.0.1:9\nsse\nsse_probe {\ntoken a\n}\nencode gzip\n}")
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, handler := range handlers {
		order = append(order, fmt.Sprint(handler["handler"]))
	}
	if got := strings.Join(order, " "); !strings.Contains(got, "encode sse_probe sse reverse_proxy") {
		t.Error(got)
	}
}

func TestTheProbesCaddyfileBecomesItsJSON(t *testing.T) {
	for _, test := range []struct{ directive, want string }{
		{"sse_probe {\ntoken a\n}", `{"handler":"sse_probe","token":"a"}`},
		{"sse_probe /p {\ntoken {env.T}\nmax_duration 1m\nmax_probes 4\n}", `{"handler":"sse_probe","max_duration":60000000000,"max_probes":4,"token":"{env.T}"}`},
	} {
		handlers, err := adapt(":80 {\n" + test.directive + "\n}")
		if err != nil {
			t.Errorf("%s: %v", test.directive, err)
			continue
		}
		if got := string(caddyconfig.JSON(handlers[len(handlers)-1], nil)); got != test.want {
			t.Errorf("%s: %s, want %s", test.directive, got, test.want)
		}
	}
	for _, test := range []struct{ directive, named string }{
		{"sse_probe", "token is missing"},
		{"sse_probe {\nmax_probes 1\n}", "token is missing"},
		{"sse_probe secret {\ntoken a\n}", `"secret"`},
		{"sse_probe {\ntoken\n}", "token wants exactly one"},
		{"sse_probe {\ntoken \"\"\n}", "token wants exactly one"},
		{"sse_probe {\ntoken a b\n}", "token wants exactly one"},
		{"sse_probe {\ntoken a\ntoken b\n}", "set twice"},
		{"sse_probe {\ntoken a\nmax_duration 0\n}", `"0"`},
		{"sse_probe {\ntoken a\nmax_duration -1s\n}", `"-1s"`},
		{"sse_probe {\ntoken a\nmax_probes 0\n}", `"0"`},
		{"sse_probe {\ntoken a\nmax_probes many\n}", `"many"`},
		{"sse_probe {\ntoken a\nmax 1\n}", `"max"`},
		{"sse_probe {\ntoken a {\nb\n}\n}", "takes no block"},
	} {
		if _, err := adapt(":80 {\n" + test.directive + "\n}"); err == nil || !strings.Contains(err.Error(), test.named) || !strings.Contains(err.Error(), "Caddyfile:") {
			t.Errorf("%q: %v does not name %s and the line", test.directive, err, test.named)
		}
	}
}

func TestAProbesTokenTakesGlobalPlaceholders(t *testing.T) {
	t.Setenv("PROBE_TOKEN", "sesame")
	c := startCaddy(t, strings.Replace(probeSite, "token sesame", "token {env.PROBE_TOKEN}", 1))
	res := c.client("h1").get(t, probePath("e"), withToken)
	if res.text(); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	for _, test := range []struct{ config, named string }{
		{`{}`, "missing"},
		{`{"token": "{env.PROBE_UNSET}"}`, "{env.PROBE_UNSET} is empty"},
		{`{"token": "{http.request.host}"}`, "placeholder of a request"},
		{`{"token": "a", "max_duration": -1}`, "max_duration"},
		{`{"token": "a", "max_probes": -1}`, "max_probes"},
	} {
		ctx, cancel := caddy.NewContext(configContext)
		_, err := ctx.LoadModuleByID("http.handlers.sse_probe", []byte(test.config))
		cancel()
		if err == nil || !strings.Contains(err.Error(), test.named) {
			t.Errorf("%s: %v does not name %s", test.config, err, test.named)
		}
	}
}

func TestAProbesBodyIsCountedToABound(t *testing.T) {
	c := startCaddy(t, probeSite)
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		body, err := cl.do(t, cl.request(t, http.MethodPost, probePath("r"), strings.NewReader(strings.Repeat("b", 1<<20)), withToken)).text()
		if err != nil && !strings.Contains(body, "\n\n") {
			t.Errorf("%s: %v", proto, err)
			continue
		}
		if event := probeEvents(t, body)[0]; event.BodyBytes != 64<<10 {
			t.Errorf("%s: %d bytes", proto, event.BodyBytes)
		}
	}
}
