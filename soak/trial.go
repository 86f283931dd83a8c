//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A trial checks one promise: clients come back, an upstream is killed, a hop
// cuts connections, and every event is accounted for. Each trial has a Caddy, an
// upstream and a hop of its own.
type trial struct {
	name  string
	small size // beside the soak
	full  size
	site  func(size, string) string // of an upstream's address
	run   func(*stage) error
}

// size is how large a trial is.
type size struct {
	clients int
	length  time.Duration
	times   int // of what goes wrong: reloads, kills
}

var trials = []trial{
	{"once", size{100, 15 * time.Second, 2}, size{2000, 10 * time.Minute, 5}, onceSite, (*stage).once},
	{"answers", size{300, 10 * time.Second, 0}, size{10000, 2 * time.Minute, 0}, answersSite, (*stage).answers},
	{"deploys", size{100, 30 * time.Second, 2}, size{2000, 10 * time.Minute, 10}, deploysSite, (*stage).deploys},
	{"shared-deploys", size{100, 30 * time.Second, 2}, size{2000, 10 * time.Minute, 10}, sharedDeploysSite, (*stage).sharedDeploys},
	{"stalls", size{10, 20 * time.Second, 1}, size{50, 3 * time.Minute, 5}, stallsSite, (*stage).stalls},
}

func findTrials(names string) (found []trial, err error) {
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(trials, func(t trial) bool { return t.name == name })
		if i < 0 {
			return nil, fmt.Errorf("-only: no trial is called %q", name)
		}
		found = append(found, trials[i])
	}
	return found, nil
}

// runTrials runs the trials in parallel, and prints the result of each.
func runTrials(ctx context.Context, some []trial, sized func(trial) size, binary, dir string) error {
	var all sync.WaitGroup
	var printing sync.Mutex
	errs := make([]error, len(some))
	for i, t := range some {
		all.Go(func() {
			s := &stage{size: sized(t), start: time.Now(), tally: tally{reasons: make(map[string]int), missed: make(map[string]int)}}
			s.ctx = ctx
			err := s.perform(t, binary, filepath.Join(dir, t.name))
			printing.Lock()
			defer printing.Unlock()
			fmt.Printf("\n%s: %d clients, %v, took %v\n%s", t.name, s.clients, s.length, time.Since(s.start).Round(time.Second), s.report.String())
			if err != nil {
				errs[i] = fmt.Errorf("%s: %w", t.name, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// stage is what one trial uses.
type stage struct {
	size
	ctx      context.Context
	start    time.Time
	upstream *upstream
	proxy    *proxy
	hop      *hop
	tally    tally
	report   strings.Builder

	problems    complaints
	connections atomic.Int64
	events      atomic.Int64
}

func (s *stage) perform(t trial, binary, dir string) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s.upstream = new(upstream)
	if err := s.upstream.start(); err != nil {
		return err
	}
	defer func() { s.upstream.kill() }()
	if s.proxy, err = startProxy(binary, dir, t.site(s.size, s.upstream.addr), &s.tally); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.proxy.stop(), s.tally.complaints.err(), s.problems.err())
	}()
	if s.hop, err = startHop(s.proxy); err != nil {
		return err
	}
	defer func() { kill(s.hop.process) }()
	return t.run(s)
}

// say adds a line to the report.
func (s *stage) say(format string, args ...any) {
	fmt.Fprintf(&s.report, "  "+format+"\n", args...)
}

// visitors runs one client each, and returns when all have left.
func (s *stage) visitors(live func(i int, random *rand.Rand)) {
	var all sync.WaitGroup
	for i := range s.clients {
		random := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
		all.Go(func() { live(i, random) })
	}
	all.Wait()
}

// reload replaces the configuration so many times, spread evenly over the trial.
func (s *stage) reloads(ctx context.Context) error {
	for range s.times {
		if !pause(ctx, s.length/time.Duration(s.times+1)) {
			return nil
		}
		if err := s.proxy.reload(); err != nil {
			return fmt.Errorf("reload: %w", err)
		}
	}
	return nil
}

// awaitNoRuns waits until no run is left. Runs whose clients have not come back
// for the end stay for their window.
func (s *stage) awaitNoRuns(window time.Duration) error {
	for deadline := time.Now().Add(window + 20*time.Second); ; time.Sleep(200 * time.Millisecond) {
		answer, err := s.proxy.ask(http.MethodGet, "/sse/runs", "", nil)
		if err != nil {
			return err
		}
		var runs struct{ Total int }
		if err := json.Unmarshal(answer, &runs); err != nil {
			return err
		}
		if runs.Total == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d runs are left", runs.Total)
		}
	}
}

// resources reports what Caddy uses after all clients have left.
func (s *stage) resources() {
	if r, err := s.proxy.runtime(); err != nil {
		s.problems.add("%v", err)
	} else {
		s.say("Caddy afterwards: heap %.1f MiB, stacks %.1f MiB, %.0f goroutines", r.Heap/(1<<20), r.Stacks/(1<<20), r.Goroutines)
	}
	s.say("%s", s.tally.String())
}

// complaints are log lines that must not occur.
type complaints struct {
	mu   sync.Mutex
	kept []string
	more int
}

func (c *complaints) add(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.kept) == problemsKept {
		c.more++
		return
	}
	c.kept = append(c.kept, time.Now().Format(time.TimeOnly)+" "+fmt.Sprintf(format, args...))
}

func (c *complaints) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for _, text := range c.kept {
		err = errors.Join(err, errors.New(text))
	}
	if c.more > 0 {
		err = errors.Join(err, fmt.Errorf("and %d more", c.more))
	}
	return err
}

// tally counts what Caddy logs.
type tally struct {
	complaints
	mu       sync.Mutex
	lastLine []byte
	reasons  map[string]int // of streams
	ended    int            // runs
	missed   map[string]int // events, by path and user agent
}

// toldLine is what a trial reads of a log line of the module.
type toldLine struct {
	Level     string `json:"level"`
	Logger    string `json:"logger"`
	Msg       string `json:"msg"`
	Path      string `json:"path"`
	UserAgent string `json:"user_agent"`
	Reason    string `json:"reason"`
	Missed    int    `json:"missed"`
}

func (t *tally) readLog(log *bufio.Reader) error {
	for {
		line, err := log.ReadBytes('\n')
		if len(line) > 0 {
			t.line(line)
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (t *tally) last() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lastLine
}

func (t *tally) line(text []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lastLine = text
	var line toldLine
	ours := false
	if err := json.Unmarshal(text, &line); err == nil {
		ours = strings.HasPrefix(line.Logger, "http.handlers.sse")
	} else {
		t.add("Caddy printed: %s", bytes.TrimSpace(text))
		return
	}
	switch {
	case ours && line.Msg == "stream closed":
		t.reasons[line.Reason]++
		if line.Missed > 0 {
			t.missed[line.Path+" "+line.UserAgent] = line.Missed
		}
	case ours && line.Msg == "run ended":
		t.ended++
	case ours && line.Level != "info" && line.Level != "debug", bytes.Contains(text, []byte("panic")):
		t.add("Caddy logged: %s", bytes.TrimSpace(text))
	}
}

// closed is how many streams ended for a reason.
func (t *tally) closed(reason string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reasons[reason]
}

func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	for _, reason := range slices.Sorted(maps.Keys(t.reasons)) {
		fmt.Fprintf(&b, "%s %d, ", reason, t.reasons[reason])
	}
	fmt.Fprintf(&b, "%d runs ended", t.ended)
	return "streams: " + b.String()
}
