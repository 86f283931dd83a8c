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

// adapt converts a Caddyfile to the handlers of its routes, in their order.
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
		{"sse {\nheartbeat off ping\nprelude 1s\n}", `{"heartbeat": {"interval": -1, "comment": "ping", "prelude": 1000000000}}`},
		{"sse {\nheartbeat_style auto\n}", `{"heartbeat": {"style": "auto"}}`},
		{"sse {\nheartbeat_style auto pad 4096\n}", `{"heartbeat": {"style": "auto", "pad": 4096}}`},
		{"sse {\nheartbeat_style block pad 2KiB\n}", `{"heartbeat": {"style": "block", "pad": 2048}}`},
		{"sse {\nheartbeat_style line pad 64KiB\n}", `{"heartbeat": {"style": "line", "pad": 65536}}`},
		{"sse {\nheartbeat_style event pad\n}", `{"heartbeat": {"style": "event", "event": "pad"}}`},
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
		{"sse {\nearly_start 1s\n}", `{"early_start": {"delay": 1000000000}}`},
		{"sse {\nearly_start 1s any\n}", `{"early_start": {"delay": 1000000000, "any": true}}`},
		{"sse {\nupstream_timeout 2m\n}", `{"upstream_timeout": 120000000000}`},
		{"sse {\nupstream_timeout off\n}", `{"upstream_timeout": -1}`},
		{"sse {\nwrite_timeout 45s\n}", `{"write_timeout": 45000000000}`},
		{"sse {\nwrite_timeout off\n}", `{"write_timeout": -1}`},
		{"sse {\ndead_client_timeout off\n}", `{"dead_client_timeout": -1}`},
		{"sse {\nmax_duration 1h\n}", `{"max_duration": {"duration": 3600000000000}}`},
		{"sse {\nmax_duration 1h 10m\n}", `{"max_duration": {"duration": 3600000000000, "jitter": 600000000000}}`},
		{"sse {\ndrain 20s\n}", `{"drain": {"reload": 20000000000}}`},
		{"sse {\ndrain 20s 5s\n}", `{"drain": {"reload": 20000000000, "exit": 5000000000}}`},
		{"sse {\ndrain off\n}", `{"drain": {"reload": -1}}`},
		{"sse {\ndrain off 3s\n}", `{"drain": {"reload": -1, "exit": 3000000000}}`},
		{"sse {\nresumable auto\n}", `{"resumable": "auto"}`},
		{"sse {\nresumable always\n}", `{"resumable": "always"}`},
		{"sse {\nresumable never\n}", `{"resumable": "never"}`},
		{"sse {\nmax_streams 1000\n}", `{"max_streams": 1000}`},
		{"sse {\nmax_streams_per_client 5 {http.auth.user.id}\n}", `{"max_streams_per_client": 5, "client_key": "{http.auth.user.id}"}`},
		{"sse {\nmax_streams_per_client 5 \"{header.X-Team} {client_ip}\"\n}", `{"max_streams_per_client": 5, "client_key": "{http.request.header.X-Team} {http.vars.client_ip}"}`},
		{"sse {\nname {env.SSE_TEST_NAME}\ncache_control {file./etc/hostname}\nheartbeat 1s \"{a} {system.os}\"\n}", `{"name": "{env.SSE_TEST_NAME}", "cache_control": "{file./etc/hostname}", "heartbeat": {"interval": 1000000000, "comment": "{a} {system.os}"}}`},
		{"sse {\nmax_streams_per_client 5\n}", `{"max_streams_per_client": 5}`},
		{"sse {\nreconnect_on 502\n}", `{"reconnect_on": [502]}`},
		{"sse {\nresume 2m\n}", `{"resume": {"window": 120000000000}}`},
		{"sse {\nresume 2m any {\n}\n}", `{"resume": {"window": 120000000000, "any": true}}`},
		{"sse {\nresume 2m {\nhistory 256KiB 1GiB\nbind {http.auth.user.id} {http.request.cookie.session}\ncancel 5s\ndetached 100\nrun_for 1h\nlost gone\n}\n}", `{"resume": {"window": 120000000000, "history": 262144, "total_history": 1073741824, "bind": ["{http.auth.user.id}", "{http.request.cookie.session}"], "cancel": 5000000000, "detached": 100, "run_for": 3600000000000, "lost": "gone"}}`},
		{"sse {\nshare\n}", `{"share": {}}`},
		{"sse {\nshare {\n}\n}", `{"share": {}}`},
		{"sse {\nshare Authorization {http.auth.user.id} {client_ip}\n}", `{"share": {"key": ["Authorization", "{http.auth.user.id}", "{http.vars.client_ip}"]}}`},
		{"sse {\nshare X-A {\njoin last 10\nhistory 1MiB 256MiB\nlinger 10s\nrun_for 1h\nlost off\n}\nname n\n}", `{"name": "n", "share": {"key": ["X-A"], "join": "last", "join_last": 10, "history": 1048576, "total_history": 268435456, "linger": 10000000000, "run_for": 3600000000000, "lost": "off"}}`},
		{"sse {\nshare {\njoin live\nlost gone\n}\n}", `{"share": {"join": "live", "lost": "gone"}}`},
		{"sse {\nupstream_retry 1m\n}", `{"upstream_retry": {"window": 60000000000}}`},
		{"sse {\nupstream_retry 90s live\n}", `{"upstream_retry": {"window": 90000000000, "live": true}}`},
		{"sse {\nreconnect_on 502 503 429 400 404 500 599\n}", `{"reconnect_on": [502, 503, 429, 400, 404, 500, 599]}`},
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

func TestTheDirectiveComesRightAfterEncode(t *testing.T) {
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

func TestAnInvalidCaddyfileIsAnErrorWithFileAndLine(t *testing.T) {
	for _, test := range []struct {
		directive string // it begins in line 2
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
		{"sse {\nheartbeat \"\"\n}", 3, []string{"heartbeat", "empty"}},
		{"sse {\nheartbeat 1s \"a\nb\"\n}", 3, []string{"heartbeat", "comment", `"a\nb"`, "line break"}},
		{"sse {\nheartbeat 1s `a\nb`\n}", 3, []string{"heartbeat", "comment", "line break"}},
		{"sse {\nheartbeat 1s <<END\n  a\n  b\n  END\n}", 3, []string{"heartbeat", "comment", `"a\nb"`, "line break"}},
		{"sse {\nheartbeat 1s \"a\rb\"\n}", 3, []string{"heartbeat", "comment", "line break"}},
		{"sse {\nheartbeat 1s \"a\x00b\"\n}", 3, []string{"heartbeat", "comment", "NUL"}},

		{"sse {\nheartbeat_style\n}", 3, []string{"heartbeat_style", "usage: heartbeat_style auto|block|line [pad <size>], or event <name> [<data>]"}},
		{"sse {\nheartbeat_style bogus\n}", 3, []string{"heartbeat_style", `"bogus"`, "block", "line", "event"}},
		{"sse {\nheartbeat_style Block\n}", 3, []string{"heartbeat_style", `"Block"`}},
		{"sse {\nheartbeat_style event\n}", 3, []string{"heartbeat_style", "name"}},
		{"sse {\nheartbeat_style event \"\"\n}", 3, []string{"heartbeat_style", "empty"}},
		{"sse {\nheartbeat_style event a b c\n}", 3, []string{"heartbeat_style", "usage"}},
		{"sse {\nheartbeat_style block ping\n}", 3, []string{"heartbeat_style", `"ping"`, "block", "pad <size>"}},
		{"sse {\nheartbeat_style line ping data\n}", 3, []string{"heartbeat_style", `"ping"`, "line", "pad <size>"}},
		{"sse {\nheartbeat_style auto pad\n}", 3, []string{"heartbeat_style", "pad <size>"}},
		{"sse {\nheartbeat_style block pad 0\n}", 3, []string{"pad", `"0"`, "positive size"}},
		{"sse {\nheartbeat_style block pad -1\n}", 3, []string{"pad", `"-1"`, "positive size"}},
		{"sse {\nheartbeat_style block pad much\n}", 3, []string{"pad", `"much"`, "4KiB"}},
		{"sse {\nheartbeat_style block pad 65537\n}", 3, []string{"pad", "65537", "65536"}},
		{"sse {\nheartbeat_style block pad 99999GB\n}", 3, []string{"pad", "positive size"}},
		{"sse {\nheartbeat_style event ping pad 1\n}", 3, []string{"usage"}},
		{"sse {\nheartbeat_style event \"a\nb\"\n}", 3, []string{"heartbeat_style", "event name", "line break"}},
		{"sse {\nheartbeat_style event \"a\x00\"\n}", 3, []string{"heartbeat_style", "event name", "NUL"}},
		{"sse {\nheartbeat_style event ping \"a\nb\"\n}", 3, []string{"heartbeat_style", "data", "line break"}},
		{"sse {\nheartbeat_style event ping `a\nb`\n}", 3, []string{"heartbeat_style", "data", "line break"}},

		{"sse {\nheartbeat off hello\n}", 3, []string{"heartbeat", `"hello"`, "off"}},
		{"sse {\nprelude off\nheartbeat off hello\nretry 1s\n}", 4, []string{"heartbeat", `"hello"`, "off"}},
		{"sse {\nheartbeat {env.HB}\n}", 3, []string{`"{env.HB}" is not a duration`, "{$HB}"}},
		{"sse {env.HB}", 2, []string{`"{env.HB}" is not a duration`, "{$HB}"}},
		{"sse {\nretry 1s {system.os}\n}", 3, []string{"is not a duration", "placeholders can't be used here"}},
		{"sse {\nmax_streams {env.MAX}\n}", 3, []string{"is not a positive number", "{$MAX}"}},
		{"sse {\nreconnect_on {env.STATUS}\n}", 3, []string{"is not a status code", "{$STATUS}"}},
		{"sse {\nname {host}\n}", 3, []string{"name", "{http.request.host}", "request"}},
		{"sse {\nheartbeat 2s {http.request.host}\n}", 3, []string{"heartbeat", "comment", "{http.request.host}", "request"}},
		{"sse {\nheartbeat_style event {path}\n}", 3, []string{"event name", "{http.request.uri.path}"}},
		{"sse {\nheartbeat_style event ping `{\"user\":\"{http.auth.user.id}\"}`\n}", 3, []string{"data", "{http.auth.user.id}"}},
		{"sse {\ncache_control {http.vars.cc}\n}", 3, []string{"cache_control", "{http.vars.cc}"}},

		{"sse {\nresume\n}", 3, []string{"resume", "usage: resume <window> [any]"}},
		{"sse {\nresume off\n}", 3, []string{"resume", "off"}},
		{"sse {\nresume 0s\n}", 3, []string{"resume", "positive"}},
		{"sse {\nresume 1m all\n}", 3, []string{"resume", "all", "any"}},
		{"sse {\nresume 1m {\nstore\n}\n}", 4, []string{"store", "usage"}},
		{"sse {\nresume 1m {\nstore unheard_of\n}\n}", 4, []string{"store", "unheard_of"}},
		{"sse {\nresume 1m {\nstore test {\nm a\n}\nstore test {\nm b\n}\n}\n}", 7, []string{"store", "twice"}},
		{"sse {\nresume 1m {\nshop redis\n}\n}", 4, []string{"shop", "store", "bind", "cancel", "detached", "history", "lost", "run_for"}},
		{"sse {\nresume 1m {\nhistory 0\n}\n}", 4, []string{"history"}},
		{"sse {\nresume 1m {\nhistory 1MiB 1KiB\n}\n}", 4, []string{"history", "total"}},
		{"sse {\nresume 1m {\nbind session\n}\n}", 4, []string{"bind", "session", "placeholder"}},
		{"sse {\nresume 1m {\nbind {a}{b}\n}\n}", 4, []string{"bind", "placeholder"}},
		{"sse {\nresume 1m {\ncancel off\n}\n}", 4, []string{"cancel", "off"}},
		{"sse {\nresume 1m {\ndetached 0\n}\n}", 4, []string{"detached", "positive"}},
		{"sse {\nresume 1m {\nrun_for -1s\n}\n}", 4, []string{"run_for", "positive"}},
		{"sse {\nresume 1m {\nlost \"a\nb\"\n}\n}", 4, []string{"lost", "line break"}},
		{"sse {\nresume 1m\nshare\n}", 5, []string{"resume", "share", "one handler"}},
		{"sse {\nresume 1m\nresumable never\n}", 5, []string{"resume", "resumable never"}},
		{"sse {\nshare Accept\n}", 3, []string{"share", "Accept"}},
		{"sse {\nshare {client_ip}x\n}", 3, []string{"share", "placeholder"}},
		{"sse {\nshare \"\"\n}", 3, []string{"share", "empty"}},
		{"sse {\nshare {\nwindow 1s\n}\n}", 4, []string{"window", "history", "join", "linger", "lost", "run_for"}},
		{"sse {\nshare {\njoin last\n}\n}", 4, []string{"join", "last"}},
		{"sse {\nshare {\njoin last 0\n}\n}", 4, []string{"join", "0"}},
		{"sse {\nshare {\njoin live 3\n}\n}", 4, []string{"join"}},
		{"sse {\nshare {\njoin late\n}\n}", 4, []string{"join", "late", "live", "last"}},
		{"sse {\nshare {\nhistory 0\n}\n}", 4, []string{"history"}},
		{"sse {\nshare {\nhistory 1MiB 1KiB\n}\n}", 4, []string{"history", "total"}},
		{"sse {\nshare {\nlinger off\n}\n}", 4, []string{"linger", "off"}},
		{"sse {\nshare {\nrun_for 0s\n}\n}", 4, []string{"run_for", "positive"}},
		{"sse {\nshare {\nlost \"a\nb\"\n}\n}", 4, []string{"lost", "line break"}},
		{"sse {\nshare {\nlost a\nlost b\n}\n}", 5, []string{"lost", "twice"}},
		{"sse {\nshare {\nlost a {\nx\n}\n}\n}", 5, []string{"lost", "block"}},
		{"sse {\nshare\nresumable never\n}", 5, []string{"share", "resumable never"}},

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

		{"sse {\nearly_start\n}", 3, []string{`early_start`, `usage: early_start <delay> [any]`}},
		{"sse {\nearly_start 1s any any\n}", 3, []string{`early_start`, `usage`}},
		{"sse {\nearly_start off\n}", 3, []string{`early_start`, `"off"`}},
		{"sse {\nearly_start 0s\n}", 3, []string{`early_start`, `"0s"`, `positive`}},
		{"sse {\nearly_start -1s\n}", 3, []string{`early_start`, `"-1s"`, `positive`}},
		{"sse {\nearly_start any\n}", 3, []string{`early_start`, `"any"`, `duration`}},
		{"sse {\nearly_start 1s Any\n}", 3, []string{`early_start`, `"Any"`, `any`}},

		{"sse {\nupstream_timeout\n}", 3, []string{`upstream_timeout`, `usage: upstream_timeout <duration>|off`}},
		{"sse {\nupstream_timeout 1s 2s\n}", 3, []string{`upstream_timeout`, `usage`}},
		{"sse {\nupstream_timeout 0s\n}", 3, []string{`upstream_timeout`, `"0s"`, `positive`, `off`}},
		{"sse {\nupstream_timeout -1s\n}", 3, []string{`upstream_timeout`, `"-1s"`, `positive`}},
		{"sse {\nupstream_timeout -1\n}", 3, []string{`upstream_timeout`, `"-1"`}},
		{"sse {\nupstream_timeout never\n}", 3, []string{`upstream_timeout`, `"never"`, `duration`, `off`}},

		{"sse {\nwrite_timeout\n}", 3, []string{`write_timeout`, `usage: write_timeout <duration>|off`}},
		{"sse {\nwrite_timeout 1s 2s\n}", 3, []string{`write_timeout`, `usage`}},
		{"sse {\nwrite_timeout 0s\n}", 3, []string{`write_timeout`, `"0s"`, `positive`, `off`}},
		{"sse {\nwrite_timeout -1s\n}", 3, []string{`write_timeout`, `"-1s"`, `positive`}},
		{"sse {\nwrite_timeout -1\n}", 3, []string{`write_timeout`, `"-1"`}},
		{"sse {\nwrite_timeout never\n}", 3, []string{`write_timeout`, `"never"`, `duration`, `off`}},

		{"sse {\ndead_client_timeout\n}", 3, []string{`dead_client_timeout`, `usage: dead_client_timeout <duration>|off`}},
		{"sse {\ndead_client_timeout 1s 2s\n}", 3, []string{`dead_client_timeout`, `usage`}},
		{"sse {\ndead_client_timeout 0s\n}", 3, []string{`dead_client_timeout`, `"0s"`, `positive`, `off`}},
		{"sse {\ndead_client_timeout -1s\n}", 3, []string{`dead_client_timeout`, `"-1s"`, `positive`}},
		{"sse {\ndead_client_timeout -1\n}", 3, []string{`dead_client_timeout`, `"-1"`}},
		{"sse {\ndead_client_timeout never\n}", 3, []string{`dead_client_timeout`, `"never"`, `duration`, `off`}},

		{"sse {\nmax_duration\n}", 3, []string{`max_duration`, `usage: max_duration <duration> [<jitter>]`}},
		{"sse {\nmax_duration 1h 1m 1s\n}", 3, []string{`max_duration`, `usage`}},
		{"sse {\nmax_duration off\n}", 3, []string{`max_duration`, `"off"`, `duration`}},
		{"sse {\nmax_duration 0s\n}", 3, []string{`max_duration`, `"0s"`, `positive`}},
		{"sse {\nmax_duration 1h 0s\n}", 3, []string{`max_duration`, `"0s"`, `positive`}},
		{"sse {\nmax_duration 1h -1s\n}", 3, []string{`max_duration`, `"-1s"`, `positive`}},
		{"sse {\nmax_duration 1h some\n}", 3, []string{`max_duration`, `"some"`, `duration`}},

		{"sse {\ndrain\n}", 3, []string{`drain`, `usage: drain <reload_window>|off [<exit_window>]`}},
		{"sse {\ndrain 1s 2s 3s\n}", 3, []string{`drain`, `usage`}},
		{"sse {\ndrain 0s\n}", 3, []string{`drain`, `"0s"`, `positive`, `off`}},
		{"sse {\ndrain -1s\n}", 3, []string{`drain`, `"-1s"`, `positive`}},
		{"sse {\ndrain 1s 0s\n}", 3, []string{`drain`, `"0s"`, `positive`}},
		{"sse {\ndrain 1s -1s\n}", 3, []string{`drain`, `"-1s"`, `positive`}},
		{"sse {\ndrain 1s off\n}", 3, []string{`drain`, `"off"`}},

		{"sse {\nresumable\n}", 3, []string{`resumable`, `usage: resumable auto|always|never`}},
		{"sse {\nresumable Always\n}", 3, []string{`resumable`, `"Always"`, `auto, always, never`}},
		{"sse {\nresumable always never\n}", 3, []string{`resumable`, `usage`}},

		{"sse {\nmax_streams\n}", 3, []string{`max_streams`, `usage: max_streams <n>`}},
		{"sse {\nmax_streams 1 2\n}", 3, []string{`max_streams`, `usage`}},
		{"sse {\nmax_streams 0\n}", 3, []string{`max_streams`, `"0"`, `positive number`}},
		{"sse {\nmax_streams -1\n}", 3, []string{`max_streams`, `"-1"`, `positive number`}},
		{"sse {\nmax_streams 1.5\n}", 3, []string{`max_streams`, `"1.5"`, `positive number`}},
		{"sse {\nmax_streams off\n}", 3, []string{`max_streams`, `"off"`, `positive number`}},
		{"sse {\nmax_streams 99999999999999999999\n}", 3, []string{`max_streams`, `positive number`}},

		{"sse {\nmax_streams_per_client\n}", 3, []string{`max_streams_per_client`, `usage: max_streams_per_client <n> [<key>]`}},
		{"sse {\nmax_streams_per_client 1 2\n}", 3, []string{`client_key`, `"2"`, `no placeholder`}},
		{"sse {\nmax_streams_per_client 1 {http.auth.user.id} b\n}", 3, []string{`max_streams_per_client`, `usage`}},
		{"sse {\nmax_streams_per_client 0\n}", 3, []string{`max_streams_per_client`, `"0"`, `positive number`}},
		{"sse {\nmax_streams_per_client -1\n}", 3, []string{`max_streams_per_client`, `"-1"`, `positive number`}},
		{"sse {\nmax_streams_per_client 1.5\n}", 3, []string{`max_streams_per_client`, `"1.5"`, `positive number`}},
		{"sse {\nmax_streams_per_client off\n}", 3, []string{`max_streams_per_client`, `"off"`, `positive number`}},
		{"sse {\nmax_streams_per_client 99999999999999999999\n}", 3, []string{`max_streams_per_client`, `positive number`}},

		{"sse {\nreconnect_on\n}", 3, []string{`reconnect_on`, `usage: reconnect_on <status...>`}},
		{"sse {\nreconnect_on 5xx\n}", 3, []string{`reconnect_on`, `"5xx"`, `status`}},
		{"sse {\nreconnect_on 502 off\n}", 3, []string{`reconnect_on`, `"off"`, `status`}},
		{"sse {\nreconnect_on 502 401\n}", 3, []string{`reconnect_on`, `401`, `who may not come`}},
		{"sse {\nreconnect_on 403\n}", 3, []string{`reconnect_on`, `403`, `who may not come`}},
		{"sse {\nreconnect_on 204\n}", 3, []string{`reconnect_on`, `204`, `to stop`}},
		{"sse {\nreconnect_on 200\n}", 3, []string{`reconnect_on`, `200`, `no error`}},
		{"sse {\nreconnect_on 302\n}", 3, []string{`reconnect_on`, `302`, `no error`}},
		{"sse {\nreconnect_on 101\n}", 3, []string{`reconnect_on`, `101`, `no error`}},
		{"sse {\nreconnect_on 399\n}", 3, []string{`reconnect_on`, `399`, `400 to 599`}},
		{"sse {\nreconnect_on 600\n}", 3, []string{`reconnect_on`, `600`, `400 to 599`}},
		{"sse {\nreconnect_on -502\n}", 3, []string{`reconnect_on`, `-502`}},
		{"sse {\nreconnect_on 0\n}", 3, []string{`reconnect_on`, `0`, `no error`}},

		{"sse {\nheartbeat 1s\nprelude 1s\nheartbeat 2s\n}", 5, []string{"heartbeat", "twice"}},
		{"sse {\ndrain 1s\ndrain off\n}", 4, []string{"drain", "twice"}},
		{"sse {\nreconnect_on 502\nreconnect_on 503\n}", 4, []string{"reconnect_on", "twice"}},
		{"sse {\nupstream_retry\n}", 3, []string{"upstream_retry", "usage: upstream_retry <window> [live]"}},
		{"sse {\nupstream_retry 0s\n}", 3, []string{"upstream_retry", "not a positive duration"}},
		{"sse {\nupstream_retry off\n}", 3, []string{"upstream_retry", `"off"`, "not a duration"}},
		{"sse {\nupstream_retry 1m dead\n}", 3, []string{"upstream_retry", `"dead"`, "live"}},
		{"sse {\nupstream_retry 1m live live\n}", 3, []string{"upstream_retry", "arguments"}},
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
		`{"heartbeat": {"interval": -1, "prelude": "1s", "comment": "hello"}}`,
		`{"heartbeat": {"style": "auto", "pad": 65536}}`,
		`{"heartbeat": {"style": "event", "event": "ping", "pad": -1}}`,
		`{"heartbeat": {"pad": 0}}`,
		`{"resumable": "auto", "max_streams_per_client": 5, "client_key": "{http.auth.user.id}"}`,
		`{"heartbeat": {"interval": 0, "prelude": 0}}`,
		`{"heartbeat": {"interval": "1ms", "prelude": "1ms"}}`,
		`{"heartbeat": {"interval": "2562047h", "prelude": "2562047h"}}`,
		`{"heartbeat": {"interval": "1d"}}`,
		`{"cache_control": "no-cache, no-store, no-transform", "compression": "deny"}`,
		`{"cache_control": "keep", "compression": "allow"}`,
		`{"retry": {"min": "2s", "max": "5s"}}`,
		`{"retry": {"min": "2s"}}`,
		`{"share": {"key": ["Authorization", "{http.auth.user.id}"], "join": "last", "join_last": 10, "history": 1048576, "total_history": 268435456, "linger": "10s", "run_for": "1h", "lost": "off"}}`,
		`{"share": {"linger": -1, "run_for": -1}}`,
		`{"resume": {"window": "2m", "any": true, "history": 262144, "total_history": 268435456, "bind": ["{http.auth.user.id}"], "cancel": "5s", "detached": 10000, "run_for": "1h", "lost": "lost"}}`,
		`{"resume": {"window": -1}}`,
		`{"resume": {"window": "1m", "cancel": -1, "detached": -1, "run_for": -1}}`,
		`{"resume": {"window": "1m", "any": true}, "resumable": "never"}`,
		`{"retry": {"min": "2s", "max": 0}}`,
		`{"retry": {"min": "2s", "max": -1}}`,
		`{"retry": {}}`,
		`{"retry": {"min": -1}}`,
		`{"max_duration": {"duration": "1h", "jitter": -1}}`,
		`{"early_start": {}}`,
		`{"early_start": {"delay": "5s", "any": true}}`,
		`{"early_start": {"delay": -1}}`,
		`{"upstream_timeout": "2m", "write_timeout": "30s", "dead_client_timeout": 0}`,
		`{"upstream_timeout": 0, "write_timeout": 0, "dead_client_timeout": -1}`,
		`{"upstream_timeout": -1, "write_timeout": -1}`,
		`{"max_duration": {"duration": "1h", "jitter": "10m"}}`,
		`{"max_duration": {"duration": -1}}`,
		`{"max_duration": {}}`,
		`{"drain": {"reload": "10s", "exit": "3s"}}`,
		`{"drain": {"reload": -1}}`,
		`{"drain": {"exit": -1}}`,
		`{"drain": {"reload": 0, "exit": 0}}`,
		`{"max_streams": 1000, "max_streams_per_client": 5, "reconnect_on": [502, 503]}`,
		`{"max_streams": 0, "max_streams_per_client": 0, "reconnect_on": []}`,
		`{"upstream_retry": {"window": "1m", "live": true}}`,
		`{"upstream_retry": {"window": -1}}`,
		`{"max_streams": -1, "max_streams_per_client": -1}`,
	} {
		if _, err := load(t, config); err != nil {
			t.Errorf("%s: %v", config, err)
		}
	}
}

func TestInvalidJSONIsAnErrorThatSaysWhy(t *testing.T) {
	for _, test := range []struct {
		config string
		want   []string
	}{
		{`{"bogus": 1}`, []string{"bogus"}},
		{`{"heartbeat": {"bogus": 1}}`, []string{"bogus"}},
		{`{"retry": {"bogus": 1}}`, []string{"bogus"}},
		{`{"resume": {}}`, []string{"resume", "window"}},
		{`{"resume": {"window": -2}}`, []string{"resume", "window", "positive"}},
		{`{"resume": {"window": "1m", "detached": -2}}`, []string{"resume", "detached"}},
		{`{"resume": {"window": "1m", "history": -1}}`, []string{"resume", "history"}},
		{`{"resume": {"window": "1m", "store": {"store": "redis"}}}`, []string{"store"}},
		{`{"resume": {"window": "1m"}, "share": {}}`, []string{"resume", "share"}},
		{`{"heartbeat": "15s"}`, nil},
		{`{"heartbeat": {"interval": "soon"}}`, []string{"soon"}},
		{`{"heartbeat": {"interval": -2}}`, []string{"heartbeat", "positive", "-1"}},
		{`{"heartbeat": {"interval": "-15s"}}`, []string{"heartbeat", "-15s", "positive"}},
		{`{"heartbeat": {"prelude": "-1s"}}`, []string{"prelude", "-1s", "positive"}},
		{`{"heartbeat": {"interval": "999us"}}`, []string{"heartbeat", "millisecond"}},
		{`{"heartbeat": {"prelude": "1ns"}}`, []string{"prelude", "millisecond"}},
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
		{`{"heartbeat": {"interval": -1, "comment": "hello"}}`, []string{"heartbeat", "hello", "off"}},
		{`{"heartbeat": {"interval": -1, "prelude": -1, "comment": "hello"}}`, []string{"heartbeat", "hello", "off"}},
		{`{"heartbeat": {"pad": -2}}`, []string{"pad", "-2"}},
		{`{"heartbeat": {"pad": 65537}}`, []string{"pad", "65537"}},
		{`{"heartbeat": {"style": "event", "event": "ping", "pad": 1}}`, []string{"pad", "event"}},
		{`{"heartbeat": {"comment": "{http.request.host}"}}`, []string{"comment", "{http.request.host}"}},
		{`{"heartbeat": {"comment": "` + strings.Repeat("{", 200) + `"}}`, []string{"comment", "unclosed"}},
		{`{"name": "{http.request.host}"}`, []string{"name", "{http.request.host}"}},
		{`{"resumable": "maybe"}`, []string{"resumable", "maybe"}},
		{`{"client_key": "{http.auth.user.id}"}`, []string{"client_key", "max_streams_per_client"}},
		{`{"client_key": "{http.auth.user.id}", "max_streams_per_client": -1}`, []string{"client_key", "max_streams_per_client"}},
		{`{"client_key": "constant", "max_streams_per_client": 1}`, []string{"client_key", "constant"}},
		{`{"heartbeat": {"style": "line", "data": "x"}}`, []string{"data", "event"}},
		{`{"cache_control": "a\nb"}`, []string{"cache_control", "line break"}},
		{`{"compression": "maybe"}`, []string{"compression", "maybe"}},
		{`{"retry": {"max": "1s"}}`, []string{"retry"}},
		{`{"retry": {"min": "1s", "max": -2}}`, []string{"retry", "positive"}},
		{`{"retry": {"min": -1, "max": "1s"}}`, []string{"retry", "minimum"}},
		{`{"retry": {"min": "-1s"}}`, []string{"retry", "-1s"}},
		{`{"retry": {"min": "5s", "max": "2s"}}`, []string{"retry", "5s", "2s"}},
		{`{"retry": {"min": "999us"}}`, []string{"retry", "millisecond"}},
		{`{"early_start": {"delay": -2}}`, []string{"early_start", "positive", "-1"}},
		{`{"early_start": {"delay": "-1s"}}`, []string{"early_start", "-1s", "positive"}},
		{`{"early_start": {"bogus": 1}}`, []string{"bogus"}},
		{`{"early_start": {"any": true}}`, []string{"early_start", "any", "delay"}},
		{`{"early_start": {"delay": -1, "any": true}}`, []string{"early_start", "any", "delay"}},
		{`{"upstream_timeout": "-1s"}`, []string{"upstream_timeout", "-1s", "positive"}},
		{`{"write_timeout": -2}`, []string{"write_timeout", "positive"}},
		{`{"dead_client_timeout": "-1s"}`, []string{"dead_client_timeout", "-1s", "positive"}},
		{`{"max_duration": {"duration": "-1h"}}`, []string{"max_duration", "positive"}},
		{`{"max_duration": {"duration": "1h", "jitter": "-1m"}}`, []string{"max_duration", "jitter", "positive"}},
		{`{"max_duration": {"duration": "1h", "jitter": -2}}`, []string{"max_duration", "jitter"}},
		{`{"max_duration": {"jitter": "1m"}}`, []string{"max_duration", "jitter"}},
		{`{"drain": {"reload": "-1s"}}`, []string{"drain", "-1s", "positive"}},
		{`{"drain": {"exit": "-1s"}}`, []string{"drain", "exit", "-1s", "positive"}},
		{`{"max_streams": -2}`, []string{"max_streams", "-2"}},
		{`{"max_streams_per_client": -2}`, []string{"max_streams_per_client", "-2"}},
		{`{"upstream_retry": {"window": -2}}`, []string{"upstream_retry", "not a positive duration"}},
		{`{"upstream_retry": {"live": true}}`, []string{"upstream_retry", "live", "window"}},
		{`{"reconnect_on": [502, 204]}`, []string{"reconnect_on", "204", "stop"}},
		{`{"reconnect_on": [401]}`, []string{"reconnect_on", "401"}},
		{`{"reconnect_on": [403]}`, []string{"reconnect_on", "403"}},
		{`{"reconnect_on": [200]}`, []string{"reconnect_on", "200"}},
		{`{"reconnect_on": [302]}`, []string{"reconnect_on", "302"}},
		{`{"reconnect_on": [0]}`, []string{"reconnect_on", "0"}},
		{`{"reconnect_on": [-1]}`, []string{"reconnect_on", "-1"}},
		{`{"reconnect_on": ["502"]}`, nil},
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

// FuzzCaddyfile searches for tokens that crash the parser, that it accepts
// although the settings are not valid, or whose JSON means something else.
func FuzzCaddyfile(f *testing.F) {
	for _, seed := range []string{
		"sse", "sse 15s", "sse {\n}", "sse 15s {\n\tprelude off\n}", "sse {",
		"sse {\n\tname chat\n\theartbeat 15s hb\n\theartbeat_style event ping \"{}\"\n\tprelude 1s\n\tcache_control keep\n\tcompression allow\n\tretry 2s 5s\n}",
		"sse {\n\theartbeat off\n\theartbeat_style line\n}",
		"sse {\n\theartbeat 1s {\n\t\tcomment a\n\t}\n}",
		"sse {\n\theartbeat 1s `a\nb`\n}",
		"sse {\n\tretry 5s 2s\n}",
		"sse {\n\tearly_start 1s any\n\tupstream_timeout 1m\n\twrite_timeout off\n\tdead_client_timeout off\n\tmax_duration 1h 5m\n\tdrain 10s 3s\n}",
		"sse {\n\tdrain off\n\tmax_streams 10\n\tmax_streams_per_client 2\n\treconnect_on 429 502 503\n}",
		"sse {\n\tname a\n\tname b\n}",
		"sse {\n\theartbeat_style line pad 4KiB\n\tresumable never\n\tmax_streams_per_client 2 {http.auth.user.id}\n}",
		"sse {\n\tname {env.X}\n\theartbeat 1s {http.request.host}\n}",
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
		h.Name = loaded.Name // the only default that is visible
		want, _ := json.Marshal(h)
		if got, err := json.Marshal(loaded); err != nil || string(got) != string(want) {
			t.Errorf("%s came back as %s, %v", want, got, err)
		}
	})
}
