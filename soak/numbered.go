//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// numbered is the upstream of trials. Its streams have the events 1, 2, 3 …, and
// it counts its requests.
type numbered struct {
	mu       sync.Mutex
	paths    map[string]int // requests
	requests int
	returns  []time.Time // of the last ten seconds, of requests with a Last-Event-ID
	told     requestsTold
}

// requestsTold is what the upstream reports about its requests.
type requestsTold struct {
	Requests int `json:"requests"`
	Paths    int `json:"paths"` // that were asked for
	Most     int `json:"most"`  // requests for one path
	Returns  int `json:"returns"`
	// The most of them in any second, and in any ten seconds.
	InASecond    int `json:"in_a_second"`
	InTenSeconds int `json:"in_ten_seconds"`
	Foreign      int `json:"foreign"` // requests with an id that the proxy has made
}

func (u *numbered) handle(mux *http.ServeMux) {
	u.paths = make(map[string]int)
	mux.HandleFunc("/numbered/{client}", u.serve)
	mux.HandleFunc("GET /requests", u.tell)
}

func (u *numbered) note(r *http.Request) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.requests++
	u.paths[r.URL.Path]++
	u.told.Most = max(u.told.Most, u.paths[r.URL.Path])
	id := r.Header.Get("Last-Event-ID")
	if id == "" {
		return
	}
	if strings.HasPrefix(id, "sse1-") {
		u.told.Foreign++
	}
	u.told.Returns++
	now := time.Now()
	u.returns = append(u.returns, now)
	within := func(d time.Duration) int {
		return len(u.returns) - sort.Search(len(u.returns), func(i int) bool { return now.Sub(u.returns[i]) < d })
	}
	u.told.InASecond = max(u.told.InASecond, within(time.Second))
	tenSeconds := within(10 * time.Second)
	u.told.InTenSeconds = max(u.told.InTenSeconds, tenSeconds)
	u.returns = u.returns[len(u.returns)-tenSeconds:]
}

func (u *numbered) tell(w http.ResponseWriter, _ *http.Request) {
	u.mu.Lock()
	told := u.told
	told.Requests, told.Paths = u.requests, len(u.paths)
	u.mu.Unlock()
	_ = json.NewEncoder(w).Encode(told)
}

// numbers describes a stream, in the query of its request.
type numbers struct {
	last int           // the number of its last event, after which it ends
	pace time.Duration // the mean time between two
	size int           // of what is added to each number
	ids  bool

	// from is when a stream with ids began. It continues without clients, and a
	// client that comes back gets what it missed.
	from time.Time
}

func (n numbers) query() string {
	return fmt.Sprintf("last=%d&pace=%d&size=%d&ids=%t&from=%d", n.last, n.pace.Microseconds(), n.size, n.ids, n.from.UnixMicro())
}

func readNumbers(query url.Values) numbers {
	number := func(key string) int64 {
		n, _ := strconv.ParseInt(query.Get(key), 10, 64)
		return n
	}
	return numbers{
		last: int(number("last")), pace: time.Duration(number("pace")) * time.Microsecond, size: int(number("size")),
		ids: query.Get("ids") == "true", from: time.UnixMicro(number("from")),
	}
}

// at is the number of the newest event at a time.
func (n numbers) at(now time.Time) int { return min(int(now.Sub(n.from)/n.pace), n.last) }

func (u *numbered) serve(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	u.note(r)
	want := readNumbers(r.URL.Query())
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	out := http.NewResponseController(w)
	_, _ = io.WriteString(w, "retry: 300\n\n")
	if out.Flush() != nil {
		return
	}
	if want.ids {
		u.replay(w, r, want)
		return
	}
	ending := []string{"\n", "\r\n", "\r"}[rand.IntN(3)]
	for n := 1; n <= want.last; n++ {
		if !wait(r, rand.N(2*want.pace)) {
			return
		}
		text := fmt.Sprintf("data: %d %s%s%s", n, strings.Repeat("x", want.size), ending, ending)
		cut := len(text)
		if rand.IntN(10) == 0 {
			cut = rand.IntN(len(text))
		}
		for _, piece := range []string{text[:cut], text[cut:]} {
			if _, err := io.WriteString(w, piece); err != nil || out.Flush() != nil {
				return
			}
		}
	}
}

// replay sends a stream with ids, from the one after Last-Event-ID on.
func (u *numbered) replay(w http.ResponseWriter, r *http.Request, want numbers) {
	sent, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
	out := http.NewResponseController(w)
	for {
		var text strings.Builder
		for at := want.at(time.Now()); sent < at; {
			sent++
			fmt.Fprintf(&text, "id: %d\ndata: %d %s\n\n", sent, sent, strings.Repeat("x", want.size))
		}
		if text.Len() > 0 {
			if _, err := io.WriteString(w, text.String()); err != nil || out.Flush() != nil {
				return
			}
		}
		if sent == want.last {
			<-r.Context().Done()
			return
		}
		if !wait(r, time.Until(want.from.Add(time.Duration(sent+1)*want.pace))) {
			return
		}
	}
}

// requests are those that the upstream has had.
func (u *upstream) requests() (told requestsTold, err error) {
	client := http.Client{Timeout: 30 * time.Second}
	defer client.CloseIdleConnections()
	response, err := client.Get("http://" + u.addr + "/requests")
	if err != nil {
		return told, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return told, &measure.StatusError{Path: "/requests", Status: response.StatusCode}
	}
	return told, json.NewDecoder(response.Body).Decode(&told)
}
