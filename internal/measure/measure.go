//go:build linux

// Package measure tells what a process of this machine uses. It reads /proc, so
// it runs on Linux only.
package measure

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is the id of a process, which stands for its descendants too.
type Process int

// IDs are those of the process and its descendants.
func (p Process) IDs() []int {
	all := []int{int(p)}
	for i := 0; i < len(all); i++ {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", all[i]))
		if err != nil {
			continue
		}
		for _, thread := range threads {
			children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", all[i], thread.Name()))
			for pid := range strings.FieldsSeq(string(children)) {
				if n, err := strconv.Atoi(pid); err == nil {
					all = append(all, n)
				}
			}
		}
	}
	return all
}

// CPU is the processor time that has been used so far. The kernel has a clock for
// each process (clock_getcpuclockid(3)) with a finer resolution than the ticks in
// /proc.
func (p Process) CPU() (used time.Duration) {
	for _, pid := range p.IDs() {
		const scheduler = 2 // CPUCLOCK_SCHED
		var spent unix.Timespec
		if unix.ClockGettime(int32(^pid)<<3|scheduler, &spent) == nil {
			used += time.Duration(spent.Nano())
		}
	}
	return used
}

// Memory is the RAM in use, in bytes. In the proportional set size, pages that
// processes share count only once.
func (p Process) Memory() (resident, proportional float64, err error) {
	for _, pid := range p.IDs() {
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, 0, err
		}
		for line := range strings.Lines(string(rollup)) {
			fields := strings.Fields(line)
			if len(fields) < 3 || fields[2] != "kB" {
				continue
			}
			kB, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				return 0, 0, err
			}
			switch fields[0] {
			case "Rss:":
				resident += kB * 1024
			case "Pss:":
				proportional += kB * 1024
			}
		}
	}
	return resident, proportional, nil
}

// Files is the number of open descriptors.
func (p Process) Files() (n int) {
	for _, pid := range p.IDs() {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err == nil {
			n += len(entries)
		}
	}
	return n
}

// Caddy is the admin API of a Caddy.
type Caddy struct {
	client *http.Client
}

// NewCaddy is the admin API at a Unix socket. It may be made before there is one.
func NewCaddy(socket string) *Caddy {
	return &Caddy{client: &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Runtime is what Caddy reports about itself.
type Runtime struct {
	Heap, Stacks float64 // bytes in use
	Goroutines   float64
	Allocations  float64 // so far
}

// Runtime measures what is reachable after two garbage collections, because pools
// keep their objects over the first one.
func (c *Caddy) Runtime() (r Runtime, err error) {
	var heap []byte
	for range 2 {
		if heap, err = c.Ask(http.MethodGet, "/debug/pprof/heap?debug=1&gc=1", "", nil); err != nil {
			return r, err
		}
	}
	fields := map[string]*float64{
		"HeapAlloc": &r.Heap, "Stack": &r.Stacks, "Mallocs": &r.Allocations,
	}
	for line := range strings.Lines(string(heap)) {
		name, value, found := strings.Cut(strings.TrimPrefix(line, "# "), " = ")
		if into := fields[name]; found && into != nil {
			value, _, _ = strings.Cut(strings.TrimSpace(value), " ") // "# Stack = in use / of the system"
			if *into, err = strconv.ParseFloat(value, 64); err != nil {
				return r, err
			}
		}
	}
	goroutines, err := c.Ask(http.MethodGet, "/debug/pprof/goroutine?debug=1", "", nil)
	if err != nil {
		return r, err
	}
	_, err = fmt.Sscanf(string(goroutines), "goroutine profile: total %f", &r.Goroutines)
	return r, err
}

// Allocations are those so far: their number and their bytes. Unlike the profiles
// of Runtime, this call always allocates the same, whatever Caddy does.
func (c *Caddy) Allocations() (count, size float64, err error) {
	answer, err := c.Ask(http.MethodGet, "/debug/vars", "", nil)
	if err != nil {
		return 0, 0, err
	}
	var variables struct {
		MemStats struct{ Mallocs, TotalAlloc float64 } `json:"memstats"`
	}
	err = json.Unmarshal(answer, &variables)
	return variables.MemStats.Mallocs, variables.MemStats.TotalAlloc, err
}

// StatusError is an answer other than 2xx.
type StatusError struct {
	Path   string
	Status int
	Answer string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: status %d: %s", e.Path, e.Status, e.Answer)
}

// Ask calls the admin API. An answer other than 2xx is a *StatusError.
func (c *Caddy) Ask(method, path, contentType string, body []byte) ([]byte, error) {
	request, err := http.NewRequest(method, "http://127.0.0.1"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := c.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = &StatusError{Path: path, Status: response.StatusCode, Answer: string(answer)}
	}
	return answer, err
}

// RaiseFileLimit raises the limit of open files for this process and its children
// as far as the machine allows, and returns it. As root it also raises the hard
// limit, if the machine allows that.
func RaiseFileLimit() (int, error) {
	const enough = 40000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	if limit.Max < enough {
		higher := unix.Rlimit{Cur: enough, Max: enough}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, (*syscall.Rlimit)(&higher)) == nil {
			return enough, nil
		}
	}
	limit.Cur = min(limit.Max, 1<<20)
	// Not with the unix package: Go would then give its children the old limit.
	return int(limit.Cur), syscall.Setrlimit(syscall.RLIMIT_NOFILE, (*syscall.Rlimit)(&limit))
}
