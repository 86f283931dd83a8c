//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processes are the proxy and its children.
func (p *proxy) processes() []int {
	all := []int{p.command.Process.Pid}
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

// cpu is the processor time of the proxy's processes so far. The kernel keeps a
// clock for each (clock_getcpuclockid(3)), finer than the ticks in /proc.
func (p *proxy) cpu() (used time.Duration) {
	for _, pid := range p.processes() {
		const scheduler = 2 // CPUCLOCK_SCHED
		var spent unix.Timespec
		if unix.ClockGettime(int32(^pid)<<3|scheduler, &spent) == nil {
			used += time.Duration(spent.Nano())
		}
	}
	return used
}

// memory is what the proxy's processes have in RAM. Pages that they share count
// once in the proportional set size.
func (p *proxy) memory() (resident, proportional float64, err error) {
	for _, pid := range p.processes() {
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

// files are the open descriptors.
func (p *proxy) files() (n int) {
	for _, pid := range p.processes() {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err == nil {
			n += len(entries)
		}
	}
	return n
}

// goRuntime is what Caddy says of itself.
type goRuntime struct {
	heap, stacks, goroutines float64
	allocations              float64 // so far
}

// goRuntime asks Caddy's admin endpoint. After collections, only what is
// reachable is left: two, as the first one leaves pools their victims.
func (p *proxy) goRuntime() (r goRuntime, err error) {
	var heap []byte
	for range 2 {
		if heap, err = p.ask(http.MethodGet, "/debug/pprof/heap?debug=1&gc=1", "", nil); err != nil {
			return r, err
		}
	}
	fields := map[string]*float64{
		"HeapAlloc": &r.heap, "Stack": &r.stacks, "Mallocs": &r.allocations,
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
	goroutines, err := p.ask(http.MethodGet, "/debug/pprof/goroutine?debug=1", "", nil)
	if err != nil {
		return r, err
	}
	_, err = fmt.Sscanf(string(goroutines), "goroutine profile: total %f", &r.goroutines)
	return r, err
}

// allocations are those so far: how many, how many bytes. Unlike the profiles
// of goRuntime, asking for them allocates the same whatever Caddy runs.
func (p *proxy) allocations() (count, size float64, err error) {
	answer, err := p.ask(http.MethodGet, "/debug/vars", "", nil)
	if err != nil {
		return 0, 0, err
	}
	var variables struct {
		MemStats struct{ Mallocs, TotalAlloc float64 } `json:"memstats"`
	}
	err = json.Unmarshal(answer, &variables)
	return variables.MemStats.Mallocs, variables.MemStats.TotalAlloc, err
}

// ask calls Caddy's admin API.
func (p *proxy) ask(method, path, contentType string, body []byte) ([]byte, error) {
	request, err := http.NewRequest(method, "http://127.0.0.1"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := p.admin.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, response.Status, answer)
	}
	return answer, err
}

// machine is where a run took place.
type machine struct {
	CPUs   int    `json:"cpus"`
	Model  string `json:"cpu_model"`
	Memory string `json:"memory"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	// Load is the load average at the start and at the end: what else the
	// machine was doing.
	Load []string `json:"load_average"`
}

func firstLine(path, prefix string) string {
	file, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if rest, found := strings.CutPrefix(lines.Text(), prefix); found {
			return strings.TrimSpace(strings.TrimLeft(rest, "\t :"))
		}
	}
	return ""
}
