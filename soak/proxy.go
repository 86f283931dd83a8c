//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// site is a part of the configuration, which answers to /<name>/….
type site struct {
	name       string
	directives string // of sse
	// event is the type of the heartbeats, where they are events.
	event string
	// retryMin and retryMax are of the `retry` that is configured, in
	// milliseconds; 0 where none is.
	retryMin, retryMax uint64
	early              bool // starts before the upstream has answered
}

var sites = []site{
	{name: "block", directives: "max_duration 5s 10s\nreconnect_on 502", retryMin: 100, retryMax: 1000},
	{name: "line", directives: "heartbeat_style line"},
	{name: "event", directives: "heartbeat_style event soak-heartbeat beat", event: "soak-heartbeat"},
	{name: "early", directives: "early_start 1s any", early: true},
}

// reloadDigit stands for the last digit of the number of the reload in a
// configuration.
const reloadDigit = "<reload>"

// allSites is the configuration of all of them.
func allSites(upstream string) string {
	var handles strings.Builder
	for _, s := range sites {
		handles.WriteString(s.block(upstream))
	}
	return handles.String()
}

// block names the site line after the number of the reload: a client is ended by
// one reload a minute at most, and that is counted by name. Ten reloads take
// longer than a drain matters.
func (s site) block(upstream string) string {
	name := s.name
	if name == "line" {
		name += reloadDigit
	}
	retry := ""
	if s.retryMax > 0 {
		retry = fmt.Sprintf("retry %dms %dms\n", s.retryMin, s.retryMax)
	}
	return fmt.Sprintf(`
	handle /%[1]s/* {
		sse 1s {
			name %[5]s
			write_timeout 5s
			drain 4s 1s
			%[2]s
			%[3]s
		}
		reverse_proxy %[4]s
	}
`, s.name, s.directives, retry, upstream, name)
}

// proxy is Caddy with the module, in a process of its own.
type proxy struct {
	dir     string
	site    string // its configuration
	plain   string // address without TLS
	secure  string // address with it: HTTP/2 and HTTP/3
	reloads int
	command *exec.Cmd
	admin   *measure.Caddy
	logged  chan error // the log was read to its end
}

// startProxy starts it. What it prints goes to a logReader.
func startProxy(binary, dir, site string, log logReader) (*proxy, error) {
	p := &proxy{
		dir: dir, site: site, admin: measure.NewCaddy(filepath.Join(dir, "admin")), logged: make(chan error, 1),
	}
	var err error
	if p.plain, err = freeAddr(); err != nil {
		return nil, err
	}
	if p.secure, err = freeAddr(); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "Caddyfile"), []byte(p.config()), 0o600); err != nil {
		return nil, err
	}
	p.command = exec.Command(binary, "run", "--config", "Caddyfile")
	p.command.Dir = dir
	p.command.Env = append(os.Environ(), "XDG_DATA_HOME="+filepath.Join(dir, "data"), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"))
	p.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// A pipe of our own: Wait would close one of the command before the last
	// lines are read.
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.command.Stdout, p.command.Stderr = writer, writer
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	writer.Close()
	go func() { p.logged <- log.readLog(bufio.NewReaderSize(reader, 1<<20)) }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("tcp", p.secure); err == nil {
			conn.Close()
			return p, nil
		}
		if time.Now().After(deadline) {
			p.stop()
			return nil, fmt.Errorf("caddy does not listen; the last it said: %s", log.last())
		}
	}
}

func freeAddr() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

// logReader reads what Caddy prints.
type logReader interface {
	readLog(log *bufio.Reader) error
	last() []byte // line
}

// config differs from reload to reload, so that Caddy loads it.
func (p *proxy) config() string {
	_, plain, _ := net.SplitHostPort(p.plain)
	_, secure, _ := net.SplitHostPort(p.secure)
	return fmt.Sprintf(`{
	admin unix/%s
	persist_config off
	auto_https disable_redirects
	skip_install_trust
	metrics
	log {
		format json
	}
}
(site) {
	bind 127.0.0.1
	header X-Reloads %d
	%s
}
http://:%s {
	import site
}
https://localhost:%s {
	tls internal
	import site
}
`, filepath.Join(p.dir, "admin"), p.reloads, strings.ReplaceAll(p.site, reloadDigit, strconv.Itoa(p.reloads%10)), plain, secure)
}

// again tries what a reload may get in the way of: Caddy replaces the admin API's
// listener too, and takes connections away with it.
func again(try func() error) (err error) {
	for range 3 {
		err = try()
		if _, answered := errors.AsType[*measure.StatusError](err); err == nil || answered {
			break
		}
	}
	return err
}

func (p *proxy) ask(method, path, contentType string, body []byte) (answer []byte, err error) {
	err = again(func() error {
		answer, err = p.admin.Ask(method, path, contentType, body)
		return err
	})
	return answer, err
}

func (p *proxy) runtime() (r measure.Runtime, err error) {
	err = again(func() error {
		r, err = p.admin.Runtime()
		return err
	})
	return r, err
}

// keepHeap writes a profile of the heap, for go tool pprof.
func (p *proxy) keepHeap(file string) error {
	profile, err := p.ask(http.MethodGet, "/debug/pprof/heap?gc=1", "", nil)
	if err != nil {
		return err
	}
	return os.WriteFile(file, profile, 0o600)
}

func (p *proxy) reload() error {
	p.reloads++
	_, err := p.ask(http.MethodPost, "/load", "text/caddyfile", []byte(p.config()))
	return err
}

func (p *proxy) process() measure.Process { return measure.Process(p.command.Process.Pid) }

// stop ends it as `systemctl stop` does, or, if it takes too long, at once.
func (p *proxy) stop() error {
	_ = p.command.Process.Signal(syscall.SIGTERM)
	ended := make(chan error, 1)
	go func() { ended <- p.command.Wait() }()
	select {
	case err := <-ended:
		return errors.Join(err, <-p.logged)
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		return errors.Join(errors.New("caddy had to be killed, 30 s after SIGTERM"), <-ended)
	}
}

// listed are streams as the admin API lists them.
type listed struct {
	Streams []struct {
		ID string `json:"id"`
	} `json:"streams"`
	Total int `json:"total"`
}

func (p *proxy) list(limit int) (l listed, err error) {
	answer, err := p.ask(http.MethodGet, "/sse/streams?limit="+strconv.Itoa(limit), "", nil)
	if err != nil {
		return l, err
	}
	return l, json.Unmarshal(answer, &l)
}

// end asks for the end of a stream, which may have ended already.
func (p *proxy) end(id string) error {
	_, err := p.ask(http.MethodDelete, "/sse/streams/"+url.PathEscape(id), "", nil)
	if status, ok := errors.AsType[*measure.StatusError](err); ok && status.Status == http.StatusNotFound {
		return nil
	}
	return err
}

// scrape is the sum of each of the module's metrics over its labels; those of
// streams that closed are there by reason too, as "closed/<reason>".
func (p *proxy) scrape() (map[string]float64, error) {
	answer, err := p.ask(http.MethodGet, "/metrics", "", nil)
	if err != nil {
		return nil, err
	}
	return readMetrics(string(answer))
}

// metricByLabel is the sums of a metric by one of its labels, for people.
func metricByLabel(text, metric, label string) string {
	sums := make(map[string]float64)
	for line := range strings.Lines(text) {
		labels, ours := strings.CutPrefix(line, metric+"{")
		_, value, labelled := strings.Cut(labels, label+`="`)
		if !ours || !labelled {
			continue
		}
		value, _, _ = strings.Cut(value, `"`)
		number, _ := strconv.ParseFloat(line[strings.LastIndex(line, " ")+1:len(line)-1], 64)
		sums[value] += number
	}
	var parts []string
	for _, value := range slices.Sorted(maps.Keys(sums)) {
		parts = append(parts, fmt.Sprintf("%s %.0f", value, sums[value]))
	}
	return strings.Join(parts, ", ")
}

func readMetrics(text string) (map[string]float64, error) {
	sums := make(map[string]float64)
	for line := range strings.Lines(text) {
		rest, ours := strings.CutPrefix(strings.TrimSpace(line), "caddy_sse_")
		if !ours {
			continue
		}
		series, value, _ := strings.Cut(rest, " ")
		number, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("metric %q: %w", line, err)
		}
		name, labels, _ := strings.Cut(series, "{")
		sums[name] += number
		if name == "streams_closed_total" {
			_, reason, _ := strings.Cut(labels, `reason="`)
			reason, _, _ = strings.Cut(reason, `"`)
			sums["closed/"+reason] += number
		}
	}
	return sums, nil
}
