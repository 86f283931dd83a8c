package caddysse

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// registerMetrics registers the collector with the registry of a configuration,
// once for all its handlers.
func registerMetrics(registry *prometheus.Registry) error {
	err := registry.Register(collector)
	if _, again := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !again {
		return fmt.Errorf("sse: registering metrics: %w", err)
	}
	return nil
}

// metrics collects the figures of the registry of streams, and values that are
// observed once per stream. No write touches anything here.
type metrics struct {
	streams, opened, closed, events, bytes, heartbeats, deferred *prometheus.Desc

	runs, resumes, journalBytes *prometheus.Desc

	refused            *prometheus.CounterVec
	unprotected        *prometheus.CounterVec
	reconnects         *prometheus.CounterVec
	earlyStartFailures *prometheus.CounterVec
	retries            *prometheus.CounterVec
	storeErrors        *prometheus.CounterVec
	storeDuration      *prometheus.HistogramVec

	duration         *prometheus.HistogramVec
	timeToHeaders    *prometheus.HistogramVec
	timeToFirstEvent *prometheus.HistogramVec
}

const metricsPrefix = "caddy_sse_"

func newMetrics() *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(metricsPrefix+name, help, append([]string{"name"}, labels...), nil)
	}
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: metricsPrefix + name, Help: help, Buckets: buckets,
		}, []string{"name"})
	}
	counter := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricsPrefix + name, Help: help,
		}, []string{"name", label})
	}
	waits := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}
	return &metrics{
		streams:    desc("streams", "Streams that are open.", "proto"),
		opened:     desc("streams_opened_total", "Streams that have been opened.", "proto"),
		closed:     desc("streams_closed_total", "Streams that have ended, by the reason of the end.", "reason"),
		events:     desc("events_total", "Events from upstreams, without heartbeats."),
		bytes:      desc("bytes_total", "Bytes of upstreams' bodies, with the IDs that were added, without heartbeats."),
		heartbeats: desc("heartbeats_total", "Heartbeats that were sent, preludes included."),
		deferred:   desc("heartbeats_deferred_total", "Heartbeats that were due where the format allows none."),

		runs: desc("runs", "Upstream streams of resume and share, by state: with a client, without one, shared, "+
			"or ended and kept for clients that may come back.", "state"),
		resumes:      desc("resumes_total", "Clients that came back with an event ID, by result.", "result"),
		journalBytes: desc("journal_bytes", "Bytes in the journals of resume and share, overhead included."),

		refused:            counter("streams_refused_total", "Requests that were refused by a limit, by limit.", "limit"),
		unprotected:        counter("streams_unprotected_total", "Streams without heartbeats, as their body is not text, or without resume, as the journals are full, by cause.", "cause"),
		reconnects:         counter("reconnects_answered_total", "Errors that were answered with a reconnection time, by the error's status.", "status"),
		earlyStartFailures: counter("early_start_failures_total", "Early starts whose upstream then sent no stream, by its status.", "status"),
		retries:            counter("upstream_retries_total", "Tries to reach an upstream that broke off, by result.", "result"),

		storeErrors: counter("store_errors_total", "Failed operations of a store of resume, by operation.", "op"),
		storeDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    metricsPrefix + "store_duration_seconds",
			Help:    "Time that operations of a store of resume took, without those that wait for something new.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}, []string{"name", "op"}),

		duration: histogram("stream_duration_seconds", "How long streams were open.",
			[]float64{1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400}),
		timeToHeaders:    histogram("time_to_headers_seconds", "Time from a request to the headers of its stream.", waits),
		timeToFirstEvent: histogram("time_to_first_event_seconds", "Time from a request to the first event of its stream.", waits),
	}
}

// vectors are the parts that collect themselves.
func (m *metrics) vectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.refused, m.unprotected, m.reconnects, m.earlyStartFailures, m.retries, m.storeErrors, m.storeDuration,
		m.duration, m.timeToHeaders, m.timeToFirstEvent,
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{m.streams, m.opened, m.closed, m.events, m.bytes, m.heartbeats, m.deferred, m.runs, m.resumes, m.journalBytes} {
		descs <- desc
	}
	for _, vector := range m.vectors() {
		vector.Describe(descs)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	for _, g := range live.all() {
		t := g.totals()
		counter := func(desc *prometheus.Desc, n uint64, label ...string) {
			out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), append([]string{t.name}, label...)...)
		}
		for p := range protoCount {
			out <- prometheus.MustNewConstMetric(m.streams, prometheus.GaugeValue, float64(t.open[p]), t.name, p.String())
			counter(m.opened, t.opened[p], p.String())
		}
		for why := notEnded + 1; why < reasonCount; why++ {
			counter(m.closed, t.closed[why], why.String())
		}
		counter(m.events, t.counts.events)
		counter(m.bytes, t.counts.bytes)
		counter(m.heartbeats, t.counts.heartbeats)
		counter(m.deferred, t.counts.deferred)
		m.collectRuns(g, out)
	}
	for _, vector := range m.vectors() {
		vector.Collect(out)
	}
}

func (m *metrics) collectRuns(g *group, out chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, n int, label ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n), append([]string{g.name}, label...)...)
	}
	t := g.runTotals()
	for state := range runStateCount {
		gauge(m.runs, t.states[state], runStateNames[state])
	}
	for result := range resumeResultCount {
		out <- prometheus.MustNewConstMetric(m.resumes, prometheus.CounterValue, float64(t.resumes[result]),
			g.name, resumeResultNames[result])
	}
	gauge(m.journalBytes, t.journals)
}

// expect creates every series that a handler can add to, with the value 0: a
// query for the increase of a counter does not see the first event of a series
// that begins with it. The statuses of failed early starts are not known in
// advance.
func (m *metrics) expect(name string, reconnectOn []int, retries bool) {
	for _, met := range []limit{limitTotal, limitPerClient} {
		m.refused.WithLabelValues(name, string(met))
	}
	for _, cause := range []string{causeEncodedBody, causeOtherBody} {
		m.unprotected.WithLabelValues(name, cause)
	}
	for _, status := range reconnectOn {
		m.reconnects.WithLabelValues(name, strconv.Itoa(status))
	}
	if retries {
		for result := resumedTry; result <= refusedTry; result++ {
			m.retries.WithLabelValues(name, result.String())
		}
	}
	for _, times := range []*prometheus.HistogramVec{m.duration, m.timeToHeaders, m.timeToFirstEvent} {
		times.WithLabelValues(name)
	}
}

// expectStore is expect for a handler with a store.
func (m *metrics) expectStore(name string) {
	for _, op := range storeOps {
		m.storeErrors.WithLabelValues(name, string(op))
		if !op.waits() {
			m.storeDuration.WithLabelValues(name, string(op))
		}
	}
}

// observeOpened observes how long the headers took.
func (m *metrics) observeOpened(s *stream) {
	m.timeToHeaders.WithLabelValues(s.h.Name).Observe(s.opened.Seconds())
}

// observeClosed observes the age of a stream that has ended.
func (m *metrics) observeClosed(r report) {
	m.duration.WithLabelValues(r.name).Observe(r.duration.Seconds())
}

// observeFirstEvent observes how long the first event took, as soon as the client
// has it: an alert on this can't wait for the end of the stream.
func (m *metrics) observeFirstEvent(s *stream) {
	m.timeToFirstEvent.WithLabelValues(s.h.Name).Observe(s.firstEvent.Seconds())
}

// Interface guards
var _ prometheus.Collector = (*metrics)(nil)
