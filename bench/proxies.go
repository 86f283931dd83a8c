//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// system is a proxy that is measured.
type system struct {
	name    string
	binary  string
	version string
	// configure writes what the proxy needs and returns its command line.
	configure func(p *proxy, changed bool) ([]string, error)
	reload    func(p *proxy) error
}

// way is how clients use a proxy.
type way struct {
	shared bool // sse shares one upstream stream; the others can't
	tls    bool // HTTP/2
}

// upstreams is how many upstream streams this many clients need.
func (p *proxy) upstreams(clients int) int {
	if p.shared && p.name == "sse" {
		return min(clients, 1)
	}
	return clients
}

// proxy is a running system.
type proxy struct {
	system
	way
	group   int // the upstream's
	dir     string
	addr    string
	origin  string
	command *exec.Cmd
	output  string         // path
	admin   *measure.Caddy // nil if it is no Caddy
	ended   chan error
}

func findSystems(names []string) ([]system, error) {
	var found []system
	for _, name := range names {
		s := system{name: name}
		switch name {
		case "plain", "control":
			s.configure, s.reload = caddyWith(""), reloadCaddy
		case "sse":
			s.configure, s.reload = caddyWith("sse"), reloadCaddy
		case "resume":
			s.configure, s.reload = caddyWith(resumeDirective), reloadCaddy
		case "nginx":
			s.configure, s.reload = configureNginx, signalled(syscall.SIGHUP)
		case "haproxy":
			s.configure, s.reload = configureHAProxy, signalled(syscall.SIGUSR2)
		default:
			return nil, fmt.Errorf("no system is called %q", name)
		}
		if name == "nginx" || name == "haproxy" {
			path, err := exec.LookPath(name)
			if err != nil {
				path, err = exec.LookPath("/usr/sbin/" + name)
			}
			if err != nil {
				fmt.Printf("%s is not installed and does not take part\n", name)
				continue
			}
			s.binary = path
			version, _ := exec.Command(path, "-v").CombinedOutput()
			s.version, _, _ = strings.Cut(string(version), "\n")
		}
		found = append(found, s)
	}
	return found, nil
}

func freeAddr() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

// start runs a system until stop.
func (b *bench) start(group int, as way) (*proxy, error) {
	dir, err := os.MkdirTemp(b.dir, "proxy")
	if err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	p := &proxy{
		system: b.systems[group], way: as, group: group, dir: dir, addr: addr,
		origin: fmt.Sprintf("127.0.0.1:%d", b.origin.ports[group]),
		output: filepath.Join(dir, "output"),
		ended:  make(chan error, 1),
	}
	if p.tls {
		if err := writeCertificate(dir); err != nil {
			return nil, err
		}
	}
	if p.binary == "" {
		p.binary = b.caddy
		p.admin = measure.NewCaddy(filepath.Join(dir, "admin"))
	}
	arguments, err := p.configure(p, false)
	if err != nil {
		return nil, err
	}
	output, err := os.Create(p.output)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	p.command = exec.Command(p.binary, arguments...)
	p.command.Dir = dir
	p.command.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	p.command.Stdout, p.command.Stderr = output, output
	p.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	go func() { p.ended <- p.command.Wait() }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return p, nil
		}
		select {
		case err := <-p.ended:
			return nil, fmt.Errorf("%s ended: %w\n%s", p.name, errors.Join(err), p.lastOutput())
		default:
		}
		if time.Now().After(deadline) {
			p.stop()
			return nil, fmt.Errorf("%s does not listen\n%s", p.name, p.lastOutput())
		}
	}
}

// stop does not wait for streams: plain Caddy never exits while one is open.
func (p *proxy) stop() {
	syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
	<-p.ended
	p.ended <- nil
}

func (p *proxy) lastOutput() string {
	output, _ := os.ReadFile(p.output)
	return string(output[max(0, len(output)-4000):])
}

func (p *proxy) process() measure.Process { return measure.Process(p.command.Process.Pid) }

func (p *proxy) path(name string) string { return filepath.Join(p.dir, name) }

func caddyWith(directive string) func(*proxy, bool) ([]string, error) {
	return func(p *proxy, changed bool) ([]string, error) {
		change := ""
		if changed {
			change = "header X-Loaded again"
		}
		directive := directive
		if p.shared && p.name == "sse" {
			directive += " {\n\t\tshare\n\t}"
		}
		scheme, certificate := "http", ""
		if p.tls {
			scheme, certificate = "https", fmt.Sprintf("tls %s %s", p.path(certificateFile), p.path(keyFile))
		}
		_, port, _ := net.SplitHostPort(p.addr)
		content := fmt.Sprintf(`{
	admin unix/%s
	persist_config off
	auto_https off
	servers {
		protocols h1 h2
	}
}
%s://:%s {
	bind 127.0.0.1
	%s
	%s
	%s
	reverse_proxy %s
}
`, p.path("admin"), scheme, port, certificate, change, directive, p.origin)
		return []string{"run", "--config", p.path("Caddyfile"), "--adapter", "caddyfile"},
			os.WriteFile(p.path("Caddyfile"), []byte(content), 0o644)
	}
}

func reloadCaddy(p *proxy) error {
	if _, err := p.configure(p, true); err != nil {
		return err
	}
	content, err := os.ReadFile(p.path("Caddyfile"))
	if err != nil {
		return err
	}
	_, err = p.admin.Ask(http.MethodPost, "/load", "text/caddyfile", content)
	return err
}

// configureNginx uses the settings that nginx's documentation recommends for
// streams.
func configureNginx(p *proxy, _ bool) ([]string, error) {
	files, err := measure.RaiseFileLimit()
	if err != nil {
		return nil, err
	}
	protocol, certificate := "", ""
	if p.tls {
		protocol = "ssl http2"
		certificate = fmt.Sprintf("ssl_certificate %s; ssl_certificate_key %s;", p.path(certificateFile), p.path(keyFile))
	}
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;"
	}
	content := fmt.Sprintf(`daemon off;
%s
worker_processes %d;
worker_rlimit_nofile %d;
pid %[4]s/pid;
error_log stderr warn;
events {
	worker_connections %[3]d;
}
http {
	access_log off;
	client_body_temp_path %[4]s/body;
	proxy_temp_path %[4]s/proxy;
	fastcgi_temp_path %[4]s/fastcgi;
	uwsgi_temp_path %[4]s/uwsgi;
	scgi_temp_path %[4]s/scgi;
	server {
		listen %[5]s %[7]s backlog=4096 reuseport;
		%[8]s
		location / {
			proxy_pass http://%[6]s;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffering off;
			proxy_read_timeout 1h;
		}
	}
}
`, user, runtime.NumCPU(), files, p.dir, p.addr, p.origin, protocol, certificate)
	return []string{"-p", p.dir, "-e", "stderr", "-c", p.path("nginx.conf")},
		os.WriteFile(p.path("nginx.conf"), []byte(content), 0o644)
}

// configureHAProxy sets abortonclose, without which it keeps the descriptors of
// clients that left, and http-no-delay, without which it delays events by 200 ms.
func configureHAProxy(p *proxy, _ bool) ([]string, error) {
	files, err := measure.RaiseFileLimit()
	if err != nil {
		return nil, err
	}
	secure := ""
	if p.tls {
		secure = "ssl crt " + p.path(bothFile) + " alpn h2"
	}
	content := fmt.Sprintf(`global
	maxconn %d
	nbthread %d
	stats socket %s mode 600 level admin expose-fd listeners
defaults
	mode http
	option abortonclose
	option http-no-delay
	timeout connect 10s
	timeout client 1h
	timeout server 1h
listen all
	bind %s %s backlog 4096
	server origin %s
`, (files-100)/2, runtime.NumCPU(), p.path("stats"), p.addr, secure, p.origin)
	return []string{"-W", "-db", "-f", p.path("haproxy.cfg")},
		os.WriteFile(p.path("haproxy.cfg"), []byte(content), 0o644)
}

func signalled(signal syscall.Signal) func(*proxy) error {
	return func(p *proxy) error {
		before := fmt.Sprint(p.process().IDs())
		if err := p.command.Process.Signal(signal); err != nil {
			return err
		}
		for deadline := time.Now().Add(10 * time.Second); fmt.Sprint(p.process().IDs()) == before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				return fmt.Errorf("no new processes after %v", signal)
			}
		}
		return nil
	}
}
