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

// The commands, for tests that have a real Caddy to talk to.
var (
	ListCommand  = listCommand
	CloseCommand = closeCommand
)

// DrainStreams is what the handler does when its server begins to stop.
func (h *Handler) DrainStreams() { h.drainStreams() }

// ForgetDrains lets no drain of an earlier test count.
func ForgetDrains() {
	for _, g := range live.all() {
		g.mu.Lock()
		g.drains = nil
		g.mu.Unlock()
	}
}

// DrainOver is what it does at a reload, with another window.
func (h *Handler) DrainOver(window time.Duration, stop <-chan struct{}) bool {
	return h.drainOver(window, stop)
}

// RegisterMetrics puts the module's metrics on a registry.
var RegisterMetrics = registerMetrics

// Observe returns what takes one snapshot of a watch after the other, as JSON.
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

// SortKeys are what streams can be sorted by in a watch.
func SortKeys() (names []string) {
	for _, key := range sortKeys {
		names = append(names, key.name)
	}
	return names
}

// SetExiting lets the process seem to end, or not, until undo is called.
func SetExiting(is bool) (undo func()) {
	before := exit.exiting
	exit.exiting = func() bool { return is }
	return func() { exit.exiting = before }
}

// seemsToExit is read by goroutines that may outlive a test.
var seemsToExit atomic.Bool

func init() {
	exits := exit.exiting
	exit.exiting = func() bool { return seemsToExit.Load() || exits() }
}

// SeemToExit lets the process of a running Caddy seem to end, or not.
func SeemToExit(is bool) { seemsToExit.Store(is) }

// EndEverything ends what is left as the end of the process does, which has as much
// time for that as it takes.
func EndEverything() {
	before := lastWordsUntil
	lastWordsUntil = func() instant { return now().plus(time.Minute) }
	endStreams(live.streams())
	lastWordsUntil = before
}

// EndHandler ends a handler's streams as the end of the grace period does.
func EndHandler(h *Handler) { endStreams(h.liveStreams()) }

// OpenStreams is how many streams of a handler are open.
func OpenStreams(h *Handler) int { return len(h.liveStreams()) }

// OpenAndChunked is how many streams there are, and to how many of them chunks may
// be written.
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

// nodeTables are where the nodes of this process find their runs, by the identity
// of their way to the store.
var nodeTables sync.Map

func init() {
	tableOfSession = func(opener store.Opener) *runTable[*run] {
		table, _ := nodeTables.LoadOrStore(opener.Identity(), new(runTable[*run]))
		return table.(*runTable[*run])
	}
}

// WaitingForStores is how many events have not been written to a store yet, and how
// many of them are being written.
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

// SetStoreLease lets nodes be dead sooner, until undo is called.
func SetStoreLease(lease time.Duration) (undo func()) {
	before := storeLease
	storeLease = lease
	return func() { storeLease = before }
}
