package caddysse

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// noClient is the client address of requests for a shared stream (TEST-NET-1, RFC
// 5737): it is in no private range, and belongs to no one. With an empty address,
// reverse_proxy would send the upstream no X-Forwarded headers.
var noClient = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}

// shareNames are the header fields and placeholders whose values must be the same
// for requests to share a stream, in addition to what must always be the same.
type shareNames struct {
	headers      []string // canonical
	placeholders []string // without braces
}

// newShareNames parses the names in a configuration: header fields, and
// placeholders in braces.
func newShareNames(names []string) (shareNames, error) {
	var n shareNames
	for _, name := range names {
		inner, opens := strings.CutPrefix(name, "{")
		inner, closes := strings.CutSuffix(inner, "}")
		switch {
		case opens != closes, opens && (inner == "" || strings.ContainsAny(inner, `{}\`)):
			return shareNames{}, fmt.Errorf("sse: share: %q is neither a header field nor one placeholder", name)
		case opens:
			n.placeholders = append(n.placeholders, inner)
			continue
		}
		field := textproto.CanonicalMIMEHeaderKey(name)
		switch {
		case !isToken(name):
			return shareNames{}, fmt.Errorf("sse: share: %q is neither a header field nor one placeholder", name)
		case slices.Contains(notInShareKey, field), strings.HasPrefix(field, "X-Forwarded-"):
			return shareNames{}, fmt.Errorf("sse: share: %s can't be named: the request of a shared stream has its own, or none; "+
				"where clients should be kept apart by their address, name {client_ip}", field)
		}
		n.headers = append(n.headers, field)
	}
	return n, nil
}

// notInShareKey are the fields that a run's request sets itself, and those that
// belong to one connection (RFC 9110, section 7.6.1).
var notInShareKey = []string{
	"Accept", "Accept-Encoding", "Forwarded", "Host", lastEventIDHeader,
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

// shareKey is everything that the requests of one shared stream have in common,
// and everything that the upstream sees of them. What is not in it can reach
// neither the upstream nor another client.
type shareKey struct {
	tls            bool
	trusted        bool // the client's address is a trusted proxy's
	forwardedProto string
	forwardedHost  string
	host           string
	received       url.URL // as the client sent it
	receivedURI    string
	rewritten      url.URL // as the handlers before this one left it
	rewrittenURI   string
	origin         []string
	root           string
	groups         []string   // of routes that the request has matched, sorted
	headers        [][]string // values, in the order of the names
	placeholders   []string
}

// key is the request's key. An id of ours must have been removed from the request
// before. Values are copied, because handlers edit those of a request in place.
func (n shareNames) key(r *http.Request) shareKey {
	k := shareKey{
		tls:          r.TLS != nil,
		host:         r.Host,
		received:     pathAndQuery(r.URL),
		receivedURI:  r.RequestURI,
		rewritten:    pathAndQuery(r.URL),
		rewrittenURI: r.RequestURI,
		origin:       slices.Clone(r.Header["Origin"]),
	}
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok && original.URL != nil {
		k.received, k.receivedURI = pathAndQuery(original.URL), original.RequestURI
	}
	if root, given := caddyhttp.GetVar(r.Context(), "root").(string); given {
		k.root = root
	}
	if k.trusted, _ = caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool); k.trusted {
		k.forwardedProto = lastValue(r.Header["X-Forwarded-Proto"])
		k.forwardedHost = lastValue(r.Header["X-Forwarded-Host"])
	}
	if groups, ok := r.Context().Value(routeGroupsKey).(map[string]struct{}); ok {
		k.groups = slices.Sorted(maps.Keys(groups))
	}
	for _, field := range n.headers {
		k.headers = append(k.headers, slices.Clone(r.Header[field]))
	}
	repl, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	for _, name := range n.placeholders {
		var value string
		if repl != nil {
			value, _ = repl.GetString(name)
		}
		k.placeholders = append(k.placeholders, value)
	}
	return k
}

// pathAndQuery is a URL without the extra parts of a request target in absolute
// form: the host is the request's, and a password belongs to one client.
func pathAndQuery(u *url.URL) url.URL {
	return url.URL{Path: u.Path, RawPath: u.RawPath, ForceQuery: u.ForceQuery, RawQuery: u.RawQuery}
}

// lastValue is the value that counts if a proxy has added one to those that it
// received, as reverse_proxy does.
func lastValue(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}

// sum is the key for a map: it has a fixed size, whatever clients send, and does
// not contain their secrets.
func (k shareKey) sum() [sha256.Size]byte {
	var b []byte
	add := func(values ...string) {
		b = binary.AppendUvarint(b, uint64(len(values)))
		for _, v := range values {
			b = binary.AppendUvarint(b, uint64(len(v)))
			b = append(b, v...)
		}
	}
	addURL := func(u url.URL) {
		add(u.Path, u.RawPath, u.RawQuery, fmt.Sprint(u.ForceQuery))
	}
	add(fmt.Sprint(k.tls, k.trusted), k.forwardedProto, k.forwardedHost, k.host, k.receivedURI, k.rewrittenURI, k.root)
	addURL(k.received)
	addURL(k.rewritten)
	add(k.origin...)
	for _, values := range k.headers {
		add(values...)
	}
	add(k.placeholders...)
	add(k.groups...)
	return sha256.Sum256(b)
}

// request makes the request of a run, which contains nothing but the key and, if
// the client that started the run brought one, the upstream's last event id. It
// needs a context of its own, the writer for its answer, and the server, which is
// independent of the client.
func (n shareNames) request(ctx context.Context, k shareKey, lastEventID string, w http.ResponseWriter, server *caddyhttp.Server) *http.Request {
	received := k.received
	r := &http.Request{
		Method:     http.MethodGet,
		URL:        &received,
		RequestURI: k.receivedURI,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
		Host:       k.host,
		RemoteAddr: noClient.String(),
		Body:       http.NoBody,
		Header: http.Header{
			"Accept":          {eventStreamType},
			"Accept-Encoding": {"identity"},
		},
	}
	if k.tls {
		// Without HandshakeComplete, the upstream would get Early-Data: 1.
		r.TLS = &tls.ConnectionState{HandshakeComplete: true, ServerName: hostname(k.host)}
	}
	setValues(r.Header, "Origin", k.origin)
	for i, field := range n.headers {
		setValues(r.Header, field, k.headers[i])
	}
	for field, value := range map[string]string{
		"X-Forwarded-Proto": k.forwardedProto,
		"X-Forwarded-Host":  k.forwardedHost,
		lastEventIDHeader:   lastEventID,
	} {
		if value != "" {
			r.Header[field] = []string{value}
		}
	}

	// Placeholders read it, and fail if it is missing.
	ctx = context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(noClient))
	repl := caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r.WithContext(ctx), repl, w, server)
	rewritten := k.rewritten
	r.URL, r.RequestURI = &rewritten, k.rewrittenURI

	ctx = r.Context()
	caddyhttp.SetVar(ctx, caddyhttp.ClientIPVarKey, noClient.IP.String())
	if k.root != "" {
		caddyhttp.SetVar(ctx, "root", k.root)
	}
	groups := ctx.Value(routeGroupsKey).(map[string]struct{}) // PrepareRequest has made it
	for _, group := range k.groups {
		groups[group] = struct{}{}
	}
	for i, name := range n.placeholders {
		repl.Set(name, k.placeholders[i])
		if variable, ok := strings.CutPrefix(name, "http.vars."); ok && !slices.Contains(typedVars, variable) {
			caddyhttp.SetVar(ctx, variable, k.placeholders[i])
		}
	}
	caddyhttp.SetVar(ctx, caddyhttp.TrustedProxyVarKey, k.trusted)
	return r
}

// typedVars are variables that Caddy expects to have a type other than string.
var typedVars = []string{caddyhttp.TrustedProxyVarKey, "start_time", "uuid"}

// setValues copies the values: handlers edit them in place.
func setValues(header http.Header, field string, values []string) {
	if len(values) > 0 {
		header[field] = slices.Clone(values)
	}
}

// hostname is a host without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}
