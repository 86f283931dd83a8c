package caddysse_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-sse/caddy-sse/store"
)

func init() {
	caddy.RegisterModule(new(documentedStore))
}

// documentedStore stands for the store in the docs, which is a separate Go
// module that tests its own settings.
type documentedStore struct{}

func (*documentedStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: store.Namespace + ".redis", New: func() caddy.Module { return new(documentedStore) }}
}

func (*documentedStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	for d.Next() {
	}
	return nil
}

// documents are the pages for users.
func documents(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

func readDocument(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// caddyfiles are the code blocks of a document that are Caddyfiles.
var caddyfiles = regexp.MustCompile("(?ms)^( *)```caddyfile\n(.*?)^ *```$")

func TestEveryCaddyfileOfTheDocsAdapts(t *testing.T) {
	seen := 0
	for _, document := range documents(t) {
		for _, block := range caddyfiles.FindAllStringSubmatch(readDocument(t, document), -1) {
			config := block[2]
			if strings.Contains(config, "[<matcher>]") {
				continue // the grammar
			}
			if strings.HasPrefix(strings.TrimSpace(config), "sse") {
				config = ":8080 {\n" + config + "}\n"
			}
			seen++
			if _, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), map[string]any{"filename": document}); err != nil {
				t.Errorf("%v, in:\n%s", err, config)
			}
		}
	}
	if seen < 15 {
		t.Errorf("only %d Caddyfiles", seen)
	}
}

var (
	codeBlocks = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	headings   = regexp.MustCompile(`(?m)^#+ (.*)$`)
	links      = regexp.MustCompile(`\]\(([^)\s]*)\)`)
	noAnchor   = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors returns the anchors of a page's headings, as GitHub names them.
func anchors(text string) map[string]bool {
	all := make(map[string]bool)
	for _, heading := range headings.FindAllStringSubmatch(codeBlocks.ReplaceAllString(text, ""), -1) {
		name := noAnchor.ReplaceAllString(strings.ToLower(heading[1]), "")
		all[strings.ReplaceAll(name, " ", "-")] = true
	}
	return all
}

func TestEveryLinkOfTheDocsLeadsSomewhere(t *testing.T) {
	seen := 0
	for _, document := range documents(t) {
		text := readDocument(t, document)
		for _, link := range links.FindAllStringSubmatch(codeBlocks.ReplaceAllString(text, ""), -1) {
			file, anchor, _ := strings.Cut(link[1], "#")
			if strings.Contains(file, "://") {
				continue
			}
			seen++
			target := document
			if file != "" {
				target = filepath.Join(filepath.Dir(document), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", document, link[1], err)
			} else if anchor != "" && !anchors(readDocument(t, target))[anchor] {
				t.Errorf("%s links to %s, which has no such heading", document, link[1])
			}
		}
	}
	if seen < 50 {
		t.Errorf("only %d links", seen)
	}
}

// Docker is not available everywhere. The only step of the Dockerfile that
// could fail is the build, and CI runs exactly that.
func TestTheDockerfileOfTheDocsBuildsAsCIDoes(t *testing.T) {
	version := regexp.MustCompile(`github\.com/caddyserver/caddy/v2 v(\S+)`).FindStringSubmatch(readDocument(t, "go.mod"))
	if version == nil {
		t.Fatal("no version of Caddy in go.mod")
	}
	ci := strings.ReplaceAll(readDocument(t, ".ci/run"), "\\\n\t", "")
	build := regexp.MustCompile(`(?m)xcaddy" (build .*)$`).FindStringSubmatch(ci)
	if build == nil {
		t.Fatal("no xcaddy build in .ci/run")
	}
	const output = "/usr/bin/caddy"
	command := "xcaddy " + strings.NewReplacer(`"$caddy_version"`, "v"+version[1], `"$caddy"`, output).Replace(build[1])

	dockerfiles := regexp.MustCompile("(?ms)^```dockerfile\n(.*?)^```$").FindAllStringSubmatch(readDocument(t, "docs/deployment.md"), -1)
	if len(dockerfiles) != 1 {
		t.Fatalf("%d Dockerfiles", len(dockerfiles))
	}
	for _, line := range []string{
		"FROM caddy:" + version[1] + "-builder AS builder\n",
		"RUN " + command + "\n",
		"FROM caddy:" + version[1] + "\n",
		"COPY --from=builder " + output + " " + output + "\n",
	} {
		if !strings.Contains(dockerfiles[0][1], line) {
			t.Errorf("it lacks %q:\n%s", line, dockerfiles[0][1])
		}
	}

	without, _, _ := strings.Cut(command, " --output")
	if !strings.Contains(readDocument(t, "README.md"), "\n"+without+"\n") {
		t.Errorf("README.md has another build than %q", without)
	}
}

// handlers are the code blocks that contain the JSON of a handler.
var handlers = regexp.MustCompile("(?ms)^```json\n({\n\t\"handler\": \"sse\".*?)^```$")

func TestTheHandlersOfTheDocsAreValid(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := handlers.FindAllStringSubmatch(string(text), -1)
	if len(found) != 1 {
		t.Errorf("%d of them", len(found))
	}
	for _, block := range found {
		if _, err := load(t, strings.Replace(block[1], `"handler": "sse", `, "", 1)); err != nil {
			t.Errorf("%v, in:\n%s", err, block[1])
		}
	}
}

func TestTheMonitoringExampleServesItsMetrics(t *testing.T) {
	text, err := os.ReadFile("examples/monitoring/Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	_, site, found := strings.Cut(string(text), ":9180 {\n")
	if !found {
		t.Fatalf("no site for the metrics in:\n%s", text)
	}
	c := startCaddy(t, strings.TrimSuffix(strings.TrimSpace(site), "}"))
	cl := c.client("h1")
	res := cl.get(t, "/metrics")
	if text, err := res.text(); res.StatusCode != 200 || !strings.Contains(text, "go_goroutines") {
		t.Errorf("/metrics: %s %.200q, %v", res.Status, text, err)
	}
	res = cl.get(t, "/")
	if text, _ := res.text(); res.StatusCode != 404 {
		t.Errorf("/: %s %q", res.Status, text)
	}
}
