package caddysse

import (
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// progressUnit is how much of a write has to go out within the write timeout:
// a client that takes less than this in that time counts as one that takes
// nothing.
const progressUnit = 4 << 10

// What a writer gets that sets a deadline before each write: a controller that
// supports none, and nowhere to say so.
var (
	noDeadlines = http.NewResponseController(struct{ http.ResponseWriter }{})
	noLog       = zap.NewNop()
)

// ownTimeouts takes a stream out of the server's timeouts and minimum rates: a
// write that gets no further is noticed by the stream's agenda, at no cost for
// all others. What it changes belongs to this request: the next one on the
// connection gets the server's timeouts again (net/http sets a connection's
// deadlines for each request, Caddy wraps the writer for each).
func ownTimeouts(w http.ResponseWriter) {
	var connection http.ResponseWriter
	for inner := w; inner != nil; inner = unwrap(inner) {
		connection = inner
		if idle, ok := inner.(*caddyhttp.IdleTimeoutWriter); ok {
			idle.Ctrl, idle.Logger = noDeadlines, noLog
		}
	}
	// The read timeout would show up as if the client had left. Where deadlines
	// are not supported there is none to clear.
	controller := http.NewResponseController(connection)
	_ = controller.SetReadDeadline(time.Time{})
	_ = controller.SetWriteDeadline(time.Time{})
}

// setConnectionDeadline sets a write deadline past all writers around the
// connection's own.
func setConnectionDeadline(w http.ResponseWriter, deadline time.Time) error {
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	return http.NewResponseController(w).SetWriteDeadline(deadline)
}
