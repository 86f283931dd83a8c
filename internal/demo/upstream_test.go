package demo

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// write is one write of the upstream, with the time since the headers.
type write struct {
	at   time.Duration
	text string
}

// recording is a client that keeps what comes and when. Its clock starts with
// the first flush, which carries the headers.
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

// watch reads a stream in the time of a synctest bubble until it ends.
func watch(ctx context.Context, u *Upstream, lastEventID string) *recording {
	request := httptest.NewRequestWithContext(ctx, "GET", "/events", nil)
	if lastEventID != "" {
		request.Header.Set("Last-Event-ID", lastEventID)
	}
	client := &recording{header: make(http.Header)}
	u.Handler().ServeHTTP(client, request)
	return client
}

// fields returns the values of all fields of that name in a body.
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
		if first := client.writes[0].at; first != 3*time.Second {
			t.Errorf("the first event came %v after the headers", first)
		}
		var silences int
		wholeEvents := client.writes[:len(client.writes)-1]
		for before, after := range pairs(wholeEvents) {
			switch gap := after.at - before.at; gap {
			case 20 * time.Second:
				silences++
			case 0, 800 * time.Millisecond:
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

func TestAClientThatComesBackGetsTheNextEvent(t *testing.T) {
	for _, test := range []struct{ lastEventID, first string }{
		{"7", "8"},
		{"10", "11"},
		{"", "1"},
		{"not ours", "1"},
		{"-1", "1"},
		{"99999999999999999999", "1"},
	} {
		synctest.Test(t, func(t *testing.T) {
			client := watch(t.Context(), NewUpstream(), test.lastEventID)
			if first := fields(client.body(), "id")[0]; first != test.first {
				t.Errorf("Last-Event-ID %q: the first id is %s, want %s", test.lastEventID, first, test.first)
			}
			if at := client.writes[0].at; at != 3*time.Second {
				t.Errorf("Last-Event-ID %q: the first event came after %v", test.lastEventID, at)
			}
		})
	}
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

func TestAStreamCanBeDropped(t *testing.T) {
	server := httptest.NewServer((&Upstream{Burst: 5, Step: time.Millisecond, Silence: time.Hour, Lifetime: time.Hour}).Handler())
	defer server.Close()
	drop := func(client string) int {
		response, err := http.Post(server.URL+"/drop?client="+client, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}

	if status := drop("a"); status != http.StatusNotFound {
		t.Errorf("status %d for a client without a stream", status)
	}
	// The next stream of the same client is another one to drop.
	for range 2 {
		response, err := http.Get(server.URL + "/events?client=a")
		if err != nil {
			t.Fatal(err)
		}
		body := bufio.NewReader(response.Body)
		if line, err := body.ReadString('\n'); err != nil || line != "id: 1\n" {
			t.Errorf("first line %q, %v", line, err)
		}
		if status := drop("b"); status != http.StatusNotFound {
			t.Errorf("status %d for another client", status)
		}
		if status := drop("a"); status != http.StatusNoContent {
			t.Errorf("status %d", status)
		}
		if _, err := io.Copy(io.Discard, body); err != nil {
			t.Errorf("the stream ends with %v", err)
		}
		response.Body.Close()
	}
}

func TestThePageRefersOnlyToWhatIsServed(t *testing.T) {
	handler := NewUpstream().Handler()
	get := func(path string) *httptest.ResponseRecorder {
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, httptest.NewRequest("GET", path, nil))
		return recorder
	}

	page := get("/")
	if page.Code != http.StatusOK || page.Header().Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("status %d, Content-Type %q", page.Code, page.Header().Get("Content-Type"))
	}
	types := map[string]string{
		"demo.js":   "text/javascript; charset=utf-8",
		"style.css": "text/css; charset=utf-8",
		"icon.svg":  "image/svg+xml",
	}
	references := regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(page.Body.String(), -1)
	if len(references) != len(types) {
		t.Errorf("the page refers to %q", references)
	}
	for _, reference := range references {
		file := reference[1]
		if got := get("/" + file); got.Code != http.StatusOK || got.Header().Get("Content-Type") != types[file] {
			t.Errorf("%s: status %d, Content-Type %q", file, got.Code, got.Header().Get("Content-Type"))
		}
	}
	if got := get("/nothing"); got.Code != http.StatusNotFound {
		t.Errorf("status %d for a file that is not there", got.Code)
	}
}
