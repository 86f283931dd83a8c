package caddysse

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

const monitoringDir = "examples/monitoring"

// monitoringQueries returns the queries in the monitoring examples, by where
// they are.
func monitoringQueries(t *testing.T) map[string]string {
	t.Helper()
	queries := make(map[string]string)

	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(monitoringDir, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &rules); err != nil {
		t.Fatal(err)
	}
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			queries["alert "+rule.Alert] = rule.Expr
			if rule.For == "" || rule.Labels["severity"] == "" || rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("alert %s is incomplete: %+v", rule.Alert, rule)
			}
		}
	}

	var dashboard struct {
		Title      string
		Templating struct {
			List []struct{ Name, Type, Definition string }
		}
		Panels []struct {
			ID          int
			Type, Title string
			Description string
			Datasource  struct{ UID string }
			Targets     []struct{ Expr string }
			GridPos     struct{ H, W, X, Y int }
		}
	}
	text, err = os.ReadFile(filepath.Join(monitoringDir, "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	hasDatasource := false
	for _, variable := range dashboard.Templating.List {
		hasDatasource = hasDatasource || variable.Name == "datasource" && variable.Type == "datasource"
		if variable.Definition != "" {
			queries["variable "+variable.Name] = variable.Definition
		}
	}
	if !hasDatasource {
		t.Error("the dashboard has no variable for the data source")
	}
	ids := make(map[int]bool)
	for _, panel := range dashboard.Panels {
		if ids[panel.ID] {
			t.Errorf("panel %d is there twice", panel.ID)
		}
		ids[panel.ID] = true
		if panel.Type == "row" {
			continue
		}
		if panel.Description == "" || len(panel.Targets) == 0 || panel.Datasource.UID != "${datasource}" || panel.GridPos.X+panel.GridPos.W > 24 {
			t.Errorf("panel %s is incomplete: %+v", panel.Title, panel)
		}
		for i, target := range panel.Targets {
			queries["panel "+panel.Title+" "+string(rune('A'+i))] = target.Expr
		}
	}
	return queries
}

// knownMetrics returns the metrics of the module and their labels, as used in
// queries.
func knownMetrics(t *testing.T) map[string][]string {
	t.Helper()
	describe := func(c prometheus.Collector) map[string][]string {
		described := make(map[string][]string)
		descs := make(chan *prometheus.Desc)
		go func() { c.Describe(descs); close(descs) }()
		description := regexp.MustCompile(`fqName: "([^"]*)".*variableLabels: \{([^}]*)\}`)
		for desc := range descs {
			parts := description.FindStringSubmatch(desc.String())
			if parts == nil {
				t.Fatalf("a metric is described as %s", desc)
			}
			described[parts[1]] = strings.Split(parts[2], ",")
		}
		return described
	}
	known := describe(collector)
	for _, vector := range collector.vectors() {
		if _, ok := vector.(*prometheus.HistogramVec); !ok {
			continue
		}
		for name, labels := range describe(vector) {
			delete(known, name)
			known[name+"_sum"], known[name+"_count"] = labels, labels
			known[name+"_bucket"] = append(slices.Clone(labels), "le")
		}
	}
	return known
}

var (
	queriedMetric = regexp.MustCompile(`caddy_sse_[a-z_]+(\{[^}]*\})?`)
	queriedLabel  = regexp.MustCompile(`([a-z_]+)\s*(=~|!~|!=|=)\s*"`)
	groupedLabels = regexp.MustCompile(`\b(?:by|without|on|ignoring)\s*\(([^)]*)\)`)
	shownLabel    = regexp.MustCompile(`\$labels\.([a-z_]+)`)
)

func TestEveryQueryOfTheMonitoringExampleNamesWhatExists(t *testing.T) {
	known := knownMetrics(t)
	used := make(map[string]bool)
	for where, query := range monitoringQueries(t) {
		metrics := queriedMetric.FindAllStringSubmatch(query, -1)
		if len(metrics) == 0 {
			t.Errorf("%s: no metric of this module in %s", where, query)
		}
		var labels []string // of all metrics in the query
		for _, metric := range metrics {
			name, _, _ := strings.Cut(metric[0], "{")
			own, ok := known[name]
			if !ok {
				t.Errorf("%s: there is no %s", where, name)
			}
			used[name] = true
			labels = append(labels, own...)
			for _, label := range queriedLabel.FindAllStringSubmatch(metric[1], -1) {
				if !slices.Contains(own, label[1]) {
					t.Errorf("%s: %s has no label %s, only %q", where, name, label[1], own)
				}
			}
		}
		for _, group := range groupedLabels.FindAllStringSubmatch(query, -1) {
			for label := range strings.SplitSeq(group[1], ",") {
				if label = strings.TrimSpace(label); !slices.Contains(labels, label) {
					t.Errorf("%s: no metric in it has the label %s", where, label)
				}
			}
		}
		if strings.Count(query, "(") != strings.Count(query, ")") || strings.Count(query, "{") != strings.Count(query, "}") {
			t.Errorf("%s: the brackets in %s do not match", where, query)
		}
	}
	text, err := os.ReadFile(filepath.Join(monitoringDir, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, label := range shownLabel.FindAllStringSubmatch(string(text), -1) {
		if !slices.Contains([]string{"name", "cause", "limit", "op", "status"}, label[1]) {
			t.Errorf("an alert shows the label %s", label[1])
		}
	}
	for name := range known {
		base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"), "_sum")
		if !used[name] && !used[base+"_bucket"] {
			t.Errorf("%s is neither on the dashboard nor in an alert", name)
		}
	}
}

func TestTheReasonsInTheMonitoringExampleExist(t *testing.T) {
	reason := regexp.MustCompile(`reason\s*=~?\s*"([^"]*)"`)
	for where, query := range monitoringQueries(t) {
		for _, match := range reason.FindAllStringSubmatch(query, -1) {
			for name := range strings.SplitSeq(match[1], "|") {
				if name == "" || !slices.Contains(reasonNames[:], name) {
					t.Errorf("%s: there is no reason %s", where, name)
				}
			}
		}
	}
}

func TestTheCaddyfileOfTheMonitoringExampleIsValid(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(monitoringDir, "Caddyfile"))
	if err != nil {
		t.Fatal(err)
	}
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt(text, map[string]any{"filename": "Caddyfile"})
	if err != nil || len(warnings) > 0 {
		t.Fatalf("%v, %v", warnings, err)
	}
	var parsed caddy.Config
	if err := json.Unmarshal(config, &parsed); err != nil {
		t.Fatal(err)
	}
	parsed.Admin = &caddy.AdminConfig{Disabled: true}
	if err := caddy.Validate(&parsed); err != nil {
		t.Error(err)
	}
}

var bucketMatcher = regexp.MustCompile(`\ble(=~?|!~?)"([^"]*)"`)

// The text format has le="1", OpenMetrics has le="1.0".
func TestQueriesForABucketFindItInBothFormats(t *testing.T) {
	found := false
	for where, query := range monitoringQueries(t) {
		for _, match := range bucketMatcher.FindAllStringSubmatch(query, -1) {
			found = true
			one, err := regexp.Compile("^(?:" + match[2] + ")$")
			if match[1] != "=~" || err != nil || !one.MatchString("1") || !one.MatchString("1.0") || one.MatchString("10") {
				t.Errorf("%s: %s", where, match[0])
			}
		}
	}
	if !found {
		t.Error("no query for a bucket")
	}
}
