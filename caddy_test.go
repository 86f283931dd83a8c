package caddysse_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// This file is the harness of the tests that drive a real Caddy over real
// sockets:
//
//	up := newUpstream(t)
//	c := startCaddy(t, `
//		sse
//		reverse_proxy `+up.addr)
//	client := c.client("h2")
//	exchange := client.begin(client.request(t, "GET", "/", nil))
//	call := up.accept(t)       // the upstream's half of that request
//	call.start("text/event-stream")
//	body := exchange.headers(t).follow()
//	call.send("data: 1\n\n")
//	body.expect(t, "data: 1\n\n")
//	call.end()
//	body.expectEnd(t)
//
// Caddy is one per process: a second startCaddy waits until the first test is
// through.

// clientProtocols are what a client can speak to Caddy. h1 is without TLS.
var clientProtocols = []string{"h1", "h2", "h3"}

// testCaddy is a running Caddy with one site, which answers to every host name
// both without TLS (HTTP/1.1) and with it (HTTP/1.1, HTTP/2, HTTP/3).
type testCaddy struct {
	t       testing.TB
	url     string // without TLS, no slash at the end
	addr    string // host and port of url
	tlsURL  string
	tlsAddr string

	logged  *logCapture
	dir     string
	h3Addr  string
	h3Once  sync.Once
	options []siteOption
}

// siteOption changes what surrounds the site in the Caddyfile.
type siteOption func(*surroundings)

type surroundings struct {
	global      string // more global options
	admin       bool
	output      string // of the logs
	level       string // of everything but this module
	moduleLevel string
}

// withGlobal adds global options, such as `servers { … }`.
func withGlobal(options string) siteOption {
	return func(s *surroundings) { s.global += options + "\n" }
}

// withAdmin switches the admin API on; see testCaddy.admin.
func withAdmin() siteOption {
	return func(s *surroundings) { s.admin = true }
}

// withLogLevel sets the level of Caddy's own logs, instead of INFO. This
// module's are always captured from DEBUG on.
func withLogLevel(level string) siteOption {
	return func(s *surroundings) { s.level = level }
}

// withoutLogs throws all logs away; levels are those of a Caddy without a
// `log` option.
func withoutLogs() siteOption {
	return func(s *surroundings) { s.output, s.level, s.moduleLevel = "discard", "INFO", "INFO" }
}

// caddyInUse is held while a test has its Caddy.
var caddyInUse sync.Mutex

// startCaddy runs a Caddy with the directives of one site until the test ends.
func startCaddy(t testing.TB, site string, options ...siteOption) *testCaddy {
	t.Helper()
	caddyInUse.Lock()
	t.Cleanup(caddyInUse.Unlock)
	caddysse.ForgetDrains()

	// Not t.TempDir: a path to a Unix socket has to be short.
	dir, err := os.MkdirTemp("", "caddy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	c := &testCaddy{t: t, dir: dir, options: options, addr: "127.0.0.1:0", tlsAddr: "127.0.0.1:0"}
	c.logged = captureLogs(filepath.Base(dir))
	t.Cleanup(func() {
		if t.Failed() {
			c.logged.dump(t)
		}
		c.logged.drop()
	})
	t.Cleanup(func() {
		// Stop leaves the admin API running.
		noAdmin := []byte(`{"admin": {"disabled": true, "config": {"persist": false}}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}}}`)
		if err := errors.Join(caddy.Load(noAdmin, true), caddy.Stop()); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
	if err := c.load(site, options); err != nil {
		t.Fatal(err)
	}
	return c
}

// reload replaces the configuration; addresses stay. Without options, those of
// startCaddy hold. When it returns, the replaced configuration gets no new
// connections any more. (Caddy returns sooner: while both listen, the system
// gives some connections to the old one, and resets those that it has not
// accepted when it closes.)
func (c *testCaddy) reload(site string, options ...siteOption) {
	c.t.Helper()
	if options == nil {
		options = c.options
	}
	caddysse.ForgetDrains() // tests reload more often than anybody else
	replaced := testListeners.open()
	if err := c.load(site, options); err != nil {
		c.t.Fatal(err)
	}
	timeout := time.After(patience)
	for _, ln := range replaced {
		select {
		case <-ln.closed:
		case <-timeout:
			c.t.Fatalf("the replaced configuration still listens on %v after %v", ln.Addr(), patience)
		}
	}
}

// The ports in the Caddyfile, which stand for the real ones.
const (
	plainPort = ":58080"
	tlsPort   = ":58443"
)

// bystander is a host that is none of the site's.
const bystander = "bystander.invalid"

func (c *testCaddy) load(site string, options []siteOption) error {
	config, err := c.adapt(site, options)
	if err != nil {
		return err
	}
	if err := caddy.Load(config, true); err != nil {
		return err
	}
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		return err
	}
	for _, server := range app.(*caddyhttp.App).Servers {
		addr := server.Listeners()[0].Addr().String()
		if len(server.TLSConnPolicies) > 0 {
			c.tlsAddr, c.tlsURL = addr, "https://"+addr
		} else {
			c.addr, c.url = addr, "http://"+addr
		}
	}
	return nil
}

// adapt makes Caddy's JSON of a site.
func (c *testCaddy) adapt(site string, options []siteOption) ([]byte, error) {
	around := surroundings{output: "test_capture " + c.logged.key, level: "INFO", moduleLevel: "DEBUG"}
	for _, option := range options {
		option(&around)
	}
	admin := "off"
	if around.admin {
		admin = "unix/" + c.adminSocket()
	}
	certificate, err := testCertificate()
	if err != nil {
		return nil, err
	}
	certFile, keyFile := filepath.Join(c.dir, "cert.pem"), filepath.Join(c.dir, "key.pem")
	if err := errors.Join(
		os.WriteFile(certFile, certificate.cert, 0o600),
		os.WriteFile(keyFile, certificate.key, 0o600),
	); err != nil {
		return nil, err
	}

	text := fmt.Sprintf(`{
	admin %[1]s
	persist_config off
	auto_https off
	skip_install_trust
	storage file_system %[2]s
	log default {
		output %[3]s
		format json
		level %[4]s
		exclude http.handlers.sse
	}
	log sse {
		output %[3]s
		format json
		level %[12]s
		include http.handlers.sse
	}
	%[5]s
}
http://%[6]s {
	%[7]s
}
https://%[8]s {
	tls %[9]s %[10]s
	%[7]s
}
https://%[11]s%[8]s {
	tls %[9]s %[10]s
	respond 204
}
`, admin, c.dir, around.output, around.level, around.global, plainPort, site, tlsPort, certFile, keyFile, bystander, around.moduleLevel)

	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return nil, fmt.Errorf("%w, in:\n%s", err, text)
	}
	for _, warning := range warnings {
		if !strings.Contains(warning.Message, "not formatted") {
			c.t.Logf("Caddyfile: %s", warning)
		}
	}
	return c.setAddresses(config)
}

// setAddresses puts the real addresses in. The first time their ports are 0,
// and the system chooses: nothing is reserved, so nobody can be faster. After
// that the TCP ports are those that were chosen. (The previous configuration
// still holds them, and Caddy shares them with SO_REUSEPORT.) HTTP/3 keeps an
// address of its own, with port 0 always: Caddy knows its sockets by this
// name and so finds the old one again.
func (c *testCaddy) setAddresses(config []byte) ([]byte, error) {
	var tree map[string]any
	if err := json.Unmarshal(config, &tree); err != nil {
		return nil, err
	}
	servers := tree["apps"].(map[string]any)["http"].(map[string]any)["servers"].(map[string]any)
	for name, value := range servers {
		server := value.(map[string]any)
		listen, _ := server["listen"].([]any)
		switch {
		case slices.Contains(listen, any(plainPort)):
			server["listen"] = []string{c.addr}
		case slices.Contains(listen, any(tlsPort)):
			// tcp4 because Caddy takes two servers at one address for a mistake.
			server["listen"] = []string{"tcp4/" + c.tlsAddr, "udp/127.0.0.1:0"}
			server["listen_protocols"] = [][]string{{"h1", "h2"}, {"h3"}}
		default:
			return nil, fmt.Errorf("server %s listens on %v", name, listen)
		}
		wrappers := []map[string]string{{"wrapper": "test_listener"}}
		if aroundAccepted.Load() != nil {
			wrappers = append(wrappers, map[string]string{"wrapper": "tls"}) // around the other one
		}
		server["listener_wrappers"] = wrappers
	}
	return json.Marshal(tree)
}

func init() {
	caddy.RegisterModule(listenerWrapper{})
}

// listenerWrapper is the listener wrapper `test_listener`. It leaves the
// connections as they are.
type listenerWrapper struct{}

func (listenerWrapper) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.listeners.test_listener",
		New: func() caddy.Module { return new(listenerWrapper) },
	}
}

func (listenerWrapper) WrapListener(ln net.Listener) net.Listener {
	watched := &testListener{Listener: ln, closed: make(chan struct{})}
	testListeners.Store(watched, nil)
	return watched
}

// testListener tells when it is closed.
type testListener struct {
	net.Listener
	once   sync.Once
	closed chan struct{}
}

func (ln *testListener) Accept() (net.Conn, error) {
	conn, err := ln.Listener.Accept()
	if around := aroundAccepted.Load(); err == nil && around != nil {
		conn = (*around)(conn)
	}
	return conn, err
}

// aroundAccepted is what a test puts around the connections that Caddy accepts, inside
// TLS; nil: nothing.
var aroundAccepted atomic.Pointer[func(net.Conn) net.Conn]

func (ln *testListener) Close() error {
	err := ln.Listener.Close()
	ln.once.Do(func() {
		testListeners.Delete(ln)
		close(ln.closed)
	})
	return err
}

// testListeners are the open ones.
var testListeners listenerSet

type listenerSet struct{ sync.Map }

func (s *listenerSet) open() (listeners []*testListener) {
	s.Range(func(ln, _ any) bool {
		listeners = append(listeners, ln.(*testListener))
		return true
	})
	return listeners
}

func (c *testCaddy) adminSocket() string {
	return filepath.Join(c.dir, "admin")
}

// admin calls the admin API and returns the answer with its body.
func (c *testCaddy) admin(method, path string) (*http.Response, string) {
	c.t.Helper()
	res := askAdmin(c.t, c.adminSocket(), method, path, "")
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return res, string(body)
}

// askAdmin makes a request to the admin API at a Unix socket. The body, if there
// is one, is a Caddyfile.
//
// It asks again after an EOF. Caddy stops the admin server of a replaced
// configuration after it has loaded the new one, and a net/http server that is
// told to stop closes connections that it has just accepted, without a look at
// their requests. So such a request has not been handled.
func askAdmin(t testing.TB, socket, method, path, body string) *http.Response {
	t.Helper()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	for again := true; ; again = false {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "text/caddyfile")
		}
		res, err := transport.RoundTrip(req)
		if again && errors.Is(err, io.EOF) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
}

// Clients

// testClient speaks one protocol to Caddy, over connections of its own. All its
// requests are given up when the test ends.
type testClient struct {
	*http.Client
	proto string
	url   string
}

// client returns a new client that speaks h1, h2 or h3. It follows no
// redirects, asks for no compression and accepts any certificate.
func (c *testCaddy) client(proto string) *testClient {
	c.t.Helper()
	insecure := &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}
	cl := &testClient{proto: proto, url: c.tlsURL}
	var transport http.RoundTripper
	switch proto {
	case "h1":
		cl.url = c.url
		h1 := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 1000}
		c.t.Cleanup(h1.CloseIdleConnections)
		transport = h1
	case "h2":
		h2 := &http.Transport{DisableCompression: true, TLSClientConfig: insecure, Protocols: new(http.Protocols)}
		h2.Protocols.SetHTTP2(true)
		c.t.Cleanup(h2.CloseIdleConnections)
		transport = h2
	case "h3":
		addr := c.findHTTP3()
		h3 := &http3.Transport{
			DisableCompression: true,
			TLSClientConfig:    insecure,
			Dial: func(ctx context.Context, _ string, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
				return quic.DialAddrEarly(ctx, addr, tlsConf, conf)
			},
		}
		c.t.Cleanup(func() { h3.Close() })
		transport = h3
	default:
		c.t.Fatalf("no such protocol: %q", proto)
	}
	cl.Client = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return cl
}

// overTLS makes HTTP/1.1 of an h2 client, with TLS still.
func (cl *testClient) overTLS() *testClient {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	cl.Transport.(*http.Transport).Protocols = protocols
	return cl
}

var altSvcPort = regexp.MustCompile(`h3=":(\d+)"`)

// findHTTP3 asks over HTTP/1.1 where HTTP/3 is, as a browser does. Caddy may
// already answer when its HTTP/3 server has not begun yet.
func (c *testCaddy) findHTTP3() string {
	c.t.Helper()
	c.h3Once.Do(func() {
		transport := &http.Transport{
			DisableKeepAlives: true,
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true, ServerName: bystander},
		}
		req, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, c.tlsURL, nil)
		if err != nil {
			c.t.Fatal(err)
		}
		req.Host = bystander
		for deadline := time.Now().Add(patience); c.h3Addr == ""; time.Sleep(time.Millisecond) {
			res, err := transport.RoundTrip(req)
			if err != nil {
				c.t.Fatal(err)
			}
			res.Body.Close()
			if port := altSvcPort.FindStringSubmatch(res.Header.Get("Alt-Svc")); port != nil {
				c.h3Addr = "127.0.0.1:" + port[1]
			} else if time.Now().After(deadline) {
				c.t.Fatalf("%s: no HTTP/3 in Alt-Svc: %q", res.Status, res.Header)
			}
		}
	})
	return c.h3Addr
}

// request makes a request for a path of the site, with header fields given as
// "Name: value".
func (cl *testClient) request(t testing.TB, method, path string, body io.Reader, header ...string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, cl.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range header {
		name, value, _ := strings.Cut(field, ":")
		req.Header.Add(name, strings.TrimSpace(value))
	}
	likeEventSource(req)
	return req
}

// likeEventSource makes a GET that accepts event streams only what an EventSource
// sends, unless it has a Cache-Control already (see notEventSource).
func likeEventSource(r *http.Request) {
	if r.Method == http.MethodGet && r.Header.Get("Accept") == "text/event-stream" && r.Header["Cache-Control"] == nil {
		r.Header.Set("Cache-Control", "no-cache")
	}
}

// notEventSource is a header of a client that accepts event streams only and is
// no EventSource.
const notEventSource = "Cache-Control: max-age=0"

// begin sends a request and does not wait for the response headers.
func (cl *testClient) begin(req *http.Request) *exchange {
	ctx, leave := context.WithCancel(req.Context())
	e := &exchange{leave: leave, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		res, err := cl.Do(req.WithContext(ctx))
		if err != nil {
			leave()
			e.err = fmt.Errorf("%s: %w", cl.proto, err)
			return
		}
		e.res = &reply{Response: res, leave: leave}
	}()
	return e
}

// do sends a request and waits for the response headers.
func (cl *testClient) do(t testing.TB, req *http.Request) *reply {
	t.Helper()
	return cl.begin(req).headers(t)
}

// get sends a GET and waits for the response headers.
func (cl *testClient) get(t testing.TB, path string, header ...string) *reply {
	t.Helper()
	return cl.do(t, cl.request(t, http.MethodGet, path, nil, header...))
}

// exchange is a request whose response headers may not be there yet.
type exchange struct {
	leave context.CancelFunc // goes away, like a closed tab
	done  chan struct{}
	res   *reply
	err   error
}

// outcome waits for the response headers or what is there instead.
func (e *exchange) outcome() (*reply, error) {
	select {
	case <-e.done:
		return e.res, e.err
	case <-time.After(patience):
		return nil, fmt.Errorf("no response headers within %v", patience)
	}
}

// headers waits for the response headers.
func (e *exchange) headers(t testing.TB) *reply {
	t.Helper()
	r, err := e.outcome()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// reply is a response whose body may still be on its way. It has to be read to
// its end (text, follow) or left.
type reply struct {
	*http.Response
	leave context.CancelFunc // goes away, like a closed tab
}

// text reads the body to its end. err is how it ended if not cleanly.
func (r *reply) text() (body string, err error) {
	defer r.leave()
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	return string(text), err
}

// follow reads the body as it comes.
func (r *reply) follow() *follower {
	f := &follower{began: time.Now(), changed: make(chan struct{})}
	go func() {
		defer r.leave()
		defer r.Body.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(buf)
			f.add(string(buf[:n]), err)
			if err != nil {
				return
			}
		}
	}()
	return f
}

// arrival is a piece of a body and when it came.
type arrival struct {
	at   time.Time
	text string
}

// follower has what has come of a body so far.
type follower struct {
	began time.Time // when the headers were there

	mu       sync.Mutex
	arrivals []arrival
	unread   string        // what no expect has seen
	err      error         // io.EOF after a clean end
	changed  chan struct{} // closed and replaced with every change
}

func (f *follower) add(text string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if text != "" {
		f.arrivals = append(f.arrivals, arrival{time.Now(), text})
		f.unread += text
	}
	f.err = err
	close(f.changed)
	f.changed = make(chan struct{})
}

// wait blocks until enough says so, the body is at its end or patience is.
func (f *follower) wait(enough func(unread string) bool) (unread string, err error) {
	timeout := time.After(patience)
	for {
		f.mu.Lock()
		unread, err = f.unread, f.err
		changed := f.changed
		f.mu.Unlock()
		if err != nil || enough(unread) {
			return unread, err
		}
		select {
		case <-changed:
		case <-timeout:
			return unread, errNothingMore
		}
	}
}

var errNothingMore = fmt.Errorf("nothing more within %v", patience)

// expect waits for want, and that nothing else has come.
func (f *follower) expect(t testing.TB, want string) {
	t.Helper()
	got, err := f.wait(func(unread string) bool { return len(unread) >= len(want) })
	if got != want {
		t.Fatalf("got %.200q (%v), want %.200q", got, err, want)
	}
	f.mu.Lock()
	f.unread = f.unread[len(want):]
	f.mu.Unlock()
}

// expectEnd waits for the clean end, and that nothing else has come.
func (f *follower) expectEnd(t testing.TB) {
	t.Helper()
	if got, err := f.rest(); got != "" || err != io.EOF {
		t.Fatalf("got %.200q and %v, want the end", got, err)
	}
}

// expectAbort waits for an end that no client can take for a clean one, and
// that nothing else has come.
func (f *follower) expectAbort(t testing.TB) {
	t.Helper()
	if got, err := f.rest(); got != "" || err == io.EOF || errors.Is(err, errNothingMore) {
		t.Fatalf("got %.200q and %v, want an abort", got, err)
	}
}

// rest waits for the end and returns what no expect has seen. err is io.EOF
// where the end is clean.
func (f *follower) rest() (string, error) {
	return f.wait(func(string) bool { return false })
}

// all returns the pieces that have come so far.
func (f *follower) all() []arrival {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.arrivals)
}

// Upstreams

// testUpstream is a server behind Caddy.
type testUpstream struct {
	*httptest.Server
	addr  string // host and port
	calls chan *upstreamCall
	paths sync.Map // of chan *upstreamCall, for those who wait for one path
}

// newUpstream starts an upstream that the test plays itself; see accept.
func newUpstream(t testing.TB) *testUpstream {
	up := &testUpstream{calls: make(chan *upstreamCall)}
	up.start(t, func(w http.ResponseWriter, r *http.Request) { up.play(w, r) })
	return up
}

// play answers a request with what the test has the call do.
func (up *testUpstream) play(w http.ResponseWriter, r *http.Request) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err // the client left before it was through
	}
	c := &upstreamCall{
		Request: r,
		body:    string(body),
		left:    r.Context().Done(),
		steps:   make(chan func(http.ResponseWriter)),
		done:    make(chan struct{}),
	}
	defer close(c.done)
	select {
	case up.calls <- c:
	case up.callsAt(r.URL.Path) <- c:
	case <-c.left:
		return r.Context().Err()
	}
	for step := range c.steps {
		step(w)
	}
	return c.err
}

// newUpstreamFunc starts an upstream that answers with a function.
func newUpstreamFunc(t testing.TB, answer http.HandlerFunc) *testUpstream {
	up := new(testUpstream)
	up.start(t, answer)
	return up
}

func (up *testUpstream) start(t testing.TB, answer http.HandlerFunc) {
	up.Server = httptest.NewUnstartedServer(answer)
	up.Config.ErrorLog = discardLog
	up.Server.Start()
	up.addr = up.Listener.Addr().String()
	t.Cleanup(up.Close)
}

// callsAt is where requests for a path can be waited for.
func (up *testUpstream) callsAt(path string) chan *upstreamCall {
	calls, _ := up.paths.LoadOrStore(path, make(chan *upstreamCall))
	return calls.(chan *upstreamCall)
}

// accept waits for the next request.
func (up *testUpstream) accept(t testing.TB) *upstreamCall {
	t.Helper()
	return acceptFrom(t, up.calls)
}

// acceptAt waits for the next request for a path: of those that are under way at
// the same time, each test takes its own.
func (up *testUpstream) acceptAt(t testing.TB, path string) *upstreamCall {
	t.Helper()
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	return acceptFrom(t, up.callsAt(path))
}

func acceptFrom(t testing.TB, calls <-chan *upstreamCall) *upstreamCall {
	t.Helper()
	select {
	case c := <-calls:
		c.t = t
		t.Cleanup(c.end)
		return c
	case <-time.After(patience):
		t.Fatalf("no request has reached the upstream within %v", patience)
		return nil
	}
}

// upstreamCall is a request that has reached the upstream, and the answer to it. What
// it does is done when its methods return.
type upstreamCall struct {
	*http.Request
	t     testing.TB
	body  string
	left  <-chan struct{} // closed when Caddy gives the request up
	steps chan func(http.ResponseWriter)
	done  chan struct{} // closed when the answer is over
	over  bool
	err   error // what a handler inside Caddy returns
}

// do runs a step of the answer in the upstream's handler.
func (c *upstreamCall) do(step func(w http.ResponseWriter)) {
	c.t.Helper()
	done := make(chan struct{})
	select {
	case c.steps <- func(w http.ResponseWriter) { defer close(done); step(w) }:
		<-done
	case <-c.done:
		c.t.Fatal("the answer is over already")
	}
}

// start sends the headers of a 200, given as "Name: value".
func (c *upstreamCall) start(contentType string, header ...string) {
	c.t.Helper()
	c.startWith(http.StatusOK, append(header, "Content-Type: "+contentType)...)
}

// startWith sends a status and headers, given as "Name: value".
func (c *upstreamCall) startWith(status int, header ...string) {
	c.t.Helper()
	c.do(func(w http.ResponseWriter) {
		for _, field := range header {
			name, value, _ := strings.Cut(field, ":")
			w.Header().Add(name, strings.TrimSpace(value))
		}
		w.WriteHeader(status)
		http.NewResponseController(w).Flush()
	})
}

// send sends a piece of the body.
func (c *upstreamCall) send(text string) {
	c.t.Helper()
	c.do(func(w http.ResponseWriter) {
		io.WriteString(w, text) // it fails where the client has left
		http.NewResponseController(w).Flush()
	})
}

// end ends the answer cleanly.
func (c *upstreamCall) end() {
	if !c.over {
		c.over = true
		close(c.steps)
		select {
		case <-c.done:
		case <-time.After(patience):
			c.t.Errorf("the answer to %s is still under way after %v", c.URL.Path, patience)
		}
	}
}

// abort breaks the answer off.
func (c *upstreamCall) abort() {
	c.t.Helper()
	c.panic(http.ErrAbortHandler)
}

// panic has the handler panic.
func (c *upstreamCall) panic(v any) {
	c.t.Helper()
	c.over = true
	c.do(func(http.ResponseWriter) { panic(v) })
	<-c.done
}

// fail has a handler inside Caddy return an error.
func (c *upstreamCall) fail(err error) {
	c.err = err
	c.end()
}

// floodUntilStuck sends until the client's side takes no more. It returns with
// a write under way, which fails when Caddy gives the request up.
func (c *upstreamCall) floodUntilStuck() {
	c.t.Helper()
	var sent atomic.Int64
	go c.do(func(w http.ResponseWriter) {
		piece := []byte("data: " + strings.Repeat("x", 64<<10) + "\n\n")
		for {
			n, err := w.Write(piece)
			sent.Add(int64(n))
			if err != nil || http.NewResponseController(w).Flush() != nil {
				return
			}
		}
	})
	// There is nothing to wait for but that nothing happens.
	for before, since := sent.Load(), time.Now(); time.Since(since) < 300*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		if now := sent.Load(); now != before || now == 0 {
			before, since = now, time.Now()
		}
	}
}

// expectGone waits until Caddy gives the request up.
func (c *upstreamCall) expectGone() {
	c.t.Helper()
	select {
	case <-c.left:
	case <-time.After(patience):
		c.t.Fatalf("Caddy still holds the request after %v", patience)
	}
}

// testHandler is a handler inside Caddy in the part of an upstream. What it
// writes is not flushed but by send.
type testHandler struct {
	*testUpstream
	directive string // how the Caddyfile names it
}

func newTestHandler(t testing.TB) testHandler {
	h := testHandler{testUpstream: &testUpstream{calls: make(chan *upstreamCall)}}
	key := fmt.Sprintf("%p", h.testUpstream)
	h.directive = "test_handler " + key
	testHandlers.Store(key, h.testUpstream)
	t.Cleanup(func() { testHandlers.Delete(key) })
	return h
}

// testHandlers are the live ones by key.
var testHandlers sync.Map

func init() {
	caddy.RegisterModule(handlerModule{})
	httpcaddyfile.RegisterHandlerDirective("test_handler", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		m := new(handlerModule)
		h.Next() // consume directive name
		if !h.Args(&m.Key) {
			return nil, h.ArgErr()
		}
		return m, nil
	})
	httpcaddyfile.RegisterDirectiveOrder("test_handler", httpcaddyfile.Before, "respond")
}

// handlerModule is the directive `test_handler <key>`.
type handlerModule struct {
	Key string `json:"key"`
}

func (handlerModule) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.test_handler",
		New: func() caddy.Module { return new(handlerModule) },
	}
}

func (m *handlerModule) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	up, ok := testHandlers.Load(m.Key)
	if !ok {
		return fmt.Errorf("no test plays %q", m.Key)
	}
	return up.(*testUpstream).play(w, r)
}

var discardLog = log.New(io.Discard, "", 0)

// Logs

func init() {
	caddy.RegisterModule(captureWriter{})
}

// captureWriter is the log output `test_capture <key>`.
type captureWriter struct {
	Key string `json:"key"`
}

func (captureWriter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.logging.writers.test_capture",
		New: func() caddy.Module { return new(captureWriter) },
	}
}

func (w *captureWriter) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume writer name
	if !d.Args(&w.Key) {
		return d.ArgErr()
	}
	return nil
}

func (w captureWriter) String() string    { return "test_capture " + w.Key }
func (w captureWriter) WriterKey() string { return w.String() }

func (w captureWriter) OpenWriter() (io.WriteCloser, error) {
	capture, ok := logCaptures.Load(w.Key)
	if !ok {
		return nil, fmt.Errorf("no test captures logs as %q", w.Key)
	}
	return capture.(*logCapture), nil
}

// logCaptures are the live ones by key.
var logCaptures sync.Map

// logCapture collects what Caddy logs.
type logCapture struct {
	key     string
	mu      sync.Mutex
	entries []logEntry
	changed chan struct{} // closed and replaced with every entry
}

// logEntry is a line of Caddy's log, as in its JSON.
type logEntry map[string]any

func (e logEntry) logger() string  { return fmt.Sprint(e["logger"]) }
func (e logEntry) level() string   { return fmt.Sprint(e["level"]) }
func (e logEntry) message() string { return fmt.Sprint(e["msg"]) }

func captureLogs(key string) *logCapture {
	l := &logCapture{key: key, changed: make(chan struct{})}
	logCaptures.Store(key, l)
	return l
}

func (l *logCapture) drop() { logCaptures.Delete(l.key) }

// Write takes one line.
func (l *logCapture) Write(line []byte) (int, error) {
	entry := make(logEntry)
	if err := json.Unmarshal(line, &entry); err != nil {
		entry["msg"], entry["error"] = string(line), err.Error()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, entry)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(line), nil
}

func (l *logCapture) Close() error { return nil }

func (l *logCapture) dump(t testing.TB) {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := l.entries[max(0, len(l.entries)-50):]
	t.Logf("the last %d of %d log entries:", len(last), len(l.entries))
	for _, entry := range last {
		line, _ := json.Marshal(entry)
		t.Logf("%s", line)
	}
}

// logs returns what Caddy has logged so far.
func (c *testCaddy) logs() []logEntry {
	c.logged.mu.Lock()
	defer c.logged.mu.Unlock()
	return slices.Clone(c.logged.entries)
}

// waitForLog waits for an entry with this message, after the first skip ones
// of its kind.
func (c *testCaddy) waitForLog(message string, skip int) logEntry {
	c.t.Helper()
	timeout := time.After(patience)
	for {
		c.logged.mu.Lock()
		entries, changed := c.logged.entries, c.logged.changed
		c.logged.mu.Unlock()
		seen := 0
		for _, entry := range entries {
			if entry.message() != message {
				continue
			}
			if seen++; seen > skip {
				return entry
			}
		}
		select {
		case <-changed:
		case <-timeout:
			c.t.Fatalf("%q was logged %d times within %v", message, seen, patience)
		}
	}
}

// Certificate

type keyPair struct{ cert, key []byte }

// testCertificate is one for any host, signed by itself.
var testCertificate = sync.OnceValues(func() (keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		DNSNames:     []string{"localhost", bystander},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return keyPair{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return keyPair{}, err
	}
	return keyPair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}, nil
})

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*captureWriter)(nil)
	_ caddy.WriterOpener    = captureWriter{}

	_ caddyhttp.MiddlewareHandler = (*handlerModule)(nil)
)
