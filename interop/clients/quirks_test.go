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

// serveAnswers is an LLM API that sends ids with its events, under /v1 and where
// Groq's SDK looks for it, and Google's API.
func serveAnswers(t *testing.T) (addr string) {
	return harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		script, ids := chatScript, true
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

// part is one of an answer of Google's API, which has no ids.
func part(text string) string {
	return `data: {"candidates":[{"content":{"parts":[{"text":"` + text + `"}],"role":"model"}}]}` + "\n\n"
}

// TestClientsThatFailOnCommentsAreSpared holds the table of clients to be true in
// both directions: with it they see their answer and nothing else, and without it
// they fail. One that has been fixed is an entry that can go.
func TestClientsThatFailOnCommentsAreSpared(t *testing.T) {
	caddy := harness.StartSite(t, `
	handle_path /auto/* {
		sse 1s
		reverse_proxy `+serveAnswers(t)+`
	}
	handle_path /block/* {
		sse 1s {
			heartbeat_style block
		}
		reverse_proxy `+serveAnswers(t)+`
	}`)
	for _, row := range []struct {
		name, path string
		start      func(t *testing.T, streams []string) watched
		fails      bool // on comments
	}{
		{"openai-python", "/v1", answersIn("openai"), true},
		{"openai-python, Azure", "/v1", answersIn("azure"), true},
		{"langchain-openai", "/v1", answersIn("langchain"), true},
		{"groq (Python)", "/v1", answersIn("groq"), true},
		// What it asks by itself, and not through an SDK of the provider's.
		{"litellm", "/v1", answersIn("litellm"), false},
		{"Google GenAI SDK for Python", "", answersIn("google"), true},
		{"Google GenAI SDK for Go", "", func(t *testing.T, streams []string) watched { return askGoogle(t, streams) }, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			running := row.start(t, []string{"auto=" + caddy.URL + "/auto" + row.path, "block=" + caddy.URL + "/block" + row.path})
			harness.Eventually(t, patience, "both answers", func() bool {
				all := running.reports()
				return len(of(all, "auto", "end")) > 0 && len(of(all, "block", "end")) > 0
			})
			all := running.reports()
			if got := fmt.Sprint(events(all, "auto"), of(all, "auto", "error")); got != "[{text Hello! }] []" {
				t.Errorf("auto: %s", got)
			}
			if got := fmt.Sprint(events(all, "block"), of(all, "block", "error")); (got == "[{text Hello! }] []") == row.fails {
				t.Errorf("block: %s; if it takes comments now, its entry in quirks.go can go", got)
			}
		})
	}
}

func answersIn(client string) func(*testing.T, []string) watched {
	return func(t *testing.T, streams []string) watched {
		return startPython(t, "answers.py", append([]string{client}, streams...))
	}
}

// askGoogle asks with Google's SDK for Go, at each URL in turn.
func askGoogle(t *testing.T, streams []string) *goWatched {
	w := new(goWatched)
	for _, stream := range streams {
		name, url, _ := strings.Cut(stream, "=")
		text, err := googleAnswer(t.Context(), url)
		if err != nil {
			w.add(report{Stream: name, Kind: "error", Error: err.Error()})
		} else {
			w.add(report{Stream: name, Kind: "event", Type: "text", Data: text})
		}
		w.add(report{Stream: name, Kind: "end"})
	}
	return w
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
