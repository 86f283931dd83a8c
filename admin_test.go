package caddysse_test

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// adminJSON calls the admin API and expects a status and JSON.
func (c *testCaddy) adminJSON(t testing.TB, method, path string, status int) map[string]any {
	t.Helper()
	res, body := c.admin(method, path)
	answer := make(map[string]any)
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("%s %s: %s %q: %v", method, path, res.Status, body, err)
	}
	if res.StatusCode != status || res.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s %s: %s %s %s, want %d", method, path, res.Status, res.Header, body, status)
	}
	return answer
}

// streams lists streams through the admin API.
func (c *testCaddy) streams(t testing.TB, query string) (streams []map[string]any, total int) {
	t.Helper()
	answer := c.adminJSON(t, "GET", "/sse/streams"+query, 200)
	expectFields(t, "list", answer, map[string]any{"streams": []any{}, "total": 0.0})
	for _, s := range answer["streams"].([]any) {
		streams = append(streams, s.(map[string]any))
	}
	return streams, int(answer["total"].(float64))
}

// listed waits until the admin API lists exactly one stream at path.
func (c *testCaddy) listed(t testing.TB, path string) map[string]any {
	t.Helper()
	return c.waitForStream(t, path, func(map[string]any) bool { return true })
}

// waitForStream waits until the only stream at path satisfies is.
func (c *testCaddy) waitForStream(t testing.TB, path string, is func(stream map[string]any) bool) map[string]any {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		streams, _ := c.streams(t, "?path="+url.QueryEscape(path))
		if len(streams) == 1 && is(streams[0]) {
			return streams[0]
		}
		if time.Now().After(deadline) {
			t.Fatalf("the streams at %s are %v", path, streams)
		}
	}
}

// waitForStreams waits until n streams are listed.
func (c *testCaddy) waitForStreams(t testing.TB, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		streams, total := c.streams(t, "")
		if total == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d streams are listed, want %d: %v", total, n, streams)
		}
	}
}

// opened is a stream that a test has opened.
type opened struct {
	path string
	*exchange
	call *upstreamCall
	body *follower
}

// open opens a stream and waits until it is listed.
func (c *testCaddy) open(t testing.TB, cl *testClient, up *testUpstream, path string, header ...string) *opened {
	t.Helper()
	e, call := open(t, cl, up, path, header...)
	return c.opened(t, path, e, call)
}

// opened starts the stream of a request and waits until it is listed.
func (c *testCaddy) opened(t testing.TB, path string, e *exchange, call *upstreamCall) *opened {
	t.Helper()
	o := &opened{path: path, exchange: e, call: call}
	o.call.start(eventStream)
	o.body = o.headers(t).follow()
	c.listed(t, path)
	return o
}

func TestAStreamIsListedWithTheContractsFields(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name chat
			prelude 1ms
		}
		uri strip_prefix /events
		reverse_proxy `+up.addr, withAdmin())
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) {
			path := "/events/" + proto
			before := time.Now()
			cl := c.client(proto)
			e := cl.begin(cl.request(t, "GET", path, nil, "Accept: text/event-stream", "User-Agent: tests/1", "Last-Event-ID: 6"))
			o := c.opened(t, path, e, up.accept(t))
			o.body.expect(t, ":heartbeat\n\n")
			o.call.send("id: 7\ndata: 1\n\n")
			o.body.expect(t, "id: 7\ndata: 1\n\n")
			line := c.lineOf(t, "stream opened", path)
			s := c.waitForStream(t, path, func(s map[string]any) bool { return s["duration_seconds"].(float64) > 0 })
			expectFields(t, "stream", s, map[string]any{
				"id": "", "name": "", "state": "", "client_ip": "", "method": "", "host": "", "path": "", "proto": "",
				"user_agent": "", "upstream": "", "resumable": false, "opened_at": "", "duration_seconds": 0.0, "idle_seconds": 0.0,
				"events": 0.0, "bytes": 0.0, "heartbeats": 0.0, "last_event_id": "",
			})
			for field, value := range line.withoutFrame() {
				if s[field] != value {
					t.Errorf("%s: %v is listed, %v was logged", field, s[field], value)
				}
			}
			for field, want := range map[string]any{
				"state": "open", "events": 1.0, "bytes": 15.0, "heartbeats": 1.0, "last_event_id": "7",
			} {
				if s[field] != want {
					t.Errorf("%s: got %v, want %v", field, s[field], want)
				}
			}
			openedAt, err := time.Parse(time.RFC3339Nano, s["opened_at"].(string))
			if err != nil || openedAt.Before(before.Add(-time.Millisecond)) || openedAt.After(time.Now().Add(time.Millisecond)) {
				t.Errorf("opened_at: %v, %v", openedAt, err)
			}
			one := c.adminJSON(t, "GET", "/sse/streams/"+s["id"].(string), 200)
			for _, field := range []string{"opened_at", "duration_seconds", "idle_seconds"} { // the two were taken at different times
				delete(one, field)
				delete(s, field)
			}
			if fmt.Sprint(one) != fmt.Sprint(s) {
				t.Errorf("alone: %v\nlisted: %v", one, s)
			}
			o.call.end()
			c.closedLine(t, path)
			c.adminJSON(t, "GET", "/sse/streams/"+s["id"].(string), 404)
		})
	}
}

func TestTheListIsFiltered(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := `
		handle /chat* {
			sse {
				prelude off
				name chat
			}
			reverse_proxy ` + up.addr + `
		}
		handle {
			sse {
				prelude off
				name feed
			}
			reverse_proxy ` + up.addr + `
		}`
	c := startCaddy(t, site, withAdmin(), withGlobal(`servers {
		trusted_proxies static 127.0.0.1
	}`))
	cl := c.client("h1")
	for _, one := range []struct{ path, ip string }{
		{"/chat/1", "203.0.113.7"}, {"/chat/2", "2001:db8::1"}, {"/chat2", "203.0.113.7"}, {"/feed", "203.0.113.8"},
	} {
		c.open(t, cl, up, one.path, "X-Forwarded-For: "+one.ip)
	}
	for query, want := range map[string]struct {
		paths []string
		total int
	}{
		"":                                      {[]string{"/chat/1", "/chat/2", "/chat2", "/feed"}, 4},
		"?name=chat":                            {[]string{"/chat/1", "/chat/2", "/chat2"}, 3},
		"?name=feed":                            {[]string{"/feed"}, 1},
		"?name=other":                           {nil, 0},
		"?path=/chat":                           {[]string{"/chat/1", "/chat/2", "/chat2"}, 3},
		"?path=/chat/":                          {[]string{"/chat/1", "/chat/2"}, 2},
		"?path=chat":                            {nil, 0},
		"?client_ip=203.0.113.7":                {[]string{"/chat/1", "/chat2"}, 2},
		"?client_ip=::ffff:203.0.113.7":         {[]string{"/chat/1", "/chat2"}, 2},
		"?client_ip=2001:db8:0:0::1":            {[]string{"/chat/2"}, 1},
		"?client_ip=203.0.113.7&path=/chat/":    {[]string{"/chat/1"}, 1},
		"?client_ip=203.0.113.7&name=feed":      {nil, 0},
		"?limit=2":                              {[]string{"/chat/1", "/chat/2"}, 4},
		"?limit=0":                              {nil, 4},
		"?limit=1&client_ip=203.0.113.7":        {[]string{"/chat/1"}, 2},
		"?limit=1000000&path=%2Fchat&name=chat": {[]string{"/chat/1", "/chat/2", "/chat2"}, 3},
		"?name=chat&path=/chat&client_ip=1.2.3.4": {nil, 0},
	} {
		var paths []string
		streams, total := c.streams(t, query)
		for _, s := range streams {
			paths = append(paths, s["path"].(string))
		}
		if !slices.Equal(paths, want.paths) || total != want.total {
			t.Errorf("%s: got %q and %d, want %q and %d", query, paths, total, want.paths, want.total)
		}
	}
	if _, body := c.admin("GET", "/sse/streams?name=other"); strings.TrimSpace(body) != `{"streams":[],"total":0}` {
		t.Errorf("an empty list is %s", body)
	}
}

func TestWhatTheAdminAPICanNotReadIsAnError(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	o := c.open(t, c.client("h1"), up, "/")
	id := c.listed(t, "/")["id"].(string)
	for _, test := range []struct {
		method, path string
		status       int
		says         string
	}{
		{"GET", "/sse/streams?client_ip=nowhere", 400, "nowhere"},
		{"GET", "/sse/streams?client_ip=10.0.0.0/8", 400, "10.0.0.0/8"},
		{"GET", "/sse/streams?client_ip=", 400, "client_ip"},
		{"GET", "/sse/streams?name=", 400, "name"},
		{"GET", "/sse/streams?limit=-1", 400, "-1"},
		{"GET", "/sse/streams?limit=many", 400, "many"},
		{"GET", "/sse/streams?limit=1.5", 400, "1.5"},
		{"GET", "/sse/streams?limit=99999999999999999999", 400, "limit"},
		{"GET", "/sse/streams?limit=1&limit=2", 400, "limit"},
		{"GET", "/sse/streams?ip=10.0.0.1", 400, `"ip"`},
		{"GET", "/sse/streams?all=true", 400, `"all"`},
		{"GET", "/sse/streams?Name=chat", 400, `"Name"`},
		{"GET", "/sse/streams?%1b[31m=1", 400, "unknown"},
		{"GET", "/sse/streams?name=%zz", 400, "%zz"},
		{"GET", "/sse/streams?name=a;limit=1", 400, "semicolon"},
		{"GET", "/sse/streams/" + id + "?name=sse", 400, `"name"`},
		{"GET", "/sse/streams/", 404, "no live stream"},
		{"GET", "/sse/streams/nothing", 404, `"nothing"`},
		{"GET", "/sse/streams/" + id + "/", 404, "no live stream"},
		{"GET", "/sse/streams/%1b%5b31m%0a", 404, "no live stream"},
		{"GET", "/sse/streams/" + strings.Repeat("x", 5000), 404, "no live stream"},
		{"POST", "/sse/streams", 405, "POST"},
		{"PUT", "/sse/streams/" + id, 405, "PUT"},
		{"PATCH", "/sse/streams/" + id, 405, "PATCH"},
		{"POST", "/sse/handlers", 405, "POST"},
		{"DELETE", "/sse/handlers", 405, "DELETE"},
		{"GET", "/sse/handlers?name=sse", 400, `"name"`},
		{"GET", "/sse/nothing", 404, "nothing is at /sse/nothing"},
		{"GET", "/sse/?name=sse", 400, `"name"`},
		{"POST", "/sse/", 405, "POST"},
		{"DELETE", "/sse/streams", 400, "all=true"},
		{"DELETE", "/sse/streams?all=false", 400, "all=true"},
		{"DELETE", "/sse/streams?all=yes", 400, "yes"},
		{"DELETE", "/sse/streams?all=", 400, "all"},
		{"DELETE", "/sse/streams?limit=1", 400, `"limit"`},
		{"DELETE", "/sse/streams?all=true&clientip=10.0.0.1", 400, "clientip"},
		{"DELETE", "/sse/streams?all=true&client_ip=%zz", 400, "%zz"},
		{"DELETE", "/sse/streams?all=true;client_ip=10.0.0.1", 400, "semicolon"},
		{"DELETE", "/sse/streams/nothing", 404, "nothing"},
		{"DELETE", "/sse/streams/" + id + "?all=true", 400, `"all"`},
	} {
		answer := c.adminJSON(t, test.method, test.path, test.status)
		said, _ := answer["error"].(string)
		if len(answer) != 1 || !strings.Contains(said, test.says) {
			t.Errorf("%s %s: got %v, want an error with %s", test.method, test.path, answer, test.says)
		}
		if len(said) > 300 || strings.ContainsAny(said, "\x1b\n") {
			t.Errorf("%s %.100s: the error is %q", test.method, test.path, said)
		}
	}
	if res, _ := c.admin("POST", "/sse/streams"); res.Header.Get("Allow") != "GET, DELETE" {
		t.Errorf("Allow is %q", res.Header.Get("Allow"))
	}
	o.call.send("data: alive\n\n")
	o.body.expect(t, "data: alive\n\n")
	if state := c.listed(t, "/")["state"]; state != "open" {
		t.Errorf("the stream is %v", state)
	}
}

func TestAStreamThatIsDeletedEndsAtAnEventBoundary(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	for _, proto := range clientProtocols {
		for _, test := range []struct {
			name   string
			before string   // what the client has received when the stream is deleted
			then   []string // what the upstream sends after that
			want   string   // what the client gets of it
			events int
		}{
			{name: "before the first event"},
			{name: "between events", before: "data: 1\n\n", events: 1},
			{name: "after a comment", before: "data: 1\n\n: comment\n", events: 1},
			{name: "after a CR", before: "data: 1\r\r", events: 1},
			{name: "in the middle of a line", before: "data: 1\n\ndata: ha", then: []string{"lf\n", "\n"}, want: "lf\n\n", events: 2},
			{name: "between lines", before: "data: 1\n\ndata: 2\n", then: []string{"data: 3\n\ndata: 4\n\n"}, want: "data: 3\n\n", events: 2},
			{name: "in a comment", before: "data: 1\n\n: comm", then: []string{"ent\ndata: 2\n\n"}, want: "ent\n", events: 1},
			{name: "with CR LF", before: "data: 1\r\n\r\ndata: 2\r\n", then: []string{"\r\ndata: 3\r\n\r\n"}, want: "\r\n", events: 2},
			{name: "in the middle of a CR LF", before: "data: 1\r\n\r", then: []string{"\ndata: 2\r\n\r\n"}, want: "\n", events: 1},
			{name: "after a CR LF that is cut", before: "data: 1\r\n\r\ndata: 2\r\n", then: []string{"\r", "\ndata: 3"}, want: "\r\n", events: 2},
			{name: "after a CR that may become a CR LF", before: "data: 1\n\r", then: []string{"data: 2\n\n"}, events: 1},
			{name: "in mid-event with CR", before: "data: 1\r\rdata: 2\r", then: []string{"\rdata: 3\r\r"}, want: "\r", events: 2},
		} {
			t.Run(proto+" "+test.name, func(t *testing.T) {
				path := "/" + t.Name()
				o := c.open(t, c.client(proto), up, path, acceptStream)
				if test.before != "" {
					o.call.send(test.before)
					o.body.expect(t, test.before)
				}
				id := c.listed(t, path)["id"].(string)
				if answer := c.adminJSON(t, "DELETE", "/sse/streams/"+id, 202); answer["ending"] != 1.0 {
					t.Errorf("the answer is %v", answer)
				}
				if len(test.then) > 0 {
					if state := c.listed(t, path)["state"]; state != "ending" {
						t.Errorf("the stream is %v", state)
					}
					if answer := c.adminJSON(t, "DELETE", "/sse/streams/"+id, 202); answer["ending"] != 0.0 {
						t.Errorf("the second answer is %v", answer)
					}
				}
				for _, piece := range test.then {
					o.call.send(piece)
				}
				o.body.expect(t, test.want)
				o.body.expectEnd(t)
				o.call.expectGone()
				line := c.closedLine(t, path)
				expectEnd(t, line, "admin", "info")
				if line["incomplete_event"] != nil || line["events"] != float64(test.events) {
					t.Errorf("the end is told as %v", line)
				}
				if parsed := eventstreamtest.Parse([]byte(test.before + test.want)); len(parsed.Events) != test.events {
					t.Errorf("the client has %v", parsed.Events)
				}
			})
		}
		t.Run(proto+" the next request on the connection", func(t *testing.T) {
			cl := c.client(proto)
			for range 3 {
				path := "/" + t.Name()
				o := c.open(t, cl, up, path, acceptStream)
				c.adminJSON(t, "DELETE", "/sse/streams?path="+url.QueryEscape(path), 202)
				o.body.expectEnd(t)
				c.waitForStreams(t, 0)
			}
		})
	}
}

func TestAnUpstreamThatStaysInMidEventIsGivenASecond(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		o := c.open(t, cl, up, path, acceptStream)
		o.call.send("data: 1\n\ndata: ha")
		o.body.expect(t, "data: 1\n\ndata: ha")
		began := time.Now()
		c.adminJSON(t, "DELETE", "/sse/streams?path="+path, 202)
		o.body.expectEnd(t)
		if took := time.Since(began); took < time.Second {
			t.Errorf("the end took %v, want 1 s", took)
		}
		line := c.closedLine(t, path)
		expectEnd(t, line, "admin", "info")
		if line["incomplete_event"] != true {
			t.Errorf("the end is told as %v", line)
		}
	})
}

func TestAClientThatReadsNothingDoesNotKeepItsStream(t *testing.T) {
	checkLeaks(t)
	text := []byte("data: " + strings.Repeat("x", 64<<10) + "\n\n")
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", eventStream)
		for r.Context().Err() == nil {
			w.Write(text)
		}
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		path := "/" + cl.proto
		res := cl.get(t, path)
		defer res.leave()
		stuck := func(s map[string]any) bool { return s["idle_seconds"].(float64) > 0.3 && s["bytes"].(float64) > 0 }
		c.waitForStream(t, path, stuck)
		c.adminJSON(t, "DELETE", "/sse/streams?path="+path, 202)
		// The write timeout would only end it after 30 s.
		expectEnd(t, c.closedLine(t, path), "admin", "info")
		if _, err := res.text(); err == nil {
			t.Error("what the client then reads looks complete")
		}
	})
}

func TestABodyThatIsNoTextIsAborted(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin())
	for _, proto := range clientProtocols {
		for name, header := range map[string]string{"encoded": "Content-Encoding: gzip", "JSON": "X: y"} {
			t.Run(proto+" "+name, func(t *testing.T) {
				path := "/" + t.Name()
				cl := c.client(proto)
				e := cl.begin(cl.request(t, "GET", path, nil, "Accept-Encoding: gzip"))
				call := up.accept(t)
				call.start(eventStream, header)
				body := e.headers(t).follow()
				text := `{"a":`
				if name == "encoded" {
					var zipped strings.Builder
					zip := gzip.NewWriter(&zipped)
					io.WriteString(zip, "data: 1\n\n")
					zip.Flush()
					text = zipped.String()
				}
				call.send(text)
				body.expect(t, text)
				id := c.listed(t, path)["id"].(string)
				c.adminJSON(t, "DELETE", "/sse/streams/"+id, 202)
				body.expectAbort(t)
				expectEnd(t, c.closedLine(t, path), "admin", "info")
			})
		}
	}
}

func TestManyStreamsAreDeletedByFilter(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin(), withGlobal(`servers {
		trusted_proxies static 127.0.0.1
	}`))
	var all []*opened
	for i, proto := range append(clientProtocols, clientProtocols...) {
		all = append(all, c.open(t, c.client(proto), up, fmt.Sprintf("/%d/%s", i/3, proto), acceptStream, fmt.Sprintf("X-Forwarded-For: 10.0.0.%d", i%2)))
	}
	ends := func(query string, ending int) {
		t.Helper()
		answer := c.adminJSON(t, "DELETE", "/sse/streams"+query, 202)
		expectFields(t, "answer", answer, map[string]any{"ending": 0.0})
		if answer["ending"] != float64(ending) {
			t.Errorf("%s: %v, want %d", query, answer, ending)
		}
	}
	ends("?client_ip=10.9.9.9", 0)
	ends("?name=other&all=true", 0)
	ends("?client_ip=10.0.0.0&path=/1", 1)
	all[4].body.expectEnd(t)
	ends("?client_ip=10.0.0.1", 3)
	for _, i := range []int{1, 3, 5} {
		all[i].body.expectEnd(t)
	}
	c.waitForStreams(t, 2)
	ends("?all=true", 2)
	for _, i := range []int{0, 2} {
		all[i].body.expectEnd(t)
	}
	c.waitForStreams(t, 0)
	for _, o := range all {
		expectEnd(t, c.closedLine(t, o.path), "admin", "info")
	}
}

func TestStreamsOfAReplacedConfigurationStayListed(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	site := `
		sse {
			prelude off
			name %s
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, fmt.Sprintf(site, "old"), withAdmin())
	var old []*opened
	for _, proto := range clientProtocols {
		old = append(old, c.open(t, c.client(proto), up, "/old/"+proto))
	}
	c.reload(fmt.Sprintf(site, "new"))
	young := c.open(t, c.client("h1"), up, "/new")

	if _, total := c.streams(t, "?name=old"); total != 3 {
		t.Errorf("%d streams of the old configuration are listed, want 3", total)
	}
	for _, o := range old {
		o.call.send("data: 1\n\n")
		o.body.expect(t, "data: 1\n\n")
		if events := c.listed(t, o.path)["events"]; events != 1.0 {
			t.Errorf("%s: %v events are listed", o.path, events)
		}
		c.adminJSON(t, "DELETE", "/sse/streams/"+c.listed(t, o.path)["id"].(string), 202)
		o.body.expectAbort(t) // not an EventSource, so a clean end would look like the end of the answer
		expectEnd(t, c.closedLine(t, o.path), "admin", "info")
	}
	if _, total := c.streams(t, ""); total != 1 {
		t.Errorf("%d streams are listed, want 1", total)
	}
	young.call.end()
	young.body.expectEnd(t)
}

func TestHandlersAreShownByName(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	name := uniqueName("shown by name ")
	up := newUpstream(t)
	site := `
		handle /a {
			sse 1h {
				name "` + name + `"
				prelude 1ms
			}
			reverse_proxy ` + up.addr + `
		}
		handle {
			sse 1h {
				name "` + name + `"
				prelude 1ms
			}
			reverse_proxy ` + up.addr + `
		}`
	c := startCaddy(t, site, withAdmin())
	handler := func() map[string]any {
		t.Helper()
		answer := c.adminJSON(t, "GET", "/sse/handlers", 200)
		expectFields(t, "handlers", answer, map[string]any{"handlers": []any{}})
		var found map[string]any
		for _, h := range answer["handlers"].([]any) {
			if h := h.(map[string]any); h["name"] == name {
				if found != nil {
					t.Errorf("shown twice: %v", answer)
				}
				found = h
			}
		}
		return found
	}
	h := handler()
	closed := map[string]any{}
	for reason := range h["closed"].(map[string]any) {
		closed[reason] = 0.0
	}
	for _, reason := range []string{"upstream_closed", "upstream_error", "client_closed", "admin"} {
		if _, ok := closed[reason]; !ok {
			t.Errorf("no reason %s: %v", reason, closed)
		}
	}
	want := map[string]any{"name": name, "open": 0.0, "opened": 0.0, "closed": closed, "events": 0.0, "bytes": 0.0, "heartbeats": 0.0}
	expectHandler := func() {
		t.Helper()
		if got := handler(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got  %v\nwant %v", got, want)
		}
	}
	expectHandler()

	a, b := c.open(t, c.client("h1"), up, "/a"), c.open(t, c.client("h2"), up, "/b")
	for _, o := range []*opened{a, b} {
		o.body.expect(t, ":heartbeat\n\n")
		o.call.send("data: 1\n\n")
		o.body.expect(t, "data: 1\n\n")
	}
	want["open"], want["opened"], want["events"], want["bytes"], want["heartbeats"] = 2.0, 2.0, 2.0, 18.0, 2.0
	expectHandler()
	a.call.end()
	b.call.abort()
	c.closedLine(t, "/a")
	c.closedLine(t, "/b")
	want["open"], closed["upstream_closed"], closed["upstream_error"] = 0.0, 1.0, 1.0
	expectHandler()
	c.reload("respond hello")
	expectHandler()
}

func TestTheAdminAPIAnswersWithoutAnyHandler(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, "respond hello", withAdmin())
	if _, total := c.streams(t, ""); total != 0 {
		t.Errorf("%d streams", total)
	}
	c.adminJSON(t, "GET", "/sse/handlers", 200)
}

// The command line

// run runs a subcommand of `caddy sse` and returns what it prints.
func run(t testing.TB, cmd *cobra.Command, args ...string) (printed string, err error) {
	t.Helper()
	reading, writing, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = writing
	defer func() { os.Stdout = stdout }()
	var reader sync.WaitGroup
	reader.Go(func() {
		text, _ := io.ReadAll(reading)
		printed = string(text)
		reading.Close()
	})
	cmd.SetArgs(append([]string{}, args...)) // with nil, cobra would use the test's arguments
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	err = cmd.Execute()
	writing.Close()
	reader.Wait()
	return printed, err
}

func TestTheCommandLineListsAndClosesStreams(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse 1h {
			name chat
			prelude off
		}
		reverse_proxy `+up.addr, withAdmin(), withGlobal(`servers {
		trusted_proxies static 127.0.0.1
	}`))
	address := "--address=unix/" + c.adminSocket()
	list := func(args ...string) string {
		t.Helper()
		printed, err := run(t, caddysse.ListCommand(), append(args, address)...)
		if err != nil {
			t.Fatal(err)
		}
		return printed
	}
	closing := func(want string, args ...string) {
		t.Helper()
		printed, err := run(t, caddysse.CloseCommand(), append(args, address)...)
		if err != nil || printed != want {
			t.Errorf("close %q: got %q, %v, want %q", args, printed, err, want)
		}
	}
	if printed := list(); printed != "0 streams open\n" {
		t.Errorf("an empty list is\n%s", printed)
	}
	long := "/" + strings.Repeat("ü", 300)
	a := c.open(t, c.client("h1"), up, "/a", acceptStream, "X-Forwarded-For: 203.0.113.7")
	b := c.open(t, c.client("h2"), up, long, acceptStream, "X-Forwarded-For: 2001:db8::1")
	third := c.open(t, c.client("h1"), up, "/c", acceptStream, "X-Forwarded-For: 203.0.113.8")
	a.call.send("data: 1\n\n")
	a.body.expect(t, "data: 1\n\n")

	printed := list()
	lines := strings.Split(strings.TrimSuffix(printed, "\n"), "\n")
	if len(lines) != 5 || lines[4] != "3 streams open" {
		t.Fatalf("printed:\n%s", printed)
	}
	for i, want := range []string{
		"ID NAME CLIENT PROTO STATE PATH AGE IDLE EVENTS BYTES HEARTBEATS",
		"chat 203.0.113.7 HTTP/1.1 open /a 1 9 0",
		"chat 2001:db8::1 HTTP/2.0 open /" + strings.Repeat("ü", 46) + "… 0 0 0",
		"chat 203.0.113.8 HTTP/1.1 open /c 0 0 0",
	} {
		fields := strings.Fields(lines[i])
		if i > 0 {
			id := fields[0]
			c.adminJSON(t, "GET", "/sse/streams/"+id, 200)
			for _, age := range fields[6:8] {
				if d, err := time.ParseDuration(age); err != nil || d < 0 {
					t.Errorf("line %d: an age is %q: %v", i, age, err)
				}
			}
			fields = slices.Delete(fields[1:], 5, 7)
		}
		if got := strings.Join(fields, " "); got != want {
			t.Errorf("line %d:\ngot  %s\nwant %s", i, got, want)
		}
	}
	columns := func(line, of string) int { return len([]rune(line[:strings.Index(line, of)])) }
	if at := columns(lines[0], "PATH"); at != columns(lines[1], "/a") || at != columns(lines[2], "/ü") || at != columns(lines[3], "/c") {
		t.Errorf("the table is not aligned:\n%s", printed)
	}

	var answer struct {
		Streams []struct{ ID, Path string }
		Total   int
	}
	if err := json.Unmarshal([]byte(list("--json")), &answer); err != nil || answer.Total != 3 || len(answer.Streams) != 3 {
		t.Fatalf("as JSON: %v, %v", answer, err)
	}

	closing("1 stream ending\n", answer.Streams[0].ID)
	a.body.expectEnd(t)
	closing("0 streams ending\n", "--client-ip", "10.9.9.9")
	closing("1 stream ending\n", "--client-ip", "2001:db8:0::1")
	b.body.expectEnd(t)
	c.waitForStreams(t, 1)
	closing("1 stream ending\n", "--all")
	third.body.expectEnd(t)
	c.waitForStreams(t, 0)
	closing("0 streams ending\n", "--all")
}

func TestTheCommandLineFindsTheAdminSocketOfTheCaddyfileBesideIt(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, "respond hello", withAdmin())
	t.Chdir(t.TempDir())
	if err := os.WriteFile("Caddyfile", []byte("{\n\tadmin unix/"+c.adminSocket()+"\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if printed, err := run(t, caddysse.ListCommand()); err != nil || printed != "0 streams open\n" {
		t.Errorf("list: got %q, %v", printed, err)
	}
	if printed, err := run(t, caddysse.CloseCommand(), "--all"); err != nil || printed != "0 streams ending\n" {
		t.Errorf("close: got %q, %v", printed, err)
	}
}

func TestTheCommandLineSaysPlainlyWhatIsWrong(t *testing.T) {
	checkLeaks(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := listener.Addr().String()
	listener.Close()
	stranger := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 19\r\nConnection: close\r\n\r\n404 page not found\n")
	})
	forbidding := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 41\r\nConnection: close\r\n\r\n{\"error\":\"host not allowed: \\u001b[31mx\"}\n")
	})
	other := rawUpstream(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n<!doctype")
	})
	c := startCaddy(t, "respond hello", withAdmin())
	live := "unix/" + c.adminSocket()

	for _, test := range []struct {
		args []string
		says string
	}{
		{[]string{"list", "--address", nobody}, "no Caddy answers at the admin address " + nobody},
		{[]string{"close", "--address", nobody, "--all"}, "no Caddy answers at the admin address " + nobody},
		{[]string{"list", "--address", "unix//nowhere/admin.sock"}, "no Caddy answers"},
		{[]string{"list", "--address", "127.0.0.1:1-9"}, "needs one port"},
		{[]string{"list", "--address", stranger}, "is no admin API of Caddy"},
		{[]string{"close", "--address", stranger, "x"}, "is no admin API of Caddy"},
		{[]string{"list", "--address", forbidding}, "host not allowed: \ufffd[31mx"},
		{[]string{"list", "--address", other}, "none of Caddy's admin API"},
		{[]string{"list", "--address", live, "x"}, "unknown command"},
		{[]string{"close", "--address", live, "no-such-id"}, `no live stream has the id "no-such-id"`},
		{[]string{"close", "--address", live, "../streams?all=true"}, "no live stream"},
		{[]string{"close", "--address", live, "--client-ip", "nowhere"}, `"nowhere" is not an IP address`},
		{[]string{"close", "--address", live, "--client-ip", ""}, "--client-ip"},
		{[]string{"close", "--address", live, ""}, "the id is empty"},
		{[]string{"close", "--address", live}, "exactly one of <id>, --client-ip and --all"},
		{[]string{"close", "--address", live, "x", "--all"}, "exactly one"},
		{[]string{"close", "--address", live, "--all", "--client-ip", "10.0.0.1"}, "exactly one"},
		{[]string{"close", "--address", live, "x", "y"}, "at most 1 arg"},
	} {
		cmd := caddysse.ListCommand()
		if test.args[0] == "close" {
			cmd = caddysse.CloseCommand()
		}
		cmd.SilenceUsage = true
		printed, err := run(t, cmd, test.args[1:]...)
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%q: got %v, want %s", test.args, err, test.says)
		}
		if printed != "" {
			t.Errorf("%q printed %q", test.args, printed)
		}
	}
}
