package caddysse

import (
	"math"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// progressUnit is how much of a write has to go out within the write timeout:
// a client that takes less than this in that time counts as one that takes
// nothing.
const progressUnit = 4 << 10

// ownTimeouts takes a stream out of the server's timeouts and minimum rates, and
// returns the writer that bounds its writes by timeout instead; 0 means not at
// all. What it changes belongs to this request: the next one on the connection
// gets the server's timeouts again (net/http sets a connection's deadlines for
// each request, Caddy wraps the writer for each).
func ownTimeouts(w http.ResponseWriter, timeout time.Duration, logger *zap.Logger) http.ResponseWriter {
	bounded := false
	var connection http.ResponseWriter
	for inner := w; inner != nil; inner = unwrap(inner) {
		connection = inner
		if idle, ok := inner.(*caddyhttp.IdleTimeoutWriter); ok {
			// Both would be applied again before every write.
			idle.Deadline.HardDeadline = time.Time{}
			if timeout > 0 {
				idle.Override(timeout, 0, progressUnit)
			} else {
				idle.Override(math.MaxInt64/2, 0, 0)
			}
			bounded = true
		}
	}
	// The read timeout would show up as if the client had left. Where deadlines
	// are not supported there is none to clear, and none to set.
	controller := http.NewResponseController(connection)
	_ = controller.SetReadDeadline(time.Time{})
	err := controller.SetWriteDeadline(time.Time{})

	if bounded || timeout == 0 || err != nil {
		return w
	}
	return &caddyhttp.IdleTimeoutWriter{
		ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: w},
		Ctrl:                  controller,
		Deadline:              caddyhttp.IdleDeadline{Timeout: timeout},
		MaxChunk:              progressUnit,
		Logger:                logger,
		// A deadline that is left on the connection would meet the next request.
		ClearBetweenWrites: true,
	}
}

// renewDeadline gives the server time to complete an HTTP/1 response. Caddy
// leaves the deadline of the last write on the connection, and on a stream that
// has been quiet it has passed.
func renewDeadline(w http.ResponseWriter, timeout time.Duration) {
	if own, ok := w.(*caddyhttp.IdleTimeoutWriter); timeout == 0 || ok && own.ClearBetweenWrites {
		return // there is none
	}
	setConnectionDeadline(w, time.Now().Add(timeout))
}

// setConnectionDeadline sets a write deadline past all writers around the
// connection's own.
func setConnectionDeadline(w http.ResponseWriter, deadline time.Time) {
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	_ = http.NewResponseController(w).SetWriteDeadline(deadline)
}
