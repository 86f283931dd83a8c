package caddysse

import (
	"net/http"
	"os"
	"strings"
	"testing"
)

func TestClientsThatFailOnCommentsAreKnownByWhatTheySay(t *testing.T) {
	for _, test := range []struct {
		userAgent, googClient []string
		want                  quirkFrames
	}{
		{[]string{"google-genai-sdk/3.6.0 gl-python/3.11.2"}, []string{"google-genai-sdk/3.6.0 gl-python/3.11.2"}, noFrames},
		{[]string{"app/1.0 google-genai-sdk/3.6.0 gl-python/3.11.2"}, nil, noFrames},
		{[]string{"Go-http-client/1.1"}, []string{"google-genai-sdk/1.77.0 gl-go/go1.26.0"}, noFrames},
		{[]string{"google-genai-sdk/2.17.1 gl-node/v22.0.0"}, []string{"google-genai-sdk/2.17.1 gl-node/v22.0.0"}, anyFrames},
		{nil, []string{"gl-python/3.11.2 grpc/1.60.0"}, anyFrames},
		{[]string{"google-genai-sdk/3.6.0", "gl-python/3.11.2"}, nil, anyFrames},

		{[]string{"OpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"AsyncOpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"AzureOpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"AsyncAzureOpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"my-app/2 OpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"my-app/2", "OpenAI/Python 3.57.0"}, nil, lineFrames},
		{[]string{"Groq/Python 1.7.0"}, nil, lineFrames},
		{[]string{"AsyncGroq/Python 1.7.0"}, nil, lineFrames},
		{[]string{"litellm/1.110.0"}, nil, lineFrames},
		{[]string{"litellm/1.110.0"}, []string{"google-genai-sdk/3.6.0 gl-python/3.11.2"}, noFrames},

		{[]string{"OpenAI/JS 6.1.0"}, nil, anyFrames},
		{[]string{"OpenAI/Go 3.43.0"}, nil, anyFrames},
		{[]string{"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36"}, nil, anyFrames},
		{[]string{""}, nil, anyFrames},
		{nil, nil, anyFrames},
	} {
		header := http.Header{}
		if test.userAgent != nil {
			header["User-Agent"] = test.userAgent
		}
		if test.googClient != nil {
			header["X-Goog-Api-Client"] = test.googClient
		}
		if got := quirkOf(header); got != test.want {
			t.Errorf("%v: got %d, want %d", header, got, test.want)
		}
	}
}

func TestTheDocumentationHasEveryClientThatIsSpared(t *testing.T) {
	text, err := os.ReadFile("docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
	frames := map[quirkFrames]string{lineFrames: "`line`", noFrames: "none"}
	for _, q := range quirks {
		row := "| " + q.client + " | `" + strings.Join(q.says, "`, `") + "` | " + frames[q.gets] + " | " + q.tried + " | " + orNot(q.fixed) + " |\n"
		if !strings.Contains(string(text), row) {
			t.Errorf("docs/clients.md lacks\n%s", row)
		}
	}
}

func orNot(fixed string) string {
	if fixed == "" {
		return "not yet"
	}
	return fixed
}

func TestASearchForQuirksAllocatesNothing(t *testing.T) {
	header := http.Header{"User-Agent": {strings.Repeat("x", 1000)}, "X-Goog-Api-Client": {"gl-python/3"}}
	if allocs := testing.AllocsPerRun(100, func() { quirkOf(header) }); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}
