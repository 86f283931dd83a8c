//go:build interop

package clients

import (
	_ "embed"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

//go:embed page.html
var pageOfReports string

// telling serves a page that reports to this test what its EventSources see.
// That needs a browser but no driver for it.
type telling struct {
	addr string

	mutex sync.Mutex
	seen  map[int]bool // numbers of reports, because one may be sent twice
	all   []report
}

func serveTelling(t *testing.T) *telling {
	p := &telling{seen: make(map[int]bool)}
	p.addr = harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			p.add(t, r.Body)
			return
		}
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, pageOfReports)
	})
	t.Cleanup(func() {
		if t.Failed() {
			for _, r := range p.reports() {
				t.Logf("%+v", r)
			}
		}
	})
	return p
}

func (p *telling) add(t *testing.T, body io.Reader) {
	var r struct {
		report
		Number int
	}
	if err := json.NewDecoder(body).Decode(&r); err != nil {
		return // broken off: it will be sent again
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if !p.seen[r.Number] {
		p.seen[r.Number] = true
		p.all = append(p.all, r.report)
	}
}

func (p *telling) reports() []report {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return append([]report(nil), p.all...)
}

// route returns the site's directives for the page, beside its streams.
func (p *telling) route(folder string) string {
	return `
	handle_path /` + folder + `/* {
		reverse_proxy ` + p.addr + `
	}`
}

// address returns the URL of the page with EventSources for these streams.
func (p *telling) address(base, folder string, streams ...string) string {
	query := make(url.Values)
	for _, stream := range streams {
		name, url, _ := strings.Cut(stream, "=")
		query.Set(name, url)
	}
	return base + "/" + folder + "/page?" + query.Encode()
}

// firefoxSettings keep Firefox from sending requests of its own, and from
// showing pages for new users.
const firefoxSettings = `
user_pref("app.normandy.enabled", false);
user_pref("app.update.enabled", false);
user_pref("browser.aboutwelcome.enabled", false);
user_pref("browser.safebrowsing.malware.enabled", false);
user_pref("browser.safebrowsing.phishing.enabled", false);
user_pref("browser.safebrowsing.update.enabled", false);
user_pref("browser.search.update", false);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("datareporting.healthreport.uploadEnabled", false);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("dom.push.connection.enabled", false);
user_pref("extensions.getAddons.cache.enabled", false);
user_pref("extensions.systemAddon.update.enabled", false);
user_pref("extensions.update.enabled", false);
user_pref("media.gmp-manager.url", "data:,");
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
user_pref("network.prefetch-next", false);
user_pref("services.settings.server", "data:,");
user_pref("toolkit.telemetry.reportingpolicy.firstRun", false);
`

// startFirefox opens an address in a Firefox with its own profile, which trusts
// Caddy's CA if there is one.
func startFirefox(t *testing.T, address, rootCA string) {
	firefox := harness.Program(t, "firefox-esr", "firefox-esr")
	home := harness.ShortTempDir(t)
	profile := filepath.Join(home, "profile")
	if err := os.Mkdir(profile, 0o700); err != nil {
		t.Fatal(err)
	}
	harness.WriteFile(t, profile, "user.js", firefoxSettings)
	if rootCA != "" {
		certutil := harness.Program(t, "certutil", "libnss3-tools")
		store := "sql:" + profile
		harness.Run(t, harness.Command(certutil, "-N", "--empty-password", "-d", store))
		harness.Run(t, harness.Command(certutil, "-A", "-n", "caddy", "-t", "C,,", "-i", rootCA, "-d", store))
	}
	harness.Start(t, harness.Command(firefox, "--headless", "--no-remote", "--profile", profile, address),
		harness.Env("HOME="+home, "TMPDIR="+home))
}

// startSurf opens an address in surf, a minimal browser based on WebKitGTK.
func startSurf(t *testing.T, address, _ string) {
	surf := harness.Program(t, "surf", "surf")
	home := harness.ShortTempDir(t)
	harness.Start(t, harness.Command(surf, "-t", address), // -t: accepts Caddy's certificate
		harness.Env("DISPLAY="+display(t), "HOME="+home, "XDG_CACHE_HOME="+home, "XDG_DATA_HOME="+home, "XDG_CONFIG_HOME="+home))
}

// display returns a virtual X display.
func display(t *testing.T) string {
	xvfb := harness.Program(t, "Xvfb", "xvfb")
	server := harness.Start(t, harness.Command(xvfb, "-displayfd", "1", "-screen", "0", "1280x1024x24", "-nolisten", "tcp"))
	number := ""
	harness.Eventually(t, harness.Patience, "there is a display", func() bool {
		for line := range strings.Lines(server.Output()) {
			if digits := strings.TrimSuffix(line, "\n"); len(digits) < len(line) && digits != "" && strings.Trim(digits, "0123456789") == "" {
				number = digits
			}
		}
		return number != ""
	})
	return ":" + number
}
