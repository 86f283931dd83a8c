package caddysse

import (
	"container/list"
	"slices"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// runs are all runs of a name, across reloads. The group's lock guards them.
type runs struct {
	byID map[uuid.UUID]*run
	idle []*run // without a client, but with an upstream; longest without first

	// Of resume.
	resumers    map[*Handler]struct{} // the current handlers with resume
	detached    list.List             // of *run: those without a client, longest without first
	maxDetached int                   // -1: any number

	resumes [resumeResultCount]uint64

	// The limits for the journals of a name together, by policy. They are those of
	// the latest configuration.
	budgets [2]*journal.Budget
}

// resumeResult is the result for an id that a client brought.
type resumeResult uint8

const (
	resumeFound   resumeResult = iota // it continues after it
	resumeGap                         // the events after it are gone
	resumeUnknown                     // there is no such place
	resumeRefused                     // the same, and the upstream is not asked instead
	resumeResultCount
)

var resumeResultNames = [resumeResultCount]string{"resumed", "gap", "unknown", "refused"}

// runTokens finds the runs of the process by the tokens in their ids.
var runTokens runTable[*run]

// runTable is the table in which the handler finds runs.
func (h *Handler) runTable() *runTable[*run] {
	if h.resuming != nil && h.resuming.session != nil {
		return h.resuming.session.runs
	}
	return &runTokens
}

// budget is the common limit for the journals of one policy.
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
	r.h.runTable().put(r.token(), r)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.runs.byID == nil {
		g.runs.byID = make(map[uuid.UUID]*run)
	}
	g.runs.byID[r.id] = r
}

func (g *group) removeRun(r *run) {
	r.h.runTable().drop(r.token())
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.runs.byID, r.id)
	g.dropIdleLocked(r)
	g.dropDetachedLocked(r)
}

// addIdle counts a run as one without a client. It counts as an open stream, but
// gives up its place when a new one needs it.
func (g *group) addIdle(r *run) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if slices.Contains(g.runs.idle, r) {
		return
	}
	g.runs.idle = append(g.runs.idle, r)
	client := r.clientID()
	g.countClientLocked(client, +1)
	// Its last client's place may have been taken already.
	limits := r.h.limits
	switch {
	case limits.perClient > 0 && client.isKnown() && g.clients[client] > limits.perClient:
		go g.oldestIdleLocked(client).giveWay()
	case limits.total > 0 && g.openLocked() > limits.total:
		go g.oldestIdleLocked(clientID{}).giveWay()
	}
}

// openLocked is the number of streams, reserved places and runs without a client.
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
		g.countClientLocked(r.clientID(), -1)
	}
}

// oldestIdleLocked removes the run that has been without a client longest from
// the list: of all runs, or of those of that client.
func (g *group) oldestIdleLocked(client clientID) *run {
	for _, r := range g.runs.idle {
		if !client.isKnown() || r.clientID() == client {
			g.dropIdleLocked(r)
			return r
		}
	}
	return nil
}

// countResume counts the result for a client's id.
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

// endRuns ends every run when the process exits. Those without a client need not
// stay until then.
func endRuns() {
	for _, r := range live.runs() {
		r.stop(serverClosed)
	}
}

// endIdleRuns ends the runs without a client.
func endIdleRuns() {
	for _, r := range live.runs() {
		r.giveWay()
	}
}

// The states of a run in metrics.
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
	idle        time.Duration // since the upstream last sent something
	detached    time.Duration // since it has had no client; 0: it has one
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
	if r.feed.useless.Load() {
		f.events, f.bytes, f.undelivered = 0, 0, 0
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

// runTotals are those of a name's runs at one moment.
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

// tellRunEnded logs the end of a run that has been accounted for. It uses the
// logger of the current configuration, because the run's own may be long gone.
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

// addResumer registers a handler to which clients may come back. Its
// configuration says how many runs may be without a client.
func (g *group) addResumer(h *Handler, maxDetached int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.runs.resumers == nil {
		g.runs.resumers = make(map[*Handler]struct{})
	}
	g.runs.resumers[h] = struct{}{}
	g.runs.maxDetached = maxDetached
}

// resumes reports whether there is such a handler.
func (g *group) resumes() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.runs.resumers) > 0
}

// dropResumer is called when a handler's configuration is no longer the current
// one. Its runs stay for their clients, up to a limit; if there is no other
// handler of the name, no client can come back.
func (g *group) dropResumer(h *Handler) {
	g.mu.Lock()
	_, known := g.runs.resumers[h]
	delete(g.runs.resumers, h)
	left := len(g.runs.resumers)
	g.mu.Unlock()
	if !known || exit.exiting() {
		return
	}
	for _, r := range g.allRuns() {
		if r.kept == nil {
			continue
		}
		if r.h == h {
			r.endAfter(replacedLimit, drained)
		}
		if left == 0 {
			r.giveWay()
		}
	}
}

// addDetached counts a run as one without a client, to which that may come back.
// If there are too many, the one that has been without a client longest is
// dropped.
func (g *group) addDetached(r *run) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.kept.alone != nil {
		return
	}
	r.kept.alone = g.runs.detached.PushBack(r)
	if g.runs.maxDetached >= 0 && g.runs.detached.Len() > g.runs.maxDetached {
		oldest := g.runs.detached.Front().Value.(*run)
		g.dropDetachedLocked(oldest)
		go oldest.giveWay() // needs the group's lock
	}
}

func (g *group) dropDetached(r *run) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropDetachedLocked(r)
}

func (g *group) dropDetachedLocked(r *run) {
	if r.kept != nil && r.kept.alone != nil {
		g.runs.detached.Remove(r.kept.alone)
		r.kept.alone = nil
	}
}
