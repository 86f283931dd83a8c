package caddysse_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

const acceptStream = "Accept: text/event-stream"

// drainSite is a site whose streams log when they open.
func drainSite(upstream, sse string) string {
	return `
		sse 1h {
			prelude off
			` + sse + `
		}
		reverse_proxy ` + upstream
}

// endOf waits for a body's end and returns when it came.
func endOf(t testing.TB, body *follower) (at time.Time, err error) {
	_, err = body.rest()
	return time.Now(), err
}

func TestAReloadEndsResumableStreamsEvenlyOverTheWindow(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	const window, streams = 1500 * time.Millisecond, 30
	site := drainSite(up.addr, "drain 1500ms")
	c := startCaddy(t, site, withAdmin())
	clients := []*testClient{c.client("h2"), c.client("h3")} // on one server, and so on one handler
	var bodies []*follower
	for i := range streams {
		cl := clients[i%2]
		body := cl.get(t, fmt.Sprintf("/%d", i), acceptStream).follow()
		body.expect(t, "data: 1\n\n")
		bodies = append(bodies, body)
	}
	began := time.Now()
	c.reload(drainSite(up.addr, "drain 1500ms\nname other"))

	ends := make([]time.Duration, streams)
	var waiting sync.WaitGroup
	for i, body := range bodies {
		waiting.Go(func() {
			if at, err := endOf(t, body); err != io.EOF {
				t.Errorf("stream %d ended with %v", i, err)
			} else {
				ends[i] = at.Sub(began)
			}
		})
	}
	waiting.Wait()
	slices.Sort(ends)
	for i, end := range ends {
		// Each stream has its own slot. A busy machine may make an end late,
		// never early.
		if slot := window / streams * time.Duration(i); end < slot {
			t.Errorf("the %dth stream ended at %v, its slot was at %v", i, end, slot)
		}
	}
	for i := range streams {
		expectEnd(t, c.closedLine(t, fmt.Sprintf("/%d", i)), "drained", "info")
	}
}

func TestEachStreamHasASlotOfTheWindowInWhichADrainEndsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window, streams = 10 * time.Second, 40
		config := silent()
		config.Drain = &caddysse.Drain{Reload: caddy.Duration(window)}
		h := provision(t, config)
		ends := make([]time.Duration, streams)
		began := time.Now()
		var group sync.WaitGroup
		for i := range streams {
			group.Go(func() {
				_ = serve(h, newClient(t), get(eventStream), func(w http.ResponseWriter, r *http.Request) error {
					w.Header().Set("Content-Type", eventStream)
					w.WriteHeader(200)
					<-r.Context().Done()
					return nil
				})
				ends[i] = time.Since(began)
			})
		}
		synctest.Wait()
		h.DrainStreams()
		group.Wait()
		slices.Sort(ends)
		for i, end := range ends {
			if slot := window / streams * time.Duration(i); end < slot || end > slot+window/streams {
				t.Errorf("the %dth stream ended at %v, its slot was at %v", i, end, slot)
			}
		}
	})
}

func TestADrainEndsAStreamAtAnEventBoundary(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	site := func(reconnectIn string) string { return drainSite(up.addr, "drain 10ms\nretry "+reconnectIn) }
	c := startCaddy(t, site("1s"), withAdmin())
	type streams struct{ whole, half, stuck, flood *opened }
	var all []streams
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		begin := func(path string) *opened {
			o := c.open(t, cl, up, path, acceptStream)
			o.call.send(":\n\n")
			o.body.expect(t, "retry: 1000\n\n:\n\n")
			return o
		}
		s := streams{begin("/whole" + proto), begin("/half" + proto), begin("/stuck" + proto), begin("/flood" + proto)}
		for _, o := range []*opened{s.half, s.stuck} {
			o.call.send("data: ha")
			o.body.expect(t, "data: ha")
		}
		all = append(all, s)
	}
	ended := func(o *opened) {
		t.Helper()
		o.body.expectEnd(t)
		o.call.expectGone()
		expectEnd(t, c.closedLine(t, o.path), "drained", "info")
	}
	began := time.Now()
	c.reload(site("2s"))
	for _, s := range all {
		s.flood.call.send("data: 1\n\ndata: 2\n\n") // in one write: the client gets all of it or only the first event
	}
	for _, s := range all {
		// An event that is incomplete is not cut, and nothing follows it.
		c.waitForStream(t, s.half.path, func(s map[string]any) bool { return s["state"] == "ending" })
		s.half.call.send("lf\n\ndata: another\n\n")
		s.half.body.expect(t, "lf\n\n")
		ended(s.half)
	}
	for _, s := range all {
		ended(s.whole)
		if text, err := s.flood.body.rest(); err != io.EOF || (text != "" && text != "data: 1\n\n" && text != "data: 1\n\ndata: 2\n\n") {
			t.Errorf("got %q, %v", text, err)
		}
		ended(s.stuck)
		if took := time.Since(began); took < time.Second {
			t.Errorf("the upstream in mid-event had %v", took)
		}
		if line := c.closedLine(t, s.stuck.path); line["incomplete_event"] != true {
			t.Errorf("told: %v", line)
		}
	}
}

func TestADrainLetsOthersRunOn(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, drainSite(up.addr, "drain 1ms"), withAdmin())
	type request struct{ name, method, accept, contentType, encoding string }
	const mcp = "Mcp-Session-Id: 1"
	var streams []*opened
	for _, proto := range clientProtocols {
		for _, r := range []request{
			{"post", "POST", acceptStream, eventStream, ""},
			{"any", "GET", "Accept: */*", eventStream, ""},
			{"none", "GET", "X-No: accept", eventStream, ""},
			{"zero", "GET", acceptStream + ";q=0", eventStream, ""},
			{"encoded", "GET", acceptStream, eventStream, "Content-Encoding: gzip"},
			{"json", "GET", acceptStream, eventStream, ""},
			{"datastar", "GET", "Accept: text/event-stream, text/html, application/json", eventStream, ""},
			{"mcp", "GET", acceptStream, eventStream, ""},
		} {
			cl := c.client(proto)
			header := []string{r.accept}
			if r.name == "mcp" {
				header = append(header, mcp)
			}
			o := &opened{path: "/" + r.name + proto, exchange: cl.begin(cl.request(t, r.method, "/"+r.name+proto, nil, header...))}
			o.call = up.accept(t)
			o.call.start(r.contentType, slices.DeleteFunc([]string{r.encoding}, func(s string) bool { return s == "" })...)
			o.body = o.headers(t).follow()
			o.call.send("{\n")
			o.body.expect(t, "{\n")
			streams = append(streams, o)
		}
	}
	// The end of a resumable stream shows that the drain has finished.
	last := c.open(t, c.client("h1"), up, "/last", acceptStream)
	for range 3 {
		c.reload(drainSite(up.addr, fmt.Sprintf("drain 1ms\nname n%d", len(c.logs()))))
	}
	last.body.expectEnd(t)
	for _, o := range streams {
		o.call.send("}\n")
		o.body.expect(t, "}\n")
		if s := c.listed(t, o.path); s["state"] != "open" || s["name"] != "sse" {
			t.Errorf("%v", s)
		}
	}
	for _, o := range streams {
		o.call.end()
		o.body.expectEnd(t)
		expectEnd(t, c.closedLine(t, o.path), "upstream_closed", "info")
	}
}

// The witness reports when a configuration has been released: it is in the same
// route as the handler.
type witness struct{ ctx caddy.Context }

var witnesses struct {
	sync.Mutex
	all []weak.Pointer[witness]
}

func init() {
	caddy.RegisterModule(witness{})
	httpcaddyfile.RegisterHandlerDirective("test_witness", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(witness), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("test_witness", httpcaddyfile.Before, "reverse_proxy")
}

func (witness) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.test_witness", New: func() caddy.Module { return new(witness) }}
}

func (w *witness) Provision(ctx caddy.Context) error {
	w.ctx = ctx
	witnesses.Lock()
	defer witnesses.Unlock()
	witnesses.all = append(witnesses.all, weak.Make(w))
	return nil
}

func (w *witness) ServeHTTP(rw http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(rw, r)
}

// drainingGoroutines counts goroutines that wait for streams of replaced
// configurations.
func drainingGoroutines() (n int) {
	for _, stack := range goroutineStacks() {
		if strings.Contains(stack, "(*Handler).drain") || strings.Contains(stack, ".(*Server).Shutdown(") {
			n++
		}
	}
	return n
}

func TestAReplacedConfigurationIsReleasedWhenItsLastStreamEnds(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := func(more string) string {
		// An idle connection to the upstream would also keep plain Caddy's
		// configuration, for up to two minutes.
		return drainSite(up.addr, "drain 50ms\nmax_duration 24h\nmax_streams_per_client 100\n"+more) + " {\ntransport http {\nkeepalive off\n}\n}\ntest_witness"
	}
	c := startCaddy(t, site(""), withAdmin())
	witnesses.Lock()
	old := slices.Clone(witnesses.all[len(witnesses.all)-2:]) // one for each server
	witnesses.Unlock()
	alive := func() bool {
		runtime.GC()
		return slices.ContainsFunc(old, func(w weak.Pointer[witness]) bool { return w.Value() != nil })
	}
	var posts []*opened
	for _, proto := range clientProtocols {
		cl := c.client(proto)
		o := &opened{path: "/post" + proto, exchange: cl.begin(cl.request(t, "POST", "/post"+proto, nil, acceptStream))}
		o.call = up.accept(t)
		o.call.start(eventStream)
		o.body = o.headers(t).follow()
		c.listed(t, o.path)
		posts = append(posts, o)
	}
	resumable := c.open(t, c.client("h1"), up, "/get", acceptStream)
	c.reload(site("name b"))
	resumable.body.expectEnd(t)
	if !alive() {
		t.Fatal("the configuration is gone, and its streams are not")
	}
	for _, o := range posts {
		o.call.send("data: 1\n\n")
		o.body.expect(t, "data: 1\n\n")
		o.call.end()
		o.body.expectEnd(t)
	}
	c.waitForStreams(t, 0)
	eventually(t, "the configuration is gone", func() bool { return !alive() })
	eventually(t, "nobody waits for its streams", func() bool { return drainingGoroutines() == 0 })
}

func TestReloadsWithinTheWindowDrainEachTheirOwn(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := func(i int) string { return drainSite(up.addr, fmt.Sprintf("drain 600ms\nname reload%d", i)) }
	c := startCaddy(t, site(0), withAdmin())
	type generation []*opened
	var all []generation
	for i := range 3 {
		var g generation
		for _, proto := range clientProtocols {
			g = append(g, c.open(t, c.client(proto), up, fmt.Sprintf("/%d%s", i, proto), acceptStream))
		}
		all = append(all, g)
		c.reload(site(i + 1))
	}
	for i, g := range all {
		for _, o := range g {
			o.body.expectEnd(t)
			line := c.closedLine(t, o.path)
			expectEnd(t, line, "drained", "info")
			if line["name"] != fmt.Sprintf("reload%d", i) {
				t.Errorf("told: %v", line)
			}
		}
	}
	after := c.open(t, c.client("h2"), up, "/after", acceptStream)
	after.call.send("data: 1\n\n")
	after.body.expect(t, "data: 1\n\n")
}

func TestABodyThatTurnsOutToBeJSONIsNotDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.Drain = &caddysse.Drain{Reload: caddy.Duration(10 * time.Second)}
		h := provision(t, config)
		begin, end := make(chan struct{}), make(chan struct{})
		var group sync.WaitGroup
		var clients []*client
		open := func() {
			c := newClient(t)
			clients = append(clients, c)
			group.Go(func() {
				err := serve(h, c, get(eventStream), stream(func(w http.ResponseWriter) {
					<-begin
					write(t, w, "{")
					<-end
					write(t, w, "}")
				}))
				if err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		for range 5 {
			open()
		}
		group.Go(h.DrainStreams)
		synctest.Wait() // until the turns have been decided
		open()
		close(begin)
		time.Sleep(time.Minute)
		close(end)
		group.Wait()
		for _, c := range clients {
			if c.body.String() != "{}" {
				t.Errorf("got %q", c.body.String())
			}
		}
	})
}

// An end that comes at the moment of a write must not interrupt that write.
func TestAnEarlyEndWaitsForTheWriteThatIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.Drain = &caddysse.Drain{Reload: caddy.Duration(time.Millisecond)}
		h := provision(t, config)
		c := newClient(t)
		var group sync.WaitGroup
		group.Go(func() {
			panicked, err := serveRecovering(h, c, get(eventStream), stream(func(w http.ResponseWriter) {
				write(t, w, "data: ha")
				time.Sleep(990 * time.Millisecond)
				c.stall = make(chan struct{})
				time.AfterFunc(20*time.Millisecond, func() { close(c.stall) })
				write(t, w, "lf") // when the time to wait for the event is over
				time.Sleep(4 * time.Second)
			}))
			if panicked != nil || err != nil {
				t.Errorf("the handler left with %v, %v", panicked, err)
			}
		})
		synctest.Wait()
		h.DrainStreams()
		group.Wait()
		if c.body.String() != "data: half" {
			t.Errorf("got %q", c.body.String())
		}
	})
}

func TestDrainOffEndsNobody(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, drainSite(up.addr, "drain off"), withAdmin())
	kept := c.open(t, c.client("h1"), up, "/kept", acceptStream)
	c.reload(drainSite(up.addr, "drain 1ms"))
	drained := c.open(t, c.client("h1"), up, "/drained", acceptStream)
	c.reload(drainSite(up.addr, "drain off"))
	drained.body.expectEnd(t)
	kept.call.send("data: 1\n\n")
	kept.body.expect(t, "data: 1\n\n")
	if s := c.listed(t, "/kept"); s["state"] != "open" {
		t.Errorf("%v", s)
	}
	kept.call.end()
	kept.body.expectEnd(t)
	expectEnd(t, c.closedLine(t, "/kept"), "upstream_closed", "info")
}

func TestAStreamThatOpensWhileItsConfigurationDrainsJoinsIn(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, drainSite(up.addr, "drain 500ms"), withAdmin())
	var late []*opened
	for _, proto := range clientProtocols {
		for _, method := range []string{"GET", "POST"} {
			cl := c.client(proto)
			path := "/" + method + proto
			o := &opened{path: path, exchange: cl.begin(cl.request(t, method, path, nil, acceptStream))}
			o.call = up.accept(t)
			late = append(late, o)
		}
	}
	c.reload(drainSite(up.addr, "drain 500ms\nname new"))
	for _, o := range late {
		o.call.start(eventStream)
		o.body = o.headers(t).follow()
	}
	for _, o := range late {
		if strings.HasPrefix(o.path, "/POST") {
			continue
		}
		o.body.expectEnd(t)
		expectEnd(t, c.closedLine(t, o.path), "drained", "info")
	}
	for _, o := range late {
		if strings.HasPrefix(o.path, "/POST") {
			o.call.send("data: 1\n\n")
			o.body.expect(t, "data: 1\n\n")
			o.call.end()
			o.body.expectEnd(t)
		}
	}
}

// A client that reads nothing can't hold up a drain.
func TestADrainEndsAStreamWhoseClientReadsNothing(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, drainSite(up.addr, "drain 1ms"), withAdmin())
	type stuck struct {
		call *upstreamCall
		res  *reply
	}
	streams := make(map[string]stuck)
	for _, proto := range clientProtocols {
		e, call := open(t, c.client(proto), up, "/"+proto, acceptStream)
		call.start(eventStream)
		streams[proto] = stuck{call, e.headers(t)}
		call.floodUntilStuck()
	}
	c.reload(drainSite(up.addr, "drain 1ms\nname new"))
	for proto, s := range streams {
		s.call.expectGone()
		expectEnd(t, c.closedLine(t, "/"+proto), "drained", "info")
		// On a very busy machine, the client may not have been stuck after all.
		if body, err := io.ReadAll(s.res.Body); err == nil && !strings.HasSuffix(string(body), "\n\n") {
			t.Errorf("%s: a cut stream looks whole", proto)
		}
		s.res.leave()
	}
}

func TestReloadsInARowEndAClientOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.Drain = &caddysse.Drain{Reload: caddy.Duration(10 * time.Second)}
		var group sync.WaitGroup
		start := time.Now()
		// open opens a stream. ended is set when it has ended.
		open := func(h *caddysse.Handler) (ended *time.Duration) {
			ended = new(time.Duration)
			group.Go(func() {
				_ = serve(h, newClient(t), get(eventStream), func(w http.ResponseWriter, r *http.Request) error {
					w.Header().Set("Content-Type", eventStream)
					w.WriteHeader(200)
					<-r.Context().Done()
					return nil
				})
				*ended = time.Since(start)
			})
			synctest.Wait()
			return ended
		}
		sameName := func() *caddysse.Handler {
			text, _ := json.Marshal(config)
			h, err := load(t, string(text))
			if err != nil {
				t.Fatal(err)
			}
			return h
		}

		first := provision(t, config) // this forgets the drains of other tests
		ofFirst := open(first)
		time.Sleep(5 * time.Second)
		group.Go(first.DrainStreams) // at 5 s
		time.Sleep(11 * time.Second)
		second := sameName()
		ofSecond := open(second) // at 16 s
		time.Sleep(4 * time.Second)
		group.Go(second.DrainStreams) // at 20 s
		time.Sleep(10 * time.Second)
		third := sameName()
		ofThird := open(third) // at 30 s
		time.Sleep(96 * time.Second)
		group.Go(third.DrainStreams) // at 126 s: the first drain has passed, this stream is old
		group.Wait()

		for name, test := range map[string]struct{ ended, from, to time.Duration }{
			"before any drain":           {*ofFirst, 5 * time.Second, 15 * time.Second},
			"after one, young":           {*ofSecond, 76 * time.Second, 76 * time.Second},
			"after two, older than that": {*ofThird, 126 * time.Second, 136 * time.Second},
		} {
			if test.ended < test.from || test.ended > test.to {
				t.Errorf("%s: ended at %v, want %v to %v", name, test.ended, test.from, test.to)
			}
		}
	})
}

// SDKs that read a finite answer would take a clean end for the end of the
// answer.
func TestAnEarlyEndIsCleanToAnEventSourceAndAnAbortForEverybodyElse(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	site := drainSite(up.addr, "drain 1ms")
	c := startCaddy(t, site, withAdmin())
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		eventSource := c.open(t, cl, up, "/source"+cl.proto, acceptStream)
		sdk := c.open(t, cl, up, "/sdk"+cl.proto, acceptStream, notEventSource)
		for _, o := range []*opened{eventSource, sdk} {
			o.call.send("data: 1\n\n")
			o.body.expect(t, "data: 1\n\n")
		}
		c.reload(site)
		eventSource.body.expectEnd(t)
		sdk.body.expectAbort(t)
		for _, o := range []*opened{eventSource, sdk} {
			expectEnd(t, c.closedLine(t, o.path), "drained", "info")
		}

		// A stream that is not drained can be ended by hand.
		datastar := c.open(t, cl, up, "/datastar"+cl.proto, "Accept: text/event-stream, text/html, application/json")
		c.adminJSON(t, "DELETE", "/sse/streams?path="+datastar.path, 202)
		datastar.body.expectAbort(t)
		expectEnd(t, c.closedLine(t, datastar.path), "admin", "info")
	})
}

func TestResumableSaysWhoIsDrained(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := func(generation int) string {
		return fmt.Sprintf(`
		header X-Generation %d
		handle /always/* {
			sse 1h {
				prelude off
				drain 1ms
				resumable always
			}
			reverse_proxy %[2]s
		}
		handle /never/* {
			sse 1h {
				prelude off
				drain 1ms
				resumable never
			}
			reverse_proxy %[2]s
		}`, generation, up.addr)
	}
	c := startCaddy(t, site(1), withAdmin())
	always := c.open(t, c.client("h1"), up, "/always/1", "Accept: */*")
	never := c.open(t, c.client("h1"), up, "/never/1", acceptStream)
	c.reload(site(2))
	always.body.expectAbort(t)
	expectEnd(t, c.closedLine(t, always.path), "drained", "info")
	never.call.send("data: 1\n\n")
	never.body.expect(t, "data: 1\n\n")
	never.call.end()
	never.body.expectEnd(t)
}

// A drain may spare a stream for a minute, and its client may leave before
// that.
func TestADrainWaitsForNobodyWhoHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := provision(t, silent())
		leave := make(chan struct{})
		var streams sync.WaitGroup
		for range 3 {
			streams.Go(func() { play(t, h, func(http.ResponseWriter) { <-leave }) })
		}
		synctest.Wait()
		began := time.Now()
		drained := make(chan bool)
		go func() { drained <- h.DrainOver(time.Hour, nil) }()
		time.Sleep(time.Second)
		close(leave)
		streams.Wait()
		if over := <-drained; !over || time.Since(began) > time.Second {
			t.Errorf("the drain was over, %v, after %v", over, time.Since(began))
		}
	})
}

// A stream that closes by itself at that moment is no longer in any list.
func TestTheEndOfTheProcessWaitsForEveryEndToBeTold(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, "sse\nreverse_proxy "+up.addr)
	client := c.client("h1")
	exchange := client.begin(client.request(t, "GET", "/", nil))
	call := up.accept(t)
	call.start(eventStream)
	res := exchange.headers(t)
	c.waitForLog("stream opened", 0)

	c.logged.mu.Lock()
	res.leave()
	eventually(t, "it has closed", func() bool {
		open, _ := caddysse.OpenAndChunked()
		return open == 0
	})
	var canBeTold atomic.Bool
	over := make(chan struct{})
	go func() {
		defer close(over)
		caddysse.EndEverything()
		if !canBeTold.Load() {
			t.Error("the process ends without a word of it")
		}
	}()
	time.Sleep(50 * time.Millisecond) // nothing may happen during this time
	canBeTold.Store(true)
	c.logged.mu.Unlock()
	<-over
	call.expectGone()
}
