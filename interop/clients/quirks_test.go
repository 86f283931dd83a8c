//go:build interop

package clients

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/genai"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

// serveAnswers is an LLM API, at /v1 and where Groq's SDK expects it, with or
// without ids, and Google's API, which never sends ids.
func serveAnswers(t *testing.T, withIDs bool) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		script, ids := chatScript, withIDs
		if strings.HasSuffix(r.URL.Path, ":streamGenerateContent") {
			script, ids = []string{"", part("Hel"), "", part("lo"), part("!"), ""}, false
		}
		harness.Begin(w)
		for i, text := range script {
			if text == "" {
				time.Sleep(silence)
				continue
			}
			if ids {
				text = fmt.Sprintf("id: %d\n%s", i, text)
			}
			harness.Send(w, text)
		}
	})
}

// part is one part of an answer of Google's API, which has no ids.
func part(text string) string {
	return `data: {"candidates":[{"content":{"parts":[{"text":"` + text + `"}],"role":"model"}}]}` + "\n\n"
}

// TestClientsThatFailOnCommentsAreSpared checks the table of clients in both
// directions: with it they see their answer and nothing else, and without it
// they fail. Once a client has been fixed, its entry can be removed. The ids
// that resume adds harm none of them, because clients that would fail on ids
// get none.
func TestClientsThatFailOnCommentsAreSpared(t *testing.T) {
	t.Parallel()
	caddy := harness.StartSite(t, `
	handle_path /auto/* {
		sse 1s
		reverse_proxy `+serveAnswers(t, true)+`
	}
	handle_path /block/* {
		sse 1s {
			heartbeat_style block
		}
		reverse_proxy `+serveAnswers(t, true)+`
	}
	handle_path /resume/* {
		sse 1s {
			resume 1m any
		}
		reverse_proxy `+serveAnswers(t, false)+`
	}`)
	rows := []struct {
		name, client string
		fails        bool // on comments
	}{
		{"openai-python", "openai", true},
		{"openai-python, async", "openai-async", true},
		{"openai-python, Azure", "azure", true},
		{"openai-python, Azure, async", "azure-async", true},
		{"langchain-openai", "langchain", true},
		{"groq (Python)", "groq", true},
		{"groq (Python), async", "groq-async", true},
		{"litellm, through openai-python", "litellm-openai", true},
		// It makes its own requests, without the provider's SDK.
		{"litellm", "litellm", false},
		{"Google GenAI SDK for Python", "google", true},
		{"Google GenAI SDK for Go", "google-go", true},
	}
	var streams []string
	inGo := new(goWatched)
	for _, row := range rows {
		for _, style := range []string{"auto", "block", "resume"} {
			name, url := row.client+"/"+style, caddy.URL+"/"+style
			switch row.client {
			case "google-go":
				go inGo.askGoogle(t.Context(), name, url)
			case "google":
				streams = append(streams, name+"="+url)
			default:
				streams = append(streams, name+"="+url+"/v1")
			}
		}
	}
	inPython := startPython(t, "answers.py", streams)
	t.Cleanup(func() {
		for _, closed := range caddy.ClosedStreams() {
			google := strings.HasSuffix(closed.Path, ":streamGenerateContent")
			if kept := strings.HasPrefix(closed.Path, "/resume/") && !google; (closed.Run != "") != kept {
				t.Errorf("%+v", closed)
			}
		}
	})
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var running watched = inPython
			if row.client == "google-go" {
				running = inGo
			}
			// saw returns everything that the application saw of an answer.
			saw := func(style string) string {
				name := row.client + "/" + style
				harness.Eventually(t, harness.Patience, "the answer "+name, func() bool { return len(of(running.reports(), name, "end")) > 0 })
				return fmt.Sprint(events(running.reports(), name), of(running.reports(), name, "error"))
			}
			const exact = "[{text Hello! }] []"
			if got := saw("auto"); got != exact {
				t.Errorf("auto: %s", got)
			}
			if got := saw("resume"); got != exact {
				t.Errorf("resume: %s", got)
			}
			if got := saw("block"); (got == exact) == row.fails {
				t.Errorf("block: %s; if it takes comments now, its entry in quirks.go can go", got)
			}
		})
	}
}

// askGoogle asks through Google's SDK for Go.
func (w *goWatched) askGoogle(ctx context.Context, name, url string) {
	text, err := googleAnswer(ctx, url)
	if err != nil {
		w.add(report{Stream: name, Kind: "error", Error: err.Error()})
	} else {
		w.add(report{Stream: name, Kind: "event", Type: "text", Data: text})
	}
	w.add(report{Stream: name, Kind: "end"})
}

func googleAnswer(ctx context.Context, url string) (text string, err error) {
	client, err := genai.NewClient(ctx, &genai.ClientConfig{
		APIKey: "none", Backend: genai.BackendGeminiAPI, HTTPOptions: genai.HTTPOptions{BaseURL: url},
	})
	if err != nil {
		return "", err
	}
	for chunk, err := range client.Models.GenerateContentStream(ctx, "stand-in", genai.Text("Hello"), nil) {
		if err != nil {
			return text, err
		}
		text += chunk.Text()
	}
	return text, nil
}
