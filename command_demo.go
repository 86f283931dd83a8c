package caddysse

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
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

// defaultDemoAddress is where the demo listens if nobody says otherwise and
// the port is free.
const defaultDemoAddress = "127.0.0.1:8080"

func demoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo [--listen <address>]",
		Short: "Shows in a browser what the sse handler does",
		Long: `
Starts Caddy with the sse handler in front of an upstream that does everything
wrong on purpose: no cache headers, long silences, no heartbeats, events cut in
half. A page shows what arrives, next to what arrives without the handler.

It needs no other program, no configuration and no internet, and leaves no
configuration behind.

--listen is the TCP address to listen on; port 0 is any free one. The default
is ` + defaultDemoAddress + `, or another port if that one is taken.

While it runs, Caddy's admin API is at its usual address, unless something else
is there already.`,
		Example: `  caddy sse demo
  caddy sse demo --listen 127.0.0.1:0`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringP("listen", "l", defaultDemoAddress, "The address to listen on")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runDemo)
	return cmd
}

func runDemo(flags caddycmd.Flags) (int, error) {
	address, err := demoAddress(flags.String("listen"), flags.Changed("listen"))
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	noAdmin := checkAdmin()

	// Caddy stops by the same signals, and then ends the process. Its servers
	// wait for their streams, and these for the upstream.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	caddy.TrapSignals()

	url, err := startDemo(ctx, address, noAdmin == nil, demo.NewUpstream().Handler())
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	fmt.Printf("sse demo: %s  (ctrl-C ends it)\n", url)
	fmt.Printf("to try:   curl -N %sevents\n", url)
	if noAdmin != nil {
		fmt.Printf("no admin API: %v\n", noAdmin)
	}
	select {}
}

// demoAddress reads the address that the demo shall listen on. It asks the
// system whether the address is free, since two Caddys can share one without
// either noticing (SO_REUSEPORT).
func demoAddress(listen string, chosen bool) (caddy.NetworkAddress, error) {
	if _, err := strconv.ParseUint(listen, 10, 16); err == nil {
		return caddy.NetworkAddress{}, fmt.Errorf("sse demo: --listen: %q is a port without a colon; write :%s", listen, listen)
	}
	address, err := caddy.ParseNetworkAddressWithDefaults(listen, "tcp", 8080)
	if err != nil {
		return caddy.NetworkAddress{}, fmt.Errorf("sse demo: --listen: %w", err)
	}
	switch address.Network {
	case "tcp", "tcp4", "tcp6":
	default:
		return caddy.NetworkAddress{}, fmt.Errorf("sse demo: --listen: %q is no TCP address, and a browser needs one", listen)
	}
	if address.PortRangeSize() != 1 {
		return caddy.NetworkAddress{}, fmt.Errorf("sse demo: --listen: %q is a range of ports; give one", listen)
	}
	if err := tryListen(address); err != nil {
		if chosen {
			return caddy.NetworkAddress{}, fmt.Errorf("sse demo: --listen: %w; give another address, or port 0 for any free port", err)
		}
		address.StartPort, address.EndPort = 0, 0
	}
	return address, nil
}

// checkAdmin tells why there can be no admin API at its usual address, if so.
func checkAdmin() error {
	address, err := caddy.ParseNetworkAddress(caddy.DefaultAdminListen)
	if err != nil {
		return err
	}
	return tryListen(address)
}

// tryListen tells whether an address can be listened on.
func tryListen(address caddy.NetworkAddress) error {
	listener, err := net.Listen(address.Network, address.JoinHostPort(0))
	if err != nil {
		return err
	}
	return listener.Close()
}

// startDemo starts the upstream on a loopback port of its own and Caddy in
// front of it, and returns the URL of the page. The upstream ends with ctx,
// and its streams with it.
func startDemo(ctx context.Context, address caddy.NetworkAddress, admin bool, upstream http.Handler) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("sse demo: upstream: %w", err)
	}
	server := &http.Server{
		Handler:     upstream,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	context.AfterFunc(ctx, func() { server.Shutdown(context.Background()) })
	go server.Serve(listener)

	err = caddy.Run(demoConfig(address, admin, listener.Addr().String()))
	if err != nil {
		server.Close()
		return "", fmt.Errorf("sse demo: %w", err)
	}
	return demoURL(address)
}

// demoGracePeriod bounds the demo's end: what has not finished by then is cut.
const demoGracePeriod = time.Second

// demoServer is the name of the demo's server in Caddy's configuration.
const demoServer = "demo"

// demoConfig is two ways to the same upstream: everything passes the sse
// handler, except what is below /plain.
func demoConfig(address caddy.NetworkAddress, admin bool, upstream string) *caddy.Config {
	type object = map[string]any
	handlers := func(handlers ...object) []json.RawMessage {
		var raw []json.RawMessage
		for _, handler := range handlers {
			raw = append(raw, caddyconfig.JSON(handler, nil))
		}
		return raw
	}
	sse := object{"handler": "sse", "name": "demo", "heartbeat": object{"interval": "5s"}}
	proxy := object{"handler": "reverse_proxy", "upstreams": []object{{"dial": upstream}}}
	strip := object{"handler": "rewrite", "strip_path_prefix": "/plain"}

	persist := false
	// A client that leaves a stream is a warning to reverse_proxy; here it is
	// every second click.
	quiet := []string{"http.handlers.reverse_proxy"}
	if !admin {
		quiet = append(quiet, "admin") // warns that it is disabled, which the demo says itself
	}
	return &caddy.Config{
		Admin: &caddy.AdminConfig{
			Disabled: !admin,
			Config:   &caddy.ConfigSettings{Persist: &persist},
		},
		Logging: &caddy.Logging{Logs: map[string]*caddy.CustomLog{
			"default": {BaseLog: caddy.BaseLog{Level: "WARN"}, Exclude: quiet},
		}},
		AppsRaw: caddy.ModuleMap{
			"http": caddyconfig.JSON(caddyhttp.App{
				GracePeriod: caddy.Duration(demoGracePeriod),
				Servers: map[string]*caddyhttp.Server{demoServer: {
					Listen:    []string{address.String()},
					Protocols: []string{"h1"},
					AutoHTTPS: &caddyhttp.AutoHTTPSConfig{Disabled: true},
					Routes: caddyhttp.RouteList{
						{
							MatcherSetsRaw: caddyhttp.RawMatcherSets{{
								"path": caddyconfig.JSON(caddyhttp.MatchPath{"/plain/*"}, nil),
							}},
							HandlersRaw: handlers(strip, proxy),
							Terminal:    true,
						},
						{HandlersRaw: handlers(sse, proxy)},
					},
				}},
			}, nil),
			// Caddy would leave files in the user's home for later runs.
			"tls": caddyconfig.JSON(object{"disable_storage_clean": true}, nil),
		},
	}
}

// demoURL asks the running server where it is, since port 0 was any free port.
func demoURL(address caddy.NetworkAddress) (string, error) {
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		return "", fmt.Errorf("sse demo: %w", err)
	}
	listeners := app.(*caddyhttp.App).Servers[demoServer].Listeners()
	_, port, err := net.SplitHostPort(listeners[0].Addr().String())
	if err != nil {
		return "", fmt.Errorf("sse demo: %w", err)
	}
	host := address.Host
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port) + "/", nil
}
