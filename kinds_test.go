package caddysse

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const noCache = "Cache-Control: no-cache"

func TestWhoComesBackIsToldByTheRequest(t *testing.T) {
	nobody, comesBack, eventSource := kind{}, kind{resumable: true}, kind{resumable: true, eventSource: true}
	for _, test := range []struct {
		who    string
		method string
		accept []string
		header []string

		auto, always, never kind
	}{
		{"an EventSource", "GET", []string{"text/event-stream"}, []string{noCache, "Pragma: no-cache"},
			eventSource, eventSource, nobody},
		{"an EventSource whose Pragma a hop took", "GET", []string{"text/event-stream"}, []string{noCache},
			eventSource, eventSource, nobody},
		{"an EventSource whose Cache-Control a hop took", "GET", []string{"text/event-stream"}, []string{"Pragma: No-Cache"},
			eventSource, eventSource, nobody},
		{"Cache-Control with more in it", "GET", []string{"text/event-stream"}, []string{"Cache-Control: max-age=0, no-cache"},
			eventSource, eventSource, nobody},
		{"Cache-Control without no-cache", "GET", []string{"text/event-stream"}, []string{"Cache-Control: no-store", "Cache-Control: x-no-cache"},
			comesBack, comesBack, nobody},
		{"an SDK that reads a finite answer", "GET", []string{"text/event-stream"}, nil,
			comesBack, comesBack, nobody},
		{"with parameters", "GET", []string{"Text/Event-Stream; charset=utf-8;q=0.9,"}, nil,
			comesBack, comesBack, nobody},
		{"other types refused", "GET", []string{"text/event-stream, text/html;q=0, */*; q=0.0"}, []string{noCache},
			eventSource, eventSource, nobody},

		{"Datastar", "GET", []string{"text/event-stream, text/html, application/json"}, nil,
			nobody, comesBack, nobody},
		{"htmx", "GET", []string{"text/html, text/event-stream"}, nil,
			nobody, comesBack, nobody},
		{"a wildcard beside it", "GET", []string{"text/event-stream", "*/*;q=0.1"}, []string{noCache},
			nobody, eventSource, nobody},
		{"a wildcard", "GET", []string{"*/*"}, []string{noCache},
			nobody, eventSource, nobody},
		{"refused", "GET", []string{"text/event-stream;q=0"}, nil,
			nobody, comesBack, nobody},
		{"no Accept", "GET", nil, nil,
			nobody, comesBack, nobody},

		{"POST", "POST", []string{"text/event-stream"}, []string{noCache},
			nobody, nobody, nobody},
		{"OPTIONS", "OPTIONS", []string{"text/event-stream"}, nil,
			nobody, nobody, nobody},
		{"an MCP session", "GET", []string{"text/event-stream"}, []string{noCache, "Mcp-Session-Id: 1"},
			nobody, nobody, nobody},
		{"MCP without a session", "GET", []string{"text/event-stream"}, []string{"MCP-Protocol-Version: 2025-11-25"},
			nobody, nobody, nobody},
		{"MCP of 2026", "GET", []string{"text/event-stream"}, []string{"Mcp-Method:"},
			nobody, nobody, nobody},
	} {
		r := httptest.NewRequest(test.method, "/", nil)
		for _, value := range test.accept {
			r.Header.Add("Accept", value)
		}
		for _, line := range test.header {
			field, value, _ := strings.Cut(line, ":")
			r.Header.Add(field, strings.TrimSpace(value))
		}
		for setting, want := range map[string]kind{
			"": test.auto, "auto": test.auto, "always": test.always, "never": test.never,
		} {
			if got := kindOf(r, acceptOf(r.Header), setting); got != want {
				t.Errorf("%s, resumable %q: got %+v, want %+v", test.who, setting, got, want)
			}
		}
	}
}

func TestWhatAcceptNames(t *testing.T) {
	for _, test := range []struct {
		lines []string
		want  accept
	}{
		{nil, accept{}},
		{[]string{""}, accept{}},
		{[]string{"text/event-stream"}, accept{eventStream: true, only: true}},
		{[]string{"", "text/event-stream,"}, accept{eventStream: true, only: true}},
		{[]string{"text/event-stream", "text/event-stream;q=0.5"}, accept{eventStream: true, only: true}},
		{[]string{"application/json, text/event-stream"}, accept{eventStream: true}},
		{[]string{"text/event-stream", "*/*"}, accept{eventStream: true}},
		{[]string{"text/event-stream, application/json;q=0"}, accept{eventStream: true, only: true}},
		{[]string{"text/event-stream; q=0.000"}, accept{}},
		{[]string{"text/*"}, accept{}},
		{[]string{`text/html; x=", text/event-stream"`}, accept{}},
	} {
		if got := acceptOf(http.Header{"Accept": test.lines}); got != test.want {
			t.Errorf("%q: got %+v, want %+v", test.lines, got, test.want)
		}
	}
}
