package caddysse

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/demo"
)

// defaultDemoAddress is where the demo listens if --listen is not given and the
// port is free.
const defaultDemoAddress = "127.0.0.1:8080"

func demoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo [--listen <address>]",
		Short: "Shows in a browser what the sse handler does",
		Long: `
Starts a Caddy that proxies the same upstream twice: with the sse handler and
without it. In front of Caddy is a proxy with an idle timer of ` + demoIdle.String() + `, like that of a
load balancer or a CDN. The upstream does everything wrong on purpose: long
silences, no heartbeats, no cache headers, events cut in half. A page shows both
streams side by side, with a button that restarts the upstream. Another button
pulls the plug between the browser and Caddy, for two streams, one with resume.

It needs no other program, no configuration and no internet, and leaves no
configuration behind.

--listen is the TCP address to listen on; port 0 is any free one. The default
is ` + defaultDemoAddress + `, or another port if that one is taken.

While it runs, Caddy's admin API is at its usual address, or at another port if
that address is in use.`,
		Example: `  caddy sse demo
  caddy sse demo --listen 127.0.0.1:0`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringP("listen", "l", defaultDemoAddress, "The address to listen on")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runDemo)
	return cmd
}

func runDemo(flags caddycmd.Flags) (int, error) {
	listener, err := demoListen(flags.String("listen"), flags.Changed("listen"))
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	admin, err := demoAdmin(caddy.DefaultAdminListen)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}

	// Caddy stops on the same signals, and then ends the process. Its servers wait
	// for their streams, and these wait for the upstream.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	caddy.TrapSignals()

	if err := startDemo(ctx, listener, admin, demo.NewParts()); err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	fmt.Print(demoText(demoURL(listener.Addr()), admin))
	select {}
}

// demoText tells in the terminal what to try.
func demoText(url, admin string) string {
	return fmt.Sprintf(`
  Open  %[1]s  in a browser. Ctrl-C ends the demo.

  Press "Pull the plug": two EventSources lose their connection, and only the one
  with resume misses nothing.
  Below, two more, with the sse handler and without it: wait %[3]s for a silence
  that cuts one of them, then press "Restart the upstream".

  In another terminal:
    curl -N %[1]sevents          the bytes with sse, heartbeats too
    curl -N %[1]splain/events    the bytes without
    curl %[1]smetrics
    %[2]s
    %[4]s

`, url, demoCommandLine("list", admin), demoIdle, demoCommandLine("close", admin)+" --all")
}

// demoCommandLine is a subcommand that works with the demo from any folder.
func demoCommandLine(name, admin string) string {
	return "caddy sse " + name + " --address " + admin
}

// demoListen listens on the demo's address.
func demoListen(listen string, chosen bool) (net.Listener, error) {
	address, err := listenAddress(listen, 8080)
	if err != nil {
		return nil, fmt.Errorf("sse demo: %w", err)
	}
	listener, err := net.Listen(address.Network, address.JoinHostPort(0))
	switch {
	case err == nil:
		return listener, nil
	case chosen:
		return nil, fmt.Errorf("sse demo: --listen: %w; give another address, or port 0 for any free port", err)
	}
	address.StartPort, address.EndPort = 0, 0
	return net.Listen(address.Network, address.JoinHostPort(0))
}

// listenAddress parses --listen, which must be one TCP address.
func listenAddress(listen string, defaultPort uint) (caddy.NetworkAddress, error) {
	if _, err := strconv.ParseUint(listen, 10, 16); err == nil {
		return caddy.NetworkAddress{}, fmt.Errorf("--listen: %q is a port without a colon; write :%s", listen, listen)
	}
	address, err := caddy.ParseNetworkAddressWithDefaults(listen, "tcp", defaultPort)
	if err != nil {
		return address, fmt.Errorf("--listen: %w", err)
	}
	switch address.Network {
	case "tcp", "tcp4", "tcp6":
	default:
		return address, fmt.Errorf("--listen: %q is no TCP address, and a browser needs one", listen)
	}
	if address.PortRangeSize() != 1 {
		return address, fmt.Errorf("--listen: %q is a range of ports; give one", listen)
	}
	return address, nil
}

// demoAdmin returns the address for the admin API: the usual one, or a free port
// if that is taken. It asks the system, because two Caddys can share an address
// without noticing (SO_REUSEPORT).
func demoAdmin(usual string) (string, error) {
	address, err := caddy.ParseNetworkAddress(usual)
	if err != nil {
		return "", fmt.Errorf("sse demo: the address of the admin API: %w", err)
	}
	listener, err := net.Listen(address.Network, address.JoinHostPort(0))
	if err == nil {
		return usual, listener.Close()
	}
	if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return "", fmt.Errorf("sse demo: the admin API: %w", err)
	}
	return listener.Addr().String(), listener.Close()
}

const (
	// demoIdle is the idle timer of the proxy in front. Fastly has one of 10 s.
	demoIdle = 10 * time.Second

	// demoGracePeriod bounds how long the demo takes to end; what has not finished
	// by then is cut.
	demoGracePeriod = time.Second

	// demoServer is the name of the demo's server in Caddy's configuration.
	demoServer = "demo"
)

// startDemo starts the upstream, the page and Caddy on loopback ports of their
// own, and lets the proxy in front of Caddy use the listener. All of it ends with
// ctx.
func startDemo(ctx context.Context, listener net.Listener, admin string, parts demo.Parts) error {
	endings := new(demo.Endings)
	parts.Upstream.Endings = endings
	upstreamAddr, err := parts.Upstream.Start(ctx)
	if err != nil {
		return fmt.Errorf("sse demo: upstream: %w", err)
	}
	numbersAddr, err := serveDemoLocally(ctx, parts.Numbers)
	if err != nil {
		return fmt.Errorf("sse demo: upstream: %w", err)
	}
	pageAddr, err := serveDemoLocally(ctx, demo.Page(ctx, parts, endings, demo.About{
		List:  demoCommandLine("list", admin),
		Close: demoCommandLine("close", admin) + " --all",
	}))
	if err != nil {
		return fmt.Errorf("sse demo: page: %w", err)
	}
	if err := caddy.Run(demoConfig(admin, upstreamAddr, numbersAddr, pageAddr)); err != nil {
		return fmt.Errorf("sse demo: %w", err)
	}
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		return fmt.Errorf("sse demo: %w", err)
	}
	caddyAddr := app.(*caddyhttp.App).Servers[demoServer].Listeners()[0].Addr().String()
	hop := demo.Hop(&url.URL{Scheme: "http", Host: caddyAddr}, demoIdle, endings)
	ways := http.NewServeMux()
	ways.Handle("/", hop)
	ways.Handle("/plug/", parts.Plug.Through(hop))
	serveDemo(ctx, listener, ways)
	return nil
}

// serveDemoLocally serves on a loopback port of its own until ctx is done.
func serveDemoLocally(ctx context.Context, handler http.Handler) (addr string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	serveDemo(ctx, listener, handler)
	return listener.Addr().String(), nil
}

// serveDemo serves until ctx is done.
func serveDemo(ctx context.Context, listener net.Listener, handler http.Handler) {
	server := &http.Server{
		Handler:     handler,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	context.AfterFunc(ctx, func() { server.Close() })
	go server.Serve(listener)
}

// demoConfig has two routes to the same upstream: /events with the sse handler,
// /plain/events without it. It also has two routes to the numbers, with resume
// and without it. Everything else is the page.
func demoConfig(admin, upstream, numbers, page string) *caddy.Config {
	type object = map[string]any
	proxy := func(to string) object {
		return object{"handler": "reverse_proxy", "upstreams": []object{{"dial": to}}}
	}
	route := func(path string, handlers ...object) caddyhttp.Route {
		r := caddyhttp.Route{Terminal: true}
		if path != "" {
			r.MatcherSetsRaw = caddyhttp.RawMatcherSets{{"path": caddyconfig.JSON(caddyhttp.MatchPath{path}, nil)}}
		}
		for _, handler := range handlers {
			r.HandlersRaw = append(r.HandlersRaw, caddyconfig.JSON(handler, nil))
		}
		return r
	}
	sse := object{
		"handler": "sse", "name": "demo",
		"heartbeat":    object{"interval": "5s"},
		"retry":        object{"min": "1s", "max": "3s"},
		"reconnect_on": []int{502, 503, 504},
	}

	// The browser reconnects soon, so that one can watch it.
	plug := func(more object) object {
		handler := object{"handler": "sse", "name": "plug", "retry": object{"min": "500ms", "max": "800ms"}}
		maps.Copy(handler, more)
		return handler
	}
	resume := object{"name": "plug-resume", "resume": object{"window": "1m"}}

	persist := false
	return &caddy.Config{
		Admin: &caddy.AdminConfig{
			Listen: admin,
			Config: &caddy.ConfigSettings{Persist: &persist},
		},
		Logging: &caddy.Logging{Logs: map[string]*caddy.CustomLog{
			// The demo is about clients that leave and upstreams that are down; to
			// Caddy these are warnings and errors.
			"default": {BaseLog: caddy.BaseLog{Level: "WARN"}, Exclude: []string{
				"http.handlers.reverse_proxy", "http.handlers.sse", "http.log.error",
			}},
		}},
		AppsRaw: caddy.ModuleMap{
			"http": caddyconfig.JSON(caddyhttp.App{
				GracePeriod: caddy.Duration(demoGracePeriod),
				Servers: map[string]*caddyhttp.Server{demoServer: {
					Listen:    []string{"127.0.0.1:0"},
					Protocols: []string{"h1"},
					AutoHTTPS: &caddyhttp.AutoHTTPSConfig{Disabled: true},
					Routes: caddyhttp.RouteList{
						route("/events", sse, proxy(upstream)),
						route("/plain/events", object{"handler": "rewrite", "strip_path_prefix": "/plain"}, proxy(upstream)),
						route("/plug/plain", plug(nil), proxy(numbers)),
						route("/plug/resume", plug(resume), proxy(numbers)),
						route("/metrics", object{"handler": "metrics"}),
						route("", proxy(page)),
					},
				}},
			}, nil),
			// Caddy would leave files in the user's home directory for later runs.
			"tls": caddyconfig.JSON(object{"disable_storage_clean": true}, nil),
		},
	}
}

// demoURL is where a browser on this machine finds the page.
func demoURL(address net.Addr) string {
	tcp := address.(*net.TCPAddr)
	host := tcp.IP.String()
	if tcp.IP.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port)) + "/"
}
