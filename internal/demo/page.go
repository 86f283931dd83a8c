package demo

import (
	"embed"
	"io/fs"
	"net/http"
)

//go:embed page
var files embed.FS

// pageHandler serves the page and what it is made of.
func pageHandler() http.Handler {
	page, err := fs.Sub(files, "page")
	if err != nil {
		panic(err) // the embedded folder has another name
	}
	server := http.FileServerFS(page)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Embedded files have no time of change: a browser could not tell the
		// page of the next build from this one.
		w.Header().Set("Cache-Control", "no-cache")
		server.ServeHTTP(w, r)
	})
}
