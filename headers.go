package caddysse

import (
	"net/http"
	"slices"
	"strings"
)

const (
	compressionAllow = "allow"
	compressionDeny  = "deny"

	cacheControlKeep = "keep"

	// defaultCacheControl keeps the stream out of every cache; no-transform is
	// added to it if compression is denied.
	defaultCacheControl = "no-cache, no-store"
)

// headerPolicy is how the configuration changes a stream's headers.
type headerPolicy struct {
	cacheControl string // replaces the upstream's completely; empty keeps that
	noTransform  bool   // add no-transform to the result
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

// withNoTransform adds no-transform to a Cache-Control if it is wanted and
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

// notForStreams are headers about a finished representation, about caches that
// must not store a stream, or about the upstream's connection.
var notForStreams = []string{
	"Accept-Ranges", "Age", "Cdn-Cache-Control", "Connection", "Content-Digest", "Content-Length",
	"Content-Md5", "Etag", "Expires", "Keep-Alive", "Last-Modified", "Pragma", "Repr-Digest",
	"Surrogate-Control",
}

// apply turns header into that of a stream.
func (p headerPolicy) apply(header http.Header) {
	for _, field := range notForStreams {
		delete(header, field)
	}
	// One allocation for all. Streams do not share them: handlers edit values in
	// place.
	values := &[3]string{p.cacheControl, "no", "?1"}
	if p.cacheControl == "" {
		given := strings.Join(header["Cache-Control"], ", ")
		if values[0] = p.withNoTransform(given); values[0] == given {
			values[0] = ""
		}
	}
	if values[0] != "" {
		header["Cache-Control"] = values[0:1:1]
	}
	header["X-Accel-Buffering"] = values[1:2:2]
	// RFC 10036, section 2: asks every hop to forward the message incrementally.
	header["Incremental"] = values[2:3:3]
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

// isStream reports whether a final response is a stream. The caller has checked
// the request's method: HEAD never has one.
func isStream(status int, header http.Header) bool {
	switch {
	case status < 200 || status > 299:
		return false
	case status == http.StatusNoContent, status == http.StatusResetContent, status == http.StatusPartialContent:
		return false
	}
	return hasEventStreamType(header)
}

// contentCodings are those of IANA's HTTP Content Coding Registry, except
// identity. Browsers ignore anything else in Content-Encoding (none, utf-8, …)
// and treat the body as text.
var contentCodings = []string{
	"aes128gcm", "br", "compress", "dcb", "dcz", "deflate", "exi", "gzip", "pack200-gzip", "x-compress", "x-gzip", "zstd",
}

// isEncoded reports whether the body has a content coding, and so is not the text
// of an event stream (RFC 9110, section 8.4).
func isEncoded(header http.Header) bool {
	for _, value := range header["Content-Encoding"] {
		for coding := range strings.SplitSeq(value, ",") {
			if slices.Contains(contentCodings, strings.ToLower(strings.TrimSpace(coding))) {
				return true
			}
		}
	}
	return false
}
