//go:build interop

package clients

import (
	"regexp"
	"strconv"
	"testing"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

var demoAddress = regexp.MustCompile(`Open +(http://\S+)`)

// TestTheDemosPage pulls the plug on the page, as a visitor does.
func TestTheDemosPage(t *testing.T) {
	t.Parallel()
	home := harness.ShortTempDir(t)
	demo := harness.Start(t, harness.Command(harness.CaddyBinary(t), "sse", "demo", "--listen", "127.0.0.1:0"),
		harness.Env("HOME="+home, "XDG_DATA_HOME="+home, "XDG_CONFIG_HOME="+home))
	demo.AwaitOutput(t, "Ctrl-C ends the demo")
	visit := startChromium(t, "demo.mjs", []string{demoAddress.FindStringSubmatch(demo.Output())[1]})
	visit.awaitCount(t, "end", 1, "page")
	figures := func(way string) map[string]int {
		of := make(map[string]int)
		for _, e := range events(visit.reports(), way) {
			n, err := strconv.Atoi(e.Data)
			if err != nil {
				t.Errorf("%s: %v", way, err)
			}
			of[e.Type] = n
		}
		return of
	}
	if f := figures("plain"); f["missing"] < 4 || f["opened"] != 2 || f["asked"] != 2 {
		t.Errorf("without resume: %v", f)
	}
	if f := figures("resume"); f["missing"] != 0 || f["late"] < 4 || f["opened"] != 2 || f["asked"] != 1 {
		t.Errorf("with resume: %v", f)
	}
	for _, e := range events(visit.reports(), "page") {
		if e.Data != "true" {
			t.Errorf("%+v", e)
		}
	}
	for _, failure := range of(visit.reports(), "page", "failure") {
		t.Error(failure.Error)
	}
}
