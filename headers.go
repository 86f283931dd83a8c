package caddysse

import (
	"net/http"
	"strings"
)

const (
	eventStreamType = "text/event-stream"

	compressionAllow = "allow"
	compressionDeny  = "deny"

	cacheControlKeep = "keep"

	// defaultCacheControl keeps the stream out of every cache; no-transform is
	// added to it where compression is denied.
	defaultCacheControl = "no-cache, no-store"
)

// headerPolicy is what the configuration makes of a stream's headers.
type headerPolicy struct {
	cacheControl string // replaces the upstream's, complete; empty keeps that
	noTransform  bool   // whatever results says no-transform
}

func newHeaderPolicy(cacheControl, compression string) headerPolicy {
	p := headerPolicy{noTransform: compression != compressionAllow}
	switch cacheControl {
	case "":
		p.cacheControl = p.withNoTransform(defaultCacheControl)
	case cacheControlKeep:
	default:
		p.cacheControl = p.withNoTransform(cacheControl)
	}
	return p
}

// withNoTransform adds no-transform to a Cache-Control where it is wanted and
// missing.
func (p headerPolicy) withNoTransform(value string) string {
	switch {
	case !p.noTransform || hasToken(value, "no-transform"):
		return value
	case value == "":
		return "no-transform"
	}
	return value + ", no-transform"
}

// notForStreams are the headers that speak of a finished representation, of a
// cache that must not be, or of the upstream's connection.
var notForStreams = []string{
	"Accept-Ranges", "Age", "Cdn-Cache-Control", "Connection", "Content-Digest", "Content-Length",
	"Content-Md5", "Etag", "Expires", "Keep-Alive", "Last-Modified", "Pragma", "Repr-Digest",
	"Surrogate-Control",
}

// apply makes header that of a stream.
func (p headerPolicy) apply(header http.Header) {
	for _, field := range notForStreams {
		delete(header, field)
	}
	if value := p.cacheControl; value != "" {
		header["Cache-Control"] = []string{value}
	} else {
		given := strings.Join(header["Cache-Control"], ", ")
		if value = p.withNoTransform(given); value != given {
			header["Cache-Control"] = []string{value}
		}
	}
	header["X-Accel-Buffering"] = []string{"no"}
	// RFC 10036, section 2: asks every hop to pass the message on as it comes.
	header["Incremental"] = []string{"?1"}
}

// hasToken reports whether the comma-separated list has the token, in any
// letter case.
func hasToken(list, token string) bool {
	for item := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.TrimSpace(item), token) {
			return true
		}
	}
	return false
}

// isStream reports whether a final response is a stream. The request's method
// has been looked at before: HEAD never has one.
func isStream(status int, header http.Header) bool {
	switch {
	case status < 200 || status > 299:
		return false
	case status == http.StatusNoContent, status == http.StatusResetContent, status == http.StatusPartialContent:
		return false
	}
	return hasEventStreamType(header)
}

func hasEventStreamType(header http.Header) bool {
	values := header["Content-Type"]
	return len(values) > 0 && isMediaType(values[0], eventStreamType)
}

// isMediaType compares without parameters and letter case (RFC 9110, section
// 8.3.1).
func isMediaType(value, mediaType string) bool {
	name, _, _ := strings.Cut(value, ";")
	return strings.EqualFold(strings.TrimSpace(name), mediaType)
}

// isEncoded reports whether the body is not the text of an event stream but
// some coding of it (RFC 9110, section 8.4).
func isEncoded(header http.Header) bool {
	for _, value := range header["Content-Encoding"] {
		for coding := range strings.SplitSeq(value, ",") {
			coding = strings.TrimSpace(coding)
			if coding != "" && !strings.EqualFold(coding, "identity") {
				return true
			}
		}
	}
	return false
}

// accept is what a request's Accept says of event streams (RFC 9110, section
// 12.5.1).
type accept struct {
	eventStream bool // it names the type; a wildcard does not, a weight of zero refuses it
	only        bool // and no other type
}

func acceptOf(header http.Header) accept {
	var a accept
	others := false
	for _, value := range header["Accept"] {
		for item := range strings.SplitSeq(value, ",") {
			switch {
			case isMediaType(item, eventStreamType):
				a.eventStream = a.eventStream || !hasZeroWeight(item)
			case strings.TrimSpace(item) != "":
				others = true
			}
		}
	}
	a.only = a.eventStream && !others
	return a
}

// hasZeroWeight reports whether an element of Accept has the parameter q=0
// (RFC 9110, section 12.4.2: at most three digits behind the point).
func hasZeroWeight(item string) bool {
	_, params, _ := strings.Cut(item, ";")
	for param := range strings.SplitSeq(params, ";") {
		name, weight, _ := strings.Cut(param, "=")
		if strings.EqualFold(strings.TrimSpace(name), "q") {
			return strings.Trim(strings.TrimSpace(weight), "0.") == "" && strings.TrimSpace(weight) != ""
		}
	}
	return false
}
