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

	// drainedOnceIn is how often a client is ended at most when one reload follows
	// another.
	drainedOnceIn = time.Minute

	// drainsMatter is how long a drain counts as an earlier one.
	drainsMatter = 2 * time.Minute

	// lastWords is how long the process waits for the streams that it ends when
	// its grace period is over.
	lastWords = 500 * time.Millisecond
)

// lastWordsUntil is the end of that: servers are stopped one after the other.
var lastWordsUntil = sync.OnceValue(func() instant { return now() + instant(lastWords) })

// drain is how the streams of one handler end when its server stops. 0: nobody
// is ended.
type drain struct {
	reload, exit time.Duration

	// until is when the window ends, an instant; 0: the handler is in use.
	until atomic.Int64

	// replaced says that a reload has replaced the handler's configuration: its
	// upstreams are not asked again.
	replaced atomic.Bool

	// graceEnds is when Caddy's grace period ends, an instant; 0: it does not.
	graceEnds atomic.Int64

	// requests are those that the handler is busy with: streams, and what may
	// become one.
	requests atomic.Int64

	// after is when the earliest of the drains of the same name began that still
	// matter to this one, an instant; 0: there is none. It is set before until.
	after instant

	// left is sent to when the last of them has left; nil: nobody waits for that.
	left atomic.Pointer[chan struct{}]
}

// enter counts a request that the handler is busy with, until leave.
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

// awaitIdle waits until the handler has nothing to do any more, or until one of
// the channels says so.
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
	// The process exits, maybe in the middle of a reload's window: the streams that
	// are left have the time of an exit.
	if exit.exiting() && h.drain.exit > 0 {
		h.drainOver(h.drain.exit, nil)
	}
}

// beginDrain takes note of a drain on reload, and returns when the earliest of
// those before it began that still matters; 0: none does.
func (g *group) beginDrain(at instant) (earliest instant) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.drains = slices.DeleteFunc(g.drains, func(began instant) bool { return at-began >= instant(drainsMatter) })
	// What begins within a second is one reload: each server has a drain of its own.
	if len(g.drains) > 0 && at-g.drains[0] >= instant(time.Second) {
		earliest = g.drains[0]
	}
	if len(g.drains) == 0 || at-g.drains[len(g.drains)-1] >= instant(time.Second) {
		g.drains = append(g.drains, at)
	}
	return earliest
}

// spared returns for how much longer a reload lets a stream run because its
// client was ended by an earlier one, and may have been for this very stream to
// open.
func (s *stream) spared() time.Duration {
	after := s.h.drain.after
	opened := s.arrived + instant(s.opened)
	if after == 0 || opened < after || exit.exiting() {
		return 0
	}
	return max(drainedOnceIn-time.Duration(now()-opened), 0)
}

// setGrace takes note of when Caddy's grace period ends. At an exit, what is left
// is recorded then: over HTTP/3, Caddy would wait for handlers without end
// before it tells us.
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
// Streams that are spared get their own time, which may be after it.
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

// drainable returns those of them that a drain ends.
func (h *Handler) drainable() []*stream {
	return slices.DeleteFunc(h.liveStreams(), func(s *stream) bool {
		return s.isAskedEnd() || !s.resumes()
	})
}

// joinDrain lets a stream that opens while its handler drains end in what is
// left of the window.
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

// endDrainedAt has a stream end at a moment, unless its body turns out to be none
// that can be resumed. The earliest of several moments counts.
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
// period is over, so that the end of each is told.
func endWhatIsLeft(context.Context) error {
	if exit.exiting() {
		endStreams(live.streams())
		endRuns()
	}
	return nil
}

// endStreams ends streams at the end of the process. It is nobody's fault that
// they are not whole; their clients see that they are not. Handlers that do not
// leave are not waited for.
func endStreams(streams []*stream) {
	for _, s := range streams {
		s.endNow(serverClosed)
	}
	isOpen := func(s *stream) bool { return s.at() < stageClosed }
	// Streams that have just closed by themselves are in no list any more.
	isBusy := func() bool { return slices.ContainsFunc(streams, isOpen) || live.telling.Load() > 0 }
	for until := lastWordsUntil(); isBusy() && now() < until; {
		time.Sleep(time.Millisecond)
	}
	for _, s := range streams {
		s.accountWithoutHandlers()
	}
}
