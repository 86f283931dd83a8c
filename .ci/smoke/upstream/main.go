// Command upstream is the server behind Caddy in the smoke test. It prints its
// port and serves until it is killed.
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// open is how many clients are at events.
var open atomic.Int64

func main() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /events", events)
	http.HandleFunc("GET /open", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, open.Load()) })
	http.HandleFunc("POST /v1/chat/completions", completion)
	fmt.Println(ln.Addr().(*net.TCPAddr).Port)
	log.Fatal(http.Serve(ln, nil))
}

// events sends one event and is then silent for as long as the client stays,
// so whatever else arrives is Caddy's. Its headers are wrong on purpose.
func events(w http.ResponseWriter, r *http.Request) {
	open.Add(1)
	defer open.Add(-1)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "public, max-age=60")
	w.Header().Set("ETag", `"1"`)
	io.WriteString(w, "id: 1\ndata: first\n\n")
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// completion answers as language models do: POST, one event per token, a last
// one that is no JSON. It takes longer than a heartbeat interval in all but is
// never silent for as long as that, and its writes end in the middle of lines
// and of characters.
func completion(w http.ResponseWriter, r *http.Request) {
	prompt, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	body := fmt.Appendf(nil, "data: {\"prompt\":%s}\n\n", prompt)
	for i := range 40 {
		body = fmt.Appendf(body, "data: {\"index\":%d,\"delta\":\"grüße 🌊 \"}\n\n", i)
	}
	body = append(body, "data: [DONE]\n\n"...)

	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	for len(body) > 0 {
		n := min(37, len(body))
		w.Write(body[:n])
		w.(http.Flusher).Flush()
		body = body[n:]
		time.Sleep(25 * time.Millisecond)
	}
}
