//go:build linux

// Command bench measures what this module costs: Caddy with sse in front of
// reverse_proxy beside the same Caddy without it, nginx and HAProxy, all on
// loopback on one machine. From the root of the checkout:
//
//	go run ./bench           # about 35 minutes
//	go run ./bench -quick    # about 3 minutes, to see that it works
//
// It prints a table and writes JSON. nginx and HAProxy take part if they are
// installed. Each system is a process of its own, and so is the upstream; the
// clients are in this one. Systems take turns, so that what else the machine
// does meets all of them, and a ratio is the median of those between neighbours
// in time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// bench is one run.
type bench struct {
	settings settings
	dir      string // temporary
	caddy    string // path of the binary
	systems  []system
	origin   *origin
	report   *report
	context  context.Context
}

// settings are part of the report.
type settings struct {
	Rounds        int           `json:"rounds"`
	Quiet         []int         `json:"quiet_streams"`
	Beats         time.Duration `json:"heartbeat_window_ns"`
	Streams       int           `json:"event_streams"`
	Rate          int           `json:"events_per_second"`
	Windows       int           `json:"event_windows_per_round"`
	Window        time.Duration `json:"event_window_ns"`
	BurstStreams  int           `json:"burst_streams"`
	Bursts        int           `json:"bursts_per_round"`
	Churn         int           `json:"churn_streams"`
	ChurnWorkers  int           `json:"churn_workers"`
	ReloadStreams int           `json:"reload_streams"`
	SharedStreams int           `json:"shared_streams"`
	StalledEvents int           `json:"stalled_events"`
}

func full() settings {
	return settings{
		Rounds: 3, Quiet: []int{2000, 10000}, Beats: 20 * time.Second,
		Streams: 1000, Rate: 10000, Windows: 6, Window: 2 * time.Second,
		BurstStreams: 5000, Bursts: 5, Churn: 5000, ChurnWorkers: 50, ReloadStreams: 5000,
		SharedStreams: 5000, StalledEvents: 12,
	}
}

func quick() settings {
	return settings{
		Rounds: 1, Quiet: []int{200, 500}, Beats: 3 * time.Second,
		Streams: 100, Rate: 2000, Windows: 2, Window: time.Second,
		BurstStreams: 300, Bursts: 2, Churn: 200, ChurnWorkers: 20, ReloadStreams: 200,
		SharedStreams: 300, StalledEvents: 4,
	}
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == originArgument {
		serveOrigin()
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	isQuick := flag.Bool("quick", false, "small sizes, one round")
	rounds := flag.Int("rounds", 0, "rounds, instead of 3")
	quiet := flag.String("streams", "", "numbers of quiet streams, instead of 2000,10000")
	eventStreams := flag.Int("event-streams", 0, "streams that get events, instead of 1000")
	rate := flag.Int("rate", 0, "events per second over all streams, instead of 10000")
	windows := flag.Int("windows", 0, "measurements of events per round, instead of 6")
	burst := flag.Int("burst-streams", 0, "streams of a burst, instead of 5000")
	churn := flag.Int("churn", 0, "streams that are opened and closed, instead of 5000")
	reload := flag.Int("reload-streams", 0, "streams that are open at a reload, instead of 5000")
	shared := flag.Int("shared-streams", 0, "clients of one stream, instead of 5000")
	only := flag.String("only", strings.Join(scenarioNames(), ","), "scenarios")
	names := flag.String("systems", "plain,sse,nginx,haproxy", "systems; control is plain Caddy again, and its ratio to plain shows the effect of chance")
	binary := flag.String("caddy", "", "a Caddy binary with the module, instead of one that is built from the checkout")
	output := flag.String("json", "bench.json", "file for the results")
	profiles := flag.String("profile", "", "folder for CPU profiles of both Caddys, taken after the scenarios")
	limit := flag.Duration("timeout", time.Hour, "give up after this time")
	flag.Parse()

	s := full()
	if *isQuick {
		s = quick()
	}
	for flagged, setting := range map[*int]*int{
		rounds: &s.Rounds, eventStreams: &s.Streams, rate: &s.Rate, windows: &s.Windows,
		burst: &s.BurstStreams, churn: &s.Churn, reload: &s.ReloadStreams,
		shared: &s.SharedStreams,
	} {
		if *flagged > 0 {
			*setting = *flagged
		}
	}
	if *quiet != "" {
		s.Quiet = nil
		for text := range strings.SplitSeq(*quiet, ",") {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 {
				return fmt.Errorf("-streams: %q is not a number of streams", text)
			}
			s.Quiet = append(s.Quiet, n)
		}
	}
	wanted := strings.Split(*only, ",")
	for _, name := range wanted {
		if !slices.Contains(scenarioNames(), name) {
			return fmt.Errorf("-only: no scenario is called %q", name)
		}
	}
	files, err := measure.RaiseFileLimit()
	if err != nil {
		return err
	}
	// A proxy needs two descriptors per stream.
	for _, n := range append(pointers(s.Quiet), &s.BurstStreams, &s.ReloadStreams, &s.Streams, &s.SharedStreams) {
		if most := (files - 200) / 2; *n > most {
			fmt.Printf("%d streams instead of %d: a process may have %d open files here\n", most, *n, files)
			*n = most
		}
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// An unprivileged user that a program switches to must be able to read it.
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}

	b := &bench{settings: s, dir: dir, caddy: *binary, context: ctx}
	if b.caddy == "" {
		b.caddy = filepath.Join(dir, "caddy")
		fmt.Println("building Caddy")
		build := exec.CommandContext(ctx, "go", "build", "-o", b.caddy, "./cmd/caddy")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("go build ./cmd/caddy, which wants the root of the checkout: %w\n%s", err, out)
		}
	}
	if b.systems, err = findSystems(strings.Split(*names, ",")); err != nil {
		return err
	}
	if b.origin, err = startOrigin(len(b.systems)); err != nil {
		return err
	}
	defer b.origin.stop()
	b.report = newReport(b)

	err = b.scenarios(wanted)
	if err == nil && *profiles != "" {
		err = b.profile(*profiles)
	}
	// What was measured before an error is still shown.
	b.report.Seconds = time.Since(b.report.Started).Seconds()
	b.report.print(os.Stdout)
	return errors.Join(err, b.report.write(*output))
}

func (b *bench) scenarios(wanted []string) error {
	for _, scenario := range scenarios {
		if !slices.Contains(wanted, scenario.name) {
			continue
		}
		if err := scenario.run(b); err != nil {
			return fmt.Errorf("%s: %w", scenario.name, err)
		}
	}
	return nil
}

func pointers(numbers []int) []*int {
	var all []*int
	for i := range numbers {
		all = append(all, &numbers[i])
	}
	return all
}

// turns are the systems of a round, starting with a different one in each.
func (b *bench) turns(round int) []int {
	order := make([]int, len(b.systems))
	for i := range order {
		order[i] = (i + round) % len(order)
	}
	// Neighbours also swap, so that no system always comes after a heavy one.
	if round/len(order)%2 == 1 {
		slices.Reverse(order)
	}
	return order
}

// each runs a measurement for every system in every round, with a fresh process.
func (b *bench) each(title string, as way, measure func(p *proxy, sample func(metric, unit string, value float64)) error) error {
	for round := range b.settings.Rounds {
		for _, i := range b.turns(round) {
			if err := b.context.Err(); err != nil {
				return err
			}
			fmt.Printf("%s, round %d of %d, %s\n", title, round+1, b.settings.Rounds, b.systems[i].name)
			p, err := b.start(i, as)
			if err != nil {
				return err
			}
			err = measure(p, func(metric, unit string, value float64) {
				b.report.add(title, metric, unit, b.systems[i].name, round, value)
			})
			p.stop()
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", b.systems[i].name, err, p.lastOutput())
			}
			if err := b.origin.awaitNone(i, 20*time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}
