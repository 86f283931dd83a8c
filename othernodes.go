package caddysse

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/store"
)

// remoteAnswer is the result for a client's id that belongs to no run of this
// process.
type remoteAnswer uint8

const (
	notElsewhere      remoteAnswer = iota // it belongs to no run of another node either
	answeredElsewhere                     // the request has its answer
	newElsewhere                          // it continues as a new request
)

// A run that is not in the store may not have been written yet. The node looks
// for it again, with pauses that double, as long as it may still appear.
const (
	firstLook  = 20 * time.Millisecond
	lastLook   = 16 * firstLook
	leastLooks = 6
)

// comeBackElsewhere answers a client that has come back to another node's run.
func (x *exchange) comeBackElsewhere() (outcome, remoteAnswer) {
	id, ok := parseRunID(x.rare.brought)
	if !ok {
		return outcome{}, notElsewhere
	}
	d := x.h.resuming.session
	found, begin, err := x.lookElsewhere(id.token)
	if x.r.Context().Err() != nil {
		return outcome{}, answeredElsewhere
	}
	if err == nil && x.r.Method == http.MethodDelete {
		return x.stopElsewhere(id, found, begin)
	}
	if err == nil && found.End != nil {
		_, lost := unmarshalEnd(found.End)
		switch {
		case id.n > found.Last, lost && id.n == found.Last:
			return outcome{}, notElsewhere
		case id.n == found.Last && x.kind.eventSource:
			return outcome{}, newElsewhere // it has everything, and comes back for more
		}
	}
	if errors.Is(err, store.ErrUnknown) {
		return outcome{}, notElsewhere
	}
	if err != nil {
		return x.storeIsAway()
	}
	dead := found.End == nil && d.isDead(begin.Node)
	if dead && id.n >= found.Last {
		return outcome{}, notElsewhere
	}
	f := d.newFollower(x.h.Name, id.token, begin, id.n, dead)
	if f == nil {
		return x.storeIsAway()
	}
	x.rare.follower = f
	feed := &x.rare.feed
	feed.ctx, feed.cancel = context.WithCancelCause(x.r.Context())
	if id.n > found.Last && !f.awaitReached(feed.ctx, id.n) && !f.isEnded() {
		if x.r.Context().Err() != nil {
			return outcome{}, answeredElsewhere
		}
		x.leaveElsewhere()
		x.rare.follower, x.rare.feed = nil, feedContext{}
		return outcome{}, notElsewhere
	}
	return outcome{left: true, run: x.goOnElsewhere(id, found)}, answeredElsewhere
}

// lookElsewhere repeats findElsewhere, because the run may have begun a moment
// ago.
func (x *exchange) lookElsewhere(token runToken) (found store.Run, begin *runBegin, err error) {
	d := x.h.resuming.session
	came, pause := now(), firstLook
	for looks := 1; ; looks++ {
		found, begin, err = x.findElsewhere(token)
		if !errors.Is(err, store.ErrUnknown) || looks >= leastLooks && now() >= d.maySeeUntil(came) {
			return found, begin, err
		}
		select {
		case <-time.After(pause):
		case <-x.r.Context().Done():
			return found, begin, err
		}
		pause = min(2*pause, lastLook)
	}
}

// findElsewhere finds another node's run to which the client may come back. If it
// is someone else's, it counts as unknown.
func (x *exchange) findElsewhere(token runToken) (found store.Run, begin *runBegin, err error) {
	d := x.h.resuming.session
	if d.away.Load() {
		return found, nil, errStoreAway
	}
	found, err = d.find(x.r.Context(), keyOf(token), x.h.Name)
	if err != nil {
		return found, nil, err
	}
	begin = new(runBegin)
	if json.Unmarshal(found.Begin, begin) != nil {
		return found, nil, store.ErrUnknown // written by an incompatible version
	}
	place := x.keptPlace()
	if subtle.ConstantTimeCompare(place[:], begin.Place) == 0 {
		return found, nil, store.ErrUnknown
	}
	return found, begin, nil
}

// isKnownElsewhere reports whether another node has a run with the token.
func (x *exchange) isKnownElsewhere(token runToken) bool {
	if x.h.resuming == nil || x.h.resuming.session == nil || x.h.resuming.session.away.Load() {
		return false
	}
	_, err := x.h.resuming.session.find(x.r.Context(), keyOf(token), x.h.Name)
	return err == nil
}

// marshalBegin is what the store gets when the run begins.
func (r *run) marshalBegin(status int, upstream string) []byte {
	text, err := json.Marshal(runBegin{
		Node:     r.h.resuming.session.node,
		Place:    r.kept.place[:],
		Status:   status,
		Added:    r.kept.added,
		Replaced: r.kept.replaced,
		Upstream: upstream,
		Report:   max(r.h.resuming.history/4, 1),
	})
	if err != nil {
		panic(err) // plain fields
	}
	return text
}

// awaitReached waits until the store has event n of a run that has not ended. It
// returns false if the run never had that event, or if the store does not get it
// in time.
func (f *follower) awaitReached(ctx context.Context, n uint64) bool {
	ctx, stop := context.WithTimeout(ctx, f.d.lease)
	defer stop()
	for ctx.Err() == nil {
		last := f.over.Err() != nil
		events, end, err := f.read(ctx, n-1)
		switch {
		case len(events) > 0:
			return true
		case end != nil, errors.Is(err, store.ErrUnknown), last:
			return false
		case err != nil && f.over.Err() == nil:
			select {
			case <-ctx.Done():
			case <-f.over.Done():
			}
		}
	}
	return false
}

// goOnElsewhere makes a stream of another node's run, beginning at the client's
// place.
func (x *exchange) goOnElsewhere(id runID, found store.Run) runEnd {
	f := x.rare.follower
	p := placing{brought: true, found: true}
	if found.Oldest > id.n+1 {
		p.missed = found.Oldest - 1 - id.n
		p.lost = fmt.Sprintf(lostHistory, p.missed)
		f.at.Store(found.Oldest - 1)
	}
	x.h.group.countPlace(p)
	g := x.newGreeting()
	if p.lost != "" && x.h.lost.isToldTo(x.kind.eventSource) {
		g.event, g.data = x.h.lost.name, p.lost
		g.id = runID{token: id.token, n: f.at.Load()}.String()
	}
	x.rare.fed = x.newFedBy(f, id.token, g)
	x.rare.fed.resumed, x.rare.fed.missed = true, p.missed
	x.takeDifference(f.begin.Added, f.begin.Replaced)
	x.open(f.begin.Status)
	return f.follow(x.rare.feed.ctx, x.stream)
}

// leaveElsewhere tells the run's node that the request's client has left.
func (x *exchange) leaveElsewhere() {
	f := x.rare.follower
	why, stay := x.whyLeft()
	if why == endedByAdmin {
		f.d.post(f.begin.Node, message{Op: clientStops, Run: f.key.String(), Why: endedByAdmin.String()})
	}
	if why == notEnded || why == serverClosed {
		stay = x.h.resuming.window // the client was not there yet, or comes back to another node
	}
	f.leave(stay)
}

// storeIsAway answers a client that has come back while the store is unavailable.
// Only a GET becomes a new request, because an answer must not be paid for twice.
func (x *exchange) storeIsAway() (outcome, remoteAnswer) {
	if x.r.Method == http.MethodGet {
		x.h.group.countResume(resumeUnknown)
		x.rare.unknown = true
		return outcome{}, newElsewhere
	}
	x.h.group.countResume(resumeRefused)
	x.w.Header().Set("Retry-After", strconv.Itoa(int(refusedFor.Seconds())))
	return outcome{left: true, err: caddyhttp.Error(http.StatusServiceUnavailable,
		errors.New("sse: resume: the store is away, so nobody can tell whether the stream is there"))}, answeredElsewhere
}

// stopElsewhere ends another node's run on its client's request.
func (x *exchange) stopElsewhere(id runID, found store.Run, begin *runBegin) (outcome, remoteAnswer) {
	d, ctx := x.h.resuming.session, x.r.Context()
	dead := d.isDead(begin.Node)
	if found.End == nil && id.n > found.Last && !dead {
		f := &follower{d: d, name: x.h.Name, key: keyOf(id.token), over: context.Background()}
		if f.awaitReached(ctx, id.n) {
			found.Last = id.n
		}
	}
	if id.n > found.Last {
		return outcome{}, notElsewhere
	}
	var err error
	if !dead {
		stop := message{Op: clientStops, Run: keyOf(id.token).String(), N: id.n, Why: clientClosed.String()}
		err = d.send(ctx, begin.Node, x.h.Name, stop)
	}
	if err == nil && (found.End != nil || dead) { // no node will drop it
		err = d.call(ctx, storeWrite, storePatience, func(ctx context.Context) error {
			return errors.Join(d.store.Write(ctx, []store.Write{{Run: keyOf(id.token), Drop: true}})...)
		}, x.h.Name)
	}
	if err != nil {
		return x.storeIsAway()
	}
	x.role = answered
	x.w.WriteHeader(http.StatusNoContent)
	return outcome{left: true}, answeredElsewhere
}
