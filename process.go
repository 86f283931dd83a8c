package caddysse

import (
	"context"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// What is here belongs to the process and outlives every configuration. Caddy
// makes a new configuration at each reload, but streams continue with the one
// that they began with, counters must not start again, and all must be told of an
// exit, whichever configuration is the current one then.
var (
	// live is every stream of the process, including those of configurations that a
	// reload has replaced.
	live registry

	// collector is the module's metrics, registered with the current
	// configuration's registry.
	collector = newMetrics()

	// exit says when the process is about to end.
	exit = exitNotice{exiting: caddy.Exiting}
)

func init() {
	// After the grace periods, if the current configuration has no handler.
	caddy.OnExit(func(ctx context.Context) {
		exit.notify()
		awaitDrains()
		_ = endWhatIsLeft(ctx)
		leaveStores()
	})
}

// exitNotice notifies its subscribers that the process is about to end. They may
// belong to configurations that were replaced, whose servers are gone and can't
// tell them.
//
// Usually the current configuration triggers it: its handlers, and its admin API.
// If it has neither, nothing does, while Caddy waits for the servers of all
// configurations. So subscribers also check by themselves.
type exitNotice struct {
	exiting func() bool

	mu      sync.Mutex
	waiting map[*func()]struct{}
}

// noticePause is how often subscribers check by themselves.
const noticePause = 250 * time.Millisecond

// await registers f to be called once, when the process is about to end, unless
// forget is called before that.
func (e *exitNotice) await(f func()) (forget func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.waiting == nil {
		e.waiting = make(map[*func()]struct{})
	}
	key := &f
	e.waiting[key] = struct{}{}
	time.AfterFunc(noticePause, func() { e.look(key) })
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.waiting, key)
	}
}

// look checks for the exit, as long as someone waits for it.
func (e *exitNotice) look(key *func()) {
	e.notify()
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, waits := e.waiting[key]; waits {
		time.AfterFunc(noticePause, func() { e.look(key) })
	}
}

// notify must be called when the process may be about to end.
func (e *exitNotice) notify() {
	if !e.exiting() {
		return
	}
	e.mu.Lock()
	waiting := e.waiting
	e.waiting = nil
	e.mu.Unlock()
	for f := range waiting {
		(*f)()
	}
	endIdleRuns() // their clients would come back too late
}

// Handle implements caddyevents.Handler: Caddy stops a configuration, and has not
// yet waited for its servers.
func (e *exitNotice) Handle(context.Context, caddy.Event) error {
	e.notify()
	return nil
}

// subscribe makes Caddy tell the notice of the end of a configuration.
func (e *exitNotice) subscribe(events *caddyevents.App) error {
	return events.On("stopping", e)
}

// Interface guards
var _ caddyevents.Handler = (*exitNotice)(nil)
