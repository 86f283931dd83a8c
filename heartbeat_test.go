package caddysse_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

func heartbeat(interval, prelude time.Duration) *caddysse.Handler {
	return &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(interval), Prelude: caddy.Duration(prelude)}}
}

// writes returns the times at which something reached the client, the headers
// first.
func (c *client) writes() []time.Duration {
	times := []time.Duration{0}
	for _, h := range c.log {
		if h.what == "write" {
			times = append(times, h.at)
		}
	}
	return times
}

// silences returns the times between them.
func (c *client) silences() []time.Duration {
	var all []time.Duration
	times := c.writes()
	for i := 1; i < len(times); i++ {
		all = append(all, times[i]-times[i-1])
	}
	return all
}

func TestNoSilenceIsLongerThanTheInterval(t *testing.T) {
	for _, interval := range []time.Duration{
		10 * time.Millisecond, 100 * time.Millisecond, time.Second, 5 * time.Second, 15 * time.Second, 10 * time.Minute,
	} {
		t.Run(interval.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := play(t, provision(t, heartbeat(interval, -1)), func(http.ResponseWriter) { quiet(200 * interval) })
				silences := c.silences()
				if len(silences) < 200 {
					t.Errorf("%d frames in 200 intervals", len(silences))
				}
				for _, silence := range silences {
					if silence > interval || silence < interval*3/4 {
						t.Errorf("a silence of %v; want one between %v and %v", silence, interval*3/4, interval)
					}
				}
			})
		})
	}
}

func TestByDefaultThePreludeComesAfterASecondAndAFrameEveryFifteen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := play(t, provision(t, &caddysse.Handler{}), func(http.ResponseWriter) { quiet(time.Hour) })
		silences := c.silences()
		if silences[0] != time.Second {
			t.Errorf("the prelude came after %v", silences[0])
		}
		for _, silence := range silences[1:] {
			if silence > 15*time.Second || silence < 15*time.Second*3/4 {
				t.Errorf("a silence of %v", silence)
			}
		}
		if got := c.body.String(); strings.ReplaceAll(got, ":heartbeat\n\n", "") != "" {
			t.Errorf("the client got %q", got)
		}
	})
}

func TestStreamsOpenedTogetherDoNotTickTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 200
		interval := 16 * time.Second
		h := provision(t, heartbeat(interval, -1))
		clients := make([]*client, streams)
		var all sync.WaitGroup
		for i := range clients {
			all.Go(func() {
				clients[i] = play(t, h, func(http.ResponseWriter) { time.Sleep(interval) })
			})
		}
		all.Wait()
		eighths := make(map[time.Duration]int) // of the last quarter
		times := make(map[time.Duration]int)
		for _, c := range clients {
			first := c.silences()[0]
			times[first]++
			eighths[(first-interval*3/4)/(interval/4/8)]++
		}
		if len(times) < streams*9/10 {
			t.Errorf("%d streams tick at %d moments", streams, len(times))
		}
		for eighth := range time.Duration(7) { // the last eighth is shorter
			if n := eighths[eighth]; n < streams/40 || n > streams/3 {
				t.Errorf("%d of %d streams tick in the same eighth of the last quarter: %v", n, streams, eighths)
			}
		}
	})
}

func TestTheUpstreamsBytesRestartTheClock(t *testing.T) {
	for name, bytes := range map[string]string{
		"an event":       "data: a\n\n",
		"a comment":      ":\n",
		"half a line":    "a",
		"half a comment": ":",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				interval := 10 * time.Second
				const times = 50
				c := play(t, provision(t, heartbeat(interval, -1)), func(w http.ResponseWriter) {
					for range times {
						quiet(interval*3/4 - 1)
						write(t, w, bytes)
					}
					quiet(interval*3/4 - 1)
				})
				if want := strings.Repeat(bytes, times); c.body.String() != want {
					t.Errorf("got %q, want %q", c.body.String(), want)
				}
			})
		})
	}
	t.Run("and the next frame is due after the last of them", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			interval := 10 * time.Second
			for at := range 20 {
				c := play(t, provision(t, heartbeat(interval, -1)), func(w http.ResponseWriter) {
					quiet(time.Duration(at) * interval / 30)
					write(t, w, "data: a\n\n")
					quiet(interval)
				})
				if silences := c.silences(); len(silences) != 2 || silences[1] > interval || silences[1] < interval*3/4 {
					t.Errorf("silences: %v", silences)
				}
			}
		})
	})
}

func TestThePreludeComesOnceAndTheHeartbeatsFollow(t *testing.T) {
	for _, test := range []struct {
		name              string
		interval, prelude time.Duration
		shortest, longest time.Duration // limits of the first silence
		frames            int           // in a minute; at least this many, or exactly this many if 0 or 1
	}{
		{name: "the defaults", shortest: time.Second, longest: time.Second, frames: 4},
		{name: "prelude shorter than heartbeat", interval: 10 * time.Second, prelude: 3 * time.Second, shortest: 3 * time.Second, longest: 3 * time.Second, frames: 6},
		{name: "prelude longer than heartbeat", interval: 10 * time.Second, prelude: 20 * time.Second, shortest: 7500 * time.Millisecond, longest: 10 * time.Second, frames: 6},
		{name: "prelude as long as heartbeat", interval: 10 * time.Second, prelude: 10 * time.Second, shortest: 7500 * time.Millisecond, longest: 10 * time.Second, frames: 6},
		{name: "heartbeat shorter than the default prelude", interval: 500 * time.Millisecond, shortest: 375 * time.Millisecond, longest: 500 * time.Millisecond, frames: 120},
		{name: "prelude off", interval: 10 * time.Second, prelude: -1, shortest: 7500 * time.Millisecond, longest: 10 * time.Second, frames: 6},
		{name: "heartbeat off", interval: -1, frames: 0},
		{name: "heartbeat and prelude off", interval: -1, prelude: -1, frames: 0},
		{name: "heartbeat off, prelude given", interval: -1, prelude: 2 * time.Second, shortest: 2 * time.Second, longest: 2 * time.Second, frames: 1},
		{name: "heartbeat off, long prelude given", interval: -1, prelude: 40 * time.Second, shortest: 40 * time.Second, longest: 40 * time.Second, frames: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := provision(t, heartbeat(test.interval, test.prelude))
				for range 20 {
					c := play(t, h, func(http.ResponseWriter) { quiet(time.Minute) })
					silences := c.silences()
					if len(silences) < test.frames || test.frames < 2 && len(silences) != test.frames {
						t.Fatalf("%d frames in a minute: %v", len(silences), silences)
					}
					if len(silences) > 0 && (silences[0] < test.shortest || silences[0] > test.longest) {
						t.Errorf("the first frame came after %v", silences[0])
					}
				}
			})
		})
	}
}

func TestTheUpstreamsFirstByteMakesThePreludeNeedless(t *testing.T) {
	for _, interval := range []time.Duration{15 * time.Second, -1} {
		synctest.Test(t, func(t *testing.T) {
			c := play(t, provision(t, heartbeat(interval, time.Second)), func(w http.ResponseWriter) {
				quiet(time.Second - 1)
				write(t, w, ":")
				write(t, w, "\n")
				quiet(10 * time.Second)
			})
			expect(t, "what reached the client", c.happenings(), []string{"200", "flush", "write :", "flush", "write \n", "flush"})
		})
	}
}

func TestAPreludeRestartsTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 50 {
			c := play(t, provision(t, heartbeat(10*time.Second, 9*time.Second)), func(http.ResponseWriter) { quiet(time.Minute) })
			for i, silence := range c.silences() {
				if i == 0 && silence != 9*time.Second || i > 0 && (silence < 7500*time.Millisecond || silence > 10*time.Second) {
					t.Errorf("silence %d took %v", i, silence)
				}
			}
		}
	})
}

func TestAFrameIsFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := play(t, provision(t, heartbeat(-1, time.Second)), func(http.ResponseWriter) { quiet(time.Second) })
		expect(t, "what reached the client", c.happenings(), []string{"200", "flush", "write :heartbeat\n\n", "flush"})
	})
}

// styles are the ways in which a frame can look.
var styles = map[string]caddysse.Heartbeat{
	"block":             {},
	"block, given":      {Style: "block"},
	"block, comment":    {Style: "block", Comment: " still here: ü "},
	"line":              {Style: "line"},
	"line, comment":     {Style: "line", Comment: "x"},
	"event":             {Style: "event", Event: "ping"},
	"event with data":   {Style: "event", Event: "ping", Data: `{"a":1}`},
	"event with spaces": {Style: "event", Event: " ping ", Data: " a ", Comment: "unused"},
}

// internal/eventstream tests where a frame is allowed, and of which form. These
// tests check that the settings and the upstream's bytes get there.
func TestFramesLookAsTheirSettingsSay(t *testing.T) {
	for _, test := range []struct {
		style, before, frame string
	}{
		{"block", "", ":heartbeat\n\n"},
		{"block, given", "", ":heartbeat\n\n"},
		{"block, comment", "", ": still here: ü \n\n"},
		{"line", "", ":heartbeat\n"},
		{"line, comment", "", ":x\n"},
		{"event", "", "event: ping\ndata:\n\n"},
		{"event with data", "", "event: ping\ndata: {\"a\":1}\n\n"},
		{"event with spaces", "", "event:  ping \ndata:  a \n\n"},

		{"block", "data: a\r\n\r\n", ":heartbeat\r\n\r\n"},
		{"block", "data: a\n", ":heartbeat\n"},
		{"event", "data: a\n", ""},
		{"block", "data: a", ""},
	} {
		t.Run(fmt.Sprintf("%s after %q", test.style, test.before), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				settings := styles[test.style]
				settings.Interval, settings.Prelude = caddy.Duration(10*time.Second), -1
				h := provision(t, &caddysse.Handler{Heartbeat: &settings})
				c := play(t, h, func(w http.ResponseWriter) {
					write(t, w, test.before)
					quiet(10 * time.Second)
				})
				if got, want := c.body.String(), test.before+test.frame; got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		})
	}
}

// A "|" stands for a silence.
func TestAFrameAmongTheUpstreamsBytesHarmsNone(t *testing.T) {
	for _, test := range []struct{ body, want string }{
		// The client gets the LF of a CR before the frame, and not again after
		// it.
		{"data: a\r|\n\r\n", "data: a\r\n:heartbeat\r\n\r\n"},
		{"data: a\r\n\r|\ndata: b", "data: a\r\n\r\n:heartbeat\r\n\r\ndata: b"},
		{"data: a\r|data: b", "data: a\r\n:heartbeat\r\ndata: b"},
		// A byte order mark must not follow anything.
		{"|\xEF\xBB\xBFdata: a\n\n", ":heartbeat\n\ndata: a\n\n"},
		{"\xEF|\xBB|\xBF|data: a\n\n", "\xEF\xBB\xBF:heartbeat\n\ndata: a\n\n"},
		// While its bytes are incomplete, nothing has reached the client, so
		// the frame that was due follows at once.
		{"|\xEF\xBB|\xBF", ":heartbeat\n\n:heartbeat\n\n"},
		// An incomplete one is sent when the stream ends.
		{"|\xEF\xBB", ":heartbeat\n\n\xEF\xBB"},
	} {
		t.Run(fmt.Sprintf("%q", test.body), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := play(t, provision(t, heartbeat(10*time.Second, -1)), func(w http.ResponseWriter) {
					playScript(t, w, test.body)
				})
				if got := c.body.String(); got != test.want {
					t.Errorf("\ngot  %q\nwant %q", got, test.want)
				}
			})
		})
	}
}

// playScript writes the parts between "|", with a silence of ten seconds for
// each "|".
func playScript(t testing.TB, w io.Writer, script string) {
	for i, part := range strings.Split(script, "|") {
		if i > 0 {
			quiet(10 * time.Second)
		}
		write(t, w, part)
	}
}

func TestAFrameThatWasDueInMidLineFollowsOnlyIfTheSilenceLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		interval := 10 * time.Second
		c := play(t, provision(t, heartbeat(interval, -1)), func(w http.ResponseWriter) {
			write(t, w, "data: a")
			quiet(5 * interval)
			write(t, w, "\n\n")
			quiet(interval*3/4 - 1)
			write(t, w, "data: b\n\n")
			quiet(interval)
		})
		if got, want := c.body.String(), "data: a\n\ndata: b\n\n:heartbeat\n\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if silences := c.silences(); silences[len(silences)-1] > interval {
			t.Errorf("silences: %v", silences)
		}
	})
}

func TestAnEncodedBodyGetsNoFrames(t *testing.T) {
	for _, test := range []struct {
		encoding []string
		isText   bool
	}{
		{nil, true},
		{[]string{""}, true},
		{[]string{"identity"}, true},
		{[]string{"Identity"}, true},
		{[]string{"identity, "}, true},
		{[]string{"gzip"}, false},
		{[]string{"br"}, false},
		{[]string{"zstd"}, false},
		{[]string{"deflate"}, false},
		{[]string{"identity, gzip"}, false},
		{[]string{"identity", "br"}, false},
		{[]string{"none"}, true},
		{[]string{"utf-8"}, true},
	} {
		t.Run(fmt.Sprintf("%q", test.encoding), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := provision(t, &caddysse.Handler{Retry: &caddysse.Retry{Min: caddy.Duration(time.Second)}})
				c := newClient(t)
				body := "\x1F\x8B\n\n\uFEFF{"
				_ = serve(h, c, get(), func(w http.ResponseWriter, _ *http.Request) error {
					w.Header().Set("Content-Type", "text/event-stream")
					if test.encoding != nil {
						w.Header()["Content-Encoding"] = test.encoding
					}
					w.WriteHeader(200)
					quiet(time.Minute)
					for i := range len(body) {
						write(t, w, body[i:i+1])
						quiet(time.Minute)
					}
					return nil
				})
				if !isStream(c) {
					t.Errorf("headers: %v", c.sent)
				}
				if got := c.body.String(); (got == body) == test.isText {
					t.Errorf("got %q", got)
				}
			})
		})
	}
}

func TestABodyThatTakesNoFramesIsWarnedAboutOnceAMinute(t *testing.T) {
	for name, answer := range map[string]caddyhttp.HandlerFunc{
		"encoded": func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "text/event-stream")
			w.Header().Set("Content-Encoding", "br")
			w.WriteHeader(200)
			return nil
		},
		"JSON": stream(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "{}") }),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				one, other := provision(t, &caddysse.Handler{Name: "one"}), provision(t, &caddysse.Handler{Name: "other"})
				logged.TakeAll()
				warnings := func(h *caddysse.Handler) (n int) {
					_ = serve(h, newClient(t), get(), answer)
					for _, entry := range logged.TakeAll() {
						if entry.ContextMap()["name"] != h.Name {
							t.Errorf("warning %q of %v", entry.Message, entry.ContextMap())
						}
						n++
					}
					return n
				}
				for minute := range 3 {
					if n := warnings(one); n != 1 {
						t.Errorf("minute %d: %d warnings, want 1", minute, n)
					}
					if n := warnings(other); n != 1 {
						t.Errorf("minute %d: %d warnings of the other handler, want 1", minute, n)
					}
					quiet(time.Minute - 1)
					if n := warnings(one); n != 0 {
						t.Errorf("minute %d: %d warnings more", minute, n)
					}
					quiet(1)
				}
			})
		})
	}
}

func TestNoFrameFollowsTheEndOfTheHandler(t *testing.T) {
	for name, leave := range map[string]func(){
		"that returns": func() {},
		"that panics":  func() { panic(http.ErrAbortHandler) },
	} {
		for at := range 3 {
			t.Run(fmt.Sprintf("%s after %d seconds", name, at), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c := newClient(t)
					h := provision(t, &caddysse.Handler{Retry: &caddysse.Retry{Min: caddy.Duration(time.Second)}})
					func() {
						defer func() { _ = recover() }()
						_ = serve(h, c, get(), stream(func(w http.ResponseWriter) {
							time.Sleep(time.Duration(at) * time.Second)
							leave()
						}))
					}()
					quiet(100 * time.Hour)
				})
			})
		}
	}
	t.Run("not even if it was due at that very moment", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := provision(t, heartbeat(-1, time.Second))
			var all sync.WaitGroup
			for range 500 {
				all.Go(func() {
					// The client fails the test if something reaches it later,
					// and the race detector does if it happens at the same
					// time.
					c := play(t, h, func(http.ResponseWriter) { time.Sleep(time.Second) })
					if got := c.body.String(); got != "" && got != ":heartbeat\n\n" {
						t.Errorf("got %q", got)
					}
				})
			}
			all.Wait()
			quiet(time.Hour)
		})
	})
}

func TestAFrameAndAWriteAtTheSameMomentDoNotMix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := provision(t, heartbeat(-1, time.Second))
		var all sync.WaitGroup
		for range 500 {
			all.Go(func() {
				c := play(t, h, func(w http.ResponseWriter) {
					time.Sleep(time.Second)
					write(t, w, "data: a\n")
					write(t, w, "\n")
					time.Sleep(time.Hour)
				})
				switch got := c.body.String(); got {
				case "data: a\n\n", ":heartbeat\n\ndata: a\n\n":
				default:
					t.Errorf("got %q", got)
				}
			})
		}
		all.Wait()
	})
}

func TestAClientThatTakesNothingDelaysNoOtherStream(t *testing.T) {
	for name, body := range map[string]func(w http.ResponseWriter){
		"in a write": func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, "data: a\n\n")
		},
		"in a frame": func(http.ResponseWriter) {
			time.Sleep(time.Hour)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				interval := 10 * time.Second
				config := heartbeat(interval, -1)
				config.WriteTimeout = -1
				h := provision(t, config)
				stuck := newClient(t)
				stuck.stall = make(chan struct{})
				var all sync.WaitGroup
				all.Go(func() { _ = serve(h, stuck, get(), stream(body)) })
				all.Go(func() {
					c := play(t, h, func(http.ResponseWriter) { time.Sleep(100 * interval) })
					silences := c.silences()
					if len(silences) < 100 {
						t.Errorf("%d frames in 100 intervals", len(silences))
					}
					for _, silence := range silences {
						if silence > interval {
							t.Errorf("a silence of %v", silence)
						}
					}
					close(stuck.stall)
				})
				all.Wait()
				quiet(100 * time.Hour)
			})
		})
	}
}

// An incomplete byte order mark is the only thing from an upstream for which a
// client may have to wait.
func TestAFrameWithoutAPlaceIsTriedAgainWithoutHaste(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := uniqueName(t.Name())
		h := provision(t, &caddysse.Handler{
			Name:      name,
			Heartbeat: &caddysse.Heartbeat{Interval: -1, Prelude: caddy.Duration(time.Second)},
			Retry:     &caddysse.Retry{Min: caddy.Duration(2 * time.Second)},
		})
		c := play(t, h, func(w http.ResponseWriter) {
			write(t, w, "\xef\xbb")
			quiet(time.Hour)
			write(t, w, "\xbf\n")
		})
		expect(t, "what reached the client", c.happenings(), []string{
			"200", "flush",
			"write retry: 2000\n\n", "write \n", "flush",
		})
		registry := prometheus.NewRegistry()
		if err := caddysse.RegisterMetrics(registry); err != nil {
			t.Fatal(err)
		}
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var deferred float64
		for _, family := range families {
			for _, metric := range family.GetMetric() {
				if family.GetName() == "caddy_sse_heartbeats_deferred_total" && metric.GetLabel()[0].GetValue() == name {
					deferred = metric.GetCounter().GetValue()
				}
			}
		}
		if deferred != 1 {
			t.Errorf("%v heartbeats were deferred", deferred)
		}
	})
}

func TestAFrameThatCannotBeWrittenEndsTheUpstreamsHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t)
		failure := errors.New("the client is gone")
		c.fail = failure
		_ = serve(provision(t, &caddysse.Handler{}), c, get(), func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(200)
			select {
			case <-r.Context().Done():
				if cause := context.Cause(r.Context()); !errors.Is(cause, failure) {
					t.Errorf("the cause is %v", cause)
				}
			case <-time.After(time.Hour):
				t.Error("the context is not done")
			}
			return r.Context().Err()
		})
		expect(t, "what reached the client", c.happenings(), []string{"200", "flush", "write :heartbeat\n\n"})
	})
}

func TestTheReconnectionTimeIsToldBeforeAnythingElse(t *testing.T) {
	for _, test := range []struct{ style, body, want string }{
		// With the upstream's first bytes.
		{"block", "data: a\n\n|", "retry: 2500\n\ndata: a\n\n:heartbeat\n\n"},
		{"line", "data: a\n\n|", "retry: 2500\ndata: a\n\n:heartbeat\n"},
		// With the first frame.
		{"block", "|data: a\n\n|", "retry: 2500\n\n:heartbeat\n\ndata: a\n\n:heartbeat\n\n"},
		// Instead of a byte order mark, which must not follow anything.
		{"block", "\xEF|\xBB\xBF|data: a\n\n", "retry: 2500\n\n:heartbeat\n\n:heartbeat\n\ndata: a\n\n"},
		// Not if the body is not an event stream.
		{"block", "{}", "{}"},
		// Not if nothing is sent.
		{"block", "", ""},
	} {
		t.Run(fmt.Sprintf("%s %q", test.style, test.body), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				settings := styles[test.style]
				settings.Interval, settings.Prelude = caddy.Duration(10*time.Second), -1
				h := provision(t, &caddysse.Handler{Heartbeat: &settings, Retry: &caddysse.Retry{Min: caddy.Duration(2500 * time.Millisecond)}})
				c := play(t, h, func(w http.ResponseWriter) { playScript(t, w, test.body) })
				if got := c.body.String(); got != test.want {
					t.Errorf("\ngot  %q\nwant %q", got, test.want)
				}
			})
		})
	}
}

func TestTheReconnectionTimeIsToldWithoutHeartbeatsToo(t *testing.T) {
	config := silent()
	config.Retry = &caddysse.Retry{Min: caddy.Duration(time.Second)}
	c := play(t, provision(t, config), func(w http.ResponseWriter) {
		write(t, w, "data: a\n\n")
		write(t, w, "data: b\n\n")
	})
	expect(t, "what reached the client", c.happenings(), []string{
		"200", "flush", "write retry: 1000\n\n", "write data: a\n\n", "flush", "write data: b\n\n", "flush",
	})
}

func TestEachStreamHasAReconnectionTimeOfItsOwn(t *testing.T) {
	config := silent()
	config.Retry = &caddysse.Retry{Min: caddy.Duration(2 * time.Second), Max: caddy.Duration(5 * time.Second)}
	h := provision(t, config)
	told := make(map[int]int)
	var low, high int
	const streams = 500
	for range streams {
		c := play(t, h, func(w http.ResponseWriter) { write(t, w, ":\n") })
		var ms int
		if _, err := fmt.Sscanf(c.body.String(), "retry: %d\n\n:\n", &ms); err != nil {
			t.Fatalf("got %q: %v", c.body.String(), err)
		}
		if ms < 2000 || ms > 5000 {
			t.Errorf("a reconnection time of %d ms", ms)
		}
		if ms < 2500 {
			low++
		}
		if ms > 4500 {
			high++
		}
		told[ms]++
	}
	if len(told) < streams*2/3 || low < streams/20 || high < streams/20 {
		t.Errorf("%d streams were told %d times, %d of them short and %d long", streams, len(told), low, high)
	}
}

func TestClientsWithAQuirkGetWhatTheyCanTake(t *testing.T) {
	const none, line, block = "", ":heartbeat\n", ":heartbeat\n\n"
	for _, test := range []struct {
		style, field, value, want string
	}{
		{"", "User-Agent", "OpenAI/Python 3.57.0", line},
		{"auto", "User-Agent", "AsyncOpenAI/Python 3.57.0", line},
		{"auto", "X-Goog-Api-Client", "google-genai-sdk/1.77.0 gl-go/go1.26", none},
		{"auto", "User-Agent", "Mozilla/5.0", block},
		{"block", "User-Agent", "OpenAI/Python 3.57.0", block},
		{"line", "User-Agent", "google-genai-sdk/3.6.0 gl-python/3.11", line},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := provision(t, &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Style: test.style}})
			r := get()
			r.Method = http.MethodPost
			r.Header.Set(test.field, test.value)
			c := newClient(t)
			_ = serve(h, c, r, stream(func(http.ResponseWriter) { quiet(2 * time.Second) }))
			if got := c.body.String(); got != test.want {
				t.Errorf("style %q, %s: %s: got %q, want %q", test.style, test.field, test.value, got, test.want)
			}
		})
	}
}

func TestACommentIsFilledUp(t *testing.T) {
	for style, want := range map[string]string{
		"block": ":heartbeat" + strings.Repeat(" ", 88) + "\n\n",
		"line":  ":heartbeat" + strings.Repeat(" ", 89) + "\n",
		"auto":  ":heartbeat" + strings.Repeat(" ", 88) + "\n\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			h := provision(t, &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Style: style, Pad: 100}})
			c := play(t, h, func(http.ResponseWriter) { quiet(2 * time.Second) })
			if got := c.body.String(); got != want {
				t.Errorf("%s: got %q", style, got)
			}
		})
	}
}

func TestOnlyAResumableStreamIsToldAReconnectionTime(t *testing.T) {
	for method, want := range map[string]string{"GET": "retry: 1000\n\ndata: 1\n\n", "POST": "data: 1\n\n"} {
		synctest.Test(t, func(t *testing.T) {
			h := provision(t, &caddysse.Handler{Retry: &caddysse.Retry{Min: caddy.Duration(time.Second)}})
			r := get(eventStream)
			r.Method = method
			c := newClient(t)
			_ = serve(h, c, r, stream(func(w http.ResponseWriter) { write(t, w, "data: 1\n\n") }))
			if got := c.body.String(); got != want {
				t.Errorf("%s: got %q, want %q", method, got, want)
			}
		})
	}
}
