//go:build interop

package clients

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// chunk returns one chunk of a streamed chat completion.
func chunk(delta string) string {
	return `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"stand-in",` +
		`"choices":[{"index":0,"delta":` + delta + `,"finish_reason":null}]}` + "\n\n"
}

// chatScript is an answer with silences before its first chunk, between two
// chunks, and before its end.
var chatScript = []string{
	"",
	chunk(`{"role":"assistant","content":""}`),
	chunk(`{"content":"Hel"}`),
	"",
	chunk(`{"content":"lo"}`),
	"",
	strings.Replace(chunk(`{"content":"!"}`), `"finish_reason":null`, `"finish_reason":"stop"`, 1),
	"data: [DONE]\n\n",
}

var chatEvents = []event{{"chunk", "", ""}, {"chunk", "Hel", ""}, {"chunk", "lo", ""}, {"chunk", "!", ""}}

func responseEvent(typ, more string) string {
	return "event: " + typ + "\ndata: {\"type\":\"" + typ + "\"," + more + "}\n\n"
}

const responseObject = `"id":"resp_1","object":"response","created_at":1700000000,"model":"stand-in",` +
	`"parallel_tool_calls":false,"tool_choice":"auto","tools":[],`

var responsesScript = []string{
	"",
	responseEvent("response.created", `"sequence_number":0,"response":{`+responseObject+`"status":"in_progress","output":[]}`),
	responseEvent("response.output_text.delta", `"sequence_number":1,"item_id":"msg_1","output_index":0,"content_index":0,"logprobs":[],"delta":"Hel"`),
	"",
	responseEvent("response.output_text.delta", `"sequence_number":2,"item_id":"msg_1","output_index":0,"content_index":0,"logprobs":[],"delta":"lo!"`),
	"",
	responseEvent("response.completed", `"sequence_number":3,"response":{`+responseObject+`"status":"completed","output":[`+
		`{"id":"msg_1","type":"message","role":"assistant","status":"completed","content":[{"type":"output_text","text":"Hello!","annotations":[]}]}]}`),
}

var responsesEvents = []event{
	{"response.created", "", ""},
	{"response.output_text.delta", "Hel", ""},
	{"response.output_text.delta", "lo!", ""},
	{"response.completed", "Hello!", ""},
}

// messagesScript is an answer of Anthropic's API.
var messagesScript = []string{
	responseEvent("message_start", `"message":{"id":"msg_1","type":"message","role":"assistant","model":"stand-in","content":[],`+
		`"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}`),
	responseEvent("content_block_start", `"index":0,"content_block":{"type":"text","text":""}`),
	responseEvent("content_block_delta", `"index":0,"delta":{"type":"text_delta","text":"Hel"}`),
	responseEvent("content_block_delta", `"index":0,"delta":{"type":"text_delta","text":"lo!"}`),
	responseEvent("content_block_stop", `"index":0`),
	responseEvent("message_delta", `"delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":2}`),
	"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
}

// serveLLM stands in for an LLM API. It has /v1, /ids/v1, which sends an id
// with each event, /slow/v1, which takes a second to send its headers, and
// /broken/v1, which takes a second to fail.
func serveLLM(t *testing.T) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		var asked struct{ Stream bool }
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || r.Method != http.MethodPost || !asked.Stream {
			http.Error(w, "want a POST that asks for a stream", http.StatusBadRequest)
			return
		}
		kind, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "v1/")
		script := map[string][]string{"chat/completions": chatScript, "responses": responsesScript, "messages": messagesScript}[path]
		switch kind {
		case "slow/":
			time.Sleep(time.Second)
		case "broken/":
			time.Sleep(time.Second)
			http.Error(w, `{"error":{"message":"overloaded"}}`, http.StatusInternalServerError)
			return
		}
		harness.Begin(w)
		for i, text := range script {
			if text == "" {
				time.Sleep(silence)
				continue
			}
			if kind == "ids/" {
				text = fmt.Sprintf("id: %d\n%s", i, text)
			}
			harness.Send(w, text)
		}
	})
}

// TestLLMClientsInEveryStyle also shows why the style is a setting: what one of
// these clients needs makes another one fail.
func TestLLMClientsInEveryStyle(t *testing.T) {
	caddy := harness.StartSite(t, styleSite(serveLLM(t), ""))
	rows := []struct {
		name, path string
		start      func(t *testing.T, streams []string) program
		want       []event
		known      map[string]string
	}{
		{"openai, chat completions", "/v1", pythonLLM("chat"), chatEvents,
			map[string]string{"event": "ping as a chunk"}},
		{"openai, chat completions, async", "/v1", pythonLLM("chat-async"), chatEvents,
			map[string]string{"event": "ping as a chunk"}},
		{"openai, responses", "/v1", pythonLLM("responses"), responsesEvents,
			map[string]string{"event": "ping as an event"}},
		// After an id, it treats each blank line as an event, and an empty
		// event is not JSON.
		{"openai, chat completions with ids", "/ids/v1", pythonLLM("chat"), chatEvents,
			map[string]string{"block": "lost", "event": "ping as a chunk"}},
		// After a comment line alone, the next block does not begin with
		// "data:".
		{"hand-written, splits on blank lines", "/v1", handWritten, chatEvents,
			map[string]string{"line": "lost"}},
	}
	cells := newMatrix(styles...)
	for _, row := range rows {
		cells.row(row.name)
	}
	t.Run("clients", func(t *testing.T) {
		for _, row := range rows {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				var streams []string
				for _, style := range styles {
					streams = append(streams, style+"="+caddy.URL+"/"+style+row.path)
				}
				running := row.start(t, streams)
				running.awaitCount(t, "end", 1, styles...)
				all := running.reports()
				for _, style := range styles {
					text, noise := verdict(events(all, style), row.want)
					cells.cells[row.name][style] = text
					failures := of(all, style, "error")
					if len(failures) > 0 {
						cells.cells[row.name][style] += ", " + failures[0].Error
					}
					if noise != row.known[style] || len(failures) > 0 && noise != "lost" {
						t.Errorf("%s: %s, %v; known is %q", style, text, failures, row.known[style])
					}
				}
			})
		}
	})
	t.Logf("what each client shows its application of each heartbeat style:\n%s", cells)
	for _, closed := range caddy.ClosedStreams() {
		if closed.Resumable || closed.Heartbeats < 3 && closed.Reason == "upstream_closed" {
			t.Errorf("%+v", closed)
		}
	}
	caddy.CheckNoErrors(t)
}

func pythonLLM(client string) func(*testing.T, []string) program {
	return func(t *testing.T, streams []string) program {
		return startPython(t, "clients.py", append([]string{client}, streams...))
	}
}

func handWritten(t *testing.T, streams []string) program {
	return startNode(t, "clients.mjs", append([]string{"hand-written"}, streams...))
}

// An answer to a POST can't be requested again.
func TestAnAnswerOutlivesAReload(t *testing.T) {
	t.Parallel()
	upstream := serveLLM(t)
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, styleSite(upstream, "drain 100ms")))
	running := pythonLLM("chat")(t, []string{"chat=http://" + plain + "/block/v1"})
	running.awaitCount(t, "event", 1, "chat")
	caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "header X-Generation 2\n"+styleSite(upstream, "drain 100ms")))
	running.awaitCount(t, "end", 1, "chat")
	all := running.reports()
	if text, _ := verdict(events(all, "chat"), chatEvents); text != "exact" || len(of(all, "chat", "error")) > 0 {
		t.Errorf("%s, %v", text, of(all, "chat", "error"))
	}
	if closed := caddy.AwaitClosed(t); !isWhole(closed) {
		t.Errorf("%+v", closed)
	}
}

// isWhole reports whether a stream ended when its client had the whole answer. The
// SDK of OpenAI for Python may leave before the upstream's end: it closes the
// response when it has read [DONE].
func isWhole(closed harness.Closed) bool {
	return closed.Reason == "upstream_closed" || closed.Reason == "client_closed"
}

// These SDKs ask for a stream in the request body, not in Accept. They raise an
// exception on the error event of an early start, because its data has a member
// "error", even if resume adds an id to it.
func TestAnEarlyStartForAnSDK(t *testing.T) {
	t.Parallel()
	upstream, site := serveLLM(t), ""
	settings := map[string]string{"alone": "heartbeat 1s", "resume": "heartbeat 1s\nresume 1m any"}
	for name, setting := range settings {
		site += `
	handle_path /` + name + `/* {
		sse {
			early_start 300ms
			` + setting + `
		}
		reverse_proxy ` + upstream + `
	}`
	}
	caddy := harness.StartSite(t, site)
	var streams []string
	for name := range settings {
		for client, base := range map[string]string{"openai": "/v1", "anthropic": ""} {
			for _, kind := range []string{"slow", "broken"} {
				streams = append(streams, client+"/"+kind+"/"+name+"="+caddy.URL+"/"+name+"/"+kind+base)
			}
		}
	}
	inPython, inNode := startPython(t, "answers.py", streams), startNode(t, "answers.mjs", streams)
	for _, row := range []struct {
		client  string
		running program
		raises  string
	}{
		{"openai", inPython, "APIError: "},
		{"anthropic", inPython, "APIStatusError: "},
		{"openai", inNode, "APIError: "},
		{"anthropic", inNode, "APIError: "},
	} {
		for name := range settings {
			slow, broken := row.client+"/slow/"+name, row.client+"/broken/"+name
			row.running.awaitCount(t, "end", 1, slow, broken)
			all := row.running.reports()
			if got := fmt.Sprint(events(all, slow), of(all, slow, "error")); got != "[{text Hello! }] []" {
				t.Errorf("%s: %s", slow, got)
			}
			failures := of(all, broken, "error")
			t.Logf("%s: %v", broken, failures)
			if len(events(all, broken)) > 0 || len(failures) != 1 ||
				!strings.HasPrefix(failures[0].Error, row.raises) || !strings.Contains(failures[0].Error, "the upstream answered 500") {
				t.Errorf("%s: events %q, errors %v", broken, events(all, broken), failures)
			}
		}
	}
	for _, closed := range caddy.ClosedStreams() {
		isBroken := strings.Contains(closed.Path, "/broken/")
		// An SDK may leave when it has read the error event.
		isTold := closed.Reason == "upstream_error" || closed.Reason == "client_closed"
		if isBroken && !isTold || !isBroken && !isWhole(closed) {
			t.Errorf("%+v", closed)
		}
	}
}
