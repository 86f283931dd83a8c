package demo

import (
	"encoding/json"
	"net/http"
	"sync"
)

// clientParam is the query parameter with the name of the page's stream.
const clientParam = "client"

// maxEndings bounds how many names are stored.
const maxEndings = 100

// Ending is how a stream ended.
type Ending struct {
	// Status is what the client was answered.
	Status int `json:"status"`
	// Bytes is how much of a body it got.
	Bytes int64 `json:"bytes"`
	// Clean says that the body was complete; otherwise it broke off.
	Clean bool `json:"clean"`
	// Why is who ended it; empty if no part of the demo did.
	Why string `json:"why"`
}

// Endings records how the last stream of each client ended, because an
// EventSource does not tell its page. A nil one records nothing.
type Endings struct {
	mu       sync.Mutex
	byClient map[string]Ending
	reasons  map[string]string // why streams are about to end that have not ended yet
}

// say records why the stream of a request is about to end.
func (e *Endings) say(r *http.Request, why string) {
	client := r.URL.Query().Get(clientParam)
	if e == nil || client == "" {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.reasons) >= maxEndings || e.reasons == nil {
		e.reasons = make(map[string]string)
	}
	e.reasons[client] = why
}

// ended records what the client saw of the end.
func (e *Endings) ended(r *http.Request, ending Ending) {
	client := r.URL.Query().Get(clientParam)
	if client == "" {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	ending.Why = e.reasons[client]
	delete(e.reasons, client)
	if len(e.byClient) >= maxEndings || e.byClient == nil {
		e.byClient = make(map[string]Ending)
	}
	e.byClient[client] = ending
}

// ServeHTTP returns the ending of the client's last stream.
func (e *Endings) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	ending, known := e.byClient[r.URL.Query().Get(clientParam)]
	e.mu.Unlock()
	if !known {
		http.Error(w, "no stream of this client has ended", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(ending)
}
