package demo

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// write is one write of the upstream, with the time since the headers.
type write struct {
	at   time.Duration
	text string
}

// recording is a client that records what arrives and when. Its clock starts
// with the first flush, which sends the headers.
type recording struct {
	header http.Header
	opened time.Time
	writes []write
}

func (r *recording) Header() http.Header { return r.header }

func (r *recording) WriteHeader(int) {}

func (r *recording) Write(p []byte) (int, error) {
	r.writes = append(r.writes, write{time.Since(r.opened), string(p)})
	return len(p), nil
}

func (r *recording) Flush() {
	if r.opened.IsZero() {
		r.opened = time.Now()
	}
}

func (r *recording) body() string {
	var body strings.Builder
	for _, w := range r.writes {
		body.WriteString(w.text)
	}
	return body.String()
}

// watch reads a stream until it ends, in a synctest bubble.
func watch(ctx context.Context, u *Upstream, lastEventID string) *recording {
	request := httptest.NewRequestWithContext(ctx, "GET", "/events", nil)
	if lastEventID != "" {
		request.Header.Set("Last-Event-ID", lastEventID)
	}
	client := &recording{header: make(http.Header)}
	u.Handler().ServeHTTP(client, request)
	return client
}

// fields returns the values of all fields with this name in a body.
func fields(body, name string) []string {
	var values []string
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, name+": "); ok {
			values = append(values, strings.TrimSuffix(value, "\n"))
		}
	}
	return values
}

func TestAStreamComesInBurstsWithSilencesBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := watch(t.Context(), NewUpstream(), "")
		body := client.body()

		if ids := fields(body, "id")[:6]; !slices.Equal(ids, []string{"1", "2", "3", "4", "5", "6"}) {
			t.Errorf("ids begin with %q", ids)
		}
		if first := client.writes[0].at; first != time.Second {
			t.Errorf("the first event came %v after the headers", first)
		}
		var silences int
		wholeEvents := client.writes[:len(client.writes)-1]
		for before, after := range pairs(wholeEvents) {
			switch gap := after.at - before.at; gap {
			case 20 * time.Second:
				silences++
			case 0, 700 * time.Millisecond, 400 * time.Millisecond: // the first comes later, after the lead
			default:
				t.Errorf("a gap of %v before %q", gap, after.text)
			}
		}
		if silences < 4 {
			t.Errorf("%d silences of 20s in two minutes", silences)
		}
		if got := fields(body, "event"); !slices.Contains(got, "tick") {
			t.Errorf("no tick among the event names %q", got)
		}
	})
}

func pairs(writes []write) func(yield func(before, after write) bool) {
	return func(yield func(before, after write) bool) {
		for i := 1; i < len(writes); i++ {
			if !yield(writes[i-1], writes[i]) {
				return
			}
		}
	}
}

func TestEveryOtherSilenceFallsIntoAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := watch(t.Context(), NewUpstream(), "")
		var inside []bool
		for before, after := range pairs(client.writes) {
			if after.at-before.at == 20*time.Second {
				inside = append(inside, !strings.HasSuffix(before.text, "\n\n"))
			}
		}
		if want := []bool{true, false, true, false}; !slices.Equal(inside[:4], want) {
			t.Errorf("silences inside an event: %v, want %v", inside, want)
		}
	})
}

func TestAStreamEndsInMidEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		client := watch(t.Context(), NewUpstream(), "")
		if age := time.Since(start); age != 2*time.Minute {
			t.Errorf("the stream ended after %v", age)
		}
		if body := client.body(); strings.HasSuffix(body, "\n\n") {
			t.Errorf("the stream ends with a whole event: %q", body[len(body)-40:])
		}
	})
}

func TestAClientThatComesBackGetsWhatItHasMissed(t *testing.T) {
	for _, test := range []struct {
		lastEventID string
		first       string
	}{
		{"1", "2"},
		{"4", "5"},
		{"5", "6"},
		{"", "5"}, // the newest event
		{"not ours", "5"},
		{"-1", "5"},
		{"99999999999999999999", "5"},
	} {
		synctest.Test(t, func(t *testing.T) {
			u := NewUpstream()
			u.due(1) // this starts the clock
			time.Sleep(u.period() + u.Step)
			client := watch(t.Context(), u, test.lastEventID)
			if first := fields(client.body(), "id")[0]; first != test.first {
				t.Errorf("Last-Event-ID %q: the first id is %s, want %s", test.lastEventID, first, test.first)
			}
			if at := client.writes[0].at; at != time.Second {
				t.Errorf("Last-Event-ID %q: the first event came after %v", test.lastEventID, at)
			}
			ids := fields(client.body(), "id")
			for i := 1; i < len(ids); i++ {
				if before, _ := strconv.Atoi(ids[i-1]); ids[i] != strconv.Itoa(before+1) {
					t.Errorf("Last-Event-ID %q: %s follows %s", test.lastEventID, ids[i], ids[i-1])
				}
			}
		})
	}
}

func TestEventsHappenAtTheSameTimeForEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := NewUpstream()
		start := time.Now()
		var readers sync.WaitGroup
		came := make([]map[string]time.Duration, 2)
		for i, delay := range []time.Duration{0, 5 * time.Second} {
			readers.Go(func() {
				time.Sleep(delay)
				client := watch(t.Context(), u, "")
				came[i] = make(map[string]time.Duration)
				for _, w := range client.writes {
					if id := fields(w.text, "id"); len(id) == 1 && strings.HasSuffix(w.text, "\n\n") {
						came[i][id[0]] = client.opened.Add(w.at).Sub(start)
					}
				}
			})
		}
		readers.Wait()
		both := 0
		for id, at := range came[0] {
			if id == "3" {
				continue // the newest event when the second reader came
			}
			if other, there := came[1][id]; there && other != at {
				t.Errorf("event %s came at %v and %v", id, at, other)
			} else if there {
				both++
			}
		}
		if both < 8 {
			t.Errorf("%d events in common", both)
		}
	})
}

func TestAStreamEndsWithItsRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		start := time.Now()
		watch(ctx, NewUpstream(), "")
		if age := time.Since(start); age != 10*time.Second {
			t.Errorf("the stream ended after %v", age)
		}
	})
}

func TestTheHeadersSayNothingAboutCaches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := watch(t.Context(), NewUpstream(), "").Header()
		if got.Get("Content-Type") != "text/event-stream" {
			t.Errorf("Content-Type is %q", got.Get("Content-Type"))
		}
		for _, name := range []string{"Cache-Control", "X-Accel-Buffering", "Expires"} {
			if value := got.Get(name); value != "" {
				t.Errorf("%s: %s", name, value)
			}
		}
	})
}

func TestAHeadRequestDoesNotWaitForEvents(t *testing.T) {
	recorder := httptest.NewRecorder()
	NewUpstream().Handler().ServeHTTP(recorder, httptest.NewRequest("HEAD", "/events", nil))
	if recorder.Code != http.StatusOK || recorder.Body.Len() > 0 {
		t.Errorf("status %d, body %q", recorder.Code, recorder.Body)
	}
}
