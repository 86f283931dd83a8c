//go:build interop

// Package monitoring has promtool and Prometheus read examples/monitoring.
package monitoring

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

func promtool(t *testing.T) string { return harness.Program(t, "promtool", "prometheus") }

func example(t *testing.T, name string) string {
	return harness.Root(t, "examples", "monitoring", name)
}

var alertName = regexp.MustCompile(`(?m)^\s*- alert: (\w+)$`)

func alerts(t *testing.T) []string {
	var names []string
	for _, match := range alertName.FindAllStringSubmatch(harness.ReadFile(t, example(t, "alerts.yml")), -1) {
		names = append(names, match[1])
	}
	return names
}

func TestPromtoolTakesTheExample(t *testing.T) {
	t.Parallel()
	// It also reads the rules that the configuration names.
	t.Log(harness.Run(t, harness.Command(promtool(t), "check", "config", "--lint=all", "--lint-fatal", example(t, "prometheus.yml"))))
}

// series are the values scraped from a Caddy, one sample a minute, in
// promtool's notation: 0+3x60 is 0, followed by 60 samples, each 3 higher.
type series map[string]string

// steady has every series of a handler without problems: two streams a minute
// begin and end, and each is open for minutes.
var steady = series{
	`streams{name="chat",proto="HTTP/2.0"}`:                              "100+0x60",
	`streams_opened_total{name="chat",proto="HTTP/2.0"}`:                 "0+2x60",
	`streams_closed_total{name="chat",reason="client_closed"}`:           "0+2x60",
	`streams_closed_total{name="chat",reason="upstream_error"}`:          "0+0x60",
	`streams_closed_total{name="chat",reason="write_timeout"}`:           "0+0x60",
	`streams_closed_total{name="chat",reason="lagged"}`:                  "0+0x60",
	`streams_unprotected_total{name="chat",cause="content_encoding"}`:    "0+0x60",
	`streams_unprotected_total{name="chat",cause="not_an_event_stream"}`: "0+0x60",
	`streams_refused_total{name="chat",limit="max_streams"}`:             "0+0x60",
	`streams_refused_total{name="chat",limit="max_streams_per_client"}`:  "0+0x60",
	`reconnects_answered_total{name="chat",status="502"}`:                "0+0x60",
	`upstream_retries_total{name="chat",result="resumed"}`:               "0+0x60",
	`upstream_retries_total{name="chat",result="failed"}`:                "0+0x60",
	`upstream_retries_total{name="chat",result="refused"}`:               "0+0x60",
	`resumes_total{name="chat",result="resumed"}`:                        "0+5x60",
	`resumes_total{name="chat",result="gap"}`:                            "0+0x60",
	`resumes_total{name="chat",result="unknown"}`:                        "0+0x60",
	`journal_bytes{name="chat"}`:                                         "1000000+0x60",
	`heartbeats_total{name="chat"}`:                                      "0+400x60",
	`heartbeats_deferred_total{name="chat"}`:                             "0+0x60",
	`stream_duration_seconds_bucket{name="chat",le="1"}`:                 "0+0x60",
	`stream_duration_seconds_bucket{name="chat",le="300"}`:               "0+2x60",
	`stream_duration_seconds_bucket{name="chat",le="+Inf"}`:              "0+2x60",
	`stream_duration_seconds_count{name="chat"}`:                         "0+2x60",
	`time_to_headers_seconds_bucket{name="chat",le="1"}`:                 "0+2x60",
	`time_to_headers_seconds_bucket{name="chat",le="30"}`:                "0+2x60",
	`time_to_headers_seconds_bucket{name="chat",le="+Inf"}`:              "0+2x60",
	`time_to_first_event_seconds_bucket{name="chat",le="1"}`:             "0+2x60",
	`time_to_first_event_seconds_bucket{name="chat",le="60"}`:            "0+2x60",
	`time_to_first_event_seconds_bucket{name="chat",le="+Inf"}`:          "0+2x60",
}

// after is when the alerts are evaluated. Everything happens at the start or at
// 20 minutes.
const after = "40m"

// TestEveryAlertFiresForItsCause checks that with the changed series the alert
// fires and no other, or none if there is no alert.
func TestEveryAlertFiresForItsCause(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		alert  string // with the labels that it has besides name and severity
		change series
	}{
		{"nothing is wrong", "", nil},

		{"one stream in ten is broken off", `SSEUpstreamErrors`, series{
			`streams_closed_total{name="chat",reason="client_closed"}`:  "0+18x60",
			`streams_closed_total{name="chat",reason="upstream_error"}`: "0+2x60",
		}},
		{"one stream in thirty is broken off", "", series{
			`streams_closed_total{name="chat",reason="client_closed"}`:  "0+58x60",
			`streams_closed_total{name="chat",reason="upstream_error"}`: "0+2x60",
		}},
		{"three streams are broken off, and nobody else leaves", "", series{
			`streams_closed_total{name="chat",reason="client_closed"}`:  "0+0x60",
			`streams_closed_total{name="chat",reason="upstream_error"}`: "0+0x30 1+1x2 3+0x30",
		}},

		{"two thirds of the streams are cut", `SSEStreamsDropped`, series{
			`streams{name="chat",proto="HTTP/2.0"}`: "100+0x36 33+0x30",
		}},
		{"a third of the streams is cut", "", series{
			`streams{name="chat",proto="HTTP/2.0"}`: "100+0x36 67+0x30",
		}},
		{"two thirds of a few streams are cut", "", series{
			`streams{name="chat",proto="HTTP/2.0"}`: "18+0x36 6+0x30",
		}},
		{"the streams move to another protocol", "", series{
			`streams{name="chat",proto="HTTP/2.0"}`: "100+0x36 0+0x30",
			`streams{name="chat",proto="HTTP/3.0"}`: "0+0x36 100+0x30",
		}},

		{"a client a minute takes nothing", `SSEWriteTimeouts`, series{
			`streams_closed_total{name="chat",reason="write_timeout"}`: "0+1x60",
		}},
		{"a client takes nothing now and then", "", series{
			`streams_closed_total{name="chat",reason="write_timeout"}`: "0+0x15 3+0x15 6+0x30",
		}},

		{"one client a minute falls behind", `SSEClientsLag`, series{
			`streams_closed_total{name="chat",reason="lagged"}`: "0+1x60",
		}},
		{"a client falls behind now and then", "", series{
			`streams_closed_total{name="chat",reason="lagged"}`: "0+0x15 3+0x15 6+0x30",
		}},

		{"the first stream that is compressed", `SSEUnprotectedStreams cause="content_encoding"`, series{
			`streams_unprotected_total{name="chat",cause="content_encoding"}`: "0+0x30 1+0x30",
		}},
		{"the first stream that is JSON", `SSEUnprotectedStreams cause="not_an_event_stream"`, series{
			`streams_unprotected_total{name="chat",cause="not_an_event_stream"}`: "0+0x30 1+0x30",
		}},
		{"the last stream that was compressed is long ago", "", series{
			`streams_unprotected_total{name="chat",cause="content_encoding"}`: "0+0x5 1+0x60",
		}},

		{"an upstream pauses in mid-line", `SSEHeartbeatsDeferred`, series{
			`heartbeats_deferred_total{name="chat"}`: "0+60x60",
		}},
		{"a heartbeat in twenty is deferred", "", series{
			`heartbeats_deferred_total{name="chat"}`: "0+20x60",
		}},

		{"headers after 20 s", `SSESlowHeaders`, series{
			`time_to_headers_seconds_bucket{name="chat",le="1"}`: "0+0x60",
		}},
		{"headers after 20 s for one stream in forty", "", series{
			`time_to_headers_seconds_bucket{name="chat",le="1"}`:    "0+39x60",
			`time_to_headers_seconds_bucket{name="chat",le="30"}`:   "0+40x60",
			`time_to_headers_seconds_bucket{name="chat",le="+Inf"}`: "0+40x60",
		}},
		{"first events after 40 s", `SSESlowFirstEvent`, series{
			`time_to_first_event_seconds_bucket{name="chat",le="1"}`: "0+0x60",
		}},

		{"clients come back in a loop", `SSEShortStreams`, series{
			`streams_opened_total{name="chat",proto="HTTP/2.0"}`:    "0+120x60",
			`stream_duration_seconds_bucket{name="chat",le="1"}`:    "0+118x60",
			`stream_duration_seconds_bucket{name="chat",le="300"}`:  "0+120x60",
			`stream_duration_seconds_bucket{name="chat",le="+Inf"}`: "0+120x60",
			`stream_duration_seconds_count{name="chat"}`:            "0+120x60",
		}},
		{"few streams, and all are short", "", series{
			`stream_duration_seconds_bucket{name="chat",le="1"}`: "0+2x60",
		}},

		{"the first request that is refused", `SSEStreamsRefused limit="max_streams"`, series{
			`streams_refused_total{name="chat",limit="max_streams"}`: "0+0x33 1+0x30",
		}},
		{"the last request that was refused is long ago", "", series{
			`streams_refused_total{name="chat",limit="max_streams"}`: "0+0x5 1+0x60",
		}},

		// A status has no series before its first failure.
		{"upstreams fail after early starts", `SSEEarlyStartFailures status="500"`, series{
			`early_start_failures_total{name="chat",status="500"}`: "1+1x60",
		}},
		{"an upstream fails after an early start", "", series{
			`early_start_failures_total{name="chat",status="500"}`: "1+0x60",
		}},

		{"reconnect_on answers for an upstream that stays away", `SSEReconnectLoop status="502"`, series{
			`reconnects_answered_total{name="chat",status="502"}`: "0+90x60",
		}},
		{"reconnect_on answers for a restart", "", series{
			`reconnects_answered_total{name="chat",status="502"}`: "0+0x33 90 180 180+0x30",
		}},

		{"upstreams do not come back", `SSEUpstreamRetriesFail`, series{
			`upstream_retries_total{name="chat",result="failed"}`:  "0+4x60",
			`upstream_retries_total{name="chat",result="resumed"}`: "0+1x60",
		}},
		{"upstreams refuse those who come back", `SSEUpstreamRetriesFail`, series{
			`upstream_retries_total{name="chat",result="refused"}`: "0+4x60",
		}},
		{"upstreams come back at the second try", "", series{
			`upstream_retries_total{name="chat",result="failed"}`:  "0+4x60",
			`upstream_retries_total{name="chat",result="resumed"}`: "0+4x60",
		}},

		{"clients come back too late", `SSEClientsMissEvents`, series{
			`resumes_total{name="chat",result="unknown"}`: "0+1x60",
		}},
		{"journals are too short", `SSEClientsMissEvents`, series{
			`resumes_total{name="chat",result="gap"}`: "0+1x60",
		}},
		{"one client in a hundred comes back too late", "", series{
			`resumes_total{name="chat",result="resumed"}`: "0+99x60",
			`resumes_total{name="chat",result="unknown"}`: "0+1x60",
		}},

		{"journals have used up what they may", `SSEJournalsFull`, series{
			`journal_bytes{name="chat"}`: "260000000+0x60",
		}},
		{"journals have been full for a moment", "", series{
			`journal_bytes{name="chat"}`: "1000000+0x36 260000000+0x30",
		}},

		{"the store is away", `SSEStoreFails op="write"`, series{
			`store_errors_total{name="chat",op="write"}`: "0+1x60",
		}},
		{"the store has failed once, an hour ago", "", series{
			`store_errors_total{name="chat",op="write"}`: "0 1+0x60",
		}},
	}

	// promtool also compares annotations, unless it is asked for the series
	// that Prometheus itself creates from its alerts.
	type sample struct {
		Labels string  `json:"labels"`
		Value  float64 `json:"value"`
	}
	type query struct {
		Expr    string   `json:"expr"`
		Time    string   `json:"eval_time"`
		Samples []sample `json:"exp_samples"`
	}
	type input struct {
		Series string `json:"series"`
		Values string `json:"values"`
	}
	type test struct {
		Name     string  `json:"name"`
		Interval string  `json:"interval"`
		Input    []input `json:"input_series"`
		Queries  []query `json:"promql_expr_test"`
	}
	critical := []string{"SSEStreamsDropped"}
	var tests []test
	missing := alerts(t)
	for _, row := range rows {
		all := make(series)
		for _, some := range []series{steady, row.change} {
			for name, values := range some {
				all[name] = values
			}
		}
		one := test{Name: row.name, Interval: "1m"}
		for name, values := range all {
			one.Input = append(one.Input, input{"caddy_sse_" + name, values})
		}
		// promtool's output names only the query of a failed test.
		firing := query{Expr: `ALERTS{alertstate="firing"} # ` + row.name, Time: after}
		if row.alert != "" {
			alert, labels, more := strings.Cut(row.alert, " ")
			severity := "warning"
			if slices.Contains(critical, alert) {
				severity = "critical"
			}
			if more {
				labels = "," + labels
			}
			firing.Samples = []sample{{fmt.Sprintf(`ALERTS{alertname=%q,alertstate="firing",name="chat",severity=%q%s}`, alert, severity, labels), 1}}
			missing = slices.DeleteFunc(missing, func(name string) bool { return name == alert })
		}
		one.Queries = []query{firing}
		tests = append(tests, one)
	}
	if len(missing) > 0 {
		t.Errorf("no row for %v", missing)
	}
	file, err := json.MarshalIndent(map[string]any{ // JSON is YAML
		"rule_files": []string{example(t, "alerts.yml")}, "evaluation_interval": "1m", "tests": tests,
	}, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	path := harness.WriteFile(t, t.TempDir(), "tests.json", string(file))
	harness.Run(t, harness.Command(promtool(t), "test", "rules", path))
}
