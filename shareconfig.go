package caddysse

import (
	"fmt"
	"math"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// Share uses one upstream stream for all resumable requests without a body that
// have the same scheme, host, URI, `Origin`, `root` and key. The upstream sees
// nothing else of a client, so access control must come before this handler.
// Clients start at an event boundary and get whole events.
type Share struct {
	// Header fields, and placeholders in braces: requests share a stream only if
	// their values are the same. `Accept`, `Accept-Encoding`, `Forwarded`, `Host`,
	// `Last-Event-ID`, `X-Forwarded-*` and hop-by-hop fields can't be named.
	Key []string `json:"key,omitempty"`

	// Where a new client starts: `live`, with what comes from now on, or `last`,
	// with the last events. Default: `live`.
	Join string `json:"join,omitempty"`

	// With how many events, at most. Required by join `last`, and only used there.
	JoinLast int `json:"join_last,omitempty"`

	// How many bytes of events each run keeps for clients that reconnect or fall
	// behind, overhead included. The newest event is always kept. Default: 1MiB.
	History int `json:"history,omitempty"`

	// How many bytes all shared runs of this name keep. Above that the oldest
	// events of the longest journal are dropped, and no new run begins. Default:
	// 256MiB.
	TotalHistory int `json:"total_history,omitempty"`

	// How long a run stays after its last client has left. Default: 10s. -1: not at
	// all.
	Linger caddy.Duration `json:"linger,omitempty"`

	// Ends a run at this age. Default: no limit.
	RunFor caddy.Duration `json:"run_for,omitempty"`

	// The name of the event that tells a client what it has lost. A name that is
	// set is sent to every client, the default only to an EventSource. `off`: it is
	// sent to none. Default: `lost`.
	Lost string `json:"lost,omitempty"`
}

const (
	joinLive = "live"
	joinLast = "last"

	defaultShareHistory = 1 << 20
	defaultTotalHistory = 256 << 20
	defaultLinger       = 10 * time.Second
)

func (s *Share) validate(resumable string) error {
	if s == nil {
		return nil
	}
	if resumable == resumableNever {
		return fmt.Errorf("sse: share: with resumable %s no request shares a stream; leave one of the two out", resumableNever)
	}
	if _, err := newShareNames(s.Key); err != nil {
		return err
	}
	switch s.Join {
	case "", joinLive:
		if s.JoinLast != 0 {
			return fmt.Errorf("sse: share: join: a number of events needs join %s", joinLast)
		}
	case joinLast:
		if s.JoinLast <= 0 {
			return fmt.Errorf("sse: share: join: %d is not a positive number of events", s.JoinLast)
		}
	default:
		return fmt.Errorf("sse: share: join: unknown value %q; it is %s, or %s with a number", s.Join, joinLive, joinLast)
	}
	if err := validateHistory("share", s.History, s.TotalHistory); err != nil {
		return err
	}
	if err := validateDuration("share: linger", s.Linger); err != nil {
		return err
	}
	if err := validateDuration("share: run_for", s.RunFor); err != nil {
		return err
	}
	return validateText("share: lost", "event name", s.Lost)
}

// validateHistory checks the sizes of journals.
func validateHistory(setting string, history, total int) error {
	if history < 0 {
		return fmt.Errorf("sse: %s: history: %d is not a positive size", setting, history)
	}
	if total < 0 {
		return fmt.Errorf("sse: %s: history: the total %d is not a positive size", setting, total)
	}
	if history > math.MaxInt32 {
		return fmt.Errorf("sse: %s: history: %d bytes are more than a run can keep", setting, history)
	}
	if total > 0 && total < history {
		return fmt.Errorf("sse: %s: history: the total %d is less than the %d of one run", setting, total, history)
	}
	return nil
}

// shareSubdirectives is the grammar of share's block.
var shareSubdirectives = map[string]subdirective{
	"join":    {"live|last <n>", 1, 2, setShareJoin},
	"history": {"<size> [<total>]", 1, 2, setShareHistory},
	"linger":  {"<duration>", 1, 1, setShareLinger},
	"run_for": {"<duration>", 1, 1, setShareRunFor},
	"lost":    {"<event>|off", 1, 1, setShareLost},
}

func setShare(h *Handler, args []string) error {
	h.Share = &Share{Key: args}
	return h.Share.validate("")
}

func setShareJoin(h *Handler, args []string) (err error) {
	h.Share.Join = args[0]
	switch {
	case len(args) > 1:
		if h.Share.JoinLast, err = parseCount("share: join: last", args[1]); err != nil {
			return err
		}
	case args[0] == joinLast:
		return fmt.Errorf("sse: share: join: %s needs a number of events", joinLast)
	}
	return h.Share.validate("")
}

func setShareHistory(h *Handler, args []string) (err error) {
	if h.Share.History, err = parseSize("share: history", args[0]); err != nil {
		return err
	}
	if len(args) > 1 {
		if h.Share.TotalHistory, err = parseTotal("share: history: total", args[1]); err != nil {
			return err
		}
	}
	return h.Share.validate("")
}

func setShareLinger(h *Handler, args []string) (err error) {
	h.Share.Linger, err = parseDuration("share: linger", args[0])
	return err
}

func setShareRunFor(h *Handler, args []string) (err error) {
	h.Share.RunFor, err = parseDuration("share: run_for", args[0])
	return err
}

func setShareLost(h *Handler, args []string) error {
	h.Share.Lost = args[0]
	return h.Share.validate("")
}

// newSharing makes the runtime configuration of share; nil if it is off.
func newSharing(h *Handler, config *Share) (*sharing, error) {
	if config == nil {
		return nil, nil
	}
	names, err := newShareNames(config.Key)
	if err != nil {
		return nil, err
	}
	sh := &sharing{
		h:       h,
		names:   names,
		history: config.History,
		linger:  orDefault(config.Linger, defaultLinger),
		runFor:  orDefault(config.RunFor, 0),
	}
	h.lost = newLostEvent(config.Lost)
	if config.Join == joinLast {
		sh.last = uint64(config.JoinLast)
	}
	if sh.history == 0 {
		sh.history = defaultShareHistory
	}
	total := config.TotalHistory
	if total == 0 {
		total = max(defaultTotalHistory, sh.history)
	}
	sh.budget = h.group.budget(journal.KeepNewest, total)
	return sh, nil
}
