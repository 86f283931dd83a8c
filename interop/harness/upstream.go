package harness

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Serve runs a handler of the test as an upstream and returns its address.
func Serve(t testing.TB, handler http.HandlerFunc) (addr string) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return strings.TrimPrefix(server.URL, "http://")
}

// Begin sends the usual headers of recipes for event streams, and flushes them.
func Begin(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	w.WriteHeader(http.StatusOK)
	http.NewResponseController(w).Flush()
}

// Send writes bytes of a stream and flushes them.
func Send(w http.ResponseWriter, bytes string) {
	w.Write([]byte(bytes))
	http.NewResponseController(w).Flush()
}
