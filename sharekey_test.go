package caddysse

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// secret is in everything from a client that must not reach another one.
const secret = "hush"

// sharedClient is a request as the handler gets it: after authentication, a
// map, a rewrite and whatever else a site may have before it. change makes it
// another client's request.
func sharedClient(change func(r *http.Request)) *http.Request {
	r := httptest.NewRequest("GET", "http://a.test/shown?x=1", nil)
	r.RequestURI = "/shown?x=1"
	r.URL = &url.URL{Path: "/shown", RawQuery: "x=1"}
	r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
	r.RemoteAddr = "203.0.113.7:1234"
	r.Header = http.Header{
		"Accept":            {"text/event-stream"},
		"Accept-Encoding":   {"gzip"},
		"Authorization":     {"Bearer " + secret},
		"Cookie":            {"session=" + secret},
		"User-Agent":        {secret},
		"Referer":           {secret},
		"Forwarded":         {"for=" + secret},
		"Via":               {secret},
		"X-Forwarded-For":   {secret},
		"X-Forwarded-Proto": {secret},
		"X-Forwarded-Host":  {secret},
		"X-Real-Ip":         {secret},
		"X-Topic":           {"news"},
		"X-User":            {secret}, // set by forward_auth or request_header
		"Connection":        {secret},
		"Upgrade":           {secret},
		"Content-Type":      {secret},
		"Origin":            {"https://page.test"},
		"Cache-Control":     {"no-cache"},
	}
	r.TLS = &tls.ConnectionState{
		HandshakeComplete: false, ServerName: secret, NegotiatedProtocol: secret, Version: tls.VersionTLS12,
		PeerCertificates: []*x509.Certificate{{Raw: []byte(secret)}},
	}
	r.Form = url.Values{"secret": {secret}}
	r.Trailer = http.Header{"Secret": {secret}}
	type other string
	ctx := context.WithValue(r.Context(), other("secret"), secret)
	ctx = context.WithValue(ctx, caddyhttp.ConnCtxKey, secret)
	ctx = context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(&net.TCPAddr{IP: net.IPv4(10, 9, 8, 7), Port: 443}))
	ctx = context.WithValue(ctx, caddyhttp.ErrorCtxKey, errors.New(secret))
	r = r.WithContext(ctx)
	repl := caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r, repl, httptest.NewRecorder(), new(caddyhttp.Server))
	r.URL.Path, r.RequestURI = "/inside", "/inside?x=1"
	repl.Set("http.auth.user.id", secret)
	repl.Set("http.auth.user.plan", secret)
	repl.Set("http.regexp.1", secret)
	repl.Set("topic", "news")
	repl.Map(func(key string) (any, bool) { return secret, key == "mapped" })
	caddyhttp.SetVar(r.Context(), "root", "/srv")
	caddyhttp.SetVar(r.Context(), "backend", secret)
	caddyhttp.SetVar(r.Context(), "tenant", "t1")
	if change != nil {
		change(r)
	}
	return r
}

func mustNames(t testing.TB, names ...string) shareNames {
	t.Helper()
	n, err := newShareNames(names)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func makeShared(n shareNames, client *http.Request, id string) *http.Request {
	return n.request(context.Background(), n.key(client), id, httptest.NewRecorder(), new(caddyhttp.Server))
}

func replacerOf(r *http.Request) *caddy.Replacer {
	return r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
}

// clientPlaceholders identify a client, or must be available in a run's request
// without failing.
var clientPlaceholders = []string{
	"http.request.header.Authorization", "http.request.header.Cookie", "http.request.header.X-User",
	"http.request.header.X-Forwarded-For", "http.request.header.User-Agent", "http.request.cookie.session",
	"http.auth.user.id", "http.auth.user.plan", "http.vars.client_ip", "http.vars.backend", "http.vars.tenant",
	"http.vars.trusted_proxy", "http.regexp.1", "mapped", "topic", "http.error", "http.error.message",
	"http.request.remote", "http.request.remote.host", "http.request.remote.port", "http.request.remote.host/24",
	"http.request.local", "http.request.local.host", "http.request.local.port", "http.request.proto",
	"http.request.scheme", "http.request.host", "http.request.hostport", "http.request.port", "http.request.method",
	"http.request.uri", "http.request.uri.path", "http.request.uri.query", "http.request.uri.query.x",
	"http.request.orig_uri", "http.request.orig_uri.path", "http.request.orig_uri.query", "http.request.orig_method",
	"http.request.body", "http.request.tls.version", "http.request.tls.cipher_suite", "http.request.tls.server_name",
	"http.request.tls.proto", "http.request.tls.resumed", "http.request.tls.client.subject",
	"http.request.tls.client.fingerprint", "http.request.tls.client.certificate_pem", "http.response.header.X",
}

func TestARunsRequestHoldsNothingOfAClient(t *testing.T) {
	n := mustNames(t, "X-Topic", "{topic}", "{http.vars.tenant}")
	client := sharedClient(nil)
	r := makeShared(n, client, "42")
	if !r.TLS.HandshakeComplete || r.ContentLength != 0 || r.Body != http.NoBody {
		t.Error("it reads as early data, or as having a body")
	}

	var seen strings.Builder
	fmt.Fprintf(&seen, "%q %q %q %q %+v %q %q %v %v %q", r.Method, r.URL, r.Host, r.RequestURI, r.Header, r.RemoteAddr, r.Proto, r.Form, r.Trailer, r.Pattern)
	fmt.Fprintf(&seen, "%+v", r.TLS)
	vars := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	fmt.Fprintf(&seen, "%+v", vars)
	fmt.Fprintf(&seen, "%v", r.Context()) // this formats every key and value in the context
	for _, name := range clientPlaceholders {
		value, _ := replacerOf(r).Get(name)
		fmt.Fprintf(&seen, "%s=%v\n", name, value)
		if wasSecret, _ := replacerOf(client).GetString(name); strings.Contains(wasSecret, secret) && value != nil && value != "" &&
			!strings.HasPrefix(name, "http.request.tls.") {
			t.Errorf("{%s} is %q", name, value)
		}
	}
	for _, of := range []string{secret, "203.0.113", "10.9.8.7", "HTTP/2"} {
		if i := strings.Index(seen.String(), of); i >= 0 {
			t.Errorf("it has %q: …%s…", of, seen.String()[max(0, i-80):i+20])
		}
	}
	if r.Context().Value(caddyhttp.ConnCtxKey) != nil || r.Context().Value(caddyhttp.ErrorCtxKey) != nil {
		t.Error("its context is the client's")
	}

	want := http.Header{
		"Accept": {"text/event-stream"}, "Accept-Encoding": {"identity"}, "Last-Event-Id": {"42"},
		"Origin": {"https://page.test"}, "X-Topic": {"news"},
	}
	if !reflect.DeepEqual(r.Header, want) {
		t.Errorf("header %v, want %v", r.Header, want)
	}
	for name, want := range map[string]any{
		"http.request.uri": "/inside?x=1", "http.request.orig_uri": "/shown?x=1", "http.request.orig_uri.path": "/shown",
		"http.request.hostport": "a.test", "http.request.scheme": "https", "http.vars.root": "/srv", "topic": "news",
		"http.vars.tenant": "t1", "http.vars.client_ip": "192.0.2.1", "http.request.remote": "192.0.2.1:0",
		"http.request.method": "GET", "http.request.tls.server_name": "a.test",
	} {
		if got, _ := replacerOf(r).Get(name); got != want {
			t.Errorf("{%s} is %q, want %q", name, got, want)
		}
	}
	if vars["tenant"] != "t1" || vars["trusted_proxy"] != false {
		t.Errorf("variables: %v", vars)
	}
	id, _ := replacerOf(r).GetString("http.request.uuid")
	if theirs, _ := replacerOf(client).GetString("http.request.uuid"); id == "" || id == theirs {
		t.Errorf("its id is %q, the client's %q", id, theirs)
	}
}

func TestClientsThatDifferInNothingOfTheKeyShare(t *testing.T) {
	n := mustNames(t, "X-Topic", "{topic}")
	want := n.key(sharedClient(nil)).sum()
	for name, change := range map[string]func(r *http.Request){
		"headers": func(r *http.Request) {
			for _, field := range []string{"Authorization", "Cookie", "User-Agent", "X-User", "X-Forwarded-For", "X-Forwarded-Proto", "Via", "Last-Event-Id", "Accept"} {
				r.Header.Set(field, "other")
			}
		},
		"address":   func(r *http.Request) { caddyhttp.SetVar(r.Context(), "client_ip", "198.51.100.1"); r.RemoteAddr = "@" },
		"user":      func(r *http.Request) { replacerOf(r).Set("http.auth.user.id", "other") },
		"variables": func(r *http.Request) { caddyhttp.SetVar(r.Context(), "backend", "other") },
		"protocol":  func(r *http.Request) { r.Proto, r.ProtoMajor = "HTTP/3.0", 3; r.ContentLength = -1 },
		"TLS":       func(r *http.Request) { r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13} },
	} {
		if n.key(sharedClient(change)).sum() != want {
			t.Errorf("%s: another key", name)
		}
	}
}

func TestClientsThatDifferInAnythingOfTheKeyDoNotShare(t *testing.T) {
	n := mustNames(t, "x-topic", "Authorization", "{topic}", "{http.auth.user.id}", "{http.vars.client_ip}")
	seen := map[[32]byte]string{n.key(sharedClient(nil)).sum(): "unchanged"}
	original := func(r *http.Request, uri string) {
		o := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
		u, _ := url.Parse(uri)
		*o.URL, o.RequestURI = *u, uri
		*r = *r.WithContext(context.WithValue(r.Context(), caddyhttp.OriginalRequestCtxKey, o))
	}
	trust := func(proto, host string) func(r *http.Request) {
		return func(r *http.Request) {
			caddyhttp.SetVar(r.Context(), "trusted_proxy", true)
			r.Header["X-Forwarded-Proto"], r.Header["X-Forwarded-Host"] = []string{proto}, []string{host}
		}
	}
	for name, change := range map[string]func(r *http.Request){
		"scheme":              func(r *http.Request) { r.TLS = nil },
		"host":                func(r *http.Request) { r.Host = "b.test" },
		"port":                func(r *http.Request) { r.Host = "a.test:8443" },
		"path as received":    func(r *http.Request) { original(r, "/other?x=1") },
		"query as received":   func(r *http.Request) { original(r, "/shown?x=2") },
		"encoded as received": func(r *http.Request) { original(r, "/show%6e?x=1") },
		"path":                func(r *http.Request) { r.URL.Path = "/other" },
		"encoded path":        func(r *http.Request) { r.URL.RawPath = "/insid%65" },
		"query":               func(r *http.Request) { r.URL.RawQuery = "x=2" },
		"target":              func(r *http.Request) { r.RequestURI = "/inside" },
		"origin":              func(r *http.Request) { r.Header["Origin"] = []string{"https://other.test"} },
		"no origin":           func(r *http.Request) { delete(r.Header, "Origin") },
		"two origins":         func(r *http.Request) { r.Header["Origin"] = append(r.Header["Origin"], "x") },
		"root":                func(r *http.Request) { caddyhttp.SetVar(r.Context(), "root", "/other") },
		"header":              func(r *http.Request) { r.Header["X-Topic"] = []string{"other"} },
		"two values":          func(r *http.Request) { r.Header["X-Topic"] = []string{"news", "other"} },
		"one of both":         func(r *http.Request) { r.Header["X-Topic"] = []string{"newsother"} },
		"no header":           func(r *http.Request) { delete(r.Header, "X-Topic") },
		"an empty one":        func(r *http.Request) { r.Header["X-Topic"] = []string{""} },
		"the next field's": func(r *http.Request) {
			r.Header["X-Topic"] = append(r.Header["X-Topic"], r.Header["Authorization"]...)
			delete(r.Header, "Authorization")
		},
		"placeholder":     func(r *http.Request) { replacerOf(r).Set("topic", "other") },
		"no placeholder":  func(r *http.Request) { replacerOf(r).Delete("topic") },
		"user":            func(r *http.Request) { replacerOf(r).Set("http.auth.user.id", "other") },
		"address":         func(r *http.Request) { caddyhttp.SetVar(r.Context(), "client_ip", "198.51.100.1") },
		"trusted":         trust("", ""),
		"forwarded https": trust("https", ""),
		"forwarded http":  trust("http", ""),
		"forwarded host":  trust("https", "a.test"),
		"moved":           trust("httpsa.test", ""),
	} {
		sum := n.key(sharedClient(change)).sum()
		if other, ok := seen[sum]; ok {
			t.Errorf("%s: shares with %s", name, other)
		}
		seen[sum] = name
	}
}

func TestOneKeyMakesOneRequest(t *testing.T) {
	n := mustNames(t, "X-Topic", "{topic}")
	show := func(client *http.Request) string {
		r := makeShared(n, client, "")
		var b strings.Builder
		fmt.Fprintf(&b, "%+v %+v %+v %v", r.Header, r.URL, r.TLS, r.RequestURI)
		for _, name := range clientPlaceholders {
			value, _ := replacerOf(r).Get(name)
			fmt.Fprintf(&b, " %v", value)
		}
		return b.String()
	}
	want := show(sharedClient(nil))
	got := show(sharedClient(func(r *http.Request) {
		r.Header = http.Header{"Origin": r.Header["Origin"], "X-Topic": {"news"}, "Cookie": {"mine"}}
		r.TLS = &tls.ConnectionState{HandshakeComplete: true, Version: tls.VersionTLS13}
		r.RemoteAddr = "[2001:db8::1]:99"
		r.URL.User, r.URL.Host, r.URL.Scheme = url.UserPassword("u", secret), "a.test", "https"
	}))
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestARunBehindATrustedProxyHasItsSchemeAndHost(t *testing.T) {
	n := mustNames(t)
	trusted := sharedClient(func(r *http.Request) {
		caddyhttp.SetVar(r.Context(), "trusted_proxy", true)
		r.Header["X-Forwarded-Proto"] = []string{"http", "https"}
		r.Header["X-Forwarded-Host"] = []string{"site.test"}
		r.TLS = nil
	})
	r := makeShared(n, trusted, "")
	if got := r.Header; got.Get("X-Forwarded-Proto") != "https" || got.Get("X-Forwarded-Host") != "site.test" || got["X-Forwarded-For"] != nil {
		t.Errorf("header %v", got)
	}
	if caddyhttp.GetVar(r.Context(), "trusted_proxy") != true || r.TLS != nil || r.RemoteAddr != "192.0.2.1:0" {
		t.Error("it does not count as trusted")
	}
	r = makeShared(n, sharedClient(nil), "")
	if got := r.Header; got["X-Forwarded-Proto"] != nil || got["X-Forwarded-Host"] != nil {
		t.Errorf("header of an untrusted client's: %v", got)
	}
}

func TestANamedAddressReachesTheUpstreamAsAPlaceholder(t *testing.T) {
	n := mustNames(t, "{http.vars.client_ip}", "{http.vars.trusted_proxy}", "{http.vars.start_time}", "{http.request.uuid}")
	client := sharedClient(func(r *http.Request) { caddyhttp.SetVar(r.Context(), "client_ip", "203.0.113.7") })
	r := makeShared(n, client, "")
	if ip := caddyhttp.GetVar(r.Context(), "client_ip"); ip != "203.0.113.7" {
		t.Errorf("client_ip is %v", ip)
	}
	if _, ok := caddyhttp.GetVar(r.Context(), "trusted_proxy").(bool); !ok {
		t.Error("Caddy would fail on trusted_proxy")
	}
	replacerOf(r).Get("http.request.duration") // this would fail with a start_time of another type
}

func TestValuesThatHandlersEditInPlaceAreNotTheClients(t *testing.T) {
	n := mustNames(t, "X-Topic")
	client := sharedClient(nil)
	key := n.key(client)
	before := key.sum()
	r := n.request(context.Background(), key, "", httptest.NewRecorder(), new(caddyhttp.Server))
	again := n.request(context.Background(), key, "", httptest.NewRecorder(), new(caddyhttp.Server))
	r.Header["X-Topic"][0], r.Header["Origin"][0] = secret, secret
	r.URL.Path = "/" + secret
	if client.Header.Get("X-Topic") != "news" || client.URL.Path != "/inside" {
		t.Error("a handler of the run edits the client's request")
	}
	if again.Header.Get("X-Topic") != "news" || again.URL.Path != "/inside" || key.sum() != before {
		t.Error("a handler of one try edits what the next one gets")
	}
	client.Header["X-Topic"][0] = secret
	client.Header["Origin"][0] = secret
	if key.sum() != before {
		t.Error("a handler of the client edits the key")
	}
}

func TestNamesThatCantBePartOfAKeyAreErrors(t *testing.T) {
	for _, name := range []string{
		"Accept", "accept-encoding", "Forwarded", "host", "Last-Event-ID", "X-Forwarded-For", "x-forwarded-anything",
		"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE", "Trailer",
		"Transfer-Encoding", "Upgrade", "", "a b", "X:", "{", "}", "{}", "{a", "a}", "{a}{b}", "{a}-{b}", "x{a}", "{{a}}", "é",
	} {
		if _, err := newShareNames([]string{name}); err == nil {
			t.Errorf("%q is accepted", name)
		} else if !strings.HasPrefix(err.Error(), "sse: share: ") {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"Authorization", "cookie", "X-Tenant", "{http.auth.user.id}", "{http.vars.client_ip}", "{http.request.header.X-Forwarded-For}"} {
		if _, err := newShareNames([]string{name}); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}
