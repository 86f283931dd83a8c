//go:build interop

package clients

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// TestMCP has a client and a server of the MCP TypeScript SDK talk through the
// proxy: answers to POST as event streams, the session's GET stream, its
// resumption, and the end of the session.
func TestMCP(t *testing.T) {
	for _, style := range styles {
		t.Run(style, func(t *testing.T) {
			t.Parallel()
			port := harness.FreePort(t)
			server := startNode(t, "mcp-server.mjs", []string{fmt.Sprint(port)})
			server.AwaitOutput(t, "listening")
			testMCP(t, fmt.Sprintf("127.0.0.1:%d", port), style)
		})
	}
}

func testMCP(t *testing.T, upstream, style string) {
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	site := styleSite(upstream, "drain 100ms")
	caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, site))
	client := startNode(t, "mcp-client.mjs", []string{"mcp=http://" + plain + "/" + style + "/mcp"})

	// saw returns the data of the events of one type, in their order.
	saw := func(all []report, typ string) (data []string) {
		for _, e := range events(all, "mcp") {
			if e.Type == typ {
				data = append(data, e.Data)
			}
		}
		return data
	}
	await := func(typ string, count int) {
		t.Helper()
		client.await(t, fmt.Sprintf("%d × %s", count, typ), func(all []report) bool { return len(saw(all, typ)) >= count })
	}
	notify := func(text string) {
		t.Helper()
		response, err := http.Post("http://"+upstream+"/notify?text="+url.QueryEscape(text), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
	}
	// listening reports whether the client's GET stream is open.
	listening := func() bool {
		return len(caddy.OpenStreams(t)) == 1
	}

	// initialize, tools/list, and a call with a silence before each step that
	// is long enough for a heartbeat. Each is a POST that is answered with a
	// stream.
	await("result", 1)
	harness.Eventually(t, harness.Patience, "only the GET stream is open", listening)
	notify("one")
	await("log", 1)

	// The GET stream ends, and the server sends something before the client has
	// reconnected. The client gets it by Last-Event-ID.
	harness.Run(t, harness.Command(harness.CaddyBinary(t), "sse", "close", "--all", "--address", caddy.AdminAddress))
	harness.Eventually(t, harness.Patience, "the GET stream has ended", func() bool { return len(caddy.OpenStreams(t)) == 0 })
	notify("two")
	begin := time.Now()
	await("log", 2)
	t.Logf("the GET stream was back with what it had missed after %v", time.Since(begin).Round(time.Millisecond))

	// A call outlives a reload, because a reload does not end streams of MCP:
	// clients of the 2025 revisions lose a running call if a resumed answer
	// ends early.
	stream := caddy.OpenStreams(t)
	notify("call")
	await("progress", 3)
	caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+site))
	await("result", 2)
	if open := caddy.OpenStreams(t); !slices.Equal(open, stream) {
		t.Errorf("open after the reload: %v, before it: %v", open, stream)
	}

	notify("end")
	client.awaitCount(t, "end", 1, "mcp")

	all := client.reports()
	for typ, want := range map[string]string{
		"tools":    "[count,leave]",
		"progress": "[1 of 2 2 of 2 1 of 3 2 of 3 3 of 3]",
		"result":   "[counted to 2 counted to 3]",
		"log":      "[one two call end]",
	} {
		if got := fmt.Sprint(saw(all, typ)); got != want {
			t.Errorf("%s: %s, want %s", typ, got, want)
		}
	}
	// The GET stream that the admin API ended was aborted: to a client that is
	// not an EventSource, a clean end could look like the end of its answer.
	if failures := of(all, "mcp", "error"); len(failures) != 1 || !strings.Contains(failures[0].Error, "terminated") {
		t.Errorf("the client's errors: %v", failures)
	}
	if ended := of(all, "mcp", "end")[0]; ended.Data != "no session" {
		t.Errorf("the session was not ended: %s", ended.Data)
	}

	harness.Eventually(t, harness.Patience, "every stream has ended", func() bool { return len(caddy.OpenStreams(t)) == 0 })
	reasons := make(map[string]int)
	beats := 0
	for _, closed := range caddy.ClosedStreams() {
		if closed.Resumable {
			t.Errorf("a request of MCP is resumable: %+v", closed)
		}
		if closed.Method == http.MethodPost {
			beats += closed.Heartbeats
		}
		reasons[closed.Method+" "+closed.Reason]++
	}
	t.Logf("%s: streams by method and reason: %v; %d heartbeats in answers to POST", style, reasons, beats)
	if reasons["POST upstream_closed"] != 4 || reasons["GET admin"] != 1 || reasons["GET upstream_closed"] != 1 || beats < 2 {
		t.Errorf("%v", reasons)
	}
	caddy.CheckNoErrors(t)
}

// The server has closed the answer to a call, and the client waits for the rest
// by GET with Last-Event-ID. If that GET ended, some SDKs would lose the call,
// and others would use up one of their few attempts.
func TestMCPCallsOutliveAReload(t *testing.T) {
	for _, test := range []struct {
		name  string
		start func(t *testing.T, stream string) watched
		// No setting makes an MCP request resumable. The Python SDK lists
		// several types in Accept, so this rule matters to it only with always.
		resumable string
	}{
		{"TypeScript SDK", func(t *testing.T, stream string) watched { return startNode(t, "mcp-call.mjs", []string{stream}) }, "auto"},
		{"Python SDK", func(t *testing.T, stream string) watched { return startPython(t, "mcp_call.py", []string{stream}) }, "always"},
		{"Go SDK", startGoMCP, "auto"},
		{"Go SDK", startGoMCP, "always"},
	} {
		t.Run(test.name+", resumable "+test.resumable, func(t *testing.T) {
			t.Parallel()
			port := harness.FreePort(t)
			upstream := fmt.Sprintf("127.0.0.1:%d", port)
			server := startNode(t, "mcp-server.mjs", []string{fmt.Sprint(port)})
			server.AwaitOutput(t, "listening")
			plain, tls := harness.FreeAddr(t), harness.FreePort(t)
			site := "sse {\n\tdrain 100ms\n\tretry 1s\n\treconnect_on 502\n\tresumable " + test.resumable + "\n}\nreverse_proxy " + upstream
			caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, site))
			client := test.start(t, "call=http://"+plain+"/mcp")

			// One of the two GET streams is the session's.
			var open []string
			harness.Eventually(t, harness.Patience, "the client waits for its answer by GET", func() bool {
				_, answer := caddy.Admin(t, http.MethodGet, "/sse/streams", "")
				open = caddy.OpenStreams(t)
				return len(open) == 2 && strings.Count(answer, `"method":"GET"`) == 2
			})
			caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+site))
			time.Sleep(time.Second) // ten times the drain window
			if now := caddy.OpenStreams(t); !slices.Equal(now, open) {
				t.Errorf("open after the reload: %v, before it: %v", now, open)
			}
			response, err := http.Post("http://"+upstream+"/go-on", "", nil)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			harness.Eventually(t, harness.Patience, "the call has ended", func() bool { return len(of(client.reports(), "call", "end")) > 0 })
			all := client.reports()
			if got := fmt.Sprint(events(all, "call"), of(all, "call", "error")); got != "[{result went on }] []" {
				t.Error(got)
			}
			caddy.CheckNoErrors(t)
		})
	}
}

// startGoMCP calls the tool "leave" with the MCP SDK for Go.
func startGoMCP(t *testing.T, stream string) watched {
	name, url, _ := strings.Cut(stream, "=")
	w := new(goWatched)
	ctx, cancel := context.WithCancel(context.Background())
	var calling sync.WaitGroup
	t.Cleanup(calling.Wait)
	t.Cleanup(cancel)
	calling.Go(func() {
		text, err := callGoMCP(ctx, url)
		if err != nil {
			w.add(report{Stream: name, Kind: "error", Error: err.Error()})
		} else {
			w.add(report{Stream: name, Kind: "event", Type: "result", Data: text})
		}
		w.add(report{Stream: name, Kind: "end"})
	})
	return w
}

func callGoMCP(ctx context.Context, url string) (text string, err error) {
	client := mcp.NewClient(&mcp.Implementation{Name: "interop", Version: "1.0.0"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: url}, nil)
	if err != nil {
		return "", err
	}
	defer session.Close()
	result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "leave"})
	if err != nil {
		return "", err
	}
	content, isText := result.Content[0].(*mcp.TextContent)
	if !isText {
		return "", fmt.Errorf("the result is %T", result.Content[0])
	}
	return content.Text, nil
}
