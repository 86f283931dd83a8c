//go:build interop

package monitoring

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// prometheus is a Prometheus that runs the example.
type prometheus struct {
	t   *testing.T
	url string
}

// startPrometheus runs the example's Prometheus, but with intervals of one
// second instead of 15 s and one minute.
func startPrometheus(t *testing.T, caddyMetrics string) prometheus {
	t.Helper()
	program := harness.Program(t, "prometheus", "prometheus")
	dir := harness.ShortTempDir(t)
	harness.WriteFile(t, dir, "alerts.yml", harness.ReadFile(t, example(t, "alerts.yml")))
	config := harness.WriteFile(t, dir, "prometheus.yml", harness.Replace(t, harness.ReadFile(t, example(t, "prometheus.yml")),
		"scrape_interval: 15s", "scrape_interval: 1s\n  scrape_timeout: 1s\n  evaluation_interval: 1s", "localhost:9180", caddyMetrics))
	addr := harness.FreeAddr(t)
	process := harness.Start(t, harness.Command(program, "--config.file="+config, "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+addr, "--log.level=warn"), harness.In(dir))
	process.AwaitHTTP(t, "http://"+addr+"/-/ready")
	return prometheus{t, "http://" + addr}
}

func (p prometheus) get(path string, data any) {
	p.t.Helper()
	response, err := http.Get(p.url + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	answer := struct {
		Status string
		Data   any
	}{Data: data}
	if err := json.Unmarshal(body, &answer); err != nil || answer.Status != "success" {
		p.t.Fatalf("%s: %v, %s", path, err, body)
	}
}

// values returns the values of a query's series, as Prometheus writes them.
func (p prometheus) values(query string) []string {
	p.t.Helper()
	var data struct {
		Result []struct{ Value [2]any }
	}
	p.get("/api/v1/query?query="+url.QueryEscape(query), &data)
	var values []string
	for _, series := range data.Result {
		values = append(values, fmt.Sprint(series.Value[1]))
	}
	slices.Sort(values)
	return values
}

func (p prometheus) await(query, values string) {
	p.t.Helper()
	var got string
	defer func() {
		if p.t.Failed() {
			p.t.Logf("%s: %s", query, got)
		}
	}()
	harness.Eventually(p.t, harness.Patience, query+" is "+values, func() bool {
		got = fmt.Sprint(p.values(query))
		return got == values
	})
}

// alerts returns the alerts that are pending or firing.
func (p prometheus) alerts() []string {
	var data struct {
		Alerts []struct{ Labels map[string]string }
	}
	p.get("/api/v1/alerts", &data)
	var names []string
	for _, alert := range data.Alerts {
		names = append(names, alert.Labels["alertname"])
	}
	slices.Sort(names)
	return names
}

var selector = regexp.MustCompile(`caddy_sse_[a-z_]+(?:\{[^}]*\})?`)

// TestPrometheusSeesTheFirstOfEach checks that the series of the example exist
// before anything has happened, so that an increase shows the first time.
func TestPrometheusSeesTheFirstOfEach(t *testing.T) {
	t.Parallel()
	upstream := harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/compressed":
			w.Header().Set("Content-Encoding", "gzip")
			harness.Begin(w)
		case "/down":
			w.WriteHeader(http.StatusBadGateway)
		case "/late":
			time.Sleep(300 * time.Millisecond)
			w.WriteHeader(http.StatusInternalServerError)
		default:
			harness.Begin(w)
			harness.Send(w, "data: hello\n\n")
			<-r.Context().Done()
		}
	})
	site, metrics := harness.FreePort(t), harness.FreePort(t)
	harness.StartCaddy(t, harness.Replace(t, harness.ReadFile(t, example(t, "Caddyfile")),
		":8080", fmt.Sprint("http://:", site), ":9180", fmt.Sprint("http://:", metrics), "localhost:9000", upstream,
		"name chat", "name chat\nmax_streams 2\nreconnect_on 502\nupstream_retry 1m live\nearly_start 100ms"))
	p := startPrometheus(t, fmt.Sprint("localhost:", metrics))
	p.await(`count(caddy_sse_streams)`, "[3]")

	// The status with which an early start fails is not known in advance, and
	// this Caddy has no store.
	unknown := regexp.MustCompile(`^caddy_sse_(early_start_failures_total|store_)`)
	asked := make(map[string]bool)
	for _, file := range []string{"alerts.yml", "dashboard.json"} {
		text := strings.ReplaceAll(harness.ReadFile(t, example(t, file)), `\"`, `"`)
		for _, query := range selector.FindAllString(text, -1) {
			query = strings.ReplaceAll(query, `$name`, "chat")
			if asked[query] || unknown.MatchString(query) {
				continue
			}
			asked[query] = true
			if len(p.values(query)) == 0 {
				t.Errorf("%s asks for %s, and there is none", file, query)
			}
		}
	}
	if len(asked) < 20 {
		t.Errorf("the example asks for %d series only", len(asked))
	}
	const first = `[1m]) > 0`
	for query, values := range map[string]string{
		`sum(caddy_sse_streams_opened_total)`:                  "[0]",
		`caddy_sse_streams_refused_total`:                      "[0 0]",
		`caddy_sse_streams_unprotected_total`:                  "[0 0]",
		`caddy_sse_reconnects_answered_total`:                  "[0]",
		`caddy_sse_upstream_retries_total`:                     "[0 0 0]",
		`caddy_sse_resumes_total`:                              "[0 0 0 0]",
		`caddy_sse_time_to_first_event_seconds_count`:          "[0]",
		`increase(caddy_sse_streams_closed_total` + first:      "[]",
		`increase(caddy_sse_reconnects_answered_total` + first: "[]",
	} {
		p.await(query, values)
	}
	if names := p.alerts(); len(names) > 0 {
		t.Errorf("alerts before anything has happened: %v", names)
	}

	base := fmt.Sprint("http://localhost:", site)
	client := harness.Client(t, "h1")
	// ask waits for the end of an answer.
	ask := func(path string) (status int) {
		t.Helper()
		stream := harness.Open(t, client, base+path)
		stream.AwaitEnd(t, harness.Patience)
		return stream.Response.StatusCode
	}
	ask("/compressed")
	ask("/down")
	ask("/late")
	harness.Open(t, client, base+"/one").Next(t, harness.Patience)
	harness.Open(t, client, base+"/two").Next(t, harness.Patience)
	if status := ask("/three"); status != http.StatusServiceUnavailable {
		t.Errorf("the third stream got %d", status)
	}

	for query, values := range map[string]string{
		`sum(caddy_sse_streams{name="chat",proto="HTTP/1.1"})`: "[2]",
		// While the streams are open.
		`caddy_sse_time_to_headers_seconds_count{name="chat"}`:                                          "[4]",
		`caddy_sse_time_to_first_event_seconds_count{name="chat"}`:                                      "[2]",
		`caddy_sse_early_start_failures_total{name="chat",status="500"}`:                                "[1]",
		`count(caddy_sse_runs{name="chat"})`:                                                            "[4]",
		`count(increase(caddy_sse_streams_unprotected_total{cause="content_encoding"}` + first + `)`:    "[1]",
		`count(increase(caddy_sse_reconnects_answered_total{status="502"}` + first + `)`:                "[1]",
		`count(increase(caddy_sse_streams_refused_total{limit="max_streams"}` + first + `)`:             "[1]",
		`count(increase(caddy_sse_time_to_first_event_seconds_count` + first + `)`:                      "[1]",
		`count(increase(caddy_sse_streams_unprotected_total{cause="not_an_event_stream"}` + first + `)`: "[]",
	} {
		p.await(query, values)
	}
	// They fire only after some minutes; the tests with promtool cover that.
	harness.Eventually(t, harness.Patience, "the two alerts that a first one is enough for are pending", func() bool {
		return slices.Equal(p.alerts(), []string{"SSEStreamsRefused", "SSEUnprotectedStreams"})
	})
}
