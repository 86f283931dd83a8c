package caddysse

import (
	"slices"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// runs is every run of a name, across reloads. It is guarded by the group's lock.
type runs struct {
	byID map[uuid.UUID]*run
	idle []*run // have no client, and an upstream; longest first

	resumes [resumeResultCount]uint64

	// What the journals of a name hold together, by their policy. The latest
	// configuration says how much that may be.
	budgets [2]*journal.Budget
}

// resumeResult is what became of an id that a client came back with.
type resumeResult uint8

const (
	resumeFound   resumeResult = iota // it goes on there
	resumeGap                         // the events after it are gone
	resumeUnknown                     // there is no such place
	resumeRefused                     // and the upstream is not asked instead
	resumeResultCount
)

var resumeResultNames = [resumeResultCount]string{"resumed", "gap", "unknown", "refused"}

// runTokens finds the runs of the process by what their ids begin with.
var runTokens runTable[*run]

// budget is what the journals of one policy may hold together.
func (g *group) budget(policy journal.Policy, limit int) *journal.Budget {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := &g.runs.budgets[policy]
	if *b == nil {
		*b = journal.NewBudget(policy, limit)
	} else {
		(*b).SetLimit(limit)
	}
	return *b
}

func (g *group) addRun(r *run) {
	runTokens.put(r.token(), r)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.runs.byID == nil {
		g.runs.byID = make(map[uuid.UUID]*run)
	}
	g.runs.byID[r.id] = r
}

func (g *group) removeRun(r *run) {
	runTokens.drop(r.token())
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.runs.byID, r.id)
	g.dropIdleLocked(r)
}

// addIdle counts a run as one without a client. It counts as an open stream, and
// gives its place to a new one.
func (g *group) addIdle(r *run) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.Contains(g.runs.idle, r) {
		return
	}
	g.runs.idle = append(g.runs.idle, r)
	if total := r.h.limits.total; total > 0 && g.openLocked() > total {
		// The place of its last client has been taken already.
		go g.oldestIdleLocked().giveWay()
	}
}

// openLocked is how many streams, places and runs without a client there are.
func (g *group) openLocked() int {
	open := g.reserved + len(g.runs.idle)
	for _, n := range g.open {
		open += n
	}
	return open
}

func (g *group) dropIdle(r *run) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropIdleLocked(r)
}

func (g *group) dropIdleLocked(r *run) {
	if i := slices.Index(g.runs.idle, r); i >= 0 {
		g.runs.idle = slices.Delete(g.runs.idle, i, i+1)
	}
}

// oldestIdleLocked takes off the run that has been without a client for longest.
func (g *group) oldestIdleLocked() *run {
	if len(g.runs.idle) == 0 {
		return nil
	}
	r := g.runs.idle[0]
	g.runs.idle = slices.Delete(g.runs.idle, 0, 1)
	return r
}

// countResume counts what became of a client's id.
func (g *group) countResume(result resumeResult) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.runs.resumes[result]++
}

// allRuns returns the runs of a name, oldest first.
func (g *group) allRuns() []*run {
	g.mu.Lock()
	all := make([]*run, 0, len(g.runs.byID))
	for _, r := range g.runs.byID {
		all = append(all, r)
	}
	g.mu.Unlock()
	slices.SortFunc(all, func(a, b *run) int { return int(a.began - b.began) })
	return all
}

// runs returns the runs of the process, each name's oldest first.
func (r *registry) runs() []*run {
	var all []*run
	for _, g := range r.all() {
		all = append(all, g.allRuns()...)
	}
	return all
}

// run returns the run with the id, or nil.
func (r *registry) run(id uuid.UUID) *run {
	for _, g := range r.all() {
		g.mu.Lock()
		found := g.runs.byID[id]
		g.mu.Unlock()
		if found != nil {
			return found
		}
	}
	return nil
}

// endRuns ends every run when the process exits. Those without a client have no
// reason to stay until then.
func endRuns() {
	for _, r := range live.runs() {
		r.stop(serverClosed)
	}
}

// endIdleRuns ends those that have no client.
func endIdleRuns() {
	for _, r := range live.runs() {
		r.giveWay()
	}
}

// What a run may be in, as metrics tell it.
type runState uint8

const (
	runAttached runState = iota
	runDetached
	runShared
	runKept // ended, and kept for clients that have not come back yet
	runStateCount
)

var runStateNames = [runStateCount]string{"attached", "detached", "shared", "ended"}

// runFigures is a run at one moment.
type runFigures struct {
	id          uuid.UUID
	token       string // shortened
	name        string
	use         runUse
	stage       runStage
	state       runState
	host, path  string
	upstream    string
	began       time.Time
	age         time.Duration
	idle        time.Duration // since the upstream sent something last
	detached    time.Duration // since it has no client; 0: it has one
	clients     int
	joined      int
	events      uint64
	bytes       uint64
	undelivered uint64
	journal     int // bytes
	end         runEnd
}

func (r *run) figures() runFigures {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.figuresLocked()
}

func (r *run) figuresLocked() runFigures {
	at := now()
	kept := r.feed.journal.Figures()
	age := time.Duration(at - r.began)
	f := runFigures{
		id:          r.id,
		token:       r.token().short(),
		name:        r.h.Name,
		use:         r.use,
		stage:       r.stage,
		host:        r.host,
		path:        r.path,
		upstream:    r.upstream,
		began:       time.Now().Add(-age),
		age:         age,
		idle:        time.Duration(at - instant(r.feed.heard.Load())),
		clients:     len(r.readers),
		joined:      r.joined,
		events:      kept.Events,
		bytes:       r.feed.bytes.Load(),
		undelivered: kept.Unsent,
		journal:     kept.Bytes,
		end:         r.end,
	}
	if f.clients == 0 && r.alone > 0 {
		f.detached = time.Duration(at - r.alone)
	}
	switch {
	case r.use == sharedRun:
		f.state = runShared
	case f.clients > 0:
		f.state = runAttached
	case r.stage >= runEnded:
		f.state = runKept
	default:
		f.state = runDetached
	}
	return f
}

// runTotals is the runs of a name at one moment.
type runTotals struct {
	states   [runStateCount]int
	resumes  [resumeResultCount]uint64
	journals int // bytes
}

func (g *group) runTotals() runTotals {
	var t runTotals
	for _, r := range g.allRuns() {
		t.states[r.figures().state]++
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	t.resumes = g.runs.resumes
	for _, b := range g.runs.budgets {
		if b != nil {
			bytes, _ := b.Used()
			t.journals += bytes
		}
	}
	return t
}

// tellRunEnded tells of a run that has been accounted for, by the logger of the
// configuration that is current: its own may be long gone.
func (h *Handler) tellRunEnded(f runFigures) {
	logger := h.logger
	if current := caddy.ActiveContext(); current.Context != nil {
		logger = current.Logger(Handler{})
	}
	logger.Info("run ended",
		zap.String("run", f.token),
		zap.String("name", f.name),
		zap.String("upstream", f.upstream),
		zap.Uint64("events", f.events),
		zap.Uint64("bytes", f.bytes),
		zap.Int("clients", f.joined),
		zap.Duration("detached_for", f.detached),
		zap.Uint64("undelivered", f.undelivered),
		zap.String("reason", f.end.reason.String()))
}
