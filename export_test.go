package caddysse

import (
	"encoding/json"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

// The commands, for tests against a real Caddy.
var (
	ListCommand  = listCommand
	CloseCommand = closeCommand
)

// DrainStreams does what the handler does when its server begins to stop.
func (h *Handler) DrainStreams() { h.drainStreams() }

// ForgetDrains makes drains of earlier tests not count.
func ForgetDrains() {
	for _, g := range live.all() {
		g.mu.Lock()
		g.drains = nil
		g.mu.Unlock()
	}
}

// DrainOver does what the handler does at a reload, with another window.
func (h *Handler) DrainOver(window time.Duration, stop <-chan struct{}) bool {
	return h.drainOver(window, stop)
}

// RegisterMetrics registers the module's metrics with a registry.
var RegisterMetrics = registerMetrics

// Observe returns a function that takes the next snapshot of a watch, as JSON.
func Observe(query string) (snapshot func() []byte, err error) {
	o, _, err := parseWatch(&http.Request{URL: &url.URL{RawQuery: query}})
	if err != nil {
		return nil, err
	}
	return func() []byte {
		text, err := json.Marshal(o.observe())
		if err != nil {
			panic(err)
		}
		return text
	}, nil
}

// SortKeys returns the keys by which a watch can sort streams.
func SortKeys() (names []string) {
	for _, key := range sortKeys {
		names = append(names, key.name)
	}
	return names
}

// SetExiting makes the process look as if it were exiting, or not, until undo
// is called.
func SetExiting(is bool) (undo func()) {
	before := exit.exiting
	exit.exiting = func() bool { return is }
	return func() { exit.exiting = before }
}

// seemsToExit is atomic because goroutines that read it may outlive a test.
var seemsToExit atomic.Bool

func init() {
	exits := exit.exiting
	exit.exiting = func() bool { return seemsToExit.Load() || exits() }
}

// SeemToExit makes the process of a running Caddy look as if it were exiting,
// or not.
func SeemToExit(is bool) { seemsToExit.Store(is) }

// EndEverything ends what is left, as at the end of the process, but without a
// limit on the time.
func EndEverything() {
	before := lastWordsUntil
	lastWordsUntil = func() instant { return now().plus(time.Minute) }
	endStreams(live.streams())
	lastWordsUntil = before
}

// EndHandler ends a handler's streams, as the end of the grace period does.
func EndHandler(h *Handler) { endStreams(h.liveStreams()) }

// OpenStreams returns how many streams of a handler are open.
func OpenStreams(h *Handler) int { return len(h.liveStreams()) }

// OpenAndChunked returns how many streams there are, and to how many of them
// chunks may be written directly.
func OpenAndChunked() (open, chunked int) {
	for _, s := range live.streams() {
		s.mu.Lock()
		if open++; s.chunks != nil {
			chunked++
		}
		s.mu.Unlock()
	}
	return open, chunked
}

// nodeTables are the tables in which the nodes of this process find their runs,
// by the identity of their store session.
var nodeTables sync.Map

func init() {
	tableOfSession = func(opener store.Opener) *runTable[*run] {
		table, _ := nodeTables.LoadOrStore(opener.Identity(), new(runTable[*run]))
		return table.(*runTable[*run])
	}
}

// WaitingForStores returns how many events still wait to be written to a store,
// and how many are being written.
func WaitingForStores() (waiting, written int) {
	storeSessions.Range(func(_, value any) bool {
		for _, m := range value.(*storeSession).allMirrors() {
			m.mu.Lock()
			waiting += len(m.waiting)
			written += m.taken
			m.mu.Unlock()
		}
		return true
	})
	return waiting, written
}

// StoresAreIdle reports whether nothing is being written to a store, or is about to be.
func StoresAreIdle() bool {
	idle := true
	storeSessions.Range(func(_, value any) bool {
		d := value.(*storeSession)
		d.mu.Lock()
		idle = idle && len(d.dirty) == 0 && !d.writing
		d.mu.Unlock()
		return true
	})
	return idle
}

// SetStoreLease changes after what time nodes are considered dead, until undo
// is called.
func SetStoreLease(lease time.Duration) (undo func()) {
	before := storeLease
	storeLease = lease
	return func() { storeLease = before }
}
