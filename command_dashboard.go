package caddysse

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// dashboardCalls are the only calls that are forwarded to the admin API, below
// /sse/.
var dashboardCalls = []string{
	"GET watch",
	"GET streams",
	"DELETE streams/{id}",
	"GET runs",
	"DELETE runs/{id}",
}

const defaultDashboardAddress = "127.0.0.1:0"

func dashboardCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dashboard [--listen <address>]",
		Short: "Shows the streams in a browser",
		Long: `
Serves a page that shows live what happens in a running Caddy: how many streams
are open, opened and ended, events and bytes per second, the longest gaps, and a
list of streams with a button to end a stream. It prints the address of the page.

The page is on the loopback interface, under a random path, and can use only this
part of the admin API. To see it from another machine, forward the port:
ssh -L 8081:127.0.0.1:8081 and --listen 127.0.0.1:8081.

--listen is the address of the page; port 0 is any free one.
` + adminHelp,
		Example: `  caddy sse dashboard
  caddy sse dashboard --listen 127.0.0.1:8081`,
		Args: cobra.NoArgs,
	}
	addAdminFlags(cmd)
	cmd.Flags().StringP("listen", "l", defaultDashboardAddress, "The address to listen on")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runDashboard)
	return cmd
}

func runDashboard(flags caddycmd.Flags) (int, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serveDashboardUntil(ctx, flags); err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse dashboard: %w", err)
	}
	return caddy.ExitCodeSuccess, nil
}

// serveDashboardUntil serves the page until ctx is done.
func serveDashboardUntil(ctx context.Context, flags caddycmd.Flags) error {
	admin, err := findAdmin(flags)
	if err != nil {
		return err
	}
	if _, err := admin.call(http.MethodGet, handlersPath); err != nil {
		return err
	}
	listener, err := listenOnLoopback(flags.String("listen"))
	if err != nil {
		return err
	}
	secret := randomPath()
	server := &http.Server{
		Handler:           newDashboardProxy(admin, secret),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
	}
	context.AfterFunc(ctx, func() { server.Close() })
	fmt.Printf("\n  Open  http://%s/%s/  in a browser. Ctrl-C ends this.\n\n", listener.Addr(), secret)
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// listenOnLoopback listens on a TCP address that only this machine can reach:
// anyone who sees the page can end streams.
func listenOnLoopback(listen string) (net.Listener, error) {
	address, err := listenAddress(listen, 0)
	if err != nil {
		return nil, err
	}
	if !isLoopback(address.Host) {
		return nil, fmt.Errorf("--listen: %q is not on the loopback interface (127.0.0.1, ::1 or localhost), "+
			"and whoever reaches the page can end streams; from another machine, forward the port by ssh -L", listen)
	}
	listener, err := net.Listen(address.Network, address.JoinHostPort(0))
	if err != nil {
		return nil, fmt.Errorf("--listen: %w; give another address, or port 0 for any free port", err)
	}
	return listener, nil
}

// isLoopback reports whether a host name means this machine for this machine
// only.
func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// randomPath is a path that can't be guessed.
func randomPath() string {
	var random [16]byte
	rand.Read(random[:]) // which never fails
	return base64.RawURLEncoding.EncodeToString(random[:])
}

// dashboardProxy serves the page and forwards its calls.
type dashboardProxy struct {
	admin adminClient
	mux   *http.ServeMux
}

func newDashboardProxy(admin adminClient, secret string) http.Handler {
	p := &dashboardProxy{admin: admin, mux: http.NewServeMux()}
	p.mux.Handle("GET /"+secret+"/{$}", theDashboard())
	for _, call := range dashboardCalls {
		method, path, _ := strings.Cut(call, " ")
		p.mux.HandleFunc(method+" /"+secret+"/"+path, func(w http.ResponseWriter, r *http.Request) { p.pass(w, r, path) })
	}
	// Another page can't read what is here, but could send a DELETE if it knew the
	// path.
	return http.NewCrossOriginProtection().Handler(p)
}

// ServeHTTP implements http.Handler. It does not answer to host names that
// someone else's DNS could have pointed at this machine.
func (p *dashboardProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = strings.Trim(r.Host, "[]")
	}
	if !isLoopback(host) {
		http.Error(w, "this page is on the loopback interface: call it localhost or 127.0.0.1", http.StatusForbidden)
		return
	}
	p.mux.ServeHTTP(w, r)
}

// idCharacters are the characters of ids. None of them has a meaning in a URI.
const idCharacters = "-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// pass forwards a call, and returns its answer as it comes.
func (p *dashboardProxy) pass(w http.ResponseWriter, r *http.Request, path string) {
	id := r.PathValue("id")
	if strings.Trim(id, idCharacters) != "" {
		http.NotFound(w, r)
		return
	}
	uri := dashboardPath + strings.Replace(path, "{id}", id, 1)
	if r.URL.RawQuery != "" {
		uri += "?" + r.URL.RawQuery
	}
	answer, err := p.admin.open(r.Context(), r.Method, uri)
	if err != nil {
		_ = writeJSON(w, http.StatusBadGateway, map[string]string{"error": err.Error()})
		return
	}
	defer answer.Body.Close()
	w.Header().Set("Content-Type", answer.Header.Get("Content-Type"))
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(answer.StatusCode)
	piece, control := make([]byte, 32<<10), http.NewResponseController(w)
	for {
		n, err := answer.Body.Read(piece)
		if _, failed := w.Write(piece[:n]); failed != nil || control.Flush() != nil {
			return
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // the browser must not treat it as the end
		}
	}
}
