package caddysse

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	// Behind the grace periods, when no current configuration has a handler.
	caddy.OnExit(func(ctx context.Context) {
		awaitDrains()
		_ = endWhatIsLeft(ctx)
	})
}

// exiting tells whether the process is about to end.
var exiting = caddy.Exiting

const (
	// exitWatch is how soon a drain in a reload's window notices that the
	// process exits: nothing tells it, as its server has been shut down before.
	exitWatch = 50 * time.Millisecond

	// lastWords is how long the process waits for the streams that it ends when
	// its grace period is over.
	lastWords = time.Second
)

// lastWordsUntil is the end of that: servers are stopped one behind the other.
var lastWordsUntil = sync.OnceValue(func() instant { return now() + instant(lastWords) })

// drain is how the streams of one handler end when its server stops. 0: nobody
// is ended.
type drain struct {
	reload, exit time.Duration

	// until is when the window ends, an instant; 0: the handler is in use.
	until atomic.Int64

	// graceEnds is when Caddy's grace period ends, an instant; 0: it does not.
	graceEnds atomic.Int64

	// requests are those that the handler is busy with: streams, and what may
	// become one.
	requests atomic.Int64
}

func (d *drain) idle() bool { return d.requests.Load() == 0 }

// graceIsOver reports whether the grace period of the handler's server is over,
// or about to be.
func (d *drain) graceIsOver() bool {
	ends := instant(d.graceEnds.Load())
	return ends != 0 && now() > ends-instant(exitWatch)
}

func newDrain(config *Drain) *drain {
	if config == nil {
		config = new(Drain)
	}
	d := &drain{
		reload: orDefault(config.Reload, defaultReloadWindow),
		exit:   orDefault(config.Exit, defaultExitWindow),
	}
	if config.Reload == off && config.Exit == 0 {
		d.exit = 0
	}
	return d
}

// drainStreams ends the resumable streams of the handler, one by one and evenly
// over the window, so that their clients do not come back at once. It runs when
// the handler's server begins to stop.
func (h *Handler) drainStreams() {
	if app, err := h.ctx.AppIfConfigured("http"); err == nil {
		if grace := app.(*caddyhttp.App).GracePeriod; grace > 0 {
			h.drain.graceEnds.Store(int64(now()) + int64(grace))
		}
	}
	if !exiting() {
		switch {
		case h.drain.reload > 0:
			if h.drainOver(h.drain.reload, exiting) {
				return
			}
		case h.drain.exit > 0:
			<-replaced.exitOrIdle(h.drain)
		}
	}
	// The process exits, maybe in the middle of a reload's window: who is left
	// has the time of an exit.
	if exiting() && h.drain.exit > 0 {
		h.drainOver(h.drain.exit, func() bool { return false })
	}
}

// drainOver drains over a window, or returns false as soon as stop says so.
func (h *Handler) drainOver(window time.Duration, stop func() bool) bool {
	start := now()
	h.drain.until.Store(int64(start) + int64(window))
	streams := h.drainable()
	phase := rand.Float64() // so that many handlers with few streams don't begin together
	for i, s := range streams {
		due := time.Duration(float64(window) * (float64(i) + phase) / float64(len(streams)))
		if waitUntil(start+instant(due), stop); stop() {
			return false
		}
		s.endDrained()
	}
	// Who opens a stream from now on ends it in time (joinDrain), but would not
	// notice that the process exits.
	waitUntil(start+instant(window), func() bool { return stop() || h.drain.idle() })
	return !stop()
}

// replaced are the drains of configurations that a reload has replaced and whose
// streams end on exit only.
var replaced exitWatchers

// exitWatchers notices for all of them that the process exits: there may be
// many, for as long as their streams live.
type exitWatchers struct {
	mu      sync.Mutex
	waiting map[*drain]chan struct{}
}

// exitOrIdle returns a channel that is closed when the process exits, or when
// the drain's handler has nothing to do any more.
func (w *exitWatchers) exitOrIdle(d *drain) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waiting) == 0 {
		w.waiting = make(map[*drain]chan struct{})
		go w.run()
	}
	over := make(chan struct{})
	w.waiting[d] = over
	return over
}

func (w *exitWatchers) run() {
	for w.look() {
		time.Sleep(exitWatch)
	}
}

// look reports whether anybody still waits.
func (w *exitWatchers) look() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for d, over := range w.waiting {
		if exiting() || d.idle() {
			close(over)
			delete(w.waiting, d)
		}
	}
	return len(w.waiting) > 0
}

// waitUntil waits for a moment, or until stop says so.
func waitUntil(moment instant, stop func() bool) {
	for wait := time.Duration(moment - now()); wait > 0 && !stop(); wait = time.Duration(moment - now()) {
		time.Sleep(min(wait, exitWatch))
	}
}

// drainable returns the handler's live streams that a drain ends.
func (h *Handler) drainable() []*stream {
	var streams []*stream
	for _, s := range live.streams() {
		if s.h == h && s.resumes() && s.ending.Load() == 0 {
			streams = append(streams, s)
		}
	}
	return streams
}

// joinDrain lets a stream that opens while its handler drains end in what is
// left of the window.
func (s *stream) joinDrain() {
	until := instant(s.h.drain.until.Load())
	if until == 0 || !s.resumes() {
		return
	}
	left := max(time.Duration(until-now()), 0)
	time.AfterFunc(rand.N(left+1), s.endDrained)
}

// endDrained ends a stream whose turn in a window has come, unless its body has
// turned out meanwhile to be none that can be resumed.
func (s *stream) endDrained() {
	if s.resumes() {
		s.end(drained)
	}
}

// awaitDrains waits for the streams that drains still end. Where the current
// configuration has an HTTP server, that has waited for them already.
func awaitDrains() {
	if len(live.streams()) == 0 {
		return
	}
	// The server still has last bytes to send when a stream has ended here.
	defer time.Sleep(2 * exitWatch)
	start := now()
	for {
		var last time.Duration
		for _, s := range live.streams() {
			if s.h.drain.exit > 0 && s.resumes() {
				last = max(last, exitWatch+s.h.drain.exit+endPatience+writePatience)
			}
		}
		if time.Duration(now()-start) >= last {
			return
		}
		time.Sleep(exitWatch)
	}
}

// endWhatIsLeft ends every stream of the process when it exits and the grace
// period is over, so that the end of each is told. It is nobody's fault that
// such a stream is not whole; its client sees that it is not.
func endWhatIsLeft(context.Context) error {
	if !exiting() {
		return nil
	}
	for _, s := range live.streams() {
		s.endNow(serverClosed)
	}
	for until := lastWordsUntil(); len(live.streams()) > 0 && now() < until; {
		time.Sleep(time.Millisecond)
	}
	return nil
}
