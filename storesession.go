package caddysse

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-sse/caddy-sse/store"
)

// storeLease is how long a node counts as alive after it has renewed its lease.
var storeLease = 10 * time.Second

const (
	// storePatience is how long the store may take to answer most calls.
	storePatience = 2 * time.Second

	// storePause is the wait before a store that has failed is called again.
	storePause = time.Second

	// storeLastWords is how long an exit waits for the last writes and messages.
	storeLastWords = time.Second
)

// storeSessions has the open stores, by a hash of their configurations. They
// outlive a reload: a run also holds the store that it began with.
var storeSessions = caddy.NewUsagePool()

// tableOfSession returns the table with the runs of a store's node. Tests replace
// it, because they have several nodes in one process.
var tableOfSession = func(store.Opener) *runTable[*run] { return &runTokens }

// storeSession is an open store as this process uses it: as one node, with one
// goroutine each that writes, sends messages, receives them, and renews the
// lease.
type storeSession struct {
	store store.Store
	node  store.Node
	key   string // in storeSessions
	runs  *runTable[*run]
	lease time.Duration

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	away                 atomic.Bool  // a call has failed, and the lease has not been renewed since
	refuses              atomic.Int64 // when a write failed, an instant; 0: not since one succeeded
	back                 atomic.Int64 // when it came back or had lost leases, an instant; 0: never
	healed               atomic.Int64 // when it came back after a failure, an instant; 0: never
	renew                chan struct{}
	leasing              chan struct{} // a lock: holds one element while the lease is renewed
	renewed              instant       // when the lease was last renewed; guarded by leasing
	leaves               bool          // the lease is not renewed any more; guarded by leasing
	writePace, renewPace pace          // how long these calls take
	warned               atomic.Int64  // unix nanoseconds of the last warning
	looked               instant       // when the receiver last looked for silent readers

	mu        sync.Mutex
	names     map[string]int // of the handlers that use it
	mirrors   map[*mirror]struct{}
	dirty     []*mirror // those with something to write, in that order
	writes    chan struct{}
	writing   bool
	followers map[string]*follower
	outbox    []outgoing
	sending   bool
	posts     chan struct{}
	idle      chan struct{} // closed when nothing is left to write or send; nil: nobody waits

	pending atomic.Int64 // bytes that the store has not confirmed
}

// openStoreSession opens a store, or returns the session if it is open. For each
// call, the caller must call use once, and later its release.
func openStoreSession(module string, opener store.Opener) (*storeSession, error) {
	sum := sha256.Sum256([]byte(module + "\x00" + opener.Identity()))
	key := string(sum[:])
	value, _, err := storeSessions.LoadOrNew(key, func() (caddy.Destructor, error) {
		s, err := opener.Open()
		if err != nil {
			return nil, fmt.Errorf("sse: resume: store: %w", err)
		}
		return newStoreSession(key, s, tableOfSession(opener)), nil
	})
	if err != nil {
		return nil, err
	}
	return value.(*storeSession), nil
}

func newStoreSession(key string, s store.Store, runs *runTable[*run]) *storeSession {
	d := &storeSession{
		store:     s,
		node:      store.Node(rand.Text()),
		key:       key,
		runs:      runs,
		lease:     storeLease,
		renew:     make(chan struct{}, 1),
		leasing:   make(chan struct{}, 1),
		names:     make(map[string]int),
		mirrors:   make(map[*mirror]struct{}),
		writes:    make(chan struct{}, 1),
		followers: make(map[string]*follower),
		posts:     make(chan struct{}, 1),
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.work.Go(d.keepWriting)
	d.work.Go(d.keepSending)
	d.work.Go(d.keepReceiving)
	d.work.Go(d.keepLease)
	return d
}

// use records that one more configuration, run or client of a name uses the
// session. release ends that.
func (d *storeSession) use(name string) (release func()) {
	d.mu.Lock()
	d.names[name]++
	d.mu.Unlock()
	return sync.OnceFunc(func() {
		d.mu.Lock()
		if d.names[name]--; d.names[name] == 0 {
			delete(d.names, name)
		}
		d.mu.Unlock()
		// The last use may end on one of the session's own goroutines, for which
		// Destruct waits.
		go func() { _, _ = storeSessions.Delete(d.key) }()
	})
}

// hold is use for a run, or for a client of one: it keeps the store that it began
// with, also after a reload. It returns nil if the store is being closed.
func (d *storeSession) hold(name string) (release func()) {
	value, _, err := storeSessions.LoadOrNew(d.key, func() (caddy.Destructor, error) { return nil, errSessionClosed })
	if err != nil {
		return nil
	}
	if value != d { // it was closed, and opened again
		_, _ = storeSessions.Delete(d.key)
		return nil
	}
	return d.use(name)
}

var errSessionClosed = errors.New("the store is being closed")

// Destruct implements caddy.Destructor. It is called when no configuration and no
// run uses the store any more.
func (d *storeSession) Destruct() error {
	d.takeLeave()
	d.cancel()
	err := d.store.Close()
	d.work.Wait()
	return err
}

// takeLeave writes and sends what is left, if that takes only a moment, and ends
// the node's lease. That also ends the node's runs that have not ended.
func (d *storeSession) takeLeave() {
	ctx, cancel := context.WithTimeout(d.ctx, storeLastWords)
	defer cancel()
	d.awaitIdle(ctx)
	select {
	case d.leasing <- struct{}{}:
		defer func() { <-d.leasing }()
	case <-ctx.Done():
		return
	}
	d.leaves = true
	_ = d.call(ctx, storeRenew, storePatience, func(ctx context.Context) error {
		return d.store.Renew(ctx, d.node, 0)
	})
}

// leaveStores is takeLeave for all stores, when the process exits.
func leaveStores() {
	var leaving sync.WaitGroup
	storeSessions.Range(func(_, value any) bool {
		leaving.Go(value.(*storeSession).takeLeave)
		return true
	})
	leaving.Wait()
}

// storeOp is a method of the store, as metrics name it.
type storeOp string

const (
	storeWrite   storeOp = "write"
	storeTouch   storeOp = "touch"
	storeFind    storeOp = "find"
	storeRead    storeOp = "read"
	storeRenew   storeOp = "renew"
	storeLives   storeOp = "lives"
	storeSend    storeOp = "send"
	storeReceive storeOp = "receive"
)

var storeOps = []storeOp{storeWrite, storeTouch, storeFind, storeRead, storeRenew, storeLives, storeSend, storeReceive}

// waits reports whether the store may wait for something: how long it takes says
// nothing of it then.
func (op storeOp) waits() bool { return op == storeRead || op == storeReceive }

// call calls the store. It counts failures and observes how long calls take,
// under the given names, or else under those of all users of the store. A failure
// marks the store as away.
func (d *storeSession) call(ctx context.Context, op storeOp, patience time.Duration, f func(ctx context.Context) error, names ...string) error {
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := now()
	err := f(limited)
	took := time.Duration(now() - start)
	if len(names) == 0 {
		names = d.users()
	}
	if !op.waits() {
		for _, name := range names {
			collector.storeDuration.WithLabelValues(name, string(op)).Observe(took.Seconds())
		}
	}
	if err == nil || errors.Is(err, store.ErrUnknown) {
		return err
	}
	if ctx.Err() != nil {
		return err // the caller has left
	}
	d.failed(op, err, names)
	return err
}

// failed marks the store as away.
func (d *storeSession) failed(op storeOp, err error, names []string) {
	if !d.away.Swap(true) {
		d.renewSoon()
	}
	d.tell(op, err, names)
}

// tell counts a failure of the store, and logs at most one a minute.
func (d *storeSession) tell(op storeOp, err error, names []string) {
	for _, name := range names {
		collector.storeErrors.WithLabelValues(name, string(op)).Inc()
	}
	at := time.Now().UnixNano()
	last := d.warned.Load()
	if at-last < int64(time.Minute) || !d.warned.CompareAndSwap(last, at) {
		return
	}
	currentLogger().Warn("resume: the store has failed; streams go on, but those that it does not take in time are as without resume",
		zap.String("name", strings.Join(names, ", ")),
		zap.String("op", string(op)),
		zap.Error(err))
}

// answers records that the store is available.
func (d *storeSession) answers() {
	healed := d.away.Swap(false)
	if healed || d.back.Load() == 0 {
		d.back.Store(int64(now()))
	}
	if healed {
		d.healed.Store(int64(now()))
	}
}

// takesRuns reports whether new runs should use the store.
func (d *storeSession) takesRuns() bool {
	if d.away.Load() {
		return false
	}
	refused := instant(d.refuses.Load())
	return refused == 0 || now()-refused > instant(d.lease/2)
}

func (d *storeSession) users() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.names))
}

// keepLease renews the lease, and does the session's other regular work.
func (d *storeSession) keepLease() {
	pulse := d.lease / 3
	timer := time.NewTimer(0)
	defer timer.Stop()
	var touched instant
	for {
		select {
		case <-timer.C:
		case <-d.renew:
		case <-d.ctx.Done():
			return
		}
		if d.renewLease() != nil {
			timer.Reset(min(storePause, pulse))
			continue
		}
		if touched == 0 || now()-touched >= instant(d.lease-pulse/2) {
			touched = now()
			d.touchRuns()
		}
		d.lookAfterFollowers()
		timer.Reset(pulse)
	}
}

// renewLease renews the node's lease, unless the node is about to leave.
func (d *storeSession) renewLease() error {
	d.leasing <- struct{}{}
	defer func() { <-d.leasing }()
	if d.leaves {
		return nil
	}
	if d.renewed > 0 && now()-d.renewed < instant(d.lease) && !d.away.Load() { // else the lease may have expired
		if lives, err := d.lives(d.node); err == nil && !lives {
			d.leasesAreLost()
		}
	}
	d.renewPace.begin()
	defer d.renewPace.end(d.lease)
	err := d.call(d.ctx, storeRenew, max(storePatience, d.lease/4), func(ctx context.Context) error {
		return d.store.Renew(ctx, d.node, d.lease)
	})
	if err == nil {
		d.renewed = now()
		d.answers()
	}
	return err
}

// touchBatch is how many runs are touched at a time.
const touchBatch = 500

// touchRuns keeps this node's runs in the store.
func (d *storeSession) touchRuns() {
	stay := make(map[time.Duration][]store.Key)
	for _, m := range d.allMirrors() {
		if ttl, key, ok := m.stays(); ok {
			stay[ttl] = append(stay[ttl], key)
		}
	}
	for ttl, keys := range stay {
		for some := range slices.Chunk(keys, touchBatch) {
			_ = d.call(d.ctx, storeTouch, storePatience, func(ctx context.Context) error {
				return d.store.Touch(ctx, ttl, some...)
			})
		}
	}
}

// isDead reports whether a node has no lease. For a while after the store was
// away or has lost leases, it returns false: a node that is alive may not have
// renewed its lease yet.
func (d *storeSession) isDead(node store.Node) bool {
	if node == d.node {
		return true // a run of this node, which does not have it any more
	}
	back := instant(d.back.Load())
	if back == 0 || d.away.Load() || now()-back < instant(d.lease/2) {
		return false
	}
	lives, err := d.lives(node)
	if err != nil || lives {
		return false
	}
	if lives, err = d.lives(d.node); err == nil && !lives {
		d.leasesAreLost()
	}
	return err == nil && lives
}

// lives asks the store whether a node has a lease.
func (d *storeSession) lives(node store.Node) (lives bool, err error) {
	err = d.call(d.ctx, storeLives, storePatience, func(ctx context.Context) (err error) {
		lives, err = d.store.Lives(ctx, node)
		return err
	})
	return lives, err
}

// leasesAreLost is called when the store does not have this node's lease. The
// store has been flushed, or replaced by a replica that never had the lease, so
// it lacks those of other nodes, too.
func (d *storeSession) leasesAreLost() {
	d.back.Store(int64(now()))
	d.renewSoon()
}

// renewSoon makes keepLease renew the lease now.
func (d *storeSession) renewSoon() {
	select {
	case d.renew <- struct{}{}:
	default:
	}
}

// pace is how long the store takes for calls of one kind.
type pace struct {
	since atomic.Int64 // when the present call began, an instant; 0: there is none
	took  atomic.Int64 // how long the last one took
	until atomic.Int64 // until when took counts, an instant
}

func (p *pace) begin() { p.since.Store(int64(now())) }

func (p *pace) end(says time.Duration) {
	p.took.Store(int64(now()) - p.since.Swap(0))
	p.until.Store(int64(now().plus(says)))
}

// takes is how long a call takes at present.
func (p *pace) takes() (took time.Duration) {
	if now() < instant(p.until.Load()) {
		took = time.Duration(p.took.Load())
	}
	if since := instant(p.since.Load()); since != 0 {
		took = max(took, time.Duration(now()-since))
	}
	return took
}

// leastLook is how long at least a node looks for a run that the store does not
// have.
const leastLook = 600 * time.Millisecond

// maySeeUntil returns until when a run that existed at an instant may still
// appear in the store. If the store is as fast for the run's node as for this one,
// that node writes the run within two calls; after the store was away, when that
// node tries again.
func (d *storeSession) maySeeUntil(at instant) instant {
	slow := max(d.writePace.takes(), d.renewPace.takes())
	until := at.plus(leastLook + 2*min(slow, d.lease/4))
	if healed := instant(d.healed.Load()); healed != 0 {
		until = max(until, healed.plus(min(2*storePause, d.lease/2)))
	}
	return until
}

func (d *storeSession) find(ctx context.Context, key store.Key, name string) (found store.Run, err error) {
	err = d.call(ctx, storeFind, storePatience, func(ctx context.Context) (err error) {
		found, err = d.store.Find(ctx, key)
		return err
	}, name)
	return found, err
}

// currentLogger is the logger of the current configuration.
func currentLogger() *zap.Logger {
	if current := caddy.ActiveContext(); current.Context != nil {
		return current.Logger(Handler{})
	}
	return caddy.Log()
}

// Interface guards
var _ caddy.Destructor = (*storeSession)(nil)
