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

// This file is the harness for tests that drive a real Caddy over real sockets:
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
// A process has only one Caddy: a second startCaddy waits until the first test
// has ended.

// clientProtocols are the protocols that clients use. h1 is HTTP/1.1 without
// TLS.
var clientProtocols = []string{"h1", "h2", "h3"}

// testCaddy is a running Caddy with one site, which answers for every host
// name, without TLS (HTTP/1.1) and with TLS (HTTP/1.1, HTTP/2, HTTP/3).
type testCaddy struct {
	t       testing.TB
	url     string // without TLS and without a slash at the end
	addr    string // host and port of url
	tlsURL  string
	tlsAddr string

	logged  *logCapture
	dir     string
	h3Addr  string
	h3Once  sync.Once
	options []siteOption
}

// siteOption changes the Caddyfile around the site.
type siteOption func(*surroundings)

type surroundings struct {
	global      string // more global options
	admin       bool
	output      string // of the logs
	level       string // of everything except this module
	moduleLevel string
}

// withGlobal adds global options, such as `servers { … }`.
func withGlobal(options string) siteOption {
	return func(s *surroundings) { s.global += options + "\n" }
}

// withAdmin turns the admin API on; see testCaddy.admin.
func withAdmin() siteOption {
	return func(s *surroundings) { s.admin = true }
}

// withLogLevel sets the level of Caddy's own logs; the default is INFO. This
// module's logs are always captured from DEBUG on.
func withLogLevel(level string) siteOption {
	return func(s *surroundings) { s.level = level }
}

// withoutLogs discards all logs. The levels are those of a Caddy without a
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

	// Not t.TempDir, because the path of a Unix socket must be short.
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
		// caddy.Stop does not stop the admin API.
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

// reload replaces the configuration; the addresses stay the same. Without
// options, those of startCaddy apply. After it returns, the replaced
// configuration gets no new connections. (Caddy itself returns earlier: while
// both configurations listen, the system gives some connections to the old one,
// and resets those that were not accepted when it closes.)
func (c *testCaddy) reload(site string, options ...siteOption) {
	c.t.Helper()
	if options == nil {
		options = c.options
	}
	caddysse.ForgetDrains() // tests reload more often than Caddy ever would
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

// The ports in the Caddyfile; setAddresses replaces them with real ones.
const (
	plainPort = ":58080"
	tlsPort   = ":58443"
)

// bystander is a host that is not the site's.
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

// adapt converts a site to Caddy's JSON.
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

// setAddresses replaces the ports of the Caddyfile with real addresses. The
// first time, the ports are 0 and the system chooses, so no other process can
// take a port in between. After that, the TCP ports are the ones that were
// chosen. (The previous configuration still holds them, and Caddy shares them
// with SO_REUSEPORT.) HTTP/3 has its own address, always with port 0: Caddy
// identifies its sockets by this name and so finds the old one again.
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
			// tcp4, because Caddy rejects two servers with the same address.
			server["listen"] = []string{"tcp4/" + c.tlsAddr, "udp/127.0.0.1:0"}
			server["listen_protocols"] = [][]string{{"h1", "h2"}, {"h3"}}
		default:
			return nil, fmt.Errorf("server %s listens on %v", name, listen)
		}
		wrappers := []map[string]string{{"wrapper": "test_listener"}}
		if aroundAccepted.Load() != nil {
			wrappers = append(wrappers, map[string]string{"wrapper": "tls"}) // around test_listener
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

// testListener closes a channel when it is closed.
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

// aroundAccepted wraps the connections that Caddy accepts, inside TLS. nil: it
// leaves them as they are.
var aroundAccepted atomic.Pointer[func(net.Conn) net.Conn]

func (ln *testListener) Close() error {
	err := ln.Listener.Close()
	ln.once.Do(func() {
		testListeners.Delete(ln)
		close(ln.closed)
	})
	return err
}

// testListeners are the listeners that are open.
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

// admin calls the admin API and returns the response with its body.
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

// askAdmin sends a request to an admin API on a Unix socket. The body, if any,
// is a Caddyfile.
//
// It tries again after an EOF. Caddy stops the admin server of a replaced
// configuration after it has loaded the new one, and a net/http server that is
// being stopped closes connections that it has just accepted, without reading
// their requests. So such a request was not handled.
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

// testClient speaks one protocol to Caddy, over its own connections. All its
// requests are canceled when the test ends.
type testClient struct {
	*http.Client
	proto string
	url   string
}

// client returns a new client for h1, h2 or h3. It does not follow redirects,
// does not ask for compression, and accepts any certificate.
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

// overTLS makes an h2 client use HTTP/1.1, still with TLS.
func (cl *testClient) overTLS() *testClient {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	cl.Transport.(*http.Transport).Protocols = protocols
	return cl
}

var altSvcPort = regexp.MustCompile(`h3=":(\d+)"`)

// findHTTP3 asks over HTTP/1.1 for the address of HTTP/3, as a browser does.
// Caddy may already answer before its HTTP/3 server has started.
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

// request makes a request for a path of the site. Header fields are given as
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

// likeEventSource adds what an EventSource sends to a GET that accepts only
// event streams, unless it has a Cache-Control already (see notEventSource).
func likeEventSource(r *http.Request) {
	if r.Method == http.MethodGet && r.Header.Get("Accept") == "text/event-stream" && r.Header["Cache-Control"] == nil {
		r.Header.Set("Cache-Control", "no-cache")
	}
}

// notEventSource is a header field of a client that accepts only event streams
// but is not an EventSource.
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

// exchange is a request whose response headers may not have arrived yet.
type exchange struct {
	leave context.CancelFunc // cancels the request, like a closed tab
	done  chan struct{}
	res   *reply
	err   error
}

// outcome waits for the response headers or for an error.
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

// reply is a response whose body may still be arriving. A test must read it to
// its end (text, follow) or call leave.
type reply struct {
	*http.Response
	leave context.CancelFunc // cancels the request, like a closed tab
}

// text reads the body to its end. err is nil after a clean end.
func (r *reply) text() (body string, err error) {
	defer r.leave()
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	return string(text), err
}

// follow reads the body as it arrives.
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

// arrival is a piece of a body and the time at which it came.
type arrival struct {
	at   time.Time
	text string
}

// follower holds what has come of a body so far.
type follower struct {
	began time.Time // when the headers had arrived

	mu       sync.Mutex
	arrivals []arrival
	unread   string        // what no expect has returned yet
	err      error         // io.EOF after a clean end
	changed  chan struct{} // closed and replaced at every change
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

// wait blocks until enough returns true, the body ends or patience has passed.
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

// expect waits for want, and fails if anything else has come.
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

// expectEnd waits for a clean end, and fails if anything else has come.
func (f *follower) expectEnd(t testing.TB) {
	t.Helper()
	if got, err := f.rest(); got != "" || err != io.EOF {
		t.Fatalf("got %.200q and %v, want the end", got, err)
	}
}

// expectAbort waits for an end that no client can mistake for a clean one, and
// fails if anything else has come.
func (f *follower) expectAbort(t testing.TB) {
	t.Helper()
	if got, err := f.rest(); got != "" || err == io.EOF || errors.Is(err, errNothingMore) {
		t.Fatalf("got %.200q and %v, want an abort", got, err)
	}
}

// rest waits for the end and returns what no expect has returned yet. err is
// io.EOF after a clean end.
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

// testUpstream is an upstream of Caddy.
type testUpstream struct {
	*httptest.Server
	addr  string // host and port
	calls chan *upstreamCall
	paths sync.Map // of chan *upstreamCall, for tests that wait for one path
}

// newUpstream starts an upstream whose answers the test gives itself; see
// accept.
func newUpstream(t testing.TB) *testUpstream {
	up := &testUpstream{calls: make(chan *upstreamCall)}
	up.start(t, func(w http.ResponseWriter, r *http.Request) { up.play(w, r) })
	return up
}

// play answers a request as the test tells it to.
func (up *testUpstream) play(w http.ResponseWriter, r *http.Request) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err // the client left before the whole request had arrived
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

// callsAt returns the channel for requests for a path.
func (up *testUpstream) callsAt(path string) chan *upstreamCall {
	calls, _ := up.paths.LoadOrStore(path, make(chan *upstreamCall))
	return calls.(chan *upstreamCall)
}

// accept waits for the next request.
func (up *testUpstream) accept(t testing.TB) *upstreamCall {
	t.Helper()
	return acceptFrom(t, up.calls)
}

// acceptAt waits for the next request for a path, for tests that have several
// requests at the same time.
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

// upstreamCall is a request that has reached the upstream, and the answer to
// it. When one of its methods returns, the step is done.
type upstreamCall struct {
	*http.Request
	t     testing.TB
	body  string
	left  <-chan struct{} // closed when Caddy cancels the request
	steps chan func(http.ResponseWriter)
	done  chan struct{}  // closed when the answer has ended
	doing sync.WaitGroup // calls of do
	over  bool
	err   error // what a handler inside Caddy returns
}

// do runs one step of the answer in the upstream's handler.
func (c *upstreamCall) do(step func(w http.ResponseWriter)) {
	c.t.Helper()
	c.doing.Add(1)
	defer c.doing.Done()
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
		io.WriteString(w, text) // this fails if the client has left
		http.NewResponseController(w).Flush()
	})
}

// end ends the answer cleanly.
func (c *upstreamCall) end() {
	if !c.over {
		c.over = true
		go func() { // a step may be on a goroutine of its own
			c.doing.Wait()
			close(c.steps)
		}()
		select {
		case <-c.done:
		case <-time.After(patience):
			c.t.Errorf("the answer to %s is still under way after %v", c.URL.Path, patience)
		}
	}
}

// abort breaks off the answer.
func (c *upstreamCall) abort() {
	c.t.Helper()
	c.panic(http.ErrAbortHandler)
}

// panic makes the handler panic.
func (c *upstreamCall) panic(v any) {
	c.t.Helper()
	c.over = true
	c.do(func(http.ResponseWriter) { panic(v) })
	<-c.done
}

// fail makes a handler inside Caddy return an error.
func (c *upstreamCall) fail(err error) {
	c.err = err
	c.end()
}

// floodUntilStuck sends until the client's side takes no more. When it returns,
// a write is blocked; it fails when Caddy cancels the request.
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
	// Nothing tells when a write blocks, so wait until the count has not grown
	// for a while.
	for before, since := sent.Load(), time.Now(); time.Since(since) < 300*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		if now := sent.Load(); now != before || now == 0 {
			before, since = now, time.Now()
		}
	}
}

// expectGone waits until Caddy cancels the request.
func (c *upstreamCall) expectGone() {
	c.t.Helper()
	select {
	case <-c.left:
	case <-time.After(patience):
		c.t.Fatalf("Caddy still holds the request after %v", patience)
	}
}

// testHandler is a handler inside Caddy that acts as an upstream. Only send
// flushes what it writes.
type testHandler struct {
	*testUpstream
	directive string // its name in the Caddyfile
}

func newTestHandler(t testing.TB) testHandler {
	h := testHandler{testUpstream: &testUpstream{calls: make(chan *upstreamCall)}}
	key := fmt.Sprintf("%p", h.testUpstream)
	h.directive = "test_handler " + key
	testHandlers.Store(key, h.testUpstream)
	t.Cleanup(func() { testHandlers.Delete(key) })
	return h
}

// testHandlers are the ones in use, by key.
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

// logCaptures are the ones in use, by key.
var logCaptures sync.Map

// logCapture collects what Caddy logs.
type logCapture struct {
	key     string
	mu      sync.Mutex
	entries []logEntry
	changed chan struct{} // closed and replaced at every entry
}

// logEntry is a line of Caddy's log, decoded from JSON.
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

// Write is called with one line at a time.
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

// waitForLog waits for an entry with this message, after the first skip entries
// with the same message.
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

// testCertificate is self-signed, for any host.
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
