package caddysse_test

import (
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Caddy's FastCGI client does not heed the context of a request while it waits
// for the application: what ends a stream has to do without it.
func TestPHPStreams(t *testing.T) {
	checkLeaks(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	next := make(map[string]chan string)
	for _, proto := range clientProtocols {
		next["/"+proto] = make(chan string)
	}
	go fcgi.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		for text := "data: 1\n\n"; text != ""; text = <-next[r.URL.Path] {
			io.WriteString(w, text)
			w.(http.Flusher).Flush()
		}
	}))
	defer ln.Close()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "index.php"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := startCaddy(t, `
		root `+root+`
		sse 200ms {
			prelude off
			write_timeout 1m
		}
		php_fastcgi `+ln.Addr().String(), withAdmin())
	var all sync.WaitGroup
	for _, proto := range clientProtocols {
		all.Go(func() {
			path := "/" + proto
			defer close(next[path])
			body := c.client(proto).get(t, path, acceptStream).follow()
			body.expect(t, "data: 1\n\n")
			body.expect(t, ":heartbeat\n\n")
			next[path] <- "data: 2\n\n"
			body.expect(t, "data: 2\n\n")

			c.adminJSON(t, "DELETE", "/sse/streams/"+c.listed(t, path)["id"].(string), 202)
			began := time.Now()
			if proto == "h3" { // the one that can't be reset from outside
				next[path] <- "data: 3\n\n"
				body.expectEnd(t)
			} else {
				body.expectAbort(t)
				if took := time.Since(began); took < 4*time.Second {
					t.Errorf("%s: it was broken off after %v", proto, took)
				}
				next[path] <- "data: 3\n\n"
			}
			expectEnd(t, c.closedLine(t, path), "admin", "info")
		})
	}
	all.Wait()
}
