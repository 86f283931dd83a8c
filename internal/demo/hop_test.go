package demo

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"syscall"
	"testing"
	"time"
)

// throughHop starts a hop in front of a handler. It returns its URL, and a
// function that returns what the hop has seen of client a's stream.
func throughHop(t *testing.T, idle time.Duration, endings *Endings, handler http.HandlerFunc) (base string, ending func() Ending) {
	t.Helper()
	caddy := httptest.NewServer(handler)
	t.Cleanup(caddy.Close)
	target, err := url.Parse(caddy.URL)
	if err != nil {
		t.Fatal(err)
	}
	hop := httptest.NewServer(Hop(target, idle, endings))
	t.Cleanup(hop.Close)
	return hop.URL, func() (e Ending) {
		t.Helper()
		recorder := httptest.NewRecorder()
		endings.ServeHTTP(recorder, httptest.NewRequest("GET", "/ending?client=a", nil))
		if recorder.Code != http.StatusOK || json.Unmarshal(recorder.Body.Bytes(), &e) != nil {
			t.Fatalf("%d %s", recorder.Code, recorder.Body)
		}
		return e
	}
}

// read reads a response to its end.
func read(t *testing.T, url string) (body string, err error) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}

func TestTheHopCutsASilentResponse(t *testing.T) {
	base, ending := throughHop(t, 50*time.Millisecond, new(Endings), func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "data: 1\n\n")
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	body, err := read(t, base+"/?client=a")
	if body != "data: 1\n\n" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %q, %v", body, err)
	}
	want := Ending{Status: 200, Bytes: 9, Why: "an idle timer on the way cut it: 0.05 s without a byte"}
	if got := ending(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestTheHopTellsHowAResponseEnded(t *testing.T) {
	endings := new(Endings)
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    Ending
	}{
		"clean": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "12345")
		}, Ending{Status: 200, Bytes: 5, Clean: true}},
		"an error": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadGateway)
		}, Ending{Status: 502, Clean: true}},
		"broken off, and by whom": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "123")
			http.NewResponseController(w).Flush()
			endings.say(r, "the upstream restarted")
			panic(http.ErrAbortHandler)
		}, Ending{Status: 200, Bytes: 3, Why: "the upstream restarted"}},
	} {
		base, ending := throughHop(t, time.Minute, endings, test.handler)
		_, _ = read(t, base+"/?client=a")
		if got := ending(); got != test.want {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
	}
}

func TestAnEndingOfNobodyIsNotFound(t *testing.T) {
	recorder := httptest.NewRecorder()
	new(Endings).ServeHTTP(recorder, httptest.NewRequest("GET", "/ending?client=b", nil))
	if recorder.Code != http.StatusNotFound {
		t.Errorf("status %d", recorder.Code)
	}
}

func TestARestartRefusesConnectionsUntilItIsOver(t *testing.T) {
	endings := new(Endings)
	u := NewUpstream()
	u.Lead, u.Away, u.Endings = 0, 50*time.Millisecond, endings
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	addr, err := u.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := (&http.Client{Transport: transport}).Get("http://" + addr + "/events?client=a")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()

	u.Restart(ctx)
	u.Restart(ctx) // does nothing
	if _, err := io.ReadAll(response.Body); err == nil {
		t.Error("the stream ended cleanly")
	}
	if why := endings.reasons["a"]; why != "the upstream restarted" {
		t.Errorf("it ended because %q", why)
	}
	refused := false
	for {
		request, _ := http.NewRequestWithContext(ctx, "HEAD", "http://"+addr+"/events", nil)
		response, err := transport.RoundTrip(request)
		if err == nil {
			response.Body.Close()
			break
		}
		refused = refused || errors.Is(err, syscall.ECONNREFUSED)
	}
	if !refused {
		t.Error("no connection was refused")
	}
}
