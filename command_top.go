package caddysse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-sse/caddy-sse/internal/top"
)

const defaultTopOrder = "bytes"

func topCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "top [--interval <duration>] [--sort <key>] [--name <name>] [--client-ip <address>] [--path <prefix>]",
		Short: "Shows the streams in a terminal, live",
		Long: `
Shows in a terminal what happens in a running Caddy: how many streams are open,
opened and ended, events and bytes per second, and the first streams in sorted
order. It keeps running when Caddy reloads. q or Ctrl-C ends it.

--sort is a key of a stream in "caddy sse list --json": largest, longest and
newest first, text from A to Z. A leading - reverses the order.
--name, --client-ip and --path (a prefix) select streams for the list. Of these,
only --name also applies to the totals.
` + adminHelp,
		Example: `  caddy sse top
  caddy sse top --sort idle_seconds --path /chat/
  caddy sse top --interval 5s --sort=-opened_at`,
		Args: cobra.NoArgs,
	}
	addAdminFlags(cmd)
	cmd.Flags().DurationP("interval", "i", defaultWatchInterval, "How often to look")
	cmd.Flags().StringP("sort", "s", defaultTopOrder, "The key of a stream to sort by")
	cmd.Flags().StringP("name", "n", "", "Only streams of this name")
	cmd.Flags().StringP("client-ip", "", "", "Only streams of the client with this IP address")
	cmd.Flags().StringP("path", "p", "", "Only streams whose path begins with this")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runTop)
	return cmd
}

func runTop(flags caddycmd.Flags) (int, error) {
	// Restore the terminal also if it is closed, or if someone ends the process.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := watchInTerminal(ctx, flags, os.Stdin, os.Stdout); err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse top: %w", err)
	}
	return caddy.ExitCodeSuccess, nil
}

// watchInTerminal shows the streams in a terminal until ctx is done or the user
// presses a key.
func watchInTerminal(ctx context.Context, flags caddycmd.Flags, in, out *os.File) (err error) {
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	admin, err := findAdmin(flags)
	if err != nil {
		return err
	}
	asked, err := topQuery(flags)
	if err != nil {
		return err
	}
	w := &topWatch{
		admin:    admin,
		uri:      watchPath + "?" + asked.Encode(),
		interval: flags.Duration("interval"),
		news:     make(chan topNews),
	}
	// An error at the start is returned before the screen is cleared, so it stays.
	first, err := w.open(ctx)
	if err != nil {
		return err
	}
	screen, err := top.Open(in, out)
	if err != nil {
		first.Close()
		return fmt.Errorf("%w; caddy sse list prints the streams", err)
	}
	defer func() { err = errors.Join(err, screen.Close()) }()

	go w.follow(ctx, first)
	go func() {
		defer quit()
		screen.Keys(func(key byte) bool { return key != 'q' && key != 'Q' && key != ctrlC })
	}()
	return showTop(ctx, screen, top.View{Address: admin.address, Asked: topAsked(asked)}, w.news)
}

// ctrlC is what a terminal in raw mode sends for Ctrl-C.
const ctrlC = 3

// resizeWatch is how often the terminal's size is checked: not every platform
// reports changes.
const resizeWatch = 200 * time.Millisecond

// showTop shows snapshots until ctx is done.
func showTop(ctx context.Context, screen *top.Screen, view top.View, news <-chan topNews) error {
	look := time.NewTicker(resizeWatch)
	defer look.Stop()
	for {
		if err := screen.Draw(view); err != nil {
			return err
		}
		for changed := false; !changed; {
			select {
			case <-ctx.Done():
				return nil
			case n := <-news:
				changed = true
				if view.Trouble = n.trouble; n.trouble == "" {
					view.Snapshot = n.snapshot
				}
			case <-look.C:
				changed = screen.Resized()
			}
		}
	}
}

// topQuery is the query of the watch that the flags ask for.
func topQuery(flags caddycmd.Flags) (url.Values, error) {
	asked := url.Values{"interval": {flags.Duration("interval").String()}, "sort": {flags.String("sort")}}
	for key, flag := range map[string]string{"name": "name", "client_ip": "client-ip", "path": "path"} {
		value := flags.String(flag)
		if value != "" {
			asked.Set(key, value)
		} else if flags.Changed(flag) {
			return nil, fmt.Errorf("--%s: the value is missing", flag)
		}
	}
	return asked, nil
}

// topAsked is the same for people.
func topAsked(asked url.Values) string {
	text := "sort " + asked.Get("sort")
	for _, key := range filterKeys {
		if value := asked.Get(key); value != "" {
			text += "  " + strings.ReplaceAll(key, "_", " ") + " " + value
		}
	}
	return text
}

// topWatch is a watch that reconnects when it ends.
type topWatch struct {
	admin    adminClient
	uri      string
	interval time.Duration
	news     chan topNews
}

// topNews is a snapshot, or why there is none.
type topNews struct {
	snapshot top.Snapshot
	trouble  string
}

// open begins the watch.
func (w *topWatch) open(ctx context.Context) (io.ReadCloser, error) {
	answer, err := w.admin.open(ctx, http.MethodGet, w.uri)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode == http.StatusOK && isMediaType(answer.Header.Get("Content-Type"), "text/event-stream") {
		return answer.Body, nil
	}
	return nil, w.admin.refusal(ctx, answer)
}

// follow reads the watch, again and again, until ctx is done.
func (w *topWatch) follow(ctx context.Context, watch io.ReadCloser) {
	for {
		trouble := w.read(ctx, watch)
		for watch = nil; watch == nil; {
			w.tell(ctx, topNews{trouble: trouble})
			select {
			case <-ctx.Done():
				return
			case <-time.After(watchRetry):
			}
			var err error
			if watch, err = w.open(ctx); err != nil {
				watch, trouble = nil, "trying again: "+err.Error()
			}
		}
	}
}

// read passes on the snapshots of one watch, and returns why there are no more.
func (w *topWatch) read(ctx context.Context, watch io.ReadCloser) (trouble string) {
	defer watch.Close()
	// A watch that has gone silent is as bad as none.
	silent := time.AfterFunc(w.interval+adminPatience, func() { watch.Close() })
	defer silent.Stop()
	err := top.Read(watch, func(snapshot top.Snapshot) {
		silent.Reset(w.interval + adminPatience)
		snapshot.At = snapshot.At.Local()
		w.tell(ctx, topNews{snapshot: snapshot})
	})
	if err != nil {
		return "trying again: the watch broke off: " + err.Error()
	}
	return "trying again: the watch ended, as it does when Caddy reloads"
}

func (w *topWatch) tell(ctx context.Context, n topNews) {
	select {
	case w.news <- n:
	case <-ctx.Done():
	}
}
