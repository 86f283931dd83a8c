package demo

import (
	"context"
	"embed"
	"encoding/json"
	"io/fs"
	"net/http"
)

//go:embed page
var files embed.FS

// Parts are what the page's buttons act on.
type Parts struct {
	Upstream *Upstream
	Numbers  *Numbers
	Plug     *Plug
}

// NewParts returns parts with timings that are good to watch.
func NewParts() Parts {
	return Parts{Upstream: NewUpstream(), Numbers: NewNumbers(), Plug: NewPlug()}
}

// About is what the page tells about its demo.
type About struct {
	// List and Close are commands to try with this demo.
	List  string `json:"list"`
	Close string `json:"close"`
	// Away is how long a restart of the upstream takes, in milliseconds.
	Away int64 `json:"away"`
	// Out is how long the plug stays out, in milliseconds.
	Out int64 `json:"out"`
	// Step is the time between two numbers, in milliseconds.
	Step int64 `json:"step"`
}

// Page serves the page and what its buttons do.
//
//	GET  /                       the page
//	GET  /about                  an About
//	GET  /ending?client=<name>   how that client's last stream ended: an Ending
//	POST /restart                restarts the upstream
//	POST /pull                   pulls the plug
//
// The upstream restarts until ctx is done.
func Page(ctx context.Context, parts Parts, endings *Endings, about About) http.Handler {
	about.Away = parts.Upstream.Away.Milliseconds()
	about.Out, about.Step = parts.Plug.Out.Milliseconds(), parts.Numbers.Step.Milliseconds()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /about", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(about)
	})
	mux.Handle("GET /ending", endings)
	mux.HandleFunc("POST /restart", func(w http.ResponseWriter, _ *http.Request) {
		parts.Upstream.Restart(ctx)
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("POST /pull", func(w http.ResponseWriter, _ *http.Request) {
		parts.Plug.Pull()
		w.WriteHeader(http.StatusAccepted)
	})
	page, err := fs.Sub(files, "page")
	if err != nil {
		panic(err) // the embedded folder has another name
	}
	static := http.FileServerFS(page)
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		// Embedded files have no modification time: without this header, a browser
		// could not tell the page of the next build from this one.
		w.Header().Set("Cache-Control", "no-cache")
		static.ServeHTTP(w, r)
	})
	return mux
}
