package caddysse

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// exitWatch is how often an exit looks at the streams that it waits for.
	exitWatch = 50 * time.Millisecond

	// drainedOnceIn is the shortest time between two ends of one client's streams
	// when reloads follow each other.
	drainedOnceIn = time.Minute

	// drainsMatter is how long a drain counts as an earlier one.
	drainsMatter = 2 * time.Minute

	// lastWords is how long the process waits for the streams that it ends when
	// its grace period is over.
	lastWords = 500 * time.Millisecond
)

// lastWordsUntil is the end of that time. Servers are stopped one after the
// other.
var lastWordsUntil = sync.OnceValue(func() instant { return now() + instant(lastWords) })

// drain is how the streams of one handler end when its server stops. 0: none are
// ended.
type drain struct {
	reload, exit time.Duration

	// until is when the window ends, an instant; 0: the handler is in use.
	until atomic.Int64

	// replaced says that a reload has replaced the handler's configuration: it
	// makes no new request to its upstreams.
	replaced atomic.Bool

	// graceEnds is when Caddy's grace period ends, an instant; 0: never.
	graceEnds atomic.Int64

	// requests counts the requests that the handler is serving: streams, and those
	// that may become one.
	requests atomic.Int64

	// after is when the earliest of the earlier drains of the same name began that
	// still matter to this one, an instant; 0: there is none. It is set before
	// until.
	after instant

	// left is sent to when the last of them has left; nil: no one waits for that.
	left atomic.Pointer[chan struct{}]
}

// enter counts a request that the handler serves, until leave.
func (d *drain) enter() { d.requests.Add(1) }

func (d *drain) leave() {
	if d.requests.Add(-1) > 0 {
		return
	}
	if left := d.left.Load(); left != nil {
		select {
		case *left <- struct{}{}:
		default:
		}
	}
}

// awaitIdle waits until the handler has no requests left, or one of the channels
// ends the wait.
func (d *drain) awaitIdle(over <-chan time.Time, stop <-chan struct{}) {
	left := make(chan struct{}, 1)
	d.left.Store(&left)
	defer d.left.Store(nil)
	for d.requests.Load() > 0 {
		select {
		case <-left:
		case <-over:
			return
		case <-stop:
			return
		}
	}
}

// graceIsOver reports whether the grace period of the handler's server is over,
// or about to be. Caddy's clock for it starts earlier than ours: on a busy
// machine, by a few hundred milliseconds.
func (d *drain) graceIsOver() bool {
	ends := instant(d.graceEnds.Load())
	return ends != 0 && now() > ends-instant(lastWords)
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
// over the window, so that their clients do not reconnect all at once. It runs
// when the handler's server begins to stop.
func (h *Handler) drainStreams() {
	exit.notify()
	if !exit.exiting() {
		h.drain.replaced.Store(true)
	}
	h.setGrace()
	stop := make(chan struct{})
	forget := exit.await(func() { close(stop) })
	defer forget()
	if !exit.exiting() {
		if h.sharing != nil {
			h.sharing.replace()
		}
		switch {
		case h.drain.reload > 0:
			h.drain.after = h.group.beginDrain(now())
			if h.drainOver(h.drain.reload, stop) {
				return
			}
		case h.drain.exit > 0:
			h.drain.awaitIdle(nil, stop)
		}
	}
	// The process exits, perhaps in the middle of a reload's window: the streams
	// that are left get the exit window.
	if exit.exiting() && h.drain.exit > 0 {
		h.drainOver(h.drain.exit, nil)
	}
}

// beginDrain records a drain on reload, and returns when the earliest drain
// before it began that still matters; 0: there is none.
func (g *group) beginDrain(at instant) (earliest instant) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.drains = slices.DeleteFunc(g.drains, func(began instant) bool { return at-began >= instant(drainsMatter) })
	// Drains that begin within a second belong to one reload: each server has its
	// own.
	if len(g.drains) > 0 && at-g.drains[0] >= instant(time.Second) {
		earliest = g.drains[0]
	}
	if len(g.drains) == 0 || at-g.drains[len(g.drains)-1] >= instant(time.Second) {
		g.drains = append(g.drains, at)
	}
	return earliest
}

// spared returns for how much longer a reload lets a stream run, because its
// client may have opened it after an earlier reload ended its last stream.
func (s *stream) spared() time.Duration {
	after := s.h.drain.after
	opened := s.arrived + instant(s.opened)
	if after == 0 || opened < after || exit.exiting() {
		return 0
	}
	return max(drainedOnceIn-time.Duration(now()-opened), 0)
}

// setGrace records when Caddy's grace period ends. On exit, the streams that are
// left are recorded then: over HTTP/3, Caddy would first wait for handlers
// without limit.
func (h *Handler) setGrace() {
	app, err := h.ctx.AppIfConfigured("http")
	if err != nil {
		return
	}
	grace := time.Duration(app.(*caddyhttp.App).GracePeriod)
	if grace <= 0 {
		return
	}
	h.drain.graceEnds.Store(int64(now().plus(grace)))
	if exit.exiting() {
		time.AfterFunc(grace, func() { endStreams(h.liveStreams()) })
	}
}

// drainOver drains over a window, or returns false as soon as stop is closed.
// Spared streams get their own time, which may be later.
func (h *Handler) drainOver(window time.Duration, stop <-chan struct{}) bool {
	start := now()
	last := start.plus(window)
	h.drain.until.Store(int64(last))
	streams := h.drainable()
	phase := rand.Float64() // so that many handlers with few streams don't begin together
	for i, s := range streams {
		due := start.plus(time.Duration(float64(window) * (float64(i) + phase) / float64(len(streams))))
		if spared := s.spared(); spared > 0 {
			due = start.plus(spared)
		}
		s.endDrainedAt(due)
		last = max(last, due)
	}
	// A stream that opens from now on ends in time (joinDrain), but would not
	// notice that the process exits.
	over := time.NewTimer(time.Duration(last) - time.Duration(now()))
	defer over.Stop()
	h.drain.awaitIdle(over.C, stop)
	return !isClosed(stop)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// liveStreams returns the handler's live streams.
func (h *Handler) liveStreams() []*stream {
	var streams []*stream
	for _, s := range live.streams() {
		if s.h == h {
			streams = append(streams, s)
		}
	}
	return streams
}

// drainable returns the live streams that a drain ends.
func (h *Handler) drainable() []*stream {
	return slices.DeleteFunc(h.liveStreams(), func(s *stream) bool {
		return s.isAskedEnd() || !s.resumes()
	})
}

// joinDrain lets a stream that opens during a drain of its handler end in the
// rest of the window.
func (s *stream) joinDrain() {
	until := instant(s.h.drain.until.Load())
	if until == 0 || !s.resumes() {
		return
	}
	left := max(time.Duration(until-now()), 0)
	wait := rand.N(sum(left, 1))
	if spared := s.spared(); spared > 0 {
		wait = spared
	}
	s.endDrainedAt(now().plus(wait))
}

// endDrainedAt ends a stream at a moment, unless its body turns out not to be
// resumable. The earliest of several moments counts.
func (s *stream) endDrainedAt(due instant) {
	s.facts.Lock()
	defer s.facts.Unlock()
	rare := s.rarely()
	if rare.drainDue == 0 || due < rare.drainDue {
		rare.drainDue = due
	}
	if !s.gone {
		s.h.agenda.hasten(s, rare.drainDue)
	}
}

// awaitDrains waits for the streams that drains are still ending. If the current
// configuration has an HTTP server, that has already waited for them.
func awaitDrains() {
	if len(live.streams()) == 0 {
		return
	}
	// After a stream has ended here, the server still has its last bytes to send.
	defer time.Sleep(2 * exitWatch)
	start := now()
	for {
		var last time.Duration
		for _, s := range live.streams() {
			if s.h.drain.exit > 0 && s.resumes() {
				last = max(last, sum(s.h.drain.exit, exitWatch, endPatience, writePatience))
			}
		}
		if time.Duration(now()-start) >= last {
			return
		}
		time.Sleep(exitWatch)
	}
}

// endWhatIsLeft ends every stream of the process when it exits and the grace
// period is over, so that the end of each is reported.
func endWhatIsLeft(context.Context) error {
	if exit.exiting() {
		endStreams(live.streams())
		endRuns()
	}
	return nil
}

// endStreams ends streams when the process ends. Their clients see that they are
// not complete. Handlers that do not return are not waited for.
func endStreams(streams []*stream) {
	for _, s := range streams {
		s.endNow(serverClosed)
	}
	isOpen := func(s *stream) bool { return s.at() < stageClosed }
	// Streams that have just closed by themselves are no longer in any list.
	isBusy := func() bool { return slices.ContainsFunc(streams, isOpen) || live.telling.Load() > 0 }
	for until := lastWordsUntil(); isBusy() && now() < until; {
		time.Sleep(time.Millisecond)
	}
	for _, s := range streams {
		s.accountWithoutHandlers()
	}
}
