package caddysse

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

// runBegin is what a store gets when a run begins.
type runBegin struct {
	Node     store.Node  `json:"node"` // that has the run
	Place    []byte      `json:"place"`
	Status   int         `json:"status"`
	Added    http.Header `json:"added,omitempty"`
	Replaced http.Header `json:"replaced,omitempty"`
	Upstream string      `json:"upstream,omitempty"`
	Report   int         `json:"report"` // bytes after which the node wants the client's place
}

// storedEnd is how a run ended, as a store has it.
type storedEnd struct {
	Reason string `json:"reason"`
	Error  string `json:"error,omitempty"`
	Soft   bool   `json:"soft,omitempty"`
	Told   bool   `json:"told,omitempty"`

	// Lost: there was more than the store has. For a client that has all of that,
	// the run is unknown.
	Lost bool `json:"lost,omitempty"`
}

func marshalEnd(end runEnd, lost bool) []byte {
	e := storedEnd{Reason: end.reason.String(), Soft: end.soft, Told: end.told, Lost: lost}
	if end.err != nil {
		e.Error = end.err.Error()
	}
	text, err := json.Marshal(e)
	if err != nil {
		panic(err) // plain fields
	}
	return text
}

// withLoss is an end with Lost set; it is nil if there is no end.
func withLoss(text []byte) []byte {
	var e storedEnd
	if json.Unmarshal(text, &e) != nil || e.Lost {
		return text
	}
	e.Lost = true
	text, err := json.Marshal(e)
	if err != nil {
		panic(err) // plain fields
	}
	return text
}

// unmarshalEnd reads how a run ended. To the run's clients, an exit of its node
// is an upstream that broke off, and so is an end after events that the store
// lacks.
func unmarshalEnd(text []byte) (end runEnd, lost bool) {
	var e storedEnd
	if err := json.Unmarshal(text, &e); err != nil {
		return runEnd{reason: upstreamError, err: err}, true
	}
	end = runEnd{reason: reasonOf(e.Reason), soft: e.Soft, told: e.Told}
	if e.Error != "" {
		end.err = errors.New(e.Error)
	}
	switch end.reason {
	case upstreamClosed, upstreamError, upstreamTimeout:
	default:
		return runEnd{reason: upstreamError, err: errNodeLeft}, e.Lost
	}
	if e.Lost {
		end = runEnd{reason: upstreamError, err: errStoreGap}
	}
	return end, e.Lost
}

var (
	errNodeLeft  = errors.New("the node that had the stream has gone")
	errStoreAway = errors.New("the store is away")
	errStoreGap  = errors.New("the store has lost events")
)

// follower is a client of this node that reads a run of another one.
type follower struct {
	d       *storeSession
	name    string
	key     store.Key
	token   string // as in the run's ids
	begin   *runBegin
	id      string
	release func()

	at   atomic.Uint64   // the last event that the client has
	over context.Context // ends when the store gets nothing more
	done context.CancelFunc

	useless atomic.Bool // what the store has only says that the upstream's answer is useless

	mu     sync.Mutex
	stream *stream
	why    reason // of an early end that was requested before there was a stream
	end    runEnd
}

// newFollower makes a client read a run after event n, and tells the run's node,
// unless that is dead.
func (d *storeSession) newFollower(name string, token runToken, begin *runBegin, n uint64, dead bool) *follower {
	release := d.hold(name)
	if release == nil {
		return nil
	}
	f := &follower{
		d:       d,
		name:    name,
		key:     keyOf(token),
		token:   base64.RawURLEncoding.EncodeToString(token[:]),
		begin:   begin,
		id:      rand.Text(),
		release: release,
	}
	f.over, f.done = context.WithCancel(context.Background())
	f.at.Store(n)
	if dead {
		f.isOver()
		return f
	}
	d.mu.Lock()
	d.followers[f.id] = f
	d.mu.Unlock()
	f.report()
	return f
}

// report tells the node of the run where the client is.
func (f *follower) report() {
	f.d.post(f.begin.Node, message{Op: clientReads, Run: f.key.String(), Reader: f.id, N: f.at.Load()})
}

// leave removes the client from the run, which continues without it for stay.
func (f *follower) leave(stay time.Duration) {
	f.d.mu.Lock()
	delete(f.d.followers, f.id)
	f.d.mu.Unlock()
	if f.over.Err() == nil { // else that node has removed it, or is dead
		f.d.post(f.begin.Node, message{Op: clientLeft, Run: f.key.String(), Reader: f.id, N: f.at.Load(), Stay: stay})
	}
	f.done()
	f.release()
}

// isOver records that the store gets nothing more.
func (f *follower) isOver() { f.done() }

// feeds tells the follower which stream is its client's.
func (f *follower) feeds(s *stream) {
	f.mu.Lock()
	f.stream = s
	why := f.why
	f.mu.Unlock()
	if why != notEnded {
		s.end(why)
	}
}

// endStream ends the client's stream at an event boundary, and never waits for
// the client.
func (f *follower) endStream(why reason) {
	f.mu.Lock()
	s := f.stream
	if f.why == notEnded {
		f.why = why
	}
	f.mu.Unlock()
	if s != nil {
		s.end(why)
	}
}

// isEnded reports whether the client's stream must end.
func (f *follower) isEnded() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.why != notEnded
}

// outcome implements feedSource.
func (f *follower) outcome() runEnd {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.end
}

func (f *follower) ended(end runEnd) runEnd {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end = end
	return end
}

// tries implements feedSource. The other node reports its tries itself.
func (f *follower) tries() int64 { return 0 }

// hasUpstreamsIDs implements feedSource. Events in a store have ids of this
// module.
func (f *follower) hasUpstreamsIDs() bool { return false }

// hasNothing implements feedSource.
func (f *follower) hasNothing() bool { return f.useless.Load() }

const (
	// followPiece is about how many bytes of a run are read at a time.
	followPiece = 64 << 10

	// dropPatience is how long a client waits for the reason why its run is gone.
	dropPatience = time.Second
)

// read reads what the store has after an event. While the run continues, it waits
// for more.
func (f *follower) read(ctx context.Context, after uint64) (events []store.Event, end []byte, err error) {
	wait := f.d.lease / 3
	reading, stop := context.WithCancel(ctx)
	defer stop()
	if f.over.Err() != nil {
		wait = 0
	} else {
		defer context.AfterFunc(f.over, stop)()
	}
	err = f.d.call(reading, storeRead, wait+storePatience, func(ctx context.Context) (err error) {
		events, end, err = f.d.store.Read(ctx, f.key, after, followPiece, wait)
		return err
	}, f.name)
	return events, end, err
}

// follow passes on the run's events from the store, until the stream or the run
// ends.
func (f *follower) follow(ctx context.Context, s *stream) runEnd {
	var (
		piece    []byte
		ends     []int
		reported int
		failing  instant
	)
	for {
		last := f.over.Err() != nil // then this is the last read
		events, end, err := f.read(ctx, f.at.Load())
		switch {
		case ctx.Err() != nil:
			return runEnd{}
		case errors.Is(err, store.ErrUnknown):
			if !f.awaitWhy(ctx) {
				return runEnd{}
			}
			return f.ended(runEnd{reason: upstreamError, err: store.ErrUnknown})
		case err != nil && !last && f.over.Err() != nil:
			continue
		case err != nil:
			if failing == 0 {
				failing = now()
			}
			if now()-failing > instant(f.d.lease) {
				return f.ended(runEnd{reason: upstreamError, err: errStoreAway})
			}
			select {
			case <-time.After(storePause / 2):
			case <-ctx.Done():
				return runEnd{}
			}
			continue
		}
		failing = 0
		piece, ends = piece[:0], ends[:0]
		gap := false
		for i, event := range events {
			if gap = event.Number != f.at.Load()+uint64(i)+1; gap {
				events = events[:i]
				break
			}
			var useless bool
			if piece, useless, err = eventText(piece, event.Data, f.token); err != nil {
				return f.ended(runEnd{reason: upstreamError, err: err})
			}
			if useless {
				f.useless.Store(true)
			}
			ends = append(ends, len(piece))
		}
		n, err := s.pass(piece)
		size := len(piece)
		for i := range events {
			if ends[i] <= n {
				f.at.Store(events[i].Number)
			}
		}
		if cap(piece) > largestIdleBlock {
			piece = nil // a quiet client does not need it
		}
		if reported += n; reported >= f.begin.Report && f.over.Err() == nil {
			reported = 0
			f.report()
		}
		switch {
		case err != nil || n < size:
			return runEnd{}
		case gap:
			return f.ended(runEnd{reason: upstreamError, err: errStoreGap})
		case end != nil:
			how, _ := unmarshalEnd(end)
			return f.ended(how)
		case last && len(events) == 0:
			return f.ended(runEnd{reason: upstreamError, err: errNodeLeft})
		}
	}
}

// awaitWhy waits for the other node to say why the run is gone, unless it has
// already. It returns false if the client's stream has ended or must end.
func (f *follower) awaitWhy(ctx context.Context) bool {
	select {
	case <-time.After(dropPatience):
	case <-f.over.Done():
	case <-ctx.Done():
	}
	return ctx.Err() == nil && !f.isEnded()
}

// lookAfterFollowers reports this node's clients to the nodes of their runs, and
// finds out which of those nodes are dead.
func (d *storeSession) lookAfterFollowers() {
	byNode := make(map[store.Node][]*follower)
	d.mu.Lock()
	for _, f := range d.followers {
		if f.over.Err() == nil {
			byNode[f.begin.Node] = append(byNode[f.begin.Node], f)
		}
	}
	d.mu.Unlock()
	for node, followers := range byNode {
		if d.isDead(node) {
			for _, f := range followers {
				f.isOver()
			}
			continue
		}
		for _, f := range followers {
			f.report()
		}
	}
}
