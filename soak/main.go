//go:build linux

// Command soak runs Caddy with this module for a long time under bad
// conditions, and looks whether anything is lost or left behind. From the root
// of the checkout:
//
//	go run ./soak            # a minute, and two around it
//	go run ./soak -for 30m
//	go run ./soak -only once -full
//
// 3,000 streams over HTTP/1.1, 2 and 3 carry random bodies in random pieces, in
// every heartbeat style. Their clients come and go, and some stall; meanwhile
// the upstream is killed, the configuration is reloaded, and streams are ended
// through the admin API. In the end
//
//   - every client's parser has seen the upstream's events, ids and reconnection
//     times, as far as its stream went;
//   - every stream was logged once, with a reason that explains what its client
//     saw, and the metrics agree at every scrape;
//   - of a thousand early ends at most four came inside an event or a write, unless
//     the machine was too busy to be on time;
//   - Caddy's heap, goroutines and descriptors are where they were.
//
// Then come trials, in a small size. In each, clients come back by the rules of an
// EventSource, or of a library that repeats its POST, and every event of a
// numbered stream is accounted for:
//
//   - once: a hop cuts connections at any byte, streams age and are drained by
//     reloads; an upstream without ids is asked once by each client (resume);
//   - answers: the same for short answers to POST, and for clients that come back
//     too late (resume);
//   - deploys, shared-deploys: an upstream is killed and comes back
//     (upstream_retry; share, and reloads);
//   - stalls: clients read slowly or not at all, and are told what that has cost
//     them (resume).
//
// With -full they take 2,000 clients and 10 minutes each, or 10,000 answers.
//
// It exits with 1 if a promise is broken.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

func main() {
	switch {
	case len(os.Args) == 3 && os.Args[1] == upstreamArgument:
		fmt.Fprintln(os.Stderr, "soak's upstream:", serveUpstream(os.Args[2]))
		os.Exit(1)
	case len(os.Args) == 4 && os.Args[1] == hopArgument:
		fmt.Fprintln(os.Stderr, "soak's hop:", serveHop(os.Args[2], os.Args[3]))
		os.Exit(1)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// warmUp is how long Caddy runs before it is measured for the first time, so that
// what it allocates once is there.
const warmUp = 15 * time.Second

// soak is one run.
type soak struct {
	streams  int
	seed     uint64
	upstream *upstream
	proxy    *proxy
	book     *ledger
	crowd    *crowd
	last     map[string]float64 // scrape
	pulse    pulse
	kills    int
	profiles string // a folder for heap profiles; empty: none are kept
}

func run() error {
	length := flag.Duration("for", 0, "how long, without the start and the end; a minute, or what a trial takes")
	streams := flag.Int("streams", 3000, "streams at a time, of the soak")
	only := flag.String("only", "", "trials, with commas between them, instead of the soak and all trials")
	isFull := flag.Bool("full", false, "trials in their full size")
	clients := flag.Int("clients", 0, "clients of a trial")
	binary := flag.String("caddy", "", "a Caddy binary with the module, instead of one that is built from the checkout")
	profile := flag.String("profile", "", "a folder to keep Caddy's heap profiles of before and after the soak in")
	seed := flag.Uint64("seed", rand.Uint64(), "of what is drawn in the soak")
	flag.Parse()

	some := trials
	if *only != "" {
		var err error
		if some, err = findTrials(*only); err != nil {
			return err
		}
	}
	files, err := measure.RaiseFileLimit()
	if err != nil {
		return err
	}
	if most := (files - 500) / 3; *streams > most {
		return fmt.Errorf("-streams: at most %d here, as a process may have %d open files", most, files)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "soak")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if *binary == "" {
		*binary = filepath.Join(dir, "caddy")
		fmt.Println("building Caddy")
		if out, err := exec.CommandContext(ctx, "go", "build", "-o", *binary, "./cmd/caddy").CombinedOutput(); err != nil {
			return fmt.Errorf("go build ./cmd/caddy, which wants the root of the checkout: %w\n%s", err, out)
		}
	} else if *binary, err = filepath.Abs(*binary); err != nil {
		return err
	}
	if *only == "" {
		s := &soak{streams: *streams, seed: *seed, profiles: *profile, book: newLedger(), upstream: new(upstream)}
		err = s.run(ctx, cmp.Or(*length, time.Minute), *binary, dir)
	}
	sized := func(t trial) size {
		sz := t.small
		if *isFull {
			sz = t.full
		}
		if *only != "" {
			sz.length = cmp.Or(*length, sz.length)
		}
		sz.clients = cmp.Or(*clients, sz.clients)
		return sz
	}
	return errors.Join(err, runTrials(ctx, some, sized, *binary, dir))
}

func (s *soak) run(ctx context.Context, length time.Duration, binary, dir string) (err error) {
	fmt.Printf("%v with %d streams, seed %d\n", length, s.streams, s.seed)
	if err := s.upstream.start(); err != nil {
		return err
	}
	defer func() { s.upstream.kill() }()
	if s.proxy, err = startProxy(binary, dir, allSites(s.upstream.addr), s.book); err != nil {
		return err
	}
	s.crowd = &crowd{proxy: s.proxy, book: s.book}
	return errors.Join(s.phases(ctx, length), s.finish())
}

func (s *soak) phases(ctx context.Context, length time.Duration) error {
	before, err := s.phase(ctx, "warm-up", warmUp, func(sample) bool { return true })
	if err != nil {
		return err
	}
	after, err := s.phase(ctx, "soak", length, func(now sample) bool { return compare(before, now) == nil })
	if err != nil {
		return err
	}
	fmt.Println()
	fmt.Println(sampleHeader)
	fmt.Println(before.line("before, idle"))
	fmt.Println(after.line("after, idle"))
	return compare(before, after)
}

// compare tolerates what varies by chance: the runtime keeps half a KiB for each
// goroutine of the largest number so far, and the module keeps the totals of each
// name. In half an hour, a leak of 20 bytes per stream would exceed that.
func compare(before, after sample) error {
	var errs []error
	for _, c := range []struct {
		what          string
		before, after float64
		slack         float64
	}{
		{"heap", before.Heap, after.Heap, 4<<20 + before.Heap/10},
		{"stacks", before.Stacks, after.Stacks, 2<<20 + before.Stacks/10},
		{"goroutines", before.Goroutines, after.Goroutines, 10},
		{"descriptors", float64(before.files), float64(after.files), 10},
	} {
		if c.after > c.before+c.slack {
			errs = append(errs, fmt.Errorf("%s: %.0f before, %.0f after", c.what, c.before, c.after))
		}
	}
	return errors.Join(errs...)
}

// phase is a time of trouble, and then calm in which it measures.
func (s *soak) phase(ctx context.Context, name string, length time.Duration, suits func(sample) bool) (sample, error) {
	trouble, end := context.WithTimeout(ctx, length)
	defer end()
	var group sync.WaitGroup
	s.seed++
	group.Go(func() { s.crowd.run(trouble, s.streams, s.seed) })
	group.Go(func() { s.pulse.run(trouble) })
	errs := make(chan error, 3)
	for _, job := range []func(context.Context) error{s.troubles, s.administer, s.watch(name, length)} {
		group.Go(func() {
			if err := job(trouble); err != nil {
				errs <- err
				end()
			}
		})
	}
	group.Wait()
	select {
	case err := <-errs:
		return sample{}, fmt.Errorf("%s: %w", name, err)
	default:
	}
	if err := ctx.Err(); err != nil {
		return sample{}, err
	}
	// A new upstream, so that no connections to the old one are left.
	s.upstream.kill()
	if err := s.upstream.start(); err != nil {
		return sample{}, err
	}
	last, err := s.calm(suits)
	if err == nil && s.profiles != "" {
		err = s.proxy.keepHeap(filepath.Join(s.profiles, name+".heap"))
	}
	return last, err
}

// calm waits until no stream is open, nothing changes any more, and what there is
// suits the caller, or until it has waited for three minutes. Some things take their
// time: if the packet that closes an HTTP/3 connection is lost, Caddy keeps the
// connection for half a minute.
func (s *soak) calm(suits func(sample) bool) (last sample, err error) {
	same := 0
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(500 * time.Millisecond) {
		if err := s.scrape(); err != nil {
			return last, err
		}
		now, err := s.sample()
		if err != nil {
			return last, err
		}
		// The descriptor of the measuring connection may or may not be included.
		still := now.Goroutines == last.Goroutines && math.Abs(float64(now.files-last.files)) <= 2
		isOver := time.Now().After(deadline)
		if s.last["streams"] == 0 && still && (isOver || suits(now)) {
			same++
		} else {
			same = 0
		}
		last = now
		if same == 6 {
			return last, nil
		}
		if isOver && same == 0 {
			return last, fmt.Errorf("no calm within three minutes: %.0f streams, %s", s.last["streams"], last.line(""))
		}
	}
}

// troubles reloads the configuration and kills the upstream.
func (s *soak) troubles(ctx context.Context) error {
	for i := 1; pause(ctx, time.Second); i++ {
		if i%13 == 0 {
			if err := s.proxy.reload(); err != nil {
				return err
			}
		}
		if i%29 == 10 {
			s.book.upstreamDies()
			s.upstream.kill()
			s.kills++
			pause(ctx, 500*time.Millisecond)
			if err := s.upstream.start(); err != nil {
				return err
			}
		}
	}
	return nil
}

// administer ends streams, two a second.
func (s *soak) administer(ctx context.Context) error {
	for pause(ctx, 2*time.Second) {
		list, err := s.proxy.list(2000)
		if err != nil {
			return err
		}
		for range min(4, len(list.Streams)) {
			if err := s.proxy.end(list.Streams[rand.IntN(len(list.Streams))].ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// watch scrapes, and prints ten lines of figures.
func (s *soak) watch(name string, length time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		fmt.Printf("\n%s, %v\n%s\n", name, length, sampleHeader)
		start, every, next := time.Now(), length/10, length/10
		for pause(ctx, time.Second) {
			if err := s.scrape(); err != nil {
				return err
			}
			took := time.Since(start)
			if took < next {
				continue
			}
			next += every
			now, err := s.sample()
			if err != nil {
				return err
			}
			fmt.Println(now.line(fmt.Sprint(took.Round(time.Second))))
		}
		return nil
	}
}

// scrape checks that every stream is in the metrics exactly once, and that no
// counter decreases.
func (s *soak) scrape() error {
	now, err := s.proxy.scrape()
	if err != nil {
		return err
	}
	if now["streams_opened_total"] != now["streams_closed_total"]+now["streams"] {
		s.book.problem("scraped: %.0f streams opened, %.0f closed, %.0f open", now["streams_opened_total"], now["streams_closed_total"], now["streams"])
	}
	for name, value := range now {
		if name != "streams" && value < s.last[name] {
			s.book.problem("scraped: %s went from %.0f to %.0f", name, s.last[name], value)
		}
	}
	s.last = now
	return nil
}

// finish ends Caddy and does the final checks.
func (s *soak) finish() error {
	err := s.proxy.stop()
	atLeast, atMost := s.book.settle()
	if answered := int(s.last["reconnects_answered_total"]); answered < atLeast || answered > atMost {
		s.book.problem("%d answers asked to come back, clients saw %d to %d", answered, atLeast, atMost)
	}
	b := s.book
	for name, closed := range s.last {
		if reason, ok := strings.CutPrefix(name, "closed/"); ok && b.reasons[reason] != int(closed) {
			b.problem("%d streams were logged as %s, the metrics have %.0f", b.reasons[reason], reason, closed)
		}
	}
	early := b.reasons["drained"] + b.reasons["max_duration"] + b.reasons["admin"]
	if b.late*250 > early && s.pulse.share() < tooBusy {
		b.problem("of %d early ends %d came inside an event or a write", early, b.late)
	}
	for _, reason := range []string{"upstream_closed", "upstream_error", "client_closed", "write_timeout", "max_duration", "drained", "admin"} {
		if b.reasons[reason] == 0 {
			b.problem("no stream ended as %s, so nothing was shown of that", reason)
		}
	}

	fmt.Printf("\n%d streams compared, %d events, %d MB; %d reloads, %d kills, %d requests refused, %d without an answer, %d early ends inside an event or a write; the machine was late for %.1f %% of the time\n",
		b.judged, b.events, b.received>>20, s.proxy.reloads, s.kills, s.crowd.refused.Load(), s.crowd.unopened.Load(), b.late, 100*s.pulse.share())
	var reasons []string
	for reason, n := range b.reasons {
		reasons = append(reasons, fmt.Sprintf("%s %d", reason, n))
	}
	slices.Sort(reasons)
	fmt.Println(strings.Join(reasons, ", "))
	for _, problem := range b.problems {
		err = errors.Join(err, errors.New(problem))
	}
	if b.more > 0 {
		err = errors.Join(err, fmt.Errorf("and %d more", b.more))
	}
	return err
}

// sample are figures of Caddy's process.
type sample struct {
	measure.Runtime
	streams  int64
	files    int
	resident float64
}

const sampleHeader = "                streams   heap MiB  stacks MiB  goroutines  descriptors  resident MiB"

func (s sample) line(title string) string {
	const mib = 1 << 20
	return fmt.Sprintf("%-14s %8d %10.1f %11.1f %11.0f %12d %13.1f", title, s.streams, s.Heap/mib, s.Stacks/mib, s.Goroutines, s.files, s.resident/mib)
}

func (s *soak) sample() (now sample, err error) {
	now.streams = s.crowd.open.Load()
	if now.Runtime, err = s.proxy.runtime(); err != nil {
		return now, err
	}
	now.files = s.proxy.process().Files()
	now.resident, _, err = s.proxy.process().Memory()
	return now, err
}
