package doctor_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/doctor"
)

// listenTo checks a stream without a probe.
func listenTo(t *testing.T, config doctor.Config, stream http.HandlerFunc) *doctor.Report {
	t.Helper()
	n := new(network)
	n.serve(t, "site:80", stream)
	config.Dial = n.dial
	if config.URL == "" {
		config.URL = "http://site/events"
	}
	report, err := doctor.Check(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func begin(w http.ResponseWriter) io.Writer {
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.WriteHeader(http.StatusOK)
	http.NewResponseController(w).Flush()
	return flusher{w}
}

// dated returns an event that contains the time at which it was made. Time in a
// bubble begins in 2000.
func dated(n int) string {
	return fmt.Sprintf("id: %d-0\ndata: {\"n\":%d}\n\n", time.Now().AddDate(25, 0, 0).UnixMilli(), n)
}

func TestWithoutAProbeTheStreamItselfIsLookedAt(t *testing.T) {
	for _, test := range []struct {
		name   string
		stream http.HandlerFunc
		codes  string
		check  func(t *testing.T, r *doctor.Report)
	}{
		{"a stream that goes on", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			for n := range 1000 {
				io.WriteString(out, dated(n)+": beat\n\n")
				if r.Context().Err() != nil {
					return
				}
				time.Sleep(5 * time.Second)
			}
		}, "", func(t *testing.T, r *doctor.Report) {
			if r.Status() != 0 || !near(r.Covered.AgeSeconds, 75, 0.1) || !near(r.Covered.SilenceSeconds, 5, 0.1) || r.Covered.Bytes == 0 {
				t.Errorf("%d %+v", r.Status(), r.Covered)
			}
		}},
		{"a stream that ends", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(begin(w), "data: all\n\n")
		}, "", func(t *testing.T, r *doctor.Report) {
			if r.Status() != 0 || r.Seconds > 1 || len(r.Tests) != 1 || !r.Tests[0].Clean || r.Tests[0].Events != 1 {
				t.Errorf("%d %+v", r.Status(), r)
			}
		}},
		{"a stream that is broken off", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			for range 3 {
				io.WriteString(out, "data: 1\n\n")
				time.Sleep(7 * time.Second)
			}
			panic(http.ErrAbortHandler)
		}, "cut", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Cut](t, r); e != (doctor.Cut{AgeSeconds: 21, SilenceSeconds: 7}) {
				t.Errorf("%+v", e)
			}
		}},
		{"events in clumps", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			io.WriteString(out, dated(0))
			var held strings.Builder
			for n := range 40 {
				time.Sleep(500 * time.Millisecond)
				held.WriteString(dated(n + 1))
				if n%8 == 7 {
					io.WriteString(out, held.String())
					held.Reset()
				}
			}
		}, "clumped", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Clumped](t, r); e != (doctor.Clumped{Events: 8, SpreadSeconds: 3.5}) {
				t.Errorf("%+v", e)
			}
		}},
		{"a history first", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			for n := range 20 {
				fmt.Fprintf(out, "data: {\"time\":%d}\n\n", time.Now().AddDate(25, 0, 0).Unix()-1000+int64(n))
			}
			time.Sleep(time.Second)
		}, "", nil},
		{"events that were made together", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			for range 5 {
				io.WriteString(out, strings.Repeat(dated(1), 5))
				time.Sleep(3 * time.Second)
			}
		}, "", nil},
		{"a busy stream", func(w http.ResponseWriter, r *http.Request) {
			out := begin(w)
			for n := range 500 {
				io.WriteString(out, dated(n))
				time.Sleep(20 * time.Millisecond)
			}
		}, "", nil},
		{"gzip, flushed", func(w http.ResponseWriter, r *http.Request) {
			zipped(w, true)
		}, "compressed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Compressed](t, r); e != (doctor.Compressed{ContentEncoding: "gzip", Flushed: true}) {
				t.Errorf("%+v", e)
			}
		}},
		{"gzip, not flushed", func(w http.ResponseWriter, r *http.Request) {
			zipped(w, false)
		}, "compressed", func(t *testing.T, r *doctor.Report) {
			if e := evidence[doctor.Compressed](t, r); e != (doctor.Compressed{ContentEncoding: "gzip"}) {
				t.Errorf("%+v", e)
			}
		}},
		{"a coding that is none", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "none")
			io.WriteString(begin(w), "data: 1\n\n")
		}, "", func(t *testing.T, r *doctor.Report) {
			if r.Tests[0].Events != 1 {
				t.Errorf("%+v", r.Tests)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := listenTo(t, doctor.Config{}, test.stream)
				if got := codes(r); got != test.codes {
					t.Errorf("found %q, want %q", got, test.codes)
				}
				if test.check != nil {
					test.check(t, r)
				}
				if t.Failed() {
					dump(t, r)
				}
			})
		})
	}
}

func zipped(w http.ResponseWriter, flush bool) {
	w.Header().Set("Content-Encoding", "gzip")
	out := gzip.NewWriter(begin(w))
	for n := range 10 {
		io.WriteString(out, dated(n))
		if flush {
			out.Flush()
		}
		time.Sleep(time.Second)
	}
	out.Close()
}

func TestAnAnswerThatIsNoStreamIsUnknown(t *testing.T) {
	for _, test := range []struct {
		name, token, named string
		answer             http.HandlerFunc
	}{
		{"a page", "", "of the type text/html", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }},
		{"a page for a probe", "sesame", "of the type text/html", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }},
		{"no type", "", "without a Content-Type", func(w http.ResponseWriter, r *http.Request) { w.Header()["Content-Type"] = nil }},
		{"a redirect", "", "302 Found", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login?secret", http.StatusFound) }},
		{"response_buffers", "sesame", "501 Not Implemented, Via: 1.1 Caddy, Server: Caddy: a Caddy with response_buffers", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Via", "1.1 Caddy")
			w.Header().Set("Server", "Caddy")
			w.WriteHeader(http.StatusNotImplemented)
		}},
		{"another stream", "sesame", "none of an sse_probe", func(w http.ResponseWriter, r *http.Request) { io.WriteString(begin(w), "data: 1\n\n") }},
		{"no probe", "sesame", "its token is another one", func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }},
		{"marks that turn the text", "", "Server: \uFFFDabc", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Server", "\u202eabc")
			w.WriteHeader(http.StatusBadGateway)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := listenTo(t, doctor.Config{Token: test.token, For: 20 * time.Second}, test.answer)
				if r.Status() != 2 || r.Result != "unknown" || !strings.Contains(r.Error, test.named) {
					t.Errorf("%d %s %q, want %q", r.Status(), r.Result, r.Error, test.named)
				}
				if strings.Contains(r.Error, "secret") {
					t.Errorf("%q", r.Error)
				}
			})
		})
	}
}

func TestSecretsAreNeverTold(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"no answer": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"a stream":  func(w http.ResponseWriter, r *http.Request) { io.WriteString(begin(w), "data: 1\n\n") },
		"an error":  func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var told bytes.Buffer
				r := listenTo(t, doctor.Config{
					URL: "http://secret-user:secret-password@site/events?key=secret#secret", Token: "secret-token",
					Header: http.Header{"Cookie": {"secret"}},
					Begin:  func(plan string) { fmt.Fprintln(&told, plan) }, Done: func(test doctor.Test) { fmt.Fprintln(&told, test.Line()) },
					Progress: func(line string) { fmt.Fprintln(&told, line) },
				}, answer)
				r.WriteText(&told)
				json.NewEncoder(&told).Encode(r)
				if strings.Contains(told.String(), "secret") {
					t.Errorf("%s", told.String())
				}
				if r.URL != "http://site/events" {
					t.Error(r.URL)
				}
			})
		})
	}
}

func TestTheRequestSaysWhatItIsTold(t *testing.T) {
	var got *http.Request
	var body []byte
	stream := func(w http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body)
		io.WriteString(begin(w), "data: 1\n\n")
	}
	synctest.Test(t, func(t *testing.T) {
		listenTo(t, doctor.Config{}, stream)
		if got.Method != "GET" || got.Header.Get("Accept") != "text/event-stream" || got.Header.Get("Cache-Control") != "no-cache" || got.Header.Get("Last-Event-ID") != "" {
			t.Errorf("%s %v", got.Method, got.Header)
		}
		listenTo(t, doctor.Config{Data: []byte(`{"stream":true}`), Header: http.Header{
			"Accept": {"application/json"}, "Cache-Control": {}, "Host": {"other"}, "User-Agent": {}, "X-Two": {"1", "2"},
		}}, stream)
		if got.Method != "POST" || string(body) != `{"stream":true}` || got.Header.Get("Content-Type") != "application/json" || got.Host != "other" {
			t.Errorf("%s %q %v", got.Method, body, got.Header)
		}
		if got.Header.Get("Accept") != "application/json" || got.Header.Get("Cache-Control") != "" || got.Header.Get("User-Agent") != "" || len(got.Header["X-Two"]) != 2 {
			t.Errorf("%v", got.Header)
		}
		listenTo(t, doctor.Config{Token: "sesame", For: 15 * time.Second, Header: http.Header{"Authorization": {"Basic site"}}}, stream)
		if got.Header.Get("Authorization") != "Basic site" || got.Header.Get("Sse-Probe-Token") != "sesame" {
			t.Errorf("%v", got.Header)
		}
		listenTo(t, doctor.Config{Token: "sesame", For: 15 * time.Second, URL: "http://site/events?a=b"}, stream)
		if got.Header.Get("Authorization") != "Bearer sesame" || got.URL.RawQuery != "a=b&script=r" {
			t.Errorf("%v %s", got.Header, got.URL.RawQuery)
		}
	})
}
