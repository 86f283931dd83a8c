package caddysse_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// answer is what the handlers after sse do in one call.
type answer func(w http.ResponseWriter, r *http.Request) error

// trial is a stream that retries its upstream, in a bubble. It records what the
// handlers were asked, and what happened to the stream.
type trial struct {
	t       *testing.T
	h       *caddysse.Handler
	name    string
	c       *client
	r       *http.Request
	answers []answer

	calls    []time.Duration // when the handlers were called
	requests []*http.Request // with what

	err      error
	panicked any
}

// Each bubble has its own names, because the state of a name belongs to the
// process, and its times would be those of another bubble.
var trials atomic.Uint64

// newTrial makes a stream of an EventSource. Each call of the handlers gets the
// next answer; further calls get the last one.
func newTrial(t *testing.T, config *caddysse.Handler, answers ...answer) *trial {
	t.Helper()
	tr := &trial{t: t, name: fmt.Sprintf("trial%d", trials.Add(1)), c: newClient(t), r: browser(), answers: answers}
	config.Name = tr.name
	tr.h = provision(t, config)
	return tr
}

func browser() *http.Request {
	r := get("text/event-stream")
	r.Header.Set("Cache-Control", "no-cache")
	return r
}

// retrying retries for a minute, and sends no frames.
func retrying() *caddysse.Handler {
	config := silent()
	config.UpstreamRetry = &caddysse.UpstreamRetry{Window: caddy.Duration(time.Minute)}
	return config
}

func (tr *trial) run() *trial {
	tr.panicked, tr.err = serveRecovering(tr.h, tr.c, tr.r, tr.answer)
	synctest.Wait() // until everything that happens at the same time has happened
	return tr
}

func (tr *trial) answer(w http.ResponseWriter, r *http.Request) error {
	n := len(tr.calls)
	for i, over := range tr.requests {
		if over.Context().Err() == nil {
			tr.t.Errorf("at call %d, the context of call %d is kept", n, i)
		}
	}
	tr.calls = append(tr.calls, time.Since(tr.c.start))
	tr.requests = append(tr.requests, r)
	return tr.answers[min(n, len(tr.answers)-1)](w, r)
}

// reasons returns why streams of the name have ended.
func (tr *trial) reasons() (all []string) {
	tr.t.Helper()
	var answer struct {
		Handlers []struct {
			Name   string
			Closed map[string]int
		}
	}
	if err := json.Unmarshal(callAdmin(tr.t, "/sse/handlers").Body.Bytes(), &answer); err != nil {
		tr.t.Fatal(err)
	}
	for _, handler := range answer.Handlers {
		for reason, n := range handler.Closed {
			if handler.Name == tr.name {
				all = slices.Concat(all, slices.Repeat([]string{reason}, n))
			}
		}
	}
	return all
}

func (tr *trial) state() string {
	tr.t.Helper()
	var answer struct{ Streams []struct{ State string } }
	if err := json.Unmarshal(callAdmin(tr.t, "/sse/streams?name="+tr.name).Body.Bytes(), &answer); err != nil {
		tr.t.Fatal(err)
	}
	if len(answer.Streams) != 1 {
		return fmt.Sprint(answer.Streams)
	}
	return answer.Streams[0].State
}

// results counts the tries of the name by result.
func (tr *trial) results() map[string]int {
	tr.t.Helper()
	registry := prometheus.NewRegistry()
	if err := caddysse.RegisterMetrics(registry); err != nil {
		tr.t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		tr.t.Fatal(err)
	}
	results := make(map[string]int)
	for _, family := range families {
		if family.GetName() != "caddy_sse_upstream_retries_total" {
			continue
		}
		for _, m := range family.Metric {
			labels := make(map[string]string)
			for _, label := range m.Label {
				labels[label.GetName()] = label.GetValue()
			}
			if labels["name"] == tr.name {
				results[labels["result"]] = int(m.Counter.GetValue())
			}
		}
	}
	return results
}

// expect checks what happened to a stream.
func (tr *trial) expect(body, reason string, aborts bool, calls int, resumed, failed, refused int) {
	tr.t.Helper()
	if got := tr.c.body.String(); got != body {
		tr.t.Errorf("the client got %q, want %q", got, body)
	}
	if got := tr.reasons(); !slices.Equal(got, []string{reason}) {
		tr.t.Errorf("ended as %q, want %q", got, reason)
	}
	if got := tr.panicked == http.ErrAbortHandler; got != aborts || tr.panicked != nil && !got || tr.err != nil {
		tr.t.Errorf("it left with %v and panicked with %v, want an abort: %v", tr.err, tr.panicked, aborts)
	}
	if len(tr.calls) != calls {
		tr.t.Errorf("the handlers were called at %v, want %d calls", tr.calls, calls)
	}
	want := map[string]int{"resumed": resumed, "failed": failed, "refused": refused}
	if got := tr.results(); !maps.Equal(got, want) {
		tr.t.Errorf("tries: %v, want %v", got, want)
	}
}

// lastEventIDs returns the id that the handlers got in each call.
func (tr *trial) lastEventIDs() (ids []string) {
	for _, r := range tr.requests {
		ids = append(ids, strings.Join(r.Header["Last-Event-Id"], ","))
	}
	return ids
}

// Answers

// sends answers with a stream that ends cleanly.
func sends(body string) answer {
	return func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		_, _ = io.WriteString(w, body)
		return nil
	}
}

// breaks answers with a stream that breaks off.
func breaks(body string) answer {
	return func(w http.ResponseWriter, r *http.Request) error {
		_ = sends(body)(w, r)
		panic(http.ErrAbortHandler)
	}
}

// hangs answers with a stream that continues until it is ended.
func hangs(body string) answer {
	return func(w http.ResponseWriter, r *http.Request) error {
		_ = sends(body)(w, r)
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// says answers with a status and no stream.
func says(status int, header ...string) answer {
	return func(w http.ResponseWriter, _ *http.Request) error {
		for _, field := range header {
			name, value, _ := strings.Cut(field, ": ")
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "none")
		return nil
	}
}

func fails(err error) answer {
	return func(http.ResponseWriter, *http.Request) error { return err }
}

func TestAStreamGoesOnWhereItsUpstreamBrokeOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, retrying(), breaks("id: 7\ndata: 1\n\n"), func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Set-Cookie", "a=b")
			return sends("\ufeffid: 8\r\ndata: 2\r\n\r\n")(w, r)
		}).run()
		tr.expect("id: 7\ndata: 1\n\nid: 8\r\ndata: 2\r\n\r\n", "upstream_closed", false, 2, 1, 0, 0)
		expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"", "7"})
		if wait := tr.calls[1]; wait < 500*time.Millisecond || wait > time.Second {
			t.Errorf("it waited %v, want half of a second to all of it", wait)
		}
		if cookie := tr.c.header.Get("Set-Cookie"); cookie != "" {
			t.Errorf("the client's headers have %q", cookie)
		}
	})
}

func TestWhatAnUpstreamThatBreaksOffLooksLike(t *testing.T) {
	for name, first := range map[string]answer{
		"an abort": breaks("id: 1\ndata: 1\n\n"),
		"a connection that fails": func(w http.ResponseWriter, r *http.Request) error {
			_ = sends("id: 1\ndata: 1\n\n")(w, r)
			return io.ErrUnexpectedEOF
		},
		"a block with an id alone":   breaks("data: 1\n\nid: 1\n\n"),
		"a comment after the event":  breaks("id: 1\ndata: 1\n\n: x\n"),
		"an event without data last": breaks("id: 1\n\ndata: 1\n\nevent: x\n\n"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := newTrial(t, retrying(), first, sends("data: 2\n\n")).run()
				if len(tr.calls) != 2 || !strings.HasSuffix(tr.c.body.String(), "data: 2\n\n") {
					t.Errorf("called at %v, the client got %q", tr.calls, tr.c.body.String())
				}
				expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"", "1"})
			})
		})
	}
}

func TestTheEndIsAsWithoutTheSettingWhereTheUpstreamCannotGoOn(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(config *caddysse.Handler, r *http.Request)
		first  answer
		body   string
		reason string
		aborts bool
	}{
		{"clean", nil, sends("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_closed", false},
		{"clean in mid-event", nil, sends("id: 1\ndata: 1\n\ndata"), "id: 1\ndata: 1\n\ndata", "upstream_closed", false},
		{"in mid-event", nil, breaks("id: 1\ndata: 1\n\ndata: 2\n"), "id: 1\ndata: 1\n\ndata: 2\n", "upstream_error", true},
		{"in mid-line", nil, breaks("id: 1\ndata: 1\n\n:"), "id: 1\ndata: 1\n\n:", "upstream_error", true},
		{"no id", nil, breaks("data: 1\n\n"), "data: 1\n\n", "upstream_error", true},
		{"an id that was reset", nil, breaks("id: 1\ndata: 1\n\nid\n\n"), "id: 1\ndata: 1\n\nid\n\n", "upstream_error", true},
		{"an id of a proxy", func(_ *caddysse.Handler, r *http.Request) { r.Header.Set("Last-Event-ID", "sse1-x.1") }, breaks("data: 1\n\n"), "data: 1\n\n", "upstream_error", true},
		{"POST", func(_ *caddysse.Handler, r *http.Request) { r.Method = "POST" }, breaks("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_error", true},
		{"a body", func(_ *caddysse.Handler, r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader("x")), 1
		}, breaks("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_error", true},
		{"not resumable", func(_ *caddysse.Handler, r *http.Request) { r.Header.Set("Accept", "text/html, text/event-stream") }, breaks("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_error", true},
		{"resumable never", func(config *caddysse.Handler, _ *http.Request) { config.Resumable = "never" }, breaks("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_error", true},
		{"MCP", func(_ *caddysse.Handler, r *http.Request) { r.Header.Set("Mcp-Session-Id", "x") }, breaks("id: 1\ndata: 1\n\n"), "id: 1\ndata: 1\n\n", "upstream_error", true},
		{"JSON", nil, breaks(`{"a":1}`), `{"a":1}`, "upstream_error", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := retrying()
				r := browser()
				if test.change != nil {
					test.change(config, r)
				}
				tr := newTrial(t, config, test.first)
				tr.r = r
				tr.run().expect(test.body, test.reason, test.aborts, 1, 0, 0, 0)
			})
		})
	}
}

func TestAnUpstreamWithoutIDsIsAskedAgainWhereThatIsWelcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.UpstreamRetry.Live = true
		tr := newTrial(t, config, breaks("id: 1\ndata: 1\n\n"), breaks("id\ndata: 2\n\n"), sends("data: 3\n\n"))
		tr.r.Header.Set("Last-Event-ID", "0")
		tr.run().expect("id: 1\ndata: 1\n\nid\ndata: 2\n\ndata: 3\n\n", "upstream_closed", false, 3, 2, 0, 0)
		expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"0", "1", ""})
	})
}

func TestThePositionOfAStreamThatBringsNoIDIsItsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, retrying(), breaks(""), breaks("data: 1\n\n"), sends("data: 2\n\n"))
		tr.r.Header.Set("Last-Event-ID", "41")
		tr.run().expect("data: 1\n\ndata: 2\n\n", "upstream_closed", false, 3, 2, 0, 0)
		expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"41", "41", "41"})
	})
}

func TestTheWaitsDoubleUntilATryBringsAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.Retry = &caddysse.Retry{Min: caddy.Duration(400 * time.Millisecond)}
		gone := caddyhttp.Error(http.StatusBadGateway, errors.New("refused"))
		tr := newTrial(t, config, breaks("id: 1\ndata: 1\n\n"),
			fails(gone), says(503), says(504), fails(errors.New("no answer")), breaks(": a comment\n"), breaks("id: 2\ndata: 2\n\n"),
			says(502, "Retry-After: 20"), sends("retry: 5\n\ndata: 3\n\n")).run()
		tr.expect("retry: 400\n\nid: 1\ndata: 1\n\n: a comment\nid: 2\ndata: 2\n\nretry: 5\n\ndata: 3\n\n", "upstream_closed", false, 9, 2, 6, 0)
		for i, upTo := range []time.Duration{400, 800, 1600, 3200, 6400, 10000, 400, 20000 + 800} {
			upTo *= time.Millisecond
			least := upTo / 2
			if i == 7 {
				least = 20*time.Second + 400*time.Millisecond
			}
			if wait := tr.calls[i+1] - tr.calls[i]; wait < least || wait > upTo {
				t.Errorf("wait %d is %v, want %v to %v", i+1, wait, least, upTo)
			}
		}
	})
}

func TestTheFirstWaitIsTheReconnectionTimeThatTheUpstreamTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.Retry = &caddysse.Retry{Min: caddy.Duration(time.Second)}
		tr := newTrial(t, config, breaks("retry: 20000\nid: 1\n\n"), sends("data: 1\n\n")).run()
		if wait := tr.calls[1]; wait < 10*time.Second || wait > 20*time.Second {
			t.Errorf("it waited %v", wait)
		}
	})
}

func TestAStreamWhoseWindowIsOverEndsWithTheReasonOfTheBreak(t *testing.T) {
	for _, client := range []struct {
		name   string
		change func(r *http.Request)
		aborts bool
	}{
		{"an EventSource", func(*http.Request) {}, false},
		{"another one", func(r *http.Request) { r.Header.Del("Cache-Control") }, true},
	} {
		for _, test := range []struct {
			name    string
			answers []answer
			least   time.Duration
			most    time.Duration
			failed  int
		}{
			{"failing", []answer{breaks("id: 1\n\n"), says(502)}, 40 * time.Second, 62 * time.Second, 0},
			{"a try without end", []answer{breaks("id: 1\n\n"), func(_ http.ResponseWriter, r *http.Request) error { <-r.Context().Done(); return r.Context().Err() }}, 60 * time.Second, 62 * time.Second, 1},
			{"a wait past it", []answer{breaks("id: 1\n\n"), says(503, "Retry-After: 100")}, 0, time.Second, 1},
			{"the first wait past it", []answer{breaks("retry: 1000000\nid: 1\n\n")}, 0, 0, 0},
		} {
			t.Run(test.name+" "+client.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					tr := newTrial(t, retrying(), test.answers...)
					client.change(tr.r)
					tr.run()
					took := time.Since(tr.c.start)
					failed := test.failed
					if test.name == "failing" {
						failed = len(tr.calls) - 1
					}
					first, _, _ := strings.Cut(tr.c.body.String(), "\n\n")
					tr.expect(first+"\n\n", "upstream_error", client.aborts, failed+1, 0, failed, 0)
					if took < test.least || took > test.most {
						t.Errorf("it gave up after %v", took)
					}
				})
			})
		}
	}
}

func TestAnAnswerThatIsNoStreamEndsTheStreamAtOnce(t *testing.T) {
	for name, second := range map[string]answer{
		"204":          says(204),
		"401":          says(401),
		"403":          says(403, "Content-Type: text/event-stream"),
		"404":          says(404),
		"429":          says(429, "Retry-After: 1"),
		"500":          says(500),
		"301":          says(301, "Location: /"),
		"another type": says(200, "Content-Type: text/html"),
		"no type":      says(200),
		"an encoding":  says(200, "Content-Type: text/event-stream", "Content-Encoding: gzip"),
		"an error 403": fails(caddyhttp.Error(403, errors.New("no"))),
		"nothing":      fails(nil),
		"JSON":         sends(`{"a":1}`),
		"no headers": func(w http.ResponseWriter, _ *http.Request) error {
			_, err := io.WriteString(w, "data: 2\n\n")
			if err == nil {
				return errors.New("it could write")
			}
			return nil
		},
		"a flush": func(w http.ResponseWriter, _ *http.Request) error {
			return http.NewResponseController(w).Flush()
		},
	} {
		for _, eventSource := range []bool{true, false} {
			t.Run(fmt.Sprint(name, eventSource), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					tr := newTrial(t, retrying(), breaks("id: 1\ndata: 1\n\n"), second)
					if !eventSource {
						tr.r.Header.Del("Cache-Control")
					}
					tr.run().expect("id: 1\ndata: 1\n\n", "upstream_error", !eventSource, 2, 0, 0, 1)
				})
			})
		}
	}
}

func TestAStreamThatRetriesGetsHeartbeatsAndHasNoUpstreamTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := heartbeat(time.Second, -1)
		config.UpstreamTimeout = caddy.Duration(1500 * time.Millisecond)
		config.UpstreamRetry = &caddysse.UpstreamRetry{Window: caddy.Duration(time.Minute)}
		tr := newTrial(t, config, breaks("retry: 20000\nid: 1\ndata: 1\n\n"), func(w http.ResponseWriter, r *http.Request) error {
			time.Sleep(5 * time.Second)
			return sends("data: 2\n\n")(w, r)
		})
		var state string
		time.AfterFunc(9*time.Second, func() { state = tr.state() })
		tr.run()
		synctest.Wait()
		if state != "retrying" {
			t.Errorf("state %q", state)
		}
		for _, silence := range tr.c.silences() {
			if silence > time.Second {
				t.Errorf("a silence of %v", silence)
			}
		}
		body := strings.ReplaceAll(tr.c.body.String(), ":heartbeat\n\n", "")
		if body != "retry: 20000\nid: 1\ndata: 1\n\ndata: 2\n\n" || len(tr.calls) != 2 {
			t.Errorf("%q, called at %v", body, tr.calls)
		}
	})
}

func TestAnUpstreamThatIsSilentTooLongIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.UpstreamTimeout = caddy.Duration(30 * time.Second)
		tr := newTrial(t, config, hangs("id: 1\r\ndata: 1\r\n\r"), hangs("id: 2\ndata: 2\n\n"), says(404)).run()
		tr.expect("id: 1\r\ndata: 1\r\n\r\nid: 2\ndata: 2\n\n", "upstream_timeout", false, 3, 1, 0, 1)
		expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"", "1", "2"})
		if wait := tr.calls[1]; wait < 30500*time.Millisecond || wait > 31*time.Second {
			t.Errorf("asked again after %v", wait)
		}
	})
}

func TestAnUpstreamThatIsSilentInMidEventEndsItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.UpstreamTimeout = caddy.Duration(30 * time.Second)
		newTrial(t, config, hangs("id: 1\ndata: 1\n")).run().expect("id: 1\ndata: 1\n", "upstream_timeout", false, 1, 0, 0, 0)
	})
}

// The client must not get what an attempt still writes.
func TestAnAttemptThatWasGivenUpWritesNothingMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.UpstreamTimeout = caddy.Duration(10 * time.Second)
		tr := newTrial(t, config, func(w http.ResponseWriter, r *http.Request) error {
			_ = sends("id: 1\ndata: 1\n\n")(w, r)
			<-r.Context().Done()
			time.Sleep(time.Second)
			if _, err := io.WriteString(w, "data: late\n\n"); err == nil {
				t.Error("it could write")
			}
			return nil
		}, sends("data: 2\n\n")).run()
		tr.expect("id: 1\ndata: 1\n\ndata: 2\n\n", "upstream_closed", false, 2, 1, 0, 0)
	})
}

func TestHandlersThatDoNotLeaveAreNotCalledAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.UpstreamTimeout = caddy.Duration(10 * time.Second)
		tr := newTrial(t, config, func(w http.ResponseWriter, r *http.Request) error {
			_ = sends("id: 1\ndata: 1\n\n")(w, r)
			time.Sleep(time.Hour)
			return nil
		})
		var told []string
		time.AfterFunc(21*time.Second, func() { told = tr.reasons() })
		tr.run()
		expect(t, "reasons 11 s after the timeout", told, []string{"upstream_timeout"})
		tr.expect("id: 1\ndata: 1\n\n", "upstream_timeout", true, 1, 0, 0, 0)
	})
}

// In the middle of a wait of 10 s or more, and in the middle of a try.
func TestAStreamThatRetriesCanEndAtAnyMoment(t *testing.T) {
	for _, moment := range []struct {
		name   string
		second answer
		failed int
	}{
		{"waiting", says(502), 0},
		{"trying", func(_ http.ResponseWriter, r *http.Request) error { <-r.Context().Done(); return r.Context().Err() }, 1},
	} {
		for _, test := range []struct {
			name   string
			config func(config *caddysse.Handler)
			end    func(tr *trial, leave func())
			reason string
			delay  time.Duration
		}{
			{"the client leaves", nil, func(_ *trial, leave func()) { leave() }, "client_closed", 0},
			{"admin", nil, func(tr *trial, _ func()) { deleteStreams(tr.t, "name="+tr.name) }, "admin", 0},
			{"reload", func(config *caddysse.Handler) { config.Drain = &caddysse.Drain{Reload: caddy.Duration(time.Second)} },
				func(tr *trial, _ func()) { go tr.h.DrainStreams() }, "drained", time.Second},
			{"max_duration", func(config *caddysse.Handler) {
				config.MaxDuration = &caddysse.MaxDuration{Duration: caddy.Duration(25 * time.Second)}
			}, func(*trial, func()) {}, "max_duration", 0},
		} {
			t.Run(moment.name+" "+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					config := retrying()
					config.UpstreamRetry.Window = caddy.Duration(10 * time.Minute)
					if test.config != nil {
						test.config(config)
					}
					first := breaks("retry: 100000\nid: 1\n\n")
					if moment.name == "trying" {
						first = breaks("id: 1\n\n")
					}
					tr := newTrial(t, config, first, moment.second)
					ctx, leave := context.WithCancel(t.Context())
					defer leave()
					tr.r = tr.r.WithContext(ctx)
					time.AfterFunc(25*time.Second, func() { test.end(tr, leave) })
					tr.run()
					if took := time.Since(tr.c.start); took < 25*time.Second || took > 25*time.Second+test.delay {
						t.Errorf("it ended after %v", took)
					}
					synctest.Wait()
					first1, _, _ := strings.Cut(tr.c.body.String(), "\n\n")
					tr.expect(first1+"\n\n", test.reason, false, moment.failed+1, 0, moment.failed, 0)
				})
			})
		}
	}
}

// What handlers still answer in a try that was given up is not an answer of the
// upstream.
func TestAnAnswerAfterTheWindowIsNoRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, retrying(), breaks("id: 1\n\n"), func(w http.ResponseWriter, r *http.Request) error {
			<-r.Context().Done()
			return says(500)(w, r)
		}).run()
		tr.expect("id: 1\n\n", "upstream_error", false, 2, 0, 1, 0)
	})
}

func TestALaterTryCannotTakeTheConnectionAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, retrying(), breaks("id: 1\n\n"), func(w http.ResponseWriter, r *http.Request) error {
			if _, _, err := http.NewResponseController(w).Hijack(); !errors.Is(err, http.ErrNotSupported) {
				t.Errorf("hijacking: %v", err)
			}
			return sends("data: 1\n\n")(w, r)
		}).run()
		tr.expect("id: 1\n\ndata: 1\n\n", "upstream_closed", false, 2, 1, 0, 0)
	})
}

func TestAReplacedConfigurationMakesNoTry(t *testing.T) {
	for _, exits := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			config := retrying()
			config.Drain = &caddysse.Drain{Reload: -1}
			tr := newTrial(t, config, breaks("retry: 20000\nid: 1\ndata: 1\n\n"), sends("data: 2\n\n"))
			defer caddysse.SetExiting(exits)()
			time.AfterFunc(5*time.Second, tr.h.DrainStreams)
			tr.run()
			if exits {
				tr.expect("retry: 20000\nid: 1\ndata: 1\n\ndata: 2\n\n", "upstream_closed", false, 2, 1, 0, 0)
				return
			}
			tr.expect("retry: 20000\nid: 1\ndata: 1\n\n", "upstream_error", false, 1, 0, 0, 0)
			if took := time.Since(tr.c.start); took < 10*time.Second || took > 20*time.Second {
				t.Errorf("it ended after %v, want when its try was due", took)
			}
		})
	}
}

func TestAPanicInALaterTryGoesOn(t *testing.T) {
	for name, second := range map[string]answer{
		"before an answer": func(http.ResponseWriter, *http.Request) error { panic("a bug") },
		"in a stream":      func(w http.ResponseWriter, r *http.Request) error { _ = sends("data: 2\n\n")(w, r); panic("a bug") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := newTrial(t, retrying(), breaks("id: 1\n\n"), second).run()
				if tr.panicked != "a bug" || len(tr.calls) != 2 {
					t.Errorf("panicked with %v, called at %v", tr.panicked, tr.calls)
				}
				expect(t, "reasons", tr.reasons(), []string{"upstream_error"})
			})
		})
	}
}

func TestEachTryHasTheRequestAsItCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type seen struct{ what []string }
		var calls []seen
		look := func(r *http.Request) {
			ctx := r.Context()
			replacer := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			original := ctx.Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
			groups := ctx.Value(caddy.CtxKey("route_group")).(map[string]struct{})
			what := []string{
				r.Method, r.URL.String(), r.RequestURI, r.Host, original.URL.String(), fmt.Sprint(len(groups)), fmt.Sprint(r.ContentLength),
				replacer.ReplaceAll("{http.vars.root} {http.vars.new} {http.request.uri} {http.request.header.X-A} {http.request.header.X-B} "+
					"{http.request.uuid} {set.before} {set.after} {http.reverse_proxy.header.User}", "-"),
				strings.Join(r.Header["Accept-Encoding"], ","),
			}
			calls = append(calls, seen{what})
			// As handlers may change their request.
			r.URL.Path, r.Method, r.RequestURI = "/rewritten", "PUT", "/rewritten"
			r.Header.Set("X-A", "changed")
			r.Header.Set("X-B", "added")
			original.URL.Path = "/changed"
			groups["group"] = struct{}{}
			caddyhttp.SetVar(ctx, "root", "/changed")
			caddyhttp.SetVar(ctx, "new", "added")
			replacer.Set("set.before", "changed")
			replacer.Set("set.after", "added")
			replacer.Set("http.reverse_proxy.upstream.hostport", "127.0.0.1:1")
		}
		tr := newTrial(t, retrying(), func(w http.ResponseWriter, r *http.Request) error {
			look(r)
			return breaks("id: 1\n\n")(w, r)
		}, func(w http.ResponseWriter, r *http.Request) error {
			look(r)
			return says(502)(w, r)
		}, func(w http.ResponseWriter, r *http.Request) error {
			look(r)
			return sends("data: 1\n\n")(w, r)
		})
		tr.r.Header.Set("X-A", "as it came")
		tr.r.Header.Set("Accept-Encoding", "br")
		around := middleware(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			caddyhttp.SetVar(r.Context(), "root", "/srv")
			replacer := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			replacer.Set("set.before", "by us")
			replacer.Set("http.reverse_proxy.header.User", "me")
			replacer.GetString("http.request.uuid")
			err := tr.h.ServeHTTP(w, r, next)
			if got, _ := replacer.GetString("http.reverse_proxy.upstream.hostport"); got != "127.0.0.1:1" {
				t.Errorf("outside, the upstream is %q", got)
			}
			if user, known := replacer.Get("http.reverse_proxy.header.User"); known {
				t.Errorf("outside, a proxy before sse is still told: %v", user)
			}
			return err
		})
		if panicked, err := serveRecovering(around, tr.c, tr.r, tr.answer); panicked != nil || err != nil {
			t.Error(panicked, err)
		}
		if len(calls) != 3 {
			t.Fatalf("%d calls", len(calls))
		}
		for i, call := range calls {
			expect(t, fmt.Sprint("call ", i+1), call.what, calls[0].what)
		}
		want := []string{"GET", "http://example.com/events?token=secret", "http://example.com/events?token=secret", "example.com",
			"http://example.com/events?token=secret", "0", "0"}
		expect(t, "the first", calls[0].what[:len(want)], want)
		if text := calls[0].what[len(want)]; !strings.HasPrefix(text, "/srv - http://example.com/events?token=secret as it came - ") &&
			!strings.HasPrefix(text, "/srv - /events?token=secret as it came - ") || !strings.HasSuffix(text, " by us - me") {
			t.Errorf("placeholders: %q", text)
		}
	})
}

// middleware is a handler that calls the next one.
type middleware func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error

func (m middleware) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return m(w, r, next)
}

func TestAStreamKeepsItsPlaceWhileItRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.MaxStreams, config.MaxStreamsPerClient = 1, 1
		tr := newTrial(t, config, breaks("retry: 20000\nid: 1\n\n"), sends("data: 1\n\n"))
		time.AfterFunc(5*time.Second, func() {
			if err := serve(tr.h, newClient(t), browser(), stream(func(http.ResponseWriter) {})); err == nil {
				t.Error("another stream could open")
			}
		})
		tr.run()
		if c := play(t, tr.h, func(http.ResponseWriter) {}); !isStream(c) {
			t.Error("a place is lost")
		}
		if len(tr.calls) != 2 {
			t.Errorf("called at %v", tr.calls)
		}
	})
}

func TestTheInnermostOfTwoHandlersAsksAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		inner := newTrial(t, config, breaks("id: 1\ndata: 1\n\n"), sends("data: 2\n\n"))
		outer := newTrial(t, retrying(), func(w http.ResponseWriter, r *http.Request) error {
			return inner.h.ServeHTTP(w, r, caddyhttp.HandlerFunc(inner.answer))
		}).run()
		if len(outer.calls) != 1 || len(inner.calls) != 2 || outer.c.body.String() != "id: 1\ndata: 1\n\ndata: 2\n\n" {
			t.Errorf("called at %v and %v, the client got %q", outer.calls, inner.calls, outer.c.body.String())
		}
		expect(t, "reasons of the inner one", inner.reasons(), []string{"upstream_closed"})
	})
}

func TestAStreamThatStartedEarlyIsAskedAgainOnceItIsOpen(t *testing.T) {
	late := func(then answer) answer {
		return func(w http.ResponseWriter, r *http.Request) error {
			time.Sleep(2 * time.Second)
			return then(w, r)
		}
	}
	early := func() *caddysse.Handler {
		config := retrying()
		config.EarlyStart = &caddysse.EarlyStart{Delay: caddy.Duration(time.Second)}
		return config
	}
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, early(), late(breaks("id: 1\ndata: 1\n\n")), late(says(503)), late(sends("data: 2\n\n"))).run()
		tr.expect("id: 1\ndata: 1\n\ndata: 2\n\n", "upstream_closed", false, 3, 1, 1, 0)
		expect(t, "Last-Event-ID", tr.lastEventIDs(), []string{"", "1", "1"})
	})
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, early(), late(says(503))).run()
		if len(tr.calls) != 1 || !strings.HasPrefix(tr.c.body.String(), "event: error\n") {
			t.Errorf("called at %v, the client got %q", tr.calls, tr.c.body.String())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t, early(), breaks("id: 1\ndata: 1\n\n"), sends("data: 2\n\n")).run()
		tr.expect("id: 1\ndata: 1\n\ndata: 2\n\n", "upstream_closed", false, 2, 1, 0, 0)
	})
}

func TestABodyOfUnknownLengthCountsOnlyOnceSomethingIsRead(t *testing.T) {
	for body, calls := range map[string]int{"": 2, "x": 1} {
		synctest.Test(t, func(t *testing.T) {
			tr := newTrial(t, retrying(), func(w http.ResponseWriter, r *http.Request) error {
				_, _ = io.ReadAll(r.Body)
				return breaks("id: 1\n\n")(w, r)
			}, sends("data: 1\n\n"))
			tr.r.ProtoMajor, tr.r.ContentLength, tr.r.Body = 3, -1, io.NopCloser(strings.NewReader(body))
			if tr.run(); len(tr.calls) != calls {
				t.Errorf("body %q: called at %v", body, tr.calls)
			}
		})
	}
}

func TestTheSeriesOfTriesBeginAtZero(t *testing.T) {
	tr := newTrial(t, retrying())
	if got, want := tr.results(), map[string]int{"resumed": 0, "failed": 0, "refused": 0}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := newTrial(t, silent()).results(); len(got) != 0 {
		t.Errorf("without the setting: %v", got)
	}
}

// A run may last for weeks while its upstream breaks off again and again.
func TestARunKeepsNoAttemptThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := retrying()
		config.Name = uniqueName("weeks")
		config.UpstreamRetry.Live = true
		config.Share = new(caddysse.Share)
		h := provision(t, config)
		var contexts []context.Context
		err := serve(h, newClient(t), browser(), func(w http.ResponseWriter, r *http.Request) error {
			for i, over := range contexts {
				if over.Err() == nil {
					t.Errorf("at call %d, the context of call %d is kept", len(contexts), i)
				}
			}
			contexts = append(contexts, r.Context())
			w.Header().Set("Content-Type", eventStream)
			write(t, w, "data: 1\n\n")
			if len(contexts) < 5 {
				panic(http.ErrAbortHandler)
			}
			return nil
		})
		if err != nil || len(contexts) != 5 {
			t.Errorf("%d calls, %v", len(contexts), err)
		}
		synctest.Wait()
	})
}
