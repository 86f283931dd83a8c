package caddysse

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"net/http"
	"sync"

	"github.com/caddyserver/caddy/v2"
)

// dashboardPath is where the admin API serves the page. The page's calls are
// relative to it.
const dashboardPath = "/sse/"

//go:embed dashboard
var dashboardFiles embed.FS

// dashboardScripts make up the page's script, in this order.
var dashboardScripts = []string{"numbers.js", "asking.js", "figures.js", "streams.js", "page.js"}

// dashboard is the page, one document with everything in it, and the policy that
// lets a browser run nothing else.
type dashboard struct {
	document []byte
	policy   string
}

var theDashboard = sync.OnceValue(func() dashboard {
	read := func(name string) []byte {
		text, err := dashboardFiles.ReadFile("dashboard/" + name)
		if err != nil {
			panic(err) // a file of the embedded folder has another name
		}
		return text
	}
	var script []byte
	for _, name := range dashboardScripts {
		script = append(script, read(name)...)
	}
	style, document := read("style.css"), read("index.html")
	document = bytes.Replace(document, []byte("<style></style>"), fmt.Appendf(nil, "<style>%s</style>", style), 1)
	document = bytes.Replace(document, []byte("<script></script>"), fmt.Appendf(nil, "<script>%s</script>", script), 1)
	return dashboard{document, fmt.Sprintf("default-src 'none'; connect-src 'self'; img-src data:; style-src '%s'; script-src '%s'; "+
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'", sourceHash(style), sourceHash(script))}
})

// sourceHash is how a policy allows an inline style or script (CSP Level 3,
// section 2.3.1).
func sourceHash(source []byte) string {
	sum := sha256.Sum256(source)
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// ServeHTTP implements http.Handler.
func (d dashboard) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	header := w.Header()
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Security-Policy", d.policy)
	header.Set("Cache-Control", "no-store")
	// The admin API recognises the page's own calls by their referrer.
	header.Set("Referrer-Policy", "same-origin")
	header.Set("X-Content-Type-Options", "nosniff")
	w.Write(d.document)
}

// serveDashboard is for sites that allow browsers to use the admin API. By
// default the admin API refuses a browser's navigation, unless its origins or a
// proxy in front allow it.
func (adminAPI) serveDashboard(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Path != dashboardPath {
		return caddy.APIError{
			HTTPStatus: http.StatusNotFound,
			Message:    fmt.Sprintf("nothing is at %s", printable(r.URL.Path, 64)),
		}
	}
	if r.Method != http.MethodGet {
		return methodNotAllowed(w, r, "GET")
	}
	if _, err := parseQuery(r.URL); err != nil {
		return badRequest(err)
	}
	theDashboard().ServeHTTP(w, r)
	return nil
}
