package caddysse

import (
	"crypto/sha256"
	"encoding/base64"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// adminPage returns the page as the admin API serves it.
func adminPage(t *testing.T) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	if err := (adminAPI{}).serveDashboard(w, httptest.NewRequest(http.MethodGet, dashboardPath, nil)); err != nil {
		t.Fatal(err)
	}
	return w
}

func TestThePageIsOneDocumentThatRunsNothingElse(t *testing.T) {
	w := adminPage(t)
	page, policy := w.Body.String(), w.Header().Get("Content-Security-Policy")
	for _, part := range []struct{ directive, name string }{{"style-src", "style"}, {"script-src", "script"}} {
		found := regexp.MustCompile(`(?s)<`+part.name+`>(.*?)</`+part.name+`>`).FindAllStringSubmatch(page, -1)
		if len(found) != 1 || len(found[0][1]) < 1000 {
			t.Fatalf("%d of <%s>", len(found), part.name)
		}
		sum := sha256.Sum256([]byte(found[0][1]))
		if want := part.directive + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "';"; !strings.Contains(policy, want) {
			t.Errorf("%s is not in the policy %s", want, policy)
		}
	}
	for _, want := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("%s is not in the policy %s", want, policy)
		}
	}
	for header, want := range map[string]string{
		"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store",
		"Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
	} {
		if got := w.Header().Get(header); got != want {
			t.Errorf("%s is %q", header, got)
		}
	}
	// Nothing from other hosts, and no attributes that the policy would block.
	for _, reference := range regexp.MustCompile(`\s(?:src|href|action|on[a-z]+|style)="([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if target := reference[1]; target != "data:," && !strings.HasPrefix(target, "#") {
			t.Errorf("the page has %s", reference[0])
		}
	}
	if addresses := regexp.MustCompile(`https?://[^"]*`).FindAllString(page, -1); len(addresses) != 1 || addresses[0] != "http://www.w3.org/2000/svg" {
		t.Errorf("the page names %q", addresses) // that one is a namespace
	}
}

// The script puts what clients have sent into the page only through properties
// that take text.
func TestTheScriptMakesNoMarkupOfText(t *testing.T) {
	page := adminPage(t).Body.String()
	for _, word := range []string{
		"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "createContextualFragment", "setHTML", "srcdoc",
	} {
		if strings.Contains(page, word) {
			t.Errorf("the script has %s", word)
		}
	}
}

func TestEveryFileOfThePageIsInIt(t *testing.T) {
	page := adminPage(t).Body.String()
	files, err := fs.Glob(dashboardFiles, "dashboard/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := dashboardFiles.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(file, ".html") && !strings.Contains(page, string(text)) {
			t.Errorf("%s is not", file)
		}
	}
	if len(files) != 2+len(dashboardScripts) {
		t.Errorf("there are %q", files)
	}
}

// If the script looked for an id that the document lacks, it would stop.
func TestTheScriptFindsWhatItLooksFor(t *testing.T) {
	page := adminPage(t).Body.String()
	asked := regexp.MustCompile(`\$\("([^"]*)"\)`).FindAllStringSubmatch(page, -1)
	for _, id := range asked {
		if !strings.Contains(page, ` id="`+id[1]+`"`) {
			t.Errorf("nothing has the id %s", id[1])
		}
	}
	if len(asked) < 30 {
		t.Errorf("it looks for %d", len(asked))
	}
	// Columns and orders are keys of a stream.
	for _, key := range regexp.MustCompile(`\{key: "([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if _, err := parseOrder(key[1]); err != nil {
			t.Error(err)
		}
	}
}
