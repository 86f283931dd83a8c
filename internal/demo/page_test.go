package demo

import (
	"net/http"
	"net/http/httptest"
	"regexp"
	"testing"
)

func TestThePageRefersOnlyToWhatIsServed(t *testing.T) {
	handler := Page(t.Context(), NewParts(), new(Endings), About{})
	get := func(path string) *httptest.ResponseRecorder {
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, httptest.NewRequest("GET", path, nil))
		return recorder
	}

	page := get("/")
	if page.Code != http.StatusOK || page.Header().Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("status %d, Content-Type %q", page.Code, page.Header().Get("Content-Type"))
	}
	types := map[string]string{
		"demo.js":   "text/javascript; charset=utf-8",
		"style.css": "text/css; charset=utf-8",
		"icon.svg":  "image/svg+xml",
	}
	references := regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(page.Body.String(), -1)
	if len(references) != len(types)+1 {
		t.Errorf("the page refers to %q", references)
	}
	for _, reference := range references {
		file := reference[1]
		if file == "metrics" {
			continue // Caddy's
		}
		if got := get("/" + file); got.Code != http.StatusOK || got.Header().Get("Content-Type") != types[file] {
			t.Errorf("%s: status %d, Content-Type %q", file, got.Code, got.Header().Get("Content-Type"))
		}
	}
	if got := get("/plug.js"); got.Code != http.StatusOK || got.Header().Get("Content-Type") != types["demo.js"] {
		t.Errorf("plug.js, which demo.js imports: status %d, Content-Type %q", got.Code, got.Header().Get("Content-Type"))
	}
	if got := get("/nothing"); got.Code != http.StatusNotFound {
		t.Errorf("status %d for a file that is not there", got.Code)
	}
}
