package caddysse_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode/gzip"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// adapt turns a Caddyfile into the handlers of its routes, in their order.
func adapt(caddyfile string) (handlers []map[string]any, err error) {
	text, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return nil, err
	}
	var config any
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	collectHandlers(config, &handlers)
	return handlers, nil
}

func collectHandlers(config any, handlers *[]map[string]any) {
	switch config := config.(type) {
	case []any:
		for _, item := range config {
			collectHandlers(item, handlers)
		}
	case map[string]any:
		if config["handler"] != nil {
			*handlers = append(*handlers, config)
		}
		for _, item := range config {
			collectHandlers(item, handlers)
		}
	}
}

func TestACaddyfileBecomesTheDocumentedJSON(t *testing.T) {
	for _, test := range []struct{ directive, want string }{
		{"sse", `{}`},
		{"sse {\n}", `{}`},
		{"sse 20s", `{"heartbeat": {"interval": 20000000000}}`},
		{"sse 1d {\n}", `{"heartbeat": {"interval": 86400000000000}}`},
		{"sse /events 500ms", `{"heartbeat": {"interval": 500000000}}`},
		{"sse * 20s", `{"heartbeat": {"interval": 20000000000}}`},
		{"sse 20s {\nprelude 2s\n}", `{"heartbeat": {"interval": 20000000000, "prelude": 2000000000}}`},
		{"sse {\nname chat\n}", `{"name": "chat"}`},
		{"sse {\nname \"chat room\"\n}", `{"name": "chat room"}`},
		{"sse {\nheartbeat 20s\n}", `{"heartbeat": {"interval": 20000000000}}`},
		{"sse {\nheartbeat 20s ping\n}", `{"heartbeat": {"interval": 20000000000, "comment": "ping"}}`},
		{"sse {\nheartbeat 20s \" still here \"\n}", `{"heartbeat": {"interval": 20000000000, "comment": " still here "}}`},
		{"sse {\nheartbeat off\n}", `{"heartbeat": {"interval": -1}}`},
		{"sse {\nheartbeat off ping\n}", `{"heartbeat": {"interval": -1, "comment": "ping"}}`},
		{"sse {\nheartbeat_style block\n}", `{"heartbeat": {"style": "block"}}`},
		{"sse {\nheartbeat_style line\n}", `{"heartbeat": {"style": "line"}}`},
		{"sse {\nheartbeat_style event ping\n}", `{"heartbeat": {"style": "event", "event": "ping"}}`},
		{"sse {\nheartbeat_style event ping \"{}\"\n}", `{"heartbeat": {"style": "event", "event": "ping", "data": "{}"}}`},
		{"sse {\nheartbeat_style event ping `{\"a\": 1}`\n}", `{"heartbeat": {"style": "event", "event": "ping", "data": "{\"a\": 1}"}}`},
		{"sse {\nheartbeat_style event ping\nheartbeat 20s\n}", `{"heartbeat": {"interval": 20000000000, "style": "event", "event": "ping"}}`},
		{"sse {\nprelude 250ms\n}", `{"heartbeat": {"prelude": 250000000}}`},
		{"sse {\nprelude off\n}", `{"heartbeat": {"prelude": -1}}`},
		{"sse {\ncache_control keep\n}", `{"cache_control": "keep"}`},
		{"sse {\ncache_control \"private, max-age=0\"\n}", `{"cache_control": "private, max-age=0"}`},
		{"sse {\ncompression allow\n}", `{"compression": "allow"}`},
		{"sse {\ncompression deny\n}", `{"compression": "deny"}`},
		{"sse {\nretry 2s\n}", `{"retry": {"min": 2000000000}}`},
		{"sse {\nretry 2s 5s\n}", `{"retry": {"min": 2000000000, "max": 5000000000}}`},
		{"sse {\nretry 2s 2s\n}", `{"retry": {"min": 2000000000, "max": 2000000000}}`},
		{"sse {\nretry 1ms\n}", `{"retry": {"min": 1000000}}`},
		{
			"sse {\nname chat\nheartbeat 15s hb\nheartbeat_style event ping x\nprelude 1s\ncache_control no-cache\ncompression deny\nretry 2s 5s\n}",
			`{"name": "chat", "heartbeat": {"interval": 15000000000, "comment": "hb", "style": "event", "event": "ping", "data": "x", "prelude": 1000000000},
			"cache_control": "no-cache", "compression": "deny", "retry": {"min": 2000000000, "max": 5000000000}}`,
		},
	} {
		t.Run(test.directive, func(t *testing.T) {
			handlers, err := adapt(":8080 {\n" + test.directive + "\n}")
			if err != nil {
				t.Fatal(err)
			}
			if len(handlers) != 1 || handlers[0]["handler"] != "sse" {
				t.Fatalf("got the handlers %v", handlers)
			}
			delete(handlers[0], "handler")
			var want map[string]any
			if err := json.Unmarshal([]byte(test.want), &want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(handlers[0], want) {
				t.Errorf("\ngot  %v\nwant %v", handlers[0], want)
			}
			if _, err := load(t, test.want); err != nil {
				t.Errorf("the JSON is not accepted: %v", err)
			}
		})
	}
}

func TestTheDirectiveComesRightBehindEncode(t *testing.T) {
	handlers, err := adapt(`
		:8080 {
			reverse_proxy localhost:9000
			sse
			request_header X-A b
			encode gzip
			header X-B c
		}`)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, h := range handlers {
		order = append(order, h["handler"].(string))
	}
	at := slices.Index(order, "sse")
	if at < 1 || order[at-1] != "encode" || order[len(order)-1] != "reverse_proxy" || at == len(order)-1 {
		t.Errorf("got the order %q", order)
	}
}

func TestAMatcherLimitsTheDirective(t *testing.T) {
	text, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(":8080 {\n@chat path /chat\nsse @chat 20s\n}"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"match":[{"path":["/chat"]}]`) {
		t.Errorf("got %s", text)
	}
}

func TestACaddyfileThatCannotBeKeptToIsAnErrorWithFileAndLine(t *testing.T) {
	for _, test := range []struct {
		directive string // begins in line 2
		line      int
		want      []string // in the error
	}{
		{"sse {\nbogus 1\n}", 3, []string{"unknown", `"bogus"`}},
		{"sse {\nname a\n\nHeartbeat 1s\n}", 5, []string{"unknown", `"Heartbeat"`}},
		{"sse 15s 20s", 2, []string{"at most one argument"}},
		{"sse /events 15s 20s", 2, []string{"at most one argument"}},
		{"sse bogus", 2, []string{`"bogus"`, "duration"}},
		{"sse off", 2, []string{`"off"`, "duration"}},
		{"sse 0s", 2, []string{`"0s"`, "positive"}},
		{"sse -1s", 2, []string{`"-1s"`, "positive"}},
		{"sse 15", 2, []string{`"15"`, "duration"}},

		{"sse {\nname\n}", 3, []string{"name", "usage: name <name>"}},
		{"sse {\nname a b\n}", 3, []string{"name", "usage: name <name>"}},
		{"sse {\nname \"\"\n}", 3, []string{"name", "empty"}},

		{"sse {\nheartbeat\n}", 3, []string{"heartbeat", "usage: heartbeat <interval>|off [<comment>]"}},
		{"sse {\nheartbeat 1s a b\n}", 3, []string{"heartbeat", "usage"}},
		{"sse {\nheartbeat 0s\n}", 3, []string{"heartbeat", `"0s"`, "positive"}},
		{"sse {\nheartbeat 0\n}", 3, []string{"heartbeat", `"0"`, "positive"}},
		{"sse {\nheartbeat -15s\n}", 3, []string{"heartbeat", `"-15s"`, "positive"}},
		{"sse {\nheartbeat -1\n}", 3, []string{"heartbeat", `"-1"`}},
		{"sse {\nheartbeat soon\n}", 3, []string{"heartbeat", `"soon"`, "duration", "off"}},
		{"sse {\nheartbeat on\n}", 3, []string{"heartbeat", `"on"`}},
		{"sse {\nheartbeat OFF\n}", 3, []string{"heartbeat", `"OFF"`}},
		{"sse {\nheartbeat \"\"\n}", 3, []string{"heartbeat", `""`}},
		{"sse {\nheartbeat 1s \"a\nb\"\n}", 3, []string{"heartbeat", "comment", `"a\nb"`, "line break"}},
		{"sse {\nheartbeat 1s `a\nb`\n}", 3, []string{"heartbeat", "comment", "line break"}},
		{"sse {\nheartbeat 1s <<END\n  a\n  b\n  END\n}", 3, []string{"heartbeat", "comment", `"a\nb"`, "line break"}},
		{"sse {\nheartbeat 1s \"a\rb\"\n}", 3, []string{"heartbeat", "comment", "line break"}},
		{"sse {\nheartbeat 1s \"a\x00b\"\n}", 3, []string{"heartbeat", "comment", "NUL"}},

		{"sse {\nheartbeat_style\n}", 3, []string{"heartbeat_style", "usage: heartbeat_style block|line|event <name> [<data>]"}},
		{"sse {\nheartbeat_style bogus\n}", 3, []string{"heartbeat_style", `"bogus"`, "block", "line", "event"}},
		{"sse {\nheartbeat_style Block\n}", 3, []string{"heartbeat_style", `"Block"`}},
		{"sse {\nheartbeat_style event\n}", 3, []string{"heartbeat_style", "name"}},
		{"sse {\nheartbeat_style event \"\"\n}", 3, []string{"heartbeat_style", "name"}},
		{"sse {\nheartbeat_style event a b c\n}", 3, []string{"heartbeat_style", "usage"}},
		{"sse {\nheartbeat_style block ping\n}", 3, []string{"heartbeat_style", "event"}},
		{"sse {\nheartbeat_style line ping data\n}", 3, []string{"heartbeat_style", "event"}},
		{"sse {\nheartbeat_style event \"a\nb\"\n}", 3, []string{"heartbeat_style", "event name", "line break"}},
		{"sse {\nheartbeat_style event \"a\x00\"\n}", 3, []string{"heartbeat_style", "event name", "NUL"}},
		{"sse {\nheartbeat_style event ping \"a\nb\"\n}", 3, []string{"heartbeat_style", "data", "line break"}},
		{"sse {\nheartbeat_style event ping `a\nb`\n}", 3, []string{"heartbeat_style", "data", "line break"}},

		{"sse {\nprelude\n}", 3, []string{"prelude", "usage: prelude <delay>|off"}},
		{"sse {\nprelude 0s\n}", 3, []string{"prelude", `"0s"`, "positive"}},
		{"sse {\nprelude -1s\n}", 3, []string{"prelude", `"-1s"`, "positive"}},
		{"sse {\nprelude 1s 2s\n}", 3, []string{"prelude", "usage"}},

		{"sse {\ncache_control\n}", 3, []string{"cache_control", "usage: cache_control <value>|keep"}},
		{"sse {\ncache_control no-cache, no-store\n}", 3, []string{"cache_control", "usage"}},
		{"sse {\ncache_control \"a\nb\"\n}", 3, []string{"cache_control", "line break"}},

		{"sse {\ncompression\n}", 3, []string{"compression", "usage: compression allow|deny"}},
		{"sse {\ncompression maybe\n}", 3, []string{"compression", `"maybe"`, "allow", "deny"}},
		{"sse {\ncompression allow deny\n}", 3, []string{"compression", "usage"}},

		{"sse {\nretry\n}", 3, []string{"retry", "usage: retry <min> [<max>]"}},
		{"sse {\nretry 1s 2s 3s\n}", 3, []string{"retry", "usage"}},
		{"sse {\nretry off\n}", 3, []string{"retry", `"off"`}},
		{"sse {\nretry 0s\n}", 3, []string{"retry", `"0s"`, "positive"}},
		{"sse {\nretry 1s 0s\n}", 3, []string{"retry", `"0s"`, "positive"}},
		{"sse {\nretry -1s 1s\n}", 3, []string{"retry", `"-1s"`, "positive"}},
		{"sse {\nretry 1s -1s\n}", 3, []string{"retry", `"-1s"`, "positive"}},
		{"sse {\nretry 5s 2s\n}", 3, []string{"retry", `"5s"`, `"2s"`}},
		{"sse {\nretry 1us\n}", 3, []string{"retry", "millisecond"}},

		{"sse {\nheartbeat 1s\nprelude 1s\nheartbeat 2s\n}", 5, []string{"heartbeat", "twice"}},
		{"sse 1s {\nheartbeat 2s\n}", 3, []string{"heartbeat", "twice"}},
		{"sse {\nname a\nname a\n}", 4, []string{"name", "twice"}},
		{"sse {\nretry 1s\nretry 1s\n}", 4, []string{"retry", "twice"}},
		{"sse {\nheartbeat 1s {\ncomment a\n}\n}", 4, []string{"heartbeat", "no block"}},
		{"sse {\nname a {\n b\n}\n}", 4, []string{"name", "no block"}},
	} {
		t.Run(test.directive, func(t *testing.T) {
			_, err := adapt(":8080 {\n" + test.directive + "\n}")
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range append(test.want, "sse", fmt.Sprintf("Caddyfile:%d", test.line)) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}

func TestJSONThatIsAccepted(t *testing.T) {
	for _, config := range []string{
		`{}`,
		`{"name": "chat"}`,
		`{"heartbeat": {}}`,
		`{"heartbeat": {"interval": "15s", "comment": "heartbeat", "style": "event", "event": "ping", "data": "{}", "prelude": "1s"}}`,
		`{"heartbeat": {"interval": -1, "prelude": -1}}`,
		`{"heartbeat": {"interval": 0, "prelude": 0}}`,
		`{"heartbeat": {"interval": "1ns", "prelude": "1ns"}}`,
		`{"heartbeat": {"interval": "2562047h", "prelude": "2562047h"}}`,
		`{"heartbeat": {"interval": "1d"}}`,
		`{"cache_control": "no-cache, no-store, no-transform", "compression": "deny"}`,
		`{"cache_control": "keep", "compression": "allow"}`,
		`{"retry": {"min": "2s", "max": "5s"}}`,
		`{"retry": {"min": "2s"}}`,
		`{"retry": {"min": "2s", "max": 0}}`,
	} {
		if _, err := load(t, config); err != nil {
			t.Errorf("%s: %v", config, err)
		}
	}
}

func TestJSONThatCannotBeKeptToIsAnErrorThatSaysWhy(t *testing.T) {
	for _, test := range []struct {
		config string
		want   []string
	}{
		{`{"bogus": 1}`, []string{"bogus"}},
		{`{"heartbeat": {"bogus": 1}}`, []string{"bogus"}},
		{`{"retry": {"bogus": 1}}`, []string{"bogus"}},
		{`{"heartbeat": "15s"}`, nil},
		{`{"heartbeat": {"interval": "soon"}}`, []string{"soon"}},
		{`{"heartbeat": {"interval": -2}}`, []string{"heartbeat", "positive", "-1"}},
		{`{"heartbeat": {"interval": "-15s"}}`, []string{"heartbeat", "-15s", "positive"}},
		{`{"heartbeat": {"prelude": "-1s"}}`, []string{"prelude", "-1s", "positive"}},
		{`{"heartbeat": {"prelude": -1000000}}`, []string{"prelude", "positive"}},
		{`{"heartbeat": {"comment": "a\nb"}}`, []string{"heartbeat", "comment", "line break"}},
		{`{"heartbeat": {"comment": "a\r"}}`, []string{"heartbeat", "comment", "line break"}},
		{`{"heartbeat": {"comment": "\u0000"}}`, []string{"heartbeat", "comment", "NUL"}},
		{`{"heartbeat": {"style": "bogus"}}`, []string{"style", "bogus"}},
		{`{"heartbeat": {"style": "event"}}`, []string{"style", "event", "name"}},
		{`{"heartbeat": {"style": "event", "event": "a\nb"}}`, []string{"event name", "line break"}},
		{`{"heartbeat": {"style": "event", "event": "a\u0000"}}`, []string{"event name", "NUL"}},
		{`{"heartbeat": {"style": "event", "event": "a", "data": "a\nb"}}`, []string{"data", "line break"}},
		{`{"heartbeat": {"event": "ping"}}`, []string{"event"}},
		{`{"heartbeat": {"style": "line", "data": "x"}}`, []string{"data", "event"}},
		{`{"cache_control": "a\nb"}`, []string{"cache_control", "line break"}},
		{`{"compression": "maybe"}`, []string{"compression", "maybe"}},
		{`{"retry": {}}`, []string{"retry"}},
		{`{"retry": {"max": "1s"}}`, []string{"retry"}},
		{`{"retry": {"min": "-1s"}}`, []string{"retry", "-1s"}},
		{`{"retry": {"min": -1}}`, []string{"retry"}},
		{`{"retry": {"min": "1s", "max": -1}}`, []string{"retry", "positive"}},
		{`{"retry": {"min": "5s", "max": "2s"}}`, []string{"retry", "5s", "2s"}},
		{`{"retry": {"min": "999us"}}`, []string{"retry", "millisecond"}},
	} {
		t.Run(test.config, func(t *testing.T) {
			_, err := load(t, test.config)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range append(test.want, "sse") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}

// FuzzCaddyfile looks for tokens that the parser stumbles over, that it accepts
// though they can't be kept to, or whose JSON means something else.
func FuzzCaddyfile(f *testing.F) {
	for _, seed := range []string{
		"sse", "sse 15s", "sse {\n}", "sse 15s {\n\tprelude off\n}", "sse {",
		"sse {\n\tname chat\n\theartbeat 15s hb\n\theartbeat_style event ping \"{}\"\n\tprelude 1s\n\tcache_control keep\n\tcompression allow\n\tretry 2s 5s\n}",
		"sse {\n\theartbeat off\n\theartbeat_style line\n}",
		"sse {\n\theartbeat 1s {\n\t\tcomment a\n\t}\n}",
		"sse {\n\theartbeat 1s `a\nb`\n}",
		"sse {\n\tretry 5s 2s\n}",
		"sse {\n\tname a\n\tname b\n}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		tokens, err := caddyfile.Tokenize([]byte(text), "Caddyfile")
		if err != nil {
			return
		}
		parse := func() (*caddysse.Handler, string, error) {
			h := new(caddysse.Handler)
			if err := h.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
				return nil, "", err
			}
			config, err := json.Marshal(h)
			if err != nil {
				t.Fatal(err)
			}
			return h, string(config), nil
		}
		h, config, err := parse()
		if err != nil {
			return
		}
		if _, again, err := parse(); err != nil || again != config {
			t.Errorf("first %s, then %s, %v", config, again, err)
		}
		loaded, err := load(t, config)
		if err != nil {
			t.Fatalf("%q is accepted, but not its JSON %s: %v", text, config, err)
		}
		h.Name = loaded.Name // the only default that shows
		want, _ := json.Marshal(h)
		if got, err := json.Marshal(loaded); err != nil || string(got) != string(want) {
			t.Errorf("%s came back as %s, %v", want, got, err)
		}
	})
}
