package caddysse

import (
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// kind is what a request says about its client: whether it reconnects by itself,
// and after what. A wrong guess has a price: a client that treats a clean end as
// the end of the answer loses the rest of it.
type kind struct {
	// resumable: the client opens its stream again if that breaks, so it may be
	// ended early.
	resumable bool

	// eventSource: it does so after a clean end too, and gives up after any status
	// but 200 (HTML Standard, section 9.2.3). Set only if resumable is.
	eventSource bool
}

// What the setting resumable can be.
const (
	resumableAuto   = "auto"
	resumableAlways = "always"
	resumableNever  = "never"
)

// kindOf returns the kind of a request. setting is that of resumable; empty for
// auto.
func kindOf(r *http.Request, accept accept, setting string) kind {
	if r.Method != http.MethodGet || setting == resumableNever || isMCP(r.Header) {
		return kind{}
	}
	if !accept.only && setting != resumableAlways {
		return kind{}
	}
	return kind{resumable: true, eventSource: bypassesCaches(r.Header)}
}

// mayStream reports whether the answer to a request can have a body that goes on.
// The answer to a HEAD has none, even if a handler before sse has changed the
// method: the server decides by what the client sent.
func mayStream(r *http.Request) bool {
	if r.Method == http.MethodHead || r.Method == http.MethodConnect {
		return false
	}
	original, _ := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	return original.Method != http.MethodHead
}

// mcpHeaders are those of MCP clients. Clients of the 2025 revisions lose a
// running call when a resumed answer ends early; in the revision of 2026-07-28,
// closing a stream cancels the call.
var mcpHeaders = []string{"Mcp-Session-Id", "Mcp-Protocol-Version", "Mcp-Method"}

func isMCP(header http.Header) bool {
	return slices.ContainsFunc(mcpHeaders, func(field string) bool {
		_, there := header[field]
		return there
	})
}

// bypassesCaches reports whether a request has no-cache, as an EventSource's
// does: its cache mode is no-store (HTML Standard, section 9.2.2), for which
// Fetch adds both fields (section 4.5).
func bypassesCaches(header http.Header) bool {
	for _, field := range []string{"Cache-Control", "Pragma"} {
		for _, line := range header[field] {
			if hasToken(line, "no-cache") {
				return true
			}
		}
	}
	return false
}

// accept is what a request's Accept says about event streams (RFC 9110, section
// 12.5.1). A type with a weight of zero does not count as named: it is refused.
type accept struct {
	eventStream bool // it names the type; a wildcard does not
	only        bool // and no other type; a wildcard is another
}

func acceptOf(header http.Header) accept {
	var a accept
	others := false
	for rest, more := joinLines(header["Accept"]), true; more; {
		var item string
		switch item, rest, more = cutItem(rest); {
		case item == "", hasZeroWeight(item):
		case isMediaType(item, eventStreamType):
			a.eventStream = true
		default:
			others = true
		}
	}
	a.only = a.eventStream && !others
	return a
}

// hasZeroWeight reports whether an element of Accept has the parameter q=0
// (RFC 9110, section 12.4.2: at most three digits after the point).
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
