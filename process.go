package caddysse

import (
	"context"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// What is here belongs to the process and outlives every configuration: Caddy
// makes a new configuration at each reload, while streams go on through the one
// that they began with, counters must not start again, and who waits for the
// exit must hear of it whatever configuration is the current one then.
var (
	// live is every stream of the process, those of configurations that a reload
	// has replaced included.
	live registry

	// collector is the module's metrics on whatever registry the current
	// configuration has.
	collector = newMetrics()

	// exit tells that the process is about to end.
	exit = exitNotice{exiting: caddy.Exiting}
)

func init() {
	// After the grace periods, when no current configuration has a handler.
	caddy.OnExit(func(ctx context.Context) {
		exit.notify()
		awaitDrains()
		_ = endWhatIsLeft(ctx)
		leaveStores()
	})
}

// exitNotice tells those who wait for it that the process is about to end. They
// may belong to configurations that were replaced, whose servers are gone and
// will not say so.
//
// The current configuration says so: its handlers, and its admin API. Where it has
// neither, nothing does, while Caddy waits for the servers of all configurations.
// So who waits looks by itself, too.
type exitNotice struct {
	exiting func() bool

	mu      sync.Mutex
	waiting map[*func()]struct{}
}

// noticePause is how often who waits looks.
const noticePause = 250 * time.Millisecond

// await has f called, once, when the process is about to end. Whoever calls
// forget before that is not called.
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

// look tells of the exit if nobody else has, as long as it is waited for.
func (e *exitNotice) look(key *func()) {
	e.notify()
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, waits := e.waiting[key]; waits {
		time.AfterFunc(noticePause, func() { e.look(key) })
	}
}

// notify is called where the process may be about to end.
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

// Handle implements caddyevents.Handler: Caddy says that it stops a
// configuration, before it waits for its servers.
func (e *exitNotice) Handle(context.Context, caddy.Event) error {
	e.notify()
	return nil
}

// subscribe has the notice hear of the end of a configuration.
func (e *exitNotice) subscribe(events *caddyevents.App) error {
	return events.On("stopping", e)
}

// Interface guards
var _ caddyevents.Handler = (*exitNotice)(nil)
