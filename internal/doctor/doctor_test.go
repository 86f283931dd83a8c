package doctor_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/internal/doctor"
)

// checkThrough checks a probe through some hops; the first one is next to the
// probe.
func checkThrough(t *testing.T, config doctor.Config, p *caddysse.Probe, hops ...hop) *doctor.Report {
	t.Helper()
	n := new(network)
	addr := "probe:80"
	n.serve(t, addr, probe(t, p))
	for i, h := range hops {
		h.network, h.to = n, addr
		addr = fmt.Sprintf("hop%d:80", i)
		n.serve(t, addr, h)
	}
	config.URL, config.Token, config.Dial = "http://"+strings.TrimSuffix(addr, ":80")+"/probe", "sesame", n.dial
	report, err := doctor.Check(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func codes(r *doctor.Report) string {
	var codes []string
	for _, f := range r.Findings {
		codes = append(codes, f.Code)
	}
	slices.Sort(codes)
	return strings.Join(codes, " ")
}

func dump(t *testing.T, r *doctor.Report) {
	t.Helper()
	var text strings.Builder
	for _, test := range r.Tests {
		fmt.Fprintln(&text, test.Line())
	}
	r.WriteText(&text)
	t.Logf("%s %+v\n%s", r.Result, r.Covered, text.String())
}

// evidence returns the evidence of type E in a report.
func evidence[E any](t *testing.T, r *doctor.Report) E {
	t.Helper()
	for _, f := range r.Findings {
		if e, ok := f.Evidence.(E); ok {
			return e
		}
	}
	var none E
	t.Errorf("no finding has %T", none)
	return none
}

func near(got, want, within float64) bool { return got >= want-within && got <= want+within }

func TestEachFaultIsOneFinding(t *testing.T) {
	for _, test := range []struct {
		name  string
		hop   hop
		codes string
		check func(t *testing.T, r *doctor.Report)
	}{
		{"no fault", hop{}, "", func(t *testing.T, r *doctor.Report) {
			if r.Status() != 0 || r.Covered.SilenceSeconds < 60 || r.Covered.AgeSeconds < 60 || r.Covered.Bytes != 64<<10 {
				t.Errorf("%d, %+v", r.Status(), r.Covered)
			}
		}},
		{"headers held until the first byte", hop{headersHeld: true}, "headers_held", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.HeadersHeld](t, r); !near(e.HeldSeconds, 1, 0.1) {
				t.Errorf("%+v", e)
			}
		}},
		{"a buffer of 4 KiB", hop{body: bufferOf(4 << 10)}, "buffered", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Buffered](t, r); e.BufferBytes != 4<<10 || !e.Exact || e.HeldSeconds < 1 {
				t.Errorf("%+v", e)
			}
		}},
		{"a buffer of 4 KiB with the headers in it", hop{body: headBuffer, headersHeld: true}, "buffered", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Buffered](t, r); e.BufferBytes != 4<<10 || !e.Exact {
				t.Errorf("%+v", e)
			}
		}},
		{"a buffer of 1 KiB", hop{body: bufferOf(1 << 10)}, "buffered", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Buffered](t, r); e.BufferBytes != 1<<10 {
				t.Errorf("%+v", e)
			}
		}},
		{"a buffer of 48 KiB", hop{body: bufferOf(48 << 10)}, "buffered", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Buffered](t, r); e.BufferBytes < 24<<10 || e.BufferBytes > 96<<10 {
				t.Errorf("%+v", e)
			}
		}},
		{"buffering to the end", hop{body: toEnd}, "buffered_to_end", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.BufferedToEnd](t, r); e.HeldBytes < 128000 || e.HeldSeconds < 8 {
				t.Errorf("%+v", e)
			}
		}},
		{"buffering to the end, headers too", hop{body: toEnd, headersHeld: true}, "buffered_to_end", nil},
		{"an idle timer of 10 s", hop{idle: 10 * time.Second}, "idle_timeout", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.IdleTimeout](t, r); !near(e.Seconds, 10, 0.1) || e.Clean {
				t.Errorf("%+v", e)
			}
		}},
		{"an idle timer that ends cleanly", hop{idle: 30 * time.Second, cleanly: true}, "idle_timeout", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.IdleTimeout](t, r); !near(e.Seconds, 30, 0.1) || !e.Clean {
				t.Errorf("%+v", e)
			}
		}},
		{"a total cap of 15 s", hop{total: 15 * time.Second}, "total_cap", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.TotalCap](t, r); !near(e.Seconds, 15, 0.1) || e.Clean {
				t.Errorf("%+v", e)
			}
		}},
		{"gzip without flush", hop{body: gzipped(false, false)}, "compressed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Compressed](t, r); e != (doctor.Compressed{ContentEncoding: "gzip"}) {
				t.Errorf("%+v", e)
			}
		}},
		{"gzip with flush", hop{body: gzipped(true, false)}, "compressed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Compressed](t, r); e != (doctor.Compressed{ContentEncoding: "gzip", Flushed: true}) {
				t.Errorf("%+v", e)
			}
		}},
		{"gzip unasked, without flush", hop{body: gzipped(false, true)}, "compressed", nil},
		{"Accept stripped", hop{request: strips("Accept")}, "request_changed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.RequestChanged](t, r); e != (doctor.RequestChanged{Header: "Accept", Sent: "text/event-stream"}) {
				t.Errorf("%+v", e)
			}
		}},
		{"Last-Event-ID stripped", hop{request: strips("Last-Event-ID")}, "last_event_id_lost", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.LastEventIDLost](t, r); e.Sent == "" || e.Arrived != "" {
				t.Errorf("%+v", e)
			}
		}},
		{"Cache-Control changed", hop{request: func(r *http.Request) { r.Header.Set("Cache-Control", "max-age=0") }}, "request_changed", nil},
		{"Cache-Control with more in it", hop{request: func(r *http.Request) { r.Header.Set("Cache-Control", "no-cache, max-age=0") }}, "", nil},
		{"POST made GET", hop{request: func(r *http.Request) { r.Method = "GET" }}, "request_changed", nil},
		{"body dropped", hop{request: func(r *http.Request) { r.Body, r.ContentLength = http.NoBody, 0 }}, "request_changed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.RequestChanged](t, r); e != (doctor.RequestChanged{Header: "body", Sent: "14 bytes", Arrived: "0 bytes"}) {
				t.Errorf("%+v", e)
			}
		}},
		{"HTTP/1.0", hop{http10: true}, "http_1_0", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.HTTP10](t, r); e.Arrived != "HTTP/1.0" {
				t.Errorf("%+v", e)
			}
		}},
		{"Nagle with delayed ACK", hop{body: waits(200*time.Millisecond, false)}, "delayed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Delayed](t, r); !near(e.DelaySeconds, 0.2, 0.05) {
				t.Errorf("%+v", e)
			}
		}},
		{"a cork", hop{body: waits(220*time.Millisecond, true)}, "delayed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Delayed](t, r); !near(e.DelaySeconds, 0.2, 0.05) {
				t.Errorf("%+v", e)
			}
		}},
		{"Nagle with the kernel's delayed ACK", hop{body: waits(40*time.Millisecond, false)}, "", nil},
		{"a flush each 700 ms", hop{body: ticks(700 * time.Millisecond)}, "delayed", nil},
		{"a flush each 3 s", hop{body: ticks(3 * time.Second)}, "delayed", nil},

		{"idle timer and cap", hop{idle: 10 * time.Second, total: 15 * time.Second}, "idle_timeout total_cap", nil},
		{"headers held and an idle timer", hop{headersHeld: true, idle: 10 * time.Second}, "headers_held idle_timeout", nil},
		{"a buffer and Last-Event-ID stripped", hop{body: bufferOf(4 << 10), request: strips("Last-Event-ID")}, "buffered last_event_id_lost", nil},
		{"a buffer and an idle timer", hop{body: bufferOf(4 << 10), idle: 10 * time.Second}, "buffered idle_timeout", nil},
		{"a buffer and a cap", hop{body: bufferOf(4 << 10), total: 15 * time.Second}, "buffered total_cap", nil},
		{"to the end and a cap", hop{body: toEnd, headersHeld: true, total: 15 * time.Second}, "buffered_to_end total_cap", nil},
		{"to the end and an idle timer", hop{body: toEnd, headersHeld: true, idle: 12 * time.Second}, "buffered_to_end idle_timeout", nil},
		{"gzip and HTTP/1.0", hop{body: gzipped(false, false), http10: true}, "compressed http_1_0", nil},
		{"a delay and an idle timer", hop{body: waits(200*time.Millisecond, true), idle: 20 * time.Second}, "delayed idle_timeout", nil},
		{"Accept and Last-Event-ID stripped", hop{request: strips("Accept", "Last-Event-ID")}, "last_event_id_lost request_changed", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := checkThrough(t, doctor.Config{}, new(caddysse.Probe), test.hop)
				if got := codes(r); got != test.codes {
					t.Errorf("found %q, want %q", got, test.codes)
				}
				if want := map[bool]int{true: 0, false: 1}[test.codes == ""]; r.Status() != want {
					t.Errorf("status %d, want %d", r.Status(), want)
				}
				if test.check != nil {
					test.check(t, r)
				}
				if r.Seconds > 75.1 {
					t.Errorf("took %v s", r.Seconds)
				}
				for _, f := range r.Findings {
					if f.Seen == "" || f.Means == "" || len(f.Set) == 0 || f.Docs == "" {
						t.Errorf("incomplete: %+v", f)
					}
				}
				if t.Failed() {
					dump(t, r)
				}
			})
		})
	}
}

func strips(names ...string) func(*http.Request) {
	return func(r *http.Request) {
		for _, name := range names {
			r.Header.Del(name)
		}
	}
}

func TestFewPlacesAreNoFinding(t *testing.T) {
	for _, places := range []int{1, 2, 3, 5} {
		t.Run(fmt.Sprint(places), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := checkThrough(t, doctor.Config{}, &caddysse.Probe{MaxProbes: places}, hop{})
				if r.Status() != 0 || r.Seconds > 75 || r.Covered.SilenceSeconds < 10 || r.Covered.AgeSeconds < 10 {
					t.Errorf("status %d", r.Status())
					dump(t, r)
				}
				r = checkThrough(t, doctor.Config{}, &caddysse.Probe{MaxProbes: places}, hop{total: 9 * time.Second, idle: 5 * time.Second})
				if got := codes(r); got != "idle_timeout total_cap" {
					t.Errorf("found %q", got)
					dump(t, r)
				}
			})
		})
	}
}

func TestPlacesThatOthersHaveAreWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(network)
		n.serve(t, "probe:80", probe(t, &caddysse.Probe{MaxProbes: 1}))
		ask := func(script string) *http.Response {
			tr := &http.Transport{DialContext: n.dial, DisableKeepAlives: true}
			req, _ := http.NewRequest("GET", "http://probe/?script="+script, nil)
			req.Header.Set("Sse-Probe-Token", "sesame")
			res, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			return res
		}
		res := ask("w20s")
		defer res.Body.Close()
		config := doctor.Config{URL: "http://probe/", Token: "sesame", Dial: n.dial}
		r, err := doctor.Check(context.Background(), config)
		if err != nil {
			t.Fatal(err)
		}
		if r.Status() != 0 || r.Seconds < 20 {
			t.Errorf("status %d", r.Status())
			dump(t, r)
		}

		res = ask("w290s")
		defer res.Body.Close()
		if r, _ = doctor.Check(context.Background(), config); r.Status() != 2 || !strings.Contains(r.Error, "no place") || len(r.Findings) > 0 {
			t.Errorf("status %d", r.Status())
			dump(t, r)
		}
	})
}

func TestAProbeThatAllowsLittleIsAskedForLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := checkThrough(t, doctor.Config{}, &caddysse.Probe{MaxDuration: caddy.Duration(12 * time.Second)}, hop{body: bufferOf(4 << 10)})
		if got := codes(r); got != "buffered" || len(r.Untold) > 0 {
			t.Errorf("found %q", got)
			dump(t, r)
		}
		if e := evidence[doctor.Buffered](t, r); e.BufferBytes != 4<<10 {
			t.Errorf("%+v", e)
		}
	})
}

func TestAShortCheckFindsTheSame(t *testing.T) {
	for name, test := range map[string]struct {
		hop   hop
		codes string
	}{
		"nothing":    {hop{}, ""},
		"a buffer":   {hop{body: bufferOf(4 << 10)}, "buffered"},
		"to the end": {hop{body: toEnd}, "buffered_to_end"},
		"idle, cap":  {hop{idle: 3 * time.Second, total: 6 * time.Second}, "idle_timeout total_cap"},
		"a delay":    {hop{body: waits(200*time.Millisecond, true)}, "delayed"},
		"headers":    {hop{headersHeld: true}, "headers_held"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := checkThrough(t, doctor.Config{For: 10 * time.Second}, new(caddysse.Probe), test.hop)
				if got := codes(r); got != test.codes || r.Seconds > 10.1 {
					t.Errorf("found %q, want %q", got, test.codes)
					dump(t, r)
				}
			})
		})
	}
}

func TestARestartIsNoFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		restarted := make(chan struct{})
		time.AfterFunc(20*time.Second, func() { close(restarted) })
		r := checkThrough(t, doctor.Config{}, new(caddysse.Probe), hop{restarted: restarted})
		if r.Status() != 2 || len(r.Findings) > 0 || !strings.Contains(strings.Join(r.Untold, " "), "restarted") {
			t.Errorf("status %d", r.Status())
			dump(t, r)
		}
	})
}

func TestOneOfTwoStreamsThatIsCutIsNoFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Bool
		r := checkThrough(t, doctor.Config{}, new(caddysse.Probe), hop{cutsOnly: func(r *http.Request) bool {
			return strings.Contains(r.URL.RawQuery, "w1s%29%2Ce") && asked.CompareAndSwap(false, true)
		}, total: 15 * time.Second})
		if r.Status() != 2 || len(r.Findings) > 0 || !strings.Contains(strings.Join(r.Untold, " "), "one of the two") {
			t.Errorf("status %d", r.Status())
			dump(t, r)
		}
	})
}

func TestWhatMakesNoSenseIsAnError(t *testing.T) {
	for _, test := range []struct {
		config doctor.Config
		named  string
	}{
		{doctor.Config{URL: ""}, "http://"},
		{doctor.Config{URL: "example.com/events"}, "http://"},
		{doctor.Config{URL: "ftp://example.com/"}, "http://"},
		{doctor.Config{URL: "http://user:secret@[::1/"}, "can't be read"},
		{doctor.Config{URL: "http://example.com/", HTTP: "1.0"}, "--http"},
		{doctor.Config{URL: "http://example.com/", For: time.Second}, "--for"},
		{doctor.Config{URL: "http://example.com/", Token: "t", Method: "PUT"}, "--method"},
	} {
		_, err := doctor.Check(context.Background(), test.config)
		if err == nil || !strings.Contains(err.Error(), test.named) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v does not name %s", test.config, err, test.named)
		}
	}
}

func TestHTTPVersionsThatCannotBeAreSaid(t *testing.T) {
	for _, test := range []struct {
		config doctor.Config
		named  string
	}{
		{doctor.Config{URL: "http://127.0.0.1:1/", HTTP: doctor.HTTP3}, "https"},
		{doctor.Config{URL: "http://127.0.0.1:1/", HTTP: doctor.HTTP2, Getenv: func(name string) string {
			return map[string]string{"http_proxy": "http://127.0.0.1:1"}[name]
		}}, "proxy"},
	} {
		r, err := doctor.Check(context.Background(), test.config)
		if err != nil || r.Status() != 2 || !strings.Contains(r.Error, test.named) {
			t.Errorf("%+v: %+v %v", test.config, r, err)
		}
	}
}
