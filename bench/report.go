//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

type report struct {
	Started  time.Time         `json:"started"`
	Seconds  float64           `json:"seconds"`
	Machine  machine           `json:"machine"`
	Versions map[string]string `json:"versions"`
	Settings settings          `json:"settings"`
	Results  []*row            `json:"results"`
	systems  []string
}

// row is one figure of all systems.
type row struct {
	Scenario string `json:"scenario"`
	Metric   string `json:"metric"`
	Unit     string `json:"unit"`
	// Samples by system and by turn: those of the same turn were taken directly
	// after each other.
	Samples map[string]map[int]float64 `json:"samples"`
	Medians map[string]float64         `json:"medians"`
	// Ratios are those of sse to plain in the same turn.
	Ratios []float64 `json:"ratios,omitempty"`
	Ratio  float64   `json:"ratio,omitempty"`
	// Control are those of control to plain.
	Control []float64 `json:"control,omitempty"`
	Targets []target  `json:"targets,omitempty"`
}

// target is the most that sse may cost.
type target struct {
	Of   string  `json:"of,omitempty"` // relative to this system; empty: in the figure's unit
	Most float64 `json:"most"`
	Is   float64 `json:"is"`
}

// targetsOf are those of a figure.
func targetsOf(scenario, metric string) []target {
	if strings.HasPrefix(scenario, "one ") { // stream for all
		metric = "shared " + metric
	}
	return slices.Clone(targets[metric])
}

var targets = map[string][]target{
	"CPU per million events":   {{Of: "plain", Most: 1.03}},
	"resident per stream":      {{Of: "plain", Most: 1.03}},
	"proportional per stream":  {{Of: "plain", Most: 1.03}},
	"heap + stacks per stream": {{Of: "plain", Most: 1.03}},
	"latency p99":              {{Of: "plain", Most: 1.05}},

	"shared resident per client":     {{Most: 40}},
	"shared CPU per million events":  {{Of: "nginx", Most: 0.8}},
	"shared until all have it":       {{Of: "plain", Most: 0.6}, {Of: "nginx", Most: 1}},
	"shared p99 with them / without": {{Most: 1.5}},
}

func newReport(b *bench) *report {
	r := &report{
		Started:  time.Now(),
		Settings: b.settings,
		Versions: make(map[string]string),
		Machine: machine{
			CPUs:   runtime.NumCPU(),
			Model:  firstLine("/proc/cpuinfo", "model name"),
			Memory: firstLine("/proc/meminfo", "MemTotal"),
			Kernel: firstLine("/proc/sys/kernel/osrelease", ""),
			Go:     runtime.Version(),
			Load:   []string{firstLine("/proc/loadavg", "")},
		},
	}
	version, _ := exec.Command(b.caddy, "version").Output()
	for _, s := range b.systems {
		r.systems = append(r.systems, s.name)
		r.Versions[s.name] = s.version
		if s.binary == "" {
			r.Versions[s.name] = "Caddy " + strings.TrimSpace(string(version))
		}
	}
	return r
}

func (r *report) add(scenario, metric, unit, system string, turn int, value float64) {
	i := slices.IndexFunc(r.Results, func(row *row) bool { return row.Scenario == scenario && row.Metric == metric })
	if i < 0 {
		i = len(r.Results)
		r.Results = append(r.Results, &row{
			Scenario: scenario, Metric: metric, Unit: unit, Targets: targetsOf(scenario, metric),
			Samples: make(map[string]map[int]float64), Medians: make(map[string]float64),
		})
	}
	row := r.Results[i]
	if row.Samples[system] == nil {
		row.Samples[system] = make(map[int]float64)
	}
	row.Samples[system][turn] = value
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

func (w *row) sum() {
	for system, samples := range w.Samples {
		var values []float64
		for _, value := range samples {
			values = append(values, value)
		}
		w.Medians[system] = median(values)
	}
	w.Ratios, w.Control = w.ratios("sse", "plain"), w.ratios("control", "plain")
	if len(w.Ratios) > 0 {
		w.Ratio = median(w.Ratios)
	}
	// Without one of the two systems the target can't be checked.
	w.Targets = slices.DeleteFunc(w.Targets, func(t target) bool {
		return len(w.Samples["sse"]) == 0 || t.Of != "" && len(w.ratios("sse", t.Of)) == 0
	})
	for i := range w.Targets {
		t := &w.Targets[i]
		if t.Is = w.Medians["sse"]; t.Of != "" {
			t.Is = median(w.ratios("sse", t.Of))
		}
	}
}

// ratios are those of one system to another in the same turn.
func (w *row) ratios(of, to string) (ratios []float64) {
	for turn, base := range w.Samples[to] {
		if value, found := w.Samples[of][turn]; found && base > 0 {
			ratios = append(ratios, value/base)
		}
	}
	slices.Sort(ratios)
	return ratios
}

func (r *report) print(out io.Writer) {
	r.Machine.Load = append(r.Machine.Load, firstLine("/proc/loadavg", ""))
	fmt.Fprintf(out, "\n%s, %d CPUs (%s), %s, Linux %s, %s, load average %s\n", r.Started.Format("2006-01-02 15:04"),
		r.Machine.CPUs, r.Machine.Model, r.Machine.Memory, r.Machine.Kernel, r.Machine.Go, strings.Join(r.Machine.Load, ", then "))
	for _, system := range r.systems {
		fmt.Fprintf(out, "%-8s %s\n", system, r.Versions[system])
	}
	scenario := ""
	for _, row := range r.Results {
		row.sum()
		if row.Scenario != scenario {
			scenario = row.Scenario
			fmt.Fprintf(out, "\n%-44s", scenario)
			for _, system := range r.systems {
				fmt.Fprintf(out, "%10s", system)
			}
			fmt.Fprintf(out, "   sse/plain\n")
		}
		fmt.Fprintf(out, "  %-42s", row.Metric+", "+row.Unit)
		for _, system := range r.systems {
			if value, found := row.Medians[system]; found {
				fmt.Fprintf(out, "%10s", figure(value))
			} else {
				fmt.Fprintf(out, "%10s", "-")
			}
		}
		if len(row.Ratios) > 0 {
			fmt.Fprintf(out, "   %.3f", row.Ratio)
			if len(row.Ratios) > 1 {
				fmt.Fprintf(out, " (%.3f to %.3f, %d pairs)", row.Ratios[0], row.Ratios[len(row.Ratios)-1], len(row.Ratios))
			}
		}
		for _, t := range row.Targets {
			fmt.Fprint(out, t)
		}
		if len(row.Control) > 0 {
			fmt.Fprintf(out, "   control/plain %.3f (%.3f to %.3f)", median(row.Control), row.Control[0], row.Control[len(row.Control)-1])
		}
		fmt.Fprintln(out)
	}
}

func (t target) String() string {
	verdict := "met"
	if t.Is > t.Most {
		verdict = "MISSED"
	}
	switch t.Of {
	case "plain":
		return fmt.Sprintf(", target %.2f %s", t.Most, verdict)
	case "":
		return fmt.Sprintf("   target %s %s", figure(t.Most), verdict)
	}
	return fmt.Sprintf("; sse/%s %.3f, target %.2f %s", t.Of, t.Is, t.Most, verdict)
}

// figure formats a value with three significant digits.
func figure(value float64) string {
	switch size := math.Abs(value); {
	case size >= 100 || value == math.Trunc(value):
		return fmt.Sprintf("%.0f", value)
	case size >= 10:
		return fmt.Sprintf("%.1f", value)
	case size >= 1:
		return fmt.Sprintf("%.2f", value)
	default:
		return fmt.Sprintf("%.3f", value)
	}
}

func (r *report) write(path string) error {
	content, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(content, '\n'), 0o644)
}
