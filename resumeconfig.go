package caddysse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
	"github.com/caddy-sse/caddy-sse/store"
)

// Resume lets a stream outlive its client's connection: a client that reconnects
// with the id of the last event that it has gets the events after it, and then
// the live stream, without help from the upstream. If the upstream sends no ids,
// each event gets one. It is for resumable requests without MCP headers.
// Upgrades, HEAD and CONNECT are left alone, and so are streams with ids of their
// own.
type Resume struct {
	// How long a stream continues without its client. After that the upstream is
	// cancelled, as if the client had left then. What is kept of a stream that has
	// ended stays for the same time. -1: resume is off.
	Window caddy.Duration `json:"window,omitempty"`

	// Also for requests that are not resumable: for answers to POST, too. Default:
	// false.
	Any bool `json:"any,omitempty"`

	// How many bytes of events each stream keeps, overhead included. Events that
	// the client has been sent are dropped first. Events that it has not been sent
	// are never dropped: when they fill the history, the upstream is not read any
	// more.
	// Default: 256KiB.
	History int `json:"history,omitempty"`

	// How many bytes all such streams of this name keep. When that is used up, new
	// streams run without resume. Default: 256MiB.
	TotalHistory int `json:"total_history,omitempty"`

	// Placeholders whose values must be the same when a client reconnects, empty
	// values included. Default: `{http.auth.user.id}`.
	Bind []string `json:"bind,omitempty"`

	// How long a stream continues after its client has cancelled it over HTTP/2 or
	// HTTP/3 while the connection is still open, as a browser does when its page is
	// left. Default: window. -1: not at all.
	Cancel caddy.Duration `json:"cancel,omitempty"`

	// How many streams of this name may be without a client, including those that
	// have ended. The one that has been without a client longest is dropped first.
	// Default: 10000. -1: any number.
	Detached int `json:"detached,omitempty"`

	// Ends a stream at this age, however often its client has reconnected.
	// Default: no limit.
	RunFor caddy.Duration `json:"run_for,omitempty"`

	// The name of the event that tells a client what it has lost. A name that is
	// set is sent to every client, the default only to an EventSource. `off`: it is
	// sent to none. Default: `lost`.
	Lost string `json:"lost,omitempty"`

	// Where the events are also kept, so that a client can reconnect to any of
	// several nodes. Default: nowhere; a client must reconnect to the process that
	// has its stream.
	StoreRaw json.RawMessage `json:"store,omitempty" caddy:"namespace=http.handlers.sse.stores inline_key=store"`
}

const (
	defaultResumeHistory = 256 << 10
	defaultDetached      = 10_000
	defaultBind          = "{http.auth.user.id}"
)

// isOn reports whether the setting does anything.
func (r *Resume) isOn() bool { return r != nil && r.Window > 0 }

func (r *Resume) validate(resumable string, shares bool) error {
	if r == nil {
		return nil
	}
	switch {
	case shares:
		return errors.New("sse: resume and share can't be in one handler: a shared stream has many clients, and belongs to none; leave one of the two out")
	case r.Window == 0:
		return errors.New("sse: resume: it needs a window, the time that a stream goes on without its client")
	case resumable == resumableNever && !r.Any:
		return fmt.Errorf("sse: resume: with resumable %s it does nothing but for any request; add any, or leave one of the two out", resumableNever)
	}
	for setting, d := range map[string]caddy.Duration{
		"resume: window":  r.Window,
		"resume: cancel":  r.Cancel,
		"resume: run_for": r.RunFor,
	} {
		if err := validateDuration(setting, d); err != nil {
			return err
		}
	}
	if r.Detached < -1 {
		return fmt.Errorf("sse: resume: detached: %d is not a number of runs", r.Detached)
	}
	if err := validateHistory("resume", r.History, r.TotalHistory); err != nil {
		return err
	}
	if _, err := bindNames(r.Bind); err != nil {
		return err
	}
	return validateText("resume: lost", "event name", r.Lost)
}

// bindNames returns the placeholders of bind, without their braces.
func bindNames(placeholders []string) ([]string, error) {
	names := make([]string, 0, len(placeholders))
	for _, placeholder := range placeholders {
		name, opens := strings.CutPrefix(placeholder, "{")
		name, closes := strings.CutSuffix(name, "}")
		if !opens || !closes || name == "" || strings.ContainsAny(name, `{}\`) {
			return nil, fmt.Errorf("sse: resume: bind: %q is not one placeholder, such as %s", placeholder, defaultBind)
		}
		names = append(names, name)
	}
	return names, nil
}

// resumeSubdirectives is the grammar of resume's block.
var resumeSubdirectives = map[string]subdirective{
	"history":  {"<size> [<total>]", 1, 2, setResumeHistory},
	"bind":     {"<placeholder...>", 1, 64, setResumeBind},
	"cancel":   {"<duration>", 1, 1, setResumeCancel},
	"detached": {"<n>", 1, 1, setResumeDetached},
	"run_for":  {"<duration>", 1, 1, setResumeRunFor},
	"lost":     {"<event>|off", 1, 1, setResumeLost},
	"store":    {"<name> { ... }", 1, 1, nil}, // unmarshalStore reads it
}

func setResume(h *Handler, args []string) (err error) {
	h.Resume = new(Resume)
	if h.Resume.Window, err = parseDuration("resume", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if args[1] != "any" {
			return fmt.Errorf("sse: resume: %q is unknown here; the one word that may follow the window is any", args[1])
		}
		h.Resume.Any = true
	}
	return nil
}

func setResumeHistory(h *Handler, args []string) (err error) {
	if h.Resume.History, err = parseSize("resume: history", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if h.Resume.TotalHistory, err = parseTotal("resume: history: total", args[1]); err != nil {
			return err
		}
	}
	return validateHistory("resume", h.Resume.History, h.Resume.TotalHistory)
}

func setResumeBind(h *Handler, args []string) (err error) {
	h.Resume.Bind = args
	_, err = bindNames(args)
	return err
}

func setResumeCancel(h *Handler, args []string) (err error) {
	h.Resume.Cancel, err = parseDuration("resume: cancel", args[0])
	return err
}

func setResumeDetached(h *Handler, args []string) (err error) {
	h.Resume.Detached, err = parseCount("resume: detached", args[0])
	return err
}

func setResumeRunFor(h *Handler, args []string) (err error) {
	h.Resume.RunFor, err = parseDuration("resume: run_for", args[0])
	return err
}

func setResumeLost(h *Handler, args []string) error {
	h.Resume.Lost = args[0]
	return validateText("resume: lost", "event name", h.Resume.Lost)
}

// resuming is the configuration of resume, as a handler uses it.
type resuming struct {
	window  time.Duration
	cancel  time.Duration
	any     bool
	history int
	bind    []string // placeholders, without braces
	runFor  time.Duration
	budget  *journal.Budget
	session *storeSession // nil: there is no store
	warned  atomic.Int64  // unix nanoseconds of the last warning
}

// newResuming makes it, and registers the handler as one with resume; nil if that
// is off.
func newResuming(h *Handler, ctx caddy.Context) (*resuming, error) {
	config := h.Resume
	if !config.isOn() {
		return nil, nil
	}
	names := config.Bind
	if len(names) == 0 {
		names = []string{defaultBind}
	}
	bind, err := bindNames(names)
	if err != nil {
		return nil, err
	}
	rs := &resuming{
		window:  time.Duration(config.Window),
		cancel:  orDefault(config.Cancel, time.Duration(config.Window)),
		any:     config.Any,
		history: config.History,
		bind:    bind,
		runFor:  orDefault(config.RunFor, 0),
	}
	if rs.history == 0 {
		rs.history = defaultResumeHistory
	}
	total := config.TotalHistory
	if total == 0 {
		total = max(defaultTotalHistory, rs.history)
	}
	if rs.session, err = config.openStore(h, ctx); err != nil {
		return nil, err
	}
	rs.budget = h.group.budget(journal.KeepUnsent, total)
	h.lost = newLostEvent(config.Lost)
	collector.unprotected.WithLabelValues(h.Name, causeNoRoom)
	detached := config.Detached
	if detached == 0 {
		detached = defaultDetached
	}
	h.group.addResumer(h, detached)
	// A configuration is cancelled when another one has replaced it, and also when
	// loading it has failed.
	forget := func() { h.group.dropResumer(h) }
	if server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server.RegisterOnShutdown(forget)
	}
	context.AfterFunc(ctx, forget)
	return rs, nil
}

// openStore opens the store for as long as the configuration is in use; nil if
// there is none.
func (r *Resume) openStore(h *Handler, ctx caddy.Context) (*storeSession, error) {
	if r.StoreRaw == nil {
		return nil, nil
	}
	loaded, err := ctx.LoadModule(r, "StoreRaw")
	if err != nil {
		return nil, fmt.Errorf("sse: resume: store: %w", err)
	}
	opener, ok := loaded.(store.Opener)
	if !ok {
		return nil, fmt.Errorf("sse: resume: store: %T is no store", loaded)
	}
	d, err := openStoreSession(fmt.Sprintf("%T", loaded), opener)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, d.use(h.Name))
	collector.expectStore(h.Name)
	return d, nil
}

// unmarshalStore reads the line of a store, and the block after it.
func (h *Handler) unmarshalStore(d *caddyfile.Dispenser) error {
	if h.Resume.StoreRaw != nil {
		return d.Err("sse: resume: store is set twice; keep one of the two")
	}
	if !d.NextArg() {
		return d.Err("sse: resume: store: wrong number of arguments (0); usage: store <name> { ... }")
	}
	name := d.Val()
	if _, err := caddy.GetModule(store.Namespace + "." + name); err != nil {
		return d.Errf("sse: resume: store: this Caddy has none with the name %q; each is a Go module of its own, which the binary is built with", name)
	}
	module, err := caddyfile.UnmarshalModule(d, store.Namespace+"."+name)
	if err != nil {
		return err
	}
	h.Resume.StoreRaw = caddyconfig.JSONModuleObject(module, "store", name, nil)
	return nil
}
