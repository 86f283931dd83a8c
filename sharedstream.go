package caddysse

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// feedContext is for a request whose stream a run feeds. It ends with the
// client's request, or when the stream is over.
type feedContext struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
}

// context is the parent context of the request's attempts.
func (x *exchange) context() context.Context {
	if x.keeps() {
		return x.rare.keeping.ctx
	}
	if x.rare != nil && x.rare.feed.ctx != nil {
		return x.rare.feed.ctx
	}
	return x.r.Context()
}

// cancelFeed ends what feeds the stream.
func (x *exchange) cancelFeed() context.CancelCauseFunc {
	if x.rare != nil && x.rare.feed.cancel != nil {
		return x.rare.feed.cancel
	}
	return x.attempt.cancel
}

// upstream is the upstream that answers the request, if it is known.
func (x *exchange) upstream() string {
	switch {
	case x.attempt != nil:
		return x.attempt.upstream()
	case x.rare != nil && x.rare.reader != nil:
		return x.rare.reader.run.figures().upstream
	case x.rare != nil && x.rare.follower != nil:
		return x.rare.follower.begin.Upstream
	}
	return ""
}

// takeID records the id that the client brought. If this module has added it, it
// is removed from the request, so that the handlers after this one do not get it.
func (x *exchange) takeID() {
	id := broughtID(x.r)
	x.rarely().brought = id
	if isRunID(id) && x.h.foreignIDs.Load() {
		parsed, ok := parseRunID(id)
		// The upstream may be another site of this process, whose runs have
		// another name.
		r, known := x.h.runTable().get(parsed.token)
		known = known && r.group() == x.h.group
		if !ok || !known && !x.isKnownElsewhere(parsed.token) {
			return // an upstream's id
		}
	}
	if stripped := withoutRunIDs(x.r); stripped != x.r {
		x.rare.given, x.r = x.r, stripped
	}
	x.rare.taken = isRunID(id) // an outer handler may have removed it
}

// lastEventID is the id that the client brought.
func (x *exchange) lastEventID() string {
	if x.rare != nil && x.rare.brought != "" {
		return x.rare.brought
	}
	return x.r.Header.Get(lastEventIDHeader)
}

// broughtOurs reports whether that id is one that this module adds.
func (x *exchange) broughtOurs() bool {
	return x.rare != nil && x.rare.taken
}

// upstreamsID is the upstream's id that the client brought in the header, empty
// for none. One in the query is part of the key.
func (x *exchange) upstreamsID() string {
	var p position
	p.commit(x.r.Header.Get(lastEventIDHeader)) // ours have been removed
	return p.id
}

// findRun enters the run that the request shares, if there is one.
func (x *exchange) findRun() {
	key := x.h.sharing.names.key(x.r)
	x.rarely().share = &shareRequest{key: key, sum: key.sum()}
	x.rare.reader = x.h.sharing.find(x.rare.share.sum)
}

// turnAway removes a client from its run, because a limit refuses it.
func (x *exchange) turnAway() {
	if x.rare != nil && x.rare.reader != nil {
		x.rare.reader.turnAway()
	}
}

// joinRun enters the run that the request shares, and begins one if there is
// none. It returns false if the request must ask the upstream itself.
func (x *exchange) joinRun(next caddyhttp.Handler) bool {
	if x.rare == nil || x.rare.share == nil {
		return false
	}
	if x.rare.reader == nil {
		x.rare.reader = x.h.sharing.findOrBegin(x, next)
	}
	x.rare.share = nil // a quiet client does not need it
	return x.rare.reader != nil
}

// earlyStartIn is how long to wait for the upstream's headers, from now on.
func (x *exchange) earlyStartIn() time.Duration {
	if x.startedEarly || !x.mayStartEarly() {
		return never
	}
	return time.Duration(x.h.EarlyStart.Delay) - time.Duration(now()-x.arrived)
}

// callShared answers the request from the run that it has entered. It returns
// false if the request must ask the upstream itself after all.
func (x *exchange) callShared() (out outcome, shared bool) {
	reader := x.rare.reader
	onOwnStack(func() {
		x.rare.fed = x.newFed(reader.run, x.newGreeting())
		feed := &x.rare.feed
		feed.ctx, feed.cancel = context.WithCancelCause(x.r.Context())
	})
	if !x.awaitAnswer(x.rare.feed.ctx, reader) {
		return outcome{}, true
	}
	answer := reader.run.answer
	switch answer.kind {
	case answerStream:
		return outcome{left: true, run: x.followAnswer(reader)}, true
	case answerFailure:
		return outcome{left: true, err: x.passFailure(answer)}, true
	}
	reader.leave()
	x.rare.reader, x.rare.fed = nil, nil
	if x.stream != nil {
		x.stream.unfeed()
	}
	return outcome{}, false
}

// followAnswer makes a stream of the run and passes on its events.
func (x *exchange) followAnswer(reader *runReader) (end runEnd) {
	var p placing
	open := false
	onOwnStack(func() { p, open = x.openShared(reader, reader.run.answer) })
	if open && p.catchUp != "" {
		end, open = x.catchUp(reader, p.catchUp)
	}
	if !open {
		return end
	}
	return reader.followRun(x.rare.feed.ctx, x.stream)
}

// awaitAnswer waits for the answer to the run. It returns false if the client has
// left, or its stream has ended.
func (x *exchange) awaitAnswer(ctx context.Context, reader *runReader) bool {
	var early <-chan time.Time
	if x.mayStartEarly() {
		delay := time.NewTimer(x.earlyStartIn())
		defer delay.Stop()
		early = delay.C
	}
	for {
		select {
		case <-reader.run.answered:
			return ctx.Err() == nil
		case <-early:
			early = nil
			x.startEarly()
			if x.stream != nil {
				reader.feeds(x.stream)
			}
		case <-ctx.Done():
			return false
		}
	}
}

// passFailure sends the client a failure that all clients of the run get.
func (x *exchange) passFailure(answer runAnswer) error {
	if answer.status == 0 {
		return answer.err
	}
	if x.stream != nil {
		x.role = streaming
		x.stream.answered(answer.status, answer.header, answer.upstream)
		return nil
	}
	header := x.w.Header()
	for _, field := range []string{"Retry-After", "Content-Type"} {
		if values := answer.header[field]; len(values) > 0 {
			header[field] = slices.Clone(values)
		}
	}
	x.response.WriteHeader(answer.status)
	_, _ = x.response.Write(answer.body) // an error means that the client has left
	return nil
}

// openShared makes a stream of the run, beginning at the client's place. It
// returns false if the client has left.
func (x *exchange) openShared(reader *runReader, answer runAnswer) (p placing, open bool) {
	p = x.placeIn(reader)
	x.h.group.countPlace(p)
	x.notePlace(p)
	greeting := x.greeting(reader, p)
	if x.stream != nil {
		x.role = streaming
		x.stream.answered(answer.status, answer.header, answer.upstream)
		greeting.retry = 0 // it has been sent
		return p, x.stream.greet(greeting.text()) == nil
	}
	header := x.w.Header()
	for field, values := range answer.header {
		if field == "Server" {
			delete(header, field) // as reverse_proxy does
		}
		// Outer handlers edit values in place.
		header[field] = slices.Concat(header[field], values)
	}
	x.rare.fed.greeting = greeting
	x.open(answer.status)
	reader.feeds(x.stream)
	return p, true
}

// onOwnStack calls f on a goroutine of its own and waits for it. A goroutine's
// stack stays as large as its deepest call: f, which is called only once, would
// double the stack of each quiet client. A panic in f continues in the caller.
func onOwnStack(f func()) {
	returned := make(chan any, 1)
	go func() {
		defer func() { returned <- recover() }()
		f()
	}()
	if panicked := <-returned; panicked != nil {
		panic(panicked)
	}
}

// notePlace records the client's place for logs. Its stream may have started
// already.
func (x *exchange) notePlace(p placing) {
	if s := x.stream; s != nil {
		s.facts.Lock()
		defer s.facts.Unlock()
	}
	x.rare.fed.resumed, x.rare.fed.missed = p.found, p.missed
}

// placing is where a client starts.
type placing struct {
	brought bool   // it brought an id
	found   bool   // which is known
	missed  uint64 // how many events after it are gone
	catchUp string // the upstream's id after which it has to catch up
	lost    string // the reason in the event lost; empty: none
}

// The reasons in the data of the event lost.
const (
	lostUnknown = `{"reason":"unknown"}`
	lostHistory = `{"reason":"history","events":%d}`
)

// placeIn gives a client its place in the run.
func (x *exchange) placeIn(reader *runReader) placing {
	id := x.rare.brought
	p := placing{brought: id != ""}
	if parsed, ok := parseRunID(id); ok && parsed.token == reader.run.token() {
		p.found = reader.join(journal.After(parsed.n))
	} else if upstreams := x.upstreamsID(); upstreams != "" {
		if p.found = reader.join(journal.AfterID(upstreams)); !p.found {
			p.catchUp = upstreams
			reader.leaveJournal()
			return p
		}
	}
	if p.found {
		if p.missed = reader.cursor.Missed(); p.missed > 0 {
			p.lost = fmt.Sprintf(lostHistory, p.missed)
		}
		return p
	}
	if reader.cursor == nil {
		start := journal.Live()
		if x.h.sharing.last > 0 {
			start = journal.Last(x.h.sharing.last)
		}
		reader.join(start)
	}
	if x.broughtOurs() {
		p.lost = lostUnknown
	}
	return p
}

// newFed is what the request's stream must know about the run that feeds it.
func (x *exchange) newFed(r *run, g greeting) *fed {
	f := x.newFedBy(r, r.token(), g)
	f.feed = r.feed
	return f
}

// newFedBy is newFed for any source.
func (x *exchange) newFedBy(source feedSource, token runToken, g greeting) *fed {
	f := &fed{run: token.short(), source: source, tried: source.tries(), greeting: g}
	if x.h.spared != nil && x.frames == &x.h.frames && !x.kind.eventSource {
		f.line = &x.h.spared.line
	}
	return f
}

// newGreeting is a greeting with nothing but the client's reconnection time.
func (x *exchange) newGreeting() greeting {
	g := greeting{eventSource: x.kind.eventSource}
	if x.frames.retryMin > 0 && x.kind.resumable {
		g.retry = x.frames.reconnectionTime()
	}
	return g
}

// greeting is what a client gets first at its place in the run.
func (x *exchange) greeting(reader *runReader, p placing) greeting {
	g := x.newGreeting()
	feed := reader.run.feed
	if p.catchUp != "" {
		g.upstreamRetry, _ = feed.upstreamRetry()
		return g
	}
	at := reader.cursor.Begin()
	if d, told := feed.upstreamRetry(); told && at.Number > 0 && reader.run.use == sharedRun {
		g.upstreamRetry = d
	}
	switch {
	case p.lost != "" && x.h.lost.isToldTo(x.kind.eventSource):
		g.event, g.data = x.h.lost.name, p.lost
	case x.kind.eventSource && !p.found && (!p.brought || x.broughtOurs()):
		g.event = firstEvent
	default:
		return g
	}
	g.id = feed.place(at)
	return g
}

// firstEvent is the name of the event with which a stream begins, so that its
// client can come back before it has received an event from the upstream.
const firstEvent = "sse"

// countPlace counts the result for the id that a client brought.
func (g *group) countPlace(p placing) {
	switch {
	case p.found && p.missed > 0:
		g.countResume(resumeGap)
	case p.found:
		g.countResume(resumeFound)
	case p.lost != "":
		g.countResume(resumeUnknown)
	}
}
