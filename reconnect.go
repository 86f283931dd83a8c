package caddysse

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// The reconnection time for clients of an upstream that fails, where no
	// range is configured.
	defaultReconnectMin = 2 * time.Second
	defaultReconnectMax = 10 * time.Second

	// longestRetryAfter is the most of a Retry-After that counts: a page whose
	// stream stays away for longer looks dead.
	longestRetryAfter = time.Minute
)

// wantsReconnect reports whether the status is answered with a reconnection
// time.
func (x *exchange) wantsReconnect(status int) bool {
	return x.kind.eventSource && slices.Contains(x.h.ReconnectOn, status)
}

// answerReconnect answers an error with an empty stream and a reconnection
// time. An EventSource takes a status other than 200 for final and an end for a
// reason to come back (HTML Standard, section 9.2.3).
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
	// On top of it and not instead: otherwise all that were refused would come back at once.
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

// isOfErrorBody reports whether a header describes a body that is not sent.
func isOfErrorBody(field string) bool {
	switch field {
	case "Retry-After", "Trailer":
		return true
	}
	return strings.HasPrefix(field, "Content-") && !strings.HasPrefix(field, "Content-Security-Policy")
}

// retryAfter reads a Retry-After, and keeps to as much of it as a page can wait.
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
