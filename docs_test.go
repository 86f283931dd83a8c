package caddysse_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// caddyfiles are the code blocks of a document that are Caddyfiles.
var caddyfiles = regexp.MustCompile("(?ms)^( *)```caddyfile\n(.*?)^ *```$")

func TestEveryCaddyfileOfTheDocsAdapts(t *testing.T) {
	var documents []string
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, found...)
	}
	seen := 0
	for _, document := range documents {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range caddyfiles.FindAllStringSubmatch(string(text), -1) {
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
		t.Errorf("only %d Caddyfiles in %q", seen, documents)
	}
}

// handlers are the code blocks that are the JSON of a handler.
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
