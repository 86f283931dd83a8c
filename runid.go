package caddysse

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// runIDPrefix begins every id that this module adds to a stream. Every id with
	// this prefix counts as one of ours, even if it is malformed.
	runIDPrefix = "sse1-"

	runTokenLength = 22 // of 128 bits in base64url, without padding

	longestRunID = len(runIDPrefix) + runTokenLength + len(".18446744073709551615")
)

// runToken names a run. Anyone who has it may read what the run has kept, so it
// appears only in ids.
type runToken [16]byte

// runID is the place after event n of a run; n is 0 before the first one.
type runID struct {
	token runToken
	n     uint64
}

func newRunToken() runToken {
	var t runToken
	_, _ = rand.Read(t[:]) // never fails
	return t
}

// append appends the id of event n.
func (t runToken) append(dst []byte, n uint64) []byte {
	dst = append(dst, runIDPrefix...)
	dst = base64.RawURLEncoding.AppendEncode(dst, t[:])
	dst = append(dst, '.')
	return strconv.AppendUint(dst, n, 10)
}

func (id runID) String() string {
	return string(id.token.append(nil, id.n))
}

// isRunID reports whether an id has the prefix of those that this module adds.
func isRunID(id string) bool {
	return strings.HasPrefix(id, runIDPrefix)
}

// runIDEncoding refuses bits that no token has, so that each id has only one
// spelling.
var runIDEncoding = base64.RawURLEncoding.Strict()

// parseRunID parses an id exactly as it was written.
func parseRunID(s string) (id runID, ok bool) {
	rest, ok := strings.CutPrefix(s, runIDPrefix)
	if !ok || len(rest) < runTokenLength+len(".0") || rest[runTokenLength] != '.' {
		return runID{}, false
	}
	token, number := rest[:runTokenLength], rest[runTokenLength+1:]
	// The decoder skips line breaks.
	if n, err := runIDEncoding.Decode(id.token[:], []byte(token)); n != len(id.token) || err != nil {
		return runID{}, false
	}
	if number[0] == '0' && number != "0" {
		return runID{}, false
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return runID{}, false
	}
	id.n = n
	return id, true
}

// shortID is an id in a form that may be shown: an upstream's unchanged, one of
// ours without the part that makes it a capability.
func shortID(s string) string {
	if !isRunID(s) {
		return s
	}
	id, ok := parseRunID(s)
	if !ok {
		return runIDPrefix + "…"
	}
	return id.short()
}

func (id runID) short() string {
	return id.token.short() + "." + strconv.FormatUint(id.n, 10)
}

// short is the token without the part that makes it a capability.
func (t runToken) short() string {
	return runIDPrefix + base64.RawURLEncoding.EncodeToString(t[:])[:4] + "…"
}

// runTable finds runs by their tokens. It compares hashes, so that the time it
// takes reveals nothing about existing tokens.
type runTable[R any] struct {
	mu   sync.Mutex
	runs map[[sha256.Size]byte]R
}

func (t *runTable[R]) put(token runToken, run R) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.runs == nil {
		t.runs = make(map[[sha256.Size]byte]R)
	}
	t.runs[hashOf(token)] = run
}

func (t *runTable[R]) get(token runToken) (run R, ok bool) {
	return t.find(hashOf(token))
}

// find is get for callers that have only the hash.
func (t *runTable[R]) find(hash [sha256.Size]byte) (run R, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	run, ok = t.runs[hash]
	return run, ok
}

func hashOf(token runToken) [sha256.Size]byte { return sha256.Sum256(token[:]) }

func (t *runTable[R]) drop(token runToken) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.runs, hashOf(token))
}

// lastEventIDHeader is sent by clients that reconnect (HTML Standard, section
// 9.2.4).
const lastEventIDHeader = "Last-Event-Id"

// takenRunIDKey is the context key of the id that an outer handler has removed
// from the request.
type takenRunIDKey struct{}

// broughtID is the id that a client brings: in the header, else in the query,
// which polyfills of EventSource use.
func broughtID(r *http.Request) string {
	for _, id := range r.Header[lastEventIDHeader] {
		if id != "" {
			return id
		}
	}
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		if id, ok := idOfPair(pair); ok && id != "" {
			return id
		}
	}
	taken, _ := r.Context().Value(takenRunIDKey{}).(string)
	return taken
}

// withoutRunIDs is the request as the handlers after this one should see it:
// without ids of the form that this module adds, in the header, the URL and the
// original request. If there are none, it is the request itself, else a shallow
// copy: the request itself is not modified. An inner sse handler still finds the
// id that counted.
func withoutRunIDs(r *http.Request) *http.Request {
	inHeader := slices.ContainsFunc(r.Header[lastEventIDHeader], isRunID)
	query := withoutRunIDPairs(r.URL.RawQuery)
	requestURI := withoutRunIDInURI(r.RequestURI)
	original, given := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	given = given && original.URL != nil
	var originalQuery string
	if given {
		originalQuery = withoutRunIDPairs(original.URL.RawQuery)
	}
	inOriginal := given && (originalQuery != original.URL.RawQuery || withoutRunIDInURI(original.RequestURI) != original.RequestURI)
	if !inHeader && !inOriginal && query == r.URL.RawQuery && requestURI == r.RequestURI {
		return r
	}

	ctx := r.Context()
	if id := broughtID(r); isRunID(id) {
		ctx = context.WithValue(ctx, takenRunIDKey{}, id)
	}
	if inOriginal {
		u := *original.URL
		u.RawQuery = originalQuery
		original.URL = &u
		original.RequestURI = withoutRunIDInURI(original.RequestURI)
		ctx = context.WithValue(ctx, caddyhttp.OriginalRequestCtxKey, original)
	}
	r = r.WithContext(ctx)
	u := *r.URL
	u.RawQuery = query
	r.URL = &u
	r.RequestURI = requestURI
	if inHeader {
		r.Header = maps.Clone(r.Header)
		rest := slices.DeleteFunc(slices.Clone(r.Header[lastEventIDHeader]), isRunID)
		if r.Header[lastEventIDHeader] = rest; len(rest) == 0 {
			delete(r.Header, lastEventIDHeader)
		}
	}
	return r
}

// withoutRunIDPairs removes the pairs from a query that contain an id of ours.
// The rest stays as it was written, and in its order.
func withoutRunIDPairs(query string) string {
	if !strings.Contains(query, "=") {
		return query
	}
	pairs := strings.Split(query, "&")
	kept := slices.DeleteFunc(slices.Clone(pairs), func(pair string) bool {
		id, ok := idOfPair(pair)
		return ok && isRunID(id)
	})
	if len(kept) == len(pairs) {
		return query
	}
	return strings.Join(kept, "&")
}

// withoutRunIDInURI is withoutRunIDPairs for a request target.
func withoutRunIDInURI(uri string) string {
	path, query, found := strings.Cut(uri, "?")
	if !found {
		return uri
	}
	kept := withoutRunIDPairs(query)
	switch {
	case kept == query:
		return uri
	case kept == "":
		return path
	}
	return path + "?" + kept
}

// idOfPair is the id that a pair of a query contains, if it has one of the names
// for ids.
func idOfPair(pair string) (id string, ok bool) {
	key, value, _ := strings.Cut(pair, "=")
	switch unescapeLoosely(key) {
	case "lastEventId", "last_event_id":
		return unescapeLoosely(value), true
	}
	return "", false
}

// unescapeLoosely decodes percent-encoding. What is not well-formed stays as it
// is, because some upstream may read it that way.
func unescapeLoosely(s string) string {
	if decoded, err := url.QueryUnescape(s); err == nil {
		return decoded
	}
	return s
}
