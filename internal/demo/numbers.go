package demo

import (
	"fmt"
	"net/http"
	"sync"
	"time"
)

// Numbers is an upstream that counts, and has neither ids nor a replay: a client
// misses the numbers that come while it is disconnected. Each event is the next
// number, the same for all clients, with the number of requests of this client.
//
//	GET <any path>[?client=<name>]  a stream
type Numbers struct {
	// Step is the time between two events.
	Step time.Duration

	mu    sync.Mutex
	began time.Time      // when the count was 1
	asked map[string]int // how many requests, by client
}

// NewNumbers returns an upstream that counts fast enough to watch.
func NewNumbers() *Numbers { return &Numbers{Step: 250 * time.Millisecond} }

func (u *Numbers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began, asked := u.ask(r.URL.Query().Get(clientParam))
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w).Flush
	if flush() != nil {
		return
	}
	for n := time.Since(began)/u.Step + 1; ; n++ {
		select {
		case <-time.After(time.Until(began.Add(n * u.Step))):
		case <-r.Context().Done():
			return
		}
		if _, err := fmt.Fprintf(w, "data: {\"n\": %d, \"asked\": %d}\n\n", n, asked); err != nil || flush() != nil {
			return
		}
	}
}

// ask counts a request, and returns since when there are numbers.
func (u *Numbers) ask(client string) (began time.Time, asked int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.began.IsZero() {
		u.began = time.Now()
	}
	if u.asked == nil || len(u.asked) >= maxEndings {
		u.asked = make(map[string]int)
	}
	u.asked[client]++
	return u.began, u.asked[client]
}
