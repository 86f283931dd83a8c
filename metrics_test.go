package caddysse_test

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// samples are the module's metrics at one scrape, each under its name and
// labels as in the text format.
type samples struct {
	values   map[string]float64
	families map[string]*dto.MetricFamily
}

// scrape requests the real /metrics of the admin API.
func (c *testCaddy) scrape(t testing.TB) samples {
	t.Helper()
	res, body := c.admin("GET", "/metrics")
	if res.StatusCode != http.StatusOK {
		t.Fatalf("scraping: %s %s", res.Status, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatalf("scraping: %v", err)
	}
	maps.DeleteFunc(families, func(name string, _ *dto.MetricFamily) bool { return !strings.HasPrefix(name, "caddy_sse_") })
	s := samples{make(map[string]float64), families}
	for name, family := range families {
		for _, m := range family.Metric {
			var labels []string
			for _, label := range m.Label {
				labels = append(labels, fmt.Sprintf("%s=%q", label.GetName(), label.GetValue()))
			}
			slices.Sort(labels)
			key := name + "{" + strings.Join(labels, ",") + "}"
			switch family.GetType() {
			case dto.MetricType_COUNTER:
				s.values[key] = m.Counter.GetValue()
			case dto.MetricType_GAUGE:
				s.values[key] = m.Gauge.GetValue()
			case dto.MetricType_HISTOGRAM:
				s.values[key+"_count"] = float64(m.Histogram.GetSampleCount())
				s.values[key+"_sum"] = m.Histogram.GetSampleSum()
			default:
				t.Errorf("%s is a %s", name, family.GetType())
			}
		}
	}
	return s
}

// sum adds up the samples of a metric for a handler's name.
func (s samples) sum(metric, name string, labels ...string) float64 {
	sum := 0.0
	for key, value := range s.values {
		if strings.HasPrefix(key, "caddy_sse_"+metric+"{") && strings.Contains(key, fmt.Sprintf("name=%q", name)) &&
			!slices.ContainsFunc(labels, func(label string) bool { return !strings.Contains(key, label) }) {
			sum += value
		}
	}
	return sum
}

// expectAccounted checks that every stream of a name that was opened is either
// closed or live.
func (s samples) expectAccounted(t testing.TB, name string) (live float64) {
	t.Helper()
	opened, closed, live := s.sum("streams_opened_total", name), s.sum("streams_closed_total", name), s.sum("streams", name)
	if opened != closed+live {
		t.Errorf("%v streams have been opened, %v closed, and %v are live", opened, closed, live)
	}
	return live
}

// expectNoneBackwards checks that no counter has decreased since before.
func (s samples) expectNoneBackwards(t testing.TB, before samples) {
	t.Helper()
	for key, old := range before.values {
		if strings.HasPrefix(key, "caddy_sse_streams{") {
			continue // the gauge
		}
		if value, ok := s.values[key]; !ok || value < old {
			t.Errorf("%s went from %v to %v (there: %v)", key, old, value, ok)
		}
	}
}

// The metrics of the contract, except those that only limits, early_start,
// reconnect_on, upstream_retry, share and resume have. Those are tested with
// these settings.
var contractMetrics = map[string]struct {
	kind   dto.MetricType
	labels []string
}{
	"caddy_sse_streams":                     {dto.MetricType_GAUGE, []string{"name", "proto"}},
	"caddy_sse_streams_opened_total":        {dto.MetricType_COUNTER, []string{"name", "proto"}},
	"caddy_sse_streams_closed_total":        {dto.MetricType_COUNTER, []string{"name", "reason"}},
	"caddy_sse_streams_unprotected_total":   {dto.MetricType_COUNTER, []string{"cause", "name"}},
	"caddy_sse_events_total":                {dto.MetricType_COUNTER, []string{"name"}},
	"caddy_sse_bytes_total":                 {dto.MetricType_COUNTER, []string{"name"}},
	"caddy_sse_heartbeats_total":            {dto.MetricType_COUNTER, []string{"name"}},
	"caddy_sse_heartbeats_deferred_total":   {dto.MetricType_COUNTER, []string{"name"}},
	"caddy_sse_stream_duration_seconds":     {dto.MetricType_HISTOGRAM, []string{"name"}},
	"caddy_sse_time_to_headers_seconds":     {dto.MetricType_HISTOGRAM, []string{"name"}},
	"caddy_sse_time_to_first_event_seconds": {dto.MetricType_HISTOGRAM, []string{"name"}},
}

func TestTheMetricsAreThoseOfTheContract(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	name := uniqueName("all metrics")
	c := startCaddy(t, `
		sse 1h {
			name "`+name+`"
			prelude 1ms
		}
		reverse_proxy `+up.addr, withAdmin())
	for _, proto := range clientProtocols {
		o := c.open(t, c.client(proto), up, "/"+proto)
		o.body.expect(t, ":heartbeat\n\n")
		o.call.send("data: 1\n\n")
		o.body.expect(t, "data: 1\n\n")
		o.call.end()
		o.body.expectEnd(t)
	}
	// A stream of each kind that can't have frames.
	for path, text := range map[string]string{"/encoded": "\x1f\x8b", "/json": "{}"} {
		cl := c.client("h1")
		e := cl.begin(cl.request(t, "GET", path, nil, "Accept-Encoding: gzip"))
		call := up.accept(t)
		call.start(eventStream, onlyText(path == "/encoded", "Content-Encoding: gzip")...)
		body := e.headers(t).follow()
		call.send(text)
		body.wait(func(unread string) bool { return strings.HasSuffix(unread, text) })
		call.end()
		body.rest()
	}
	c.waitForStreams(t, 0)

	s := c.scrape(t)
	for name, want := range contractMetrics {
		family := s.families[name]
		if family == nil {
			t.Errorf("%s is missing", name)
			continue
		}
		if family.GetType() != want.kind {
			t.Errorf("%s is a %s, want a %s", name, family.GetType(), want.kind)
		}
		for _, m := range family.Metric {
			var labels []string
			for _, label := range m.Label {
				labels = append(labels, label.GetName())
			}
			slices.Sort(labels)
			if !slices.Equal(labels, want.labels) {
				t.Errorf("%s has the labels %q, want %q", name, labels, want.labels)
			}
		}
	}
	others := []string{
		"caddy_sse_streams_refused_total", "caddy_sse_reconnects_answered_total", "caddy_sse_early_start_failures_total",
		"caddy_sse_upstream_retries_total", "caddy_sse_runs", "caddy_sse_resumes_total", "caddy_sse_journal_bytes",
		"caddy_sse_store_errors_total", "caddy_sse_store_duration_seconds",
	}
	for name := range s.families {
		if _, ok := contractMetrics[name]; !ok && !slices.Contains(others, name) {
			t.Errorf("%s is not in the contract", name)
		}
	}
	for key, want := range map[string]float64{
		`caddy_sse_streams{name="NAME",proto="HTTP/1.1"}`:                              0,
		`caddy_sse_streams_opened_total{name="NAME",proto="HTTP/1.1"}`:                 3,
		`caddy_sse_streams_opened_total{name="NAME",proto="HTTP/2.0"}`:                 1,
		`caddy_sse_streams_opened_total{name="NAME",proto="HTTP/3.0"}`:                 1,
		`caddy_sse_streams_closed_total{name="NAME",reason="upstream_closed"}`:         5,
		`caddy_sse_streams_closed_total{name="NAME",reason="client_closed"}`:           0,
		`caddy_sse_streams_unprotected_total{cause="content_encoding",name="NAME"}`:    1,
		`caddy_sse_streams_unprotected_total{cause="not_an_event_stream",name="NAME"}`: 1,
		`caddy_sse_events_total{name="NAME"}`:                                          3,
		`caddy_sse_bytes_total{name="NAME"}`:                                           3*9 + 4,
		`caddy_sse_heartbeats_deferred_total{name="NAME"}`:                             0,
		`caddy_sse_stream_duration_seconds{name="NAME"}_count`:                         5,
		`caddy_sse_time_to_headers_seconds{name="NAME"}_count`:                         5,
		`caddy_sse_time_to_first_event_seconds{name="NAME"}_count`:                     3,
	} {
		key = strings.Replace(key, "NAME", name, 1)
		if got, ok := s.values[key]; !ok || got != want {
			t.Errorf("%s is %v (there: %v), want %v", key, got, ok, want)
		}
	}
	if beats := s.sum("heartbeats_total", name); beats < 3 || beats > 4 {
		t.Errorf("%v heartbeats", beats)
	}
	buckets := s.families["caddy_sse_stream_duration_seconds"].Metric[0].Histogram.Bucket
	if first, last := buckets[0].GetUpperBound(), buckets[len(buckets)-2].GetUpperBound(); first != 1 || last != 86400 {
		t.Errorf("durations are told from %v to %v", first, last)
	}
}

func onlyText(wanted bool, text string) []string {
	if !wanted {
		return nil
	}
	return []string{text}
}

func TestThePrometheusLinterHasNothingToSay(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, r.URL.Query().Get("body"))
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	for _, body := range []string{"data:%0a%0a", "{}"} {
		if _, err := c.client("h1").get(t, "/?body="+body).text(); err != nil {
			t.Fatal(err)
		}
	}
	c.waitForStreams(t, 0)
	_, text := c.admin("GET", "/metrics")
	var ours strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, "caddy_sse_") {
			ours.WriteString(line)
		}
	}
	problems, err := promlint.New(strings.NewReader(ours.String())).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	if count := strings.Count(ours.String(), "# HELP"); count < len(contractMetrics) {
		t.Errorf("only %d metrics were looked at", count)
	}
}

func TestLiveStreamsAreCountedInTheTotals(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	name := uniqueName("counted live")
	c := startCaddy(t, `
		sse {
			prelude off
			name "`+name+`"
		}
		reverse_proxy `+up.addr, withAdmin())
	for n, proto := range clientProtocols {
		o := c.open(t, c.client(proto), up, "/"+proto)
		o.call.send("data: 1\n\ndata: 2\n\n")
		o.body.expect(t, "data: 1\n\ndata: 2\n\n")
		s := c.scrape(t)
		if live := s.expectAccounted(t, name); live != float64(n+1) {
			t.Errorf("%v streams are live, want %d", live, n+1)
		}
		if events := s.sum("events_total", name); events != float64(2*(n+1)) {
			t.Errorf("%v events, want %d", events, 2*(n+1))
		}
		if bytes := s.sum("bytes_total", name); bytes != float64(18*(n+1)) {
			t.Errorf("%v bytes, want %d", bytes, 18*(n+1))
		}
	}
}

func TestCountersNeverGoBackwards(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	removed := uniqueName("removed")
	site := `
		sse 1h {
			name %q
			prelude 1ms
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, fmt.Sprintf(site, removed), withAdmin())
	var before samples
	check := func(when string) {
		t.Helper()
		s := c.scrape(t)
		s.expectNoneBackwards(t, before)
		s.expectAccounted(t, removed)
		if t.Failed() {
			t.Fatal(when)
		}
		before = s
	}
	check("at first")
	live := c.open(t, c.client("h2"), up, "/live")
	for i := range 3 {
		o := c.open(t, c.client("h1"), up, fmt.Sprintf("/%d", i))
		o.call.send("data: 1\n\n")
		o.body.wait(func(unread string) bool { return strings.HasSuffix(unread, "data: 1\n\n") })
		check("with a live stream")
		o.call.end()
		c.closedLine(t, o.path)
		check("with a closed stream")
	}
	c.reload(fmt.Sprintf(site, removed) + "\nencode gzip")
	check("after a reload")
	live.call.send("data: 1\n\n")
	live.body.wait(func(unread string) bool { return strings.HasSuffix(unread, "data: 1\n\n") })
	check("with an event of an old configuration")
	c.reload(fmt.Sprintf(site, "another"))
	check("with the handler gone")
	c.reload("respond hello")
	check("without any handler")
	live.call.end()
	c.closedLine(t, "/live")
	check("with a stream closed whose handler is gone")
	if closed := before.sum("streams_closed_total", removed); closed != 4 {
		t.Errorf("%v streams are closed, want 4", closed)
	}
	c.reload(fmt.Sprintf(site, removed))
	check("with the handler back")
	o := c.open(t, c.client("h1"), up, "/back")
	o.call.end()
	c.closedLine(t, "/back")
	check("and another stream")
	if opened := before.sum("streams_opened_total", removed); opened != 5 {
		t.Errorf("%v streams have been opened, want 5", opened)
	}
}

// Several handlers and servers register the collector with one registry.
func TestHandlersOfOneNameShareTheirMetrics(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		handle /a {
			sse {
				prelude off
				name shared
			}
			reverse_proxy `+up.addr+`
		}
		handle /b {
			sse {
				prelude off
				name shared
			}
			reverse_proxy `+up.addr+`
		}
		handle {
			sse {
				prelude off
				name "not shared"
			}
			reverse_proxy `+up.addr+`
		}`, withAdmin())
	for _, path := range []string{"/a", "/b", "/c"} {
		c.open(t, c.client("h1"), up, path)
	}
	s := c.scrape(t)
	if shared, other := s.sum("streams", "shared"), s.sum("streams", "not shared"); shared != 2 || other != 1 {
		t.Errorf("%v streams share a name, %v do not", shared, other)
	}
}

// A value that a client chooses must not become a label, because it could fill
// the memory.
func TestNoLabelHasAValueThatAClientChooses(t *testing.T) {
	checkLeaks(t)
	site := answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Type", eventStream)
		_, err := io.WriteString(w, "event: CHOSEN\ndata: 1\n\n")
		return err
	})
	c := startCaddy(t, site, withAdmin())
	cl := c.client("h1")
	req := cl.request(t, "CHOSEN", "/CHOSEN?CHOSEN", nil, "User-Agent: CHOSEN", "X-Forwarded-For: CHOSEN", "Last-Event-ID: CHOSEN", "Accept: CHOSEN")
	req.Host = "CHOSEN"
	if _, err := cl.do(t, req).text(); err != nil {
		t.Fatal(err)
	}
	c.waitForStreams(t, 0)
	for key := range c.scrape(t).values {
		if strings.Contains(strings.ToUpper(key), "CHOSEN") {
			t.Errorf("%s", key)
		}
	}
}

func TestTheLongestWaitIsInTheHistograms(t *testing.T) {
	checkLeaks(t)
	name := uniqueName("histograms")
	c := startCaddy(t, strings.Replace(answerWith(t, func(w http.ResponseWriter, r *http.Request) error {
		time.Sleep(30 * time.Millisecond) // the time that an upstream needs
		w.Header().Set("Content-Type", eventStream)
		w.WriteHeader(http.StatusOK)
		time.Sleep(30 * time.Millisecond)
		_, err := io.WriteString(w, "data: 1\n\n")
		return err
	}), "sse", "sse {\nname "+name+"\n}", 1), withAdmin())
	if _, err := c.client("h1").get(t, "/").text(); err != nil {
		t.Fatal(err)
	}
	line := c.closedLine(t, "/")
	s := c.scrape(t)
	for metric, field := range map[string]string{
		"stream_duration_seconds":     "duration",
		"time_to_headers_seconds":     "time_to_headers",
		"time_to_first_event_seconds": "time_to_first_event",
	} {
		sum := s.values[fmt.Sprintf("caddy_sse_%s{name=%q}_sum", metric, name)]
		if difference := sum - line[field].(float64); difference > 1e-6 || difference < -1e-6 {
			t.Errorf("%s is %v in the metrics, %v in the log", field, sum, line[field])
		}
	}
}

func TestEverySeriesThatTheConfigurationNamesIsThereAtZero(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, `
		sse {
			prelude off
			name born
			max_streams 1
			reconnect_on 502 503
		}
		respond hello`, withAdmin())
	s := c.scrape(t)
	for _, key := range []string{
		`streams{name="born",proto="HTTP/1.1"}`,
		`streams_opened_total{name="born",proto="HTTP/2.0"}`,
		`streams_closed_total{name="born",reason="upstream_error"}`,
		`streams_closed_total{name="born",reason="drained"}`,
		`streams_refused_total{limit="max_streams",name="born"}`,
		`streams_refused_total{limit="max_streams_per_client",name="born"}`,
		`streams_unprotected_total{cause="content_encoding",name="born"}`,
		`streams_unprotected_total{cause="not_an_event_stream",name="born"}`,
		`reconnects_answered_total{name="born",status="502"}`,
		`reconnects_answered_total{name="born",status="503"}`,
		`events_total{name="born"}`,
		`bytes_total{name="born"}`,
		`heartbeats_total{name="born"}`,
		`heartbeats_deferred_total{name="born"}`,
		`stream_duration_seconds{name="born"}_count`,
		`time_to_headers_seconds{name="born"}_count`,
		`time_to_first_event_seconds{name="born"}_count`,
	} {
		if value, there := s.values["caddy_sse_"+key]; !there || value != 0 {
			t.Errorf("%s is %v, there: %t", key, value, there)
		}
	}
}

func TestTheFirstEventsTimeIsObservedWhileTheStreamIsOpen(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	name := uniqueName("first event")
	c := startCaddy(t, `
		sse 1h {
			name "`+name+`"
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	o := c.open(t, c.client("h1"), up, "/", acceptStream)
	count := func() float64 {
		return c.scrape(t).values[fmt.Sprintf("caddy_sse_time_to_first_event_seconds{name=%q}_count", name)]
	}
	if n := count(); n != 0 {
		t.Errorf("%v before the first event", n)
	}
	for range 3 {
		o.call.send("data: 1\n\n")
		o.body.expect(t, "data: 1\n\n")
	}
	// It is counted just after the write that the client has seen.
	eventually(t, "the first event is counted", func() bool { return count() == 1 })
	o.call.end()
	o.body.expectEnd(t)
	c.closedLine(t, "/")
	if n := count(); n != 1 {
		t.Errorf("%v after the end", n)
	}
}
