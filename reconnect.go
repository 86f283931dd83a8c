package caddysse

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// The reconnection time for clients of an upstream that fails, if no range is
	// configured.
	defaultReconnectMin = 2 * time.Second
	defaultReconnectMax = 10 * time.Second

	// longestRetryAfter bounds a Retry-After: a page whose stream is gone for
	// longer looks dead.
	longestRetryAfter = time.Minute
)

// wantsReconnect reports whether the status is answered with a reconnection time.
func (x *exchange) wantsReconnect(status int) bool {
	return x.kind.eventSource && slices.Contains(x.h.ReconnectOn, status)
}

// answerReconnect answers an error with an empty stream and a reconnection time.
// An EventSource gives up after a status other than 200, and reconnects after an
// end (HTML Standard, section 9.2.3).
func (x *exchange) answerReconnect(status int) {
	header := x.w.Header()
	after := retryAfter(header.Get("Retry-After"))
	for field := range header {
		if isOfErrorBody(field) {
			delete(header, field)
		}
	}
	header["Content-Type"] = []string{eventStreamType}
	x.h.headers.apply(header)
	collector.reconnects.WithLabelValues(x.h.Name, strconv.Itoa(status)).Inc()

	frames := *x.frames
	if frames.retryMin == 0 {
		frames.retryMin, frames.retryMax = defaultReconnectMin, defaultReconnectMax
	}
	// Added to the random time, not instead of it: otherwise all refused clients
	// would come back at once.
	frames.retryMin = sum(frames.retryMin, after)
	frames.retryMax = sum(frames.retryMax, after)
	x.w.WriteHeader(http.StatusOK)
	// A client that has left needs no answer.
	_, _ = x.w.Write(frames.retryBlock())
	_ = http.NewResponseController(x.w).Flush()
	if x.attempt != nil {
		x.attempt.cancel(errStreamEnded)
	}
}

// isOfErrorBody reports whether a header field describes a body that is not sent.
func isOfErrorBody(field string) bool {
	switch field {
	case "Retry-After", "Trailer":
		return true
	}
	return strings.HasPrefix(field, "Content-") && !strings.HasPrefix(field, "Content-Security-Policy")
}

// retryAfter reads a Retry-After, up to the longest that counts.
func retryAfter(value string) time.Duration {
	return min(statedRetryAfter(value), longestRetryAfter)
}

// statedRetryAfter reads a Retry-After: seconds or a date (RFC 9110, section
// 10.2.3).
func statedRetryAfter(value string) time.Duration {
	var after time.Duration
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		after = time.Duration(seconds) * time.Second
	} else if date, err := http.ParseTime(value); err == nil {
		after = time.Until(date)
	}
	return max(after, 0)
}
