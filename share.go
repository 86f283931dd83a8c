package caddysse

import (
	"context"
	"crypto/sha256"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// sharing has the shared runs of one handler: one for all requests with the same
// key. A reload makes a new one, and so new runs.
type sharing struct {
	h       *Handler
	names   shareNames
	last    uint64 // how many events a new client starts with; 0: with what comes from now on
	history int
	linger  time.Duration
	runFor  time.Duration
	budget  *journal.Budget

	warned atomic.Int64 // unix nanoseconds of the last warning

	mu     sync.Mutex
	runs   map[shareSum]*run
	others otherAnswers
}

// shareSum is a shareKey as a key of a map.
type shareSum = [sha256.Size]byte

// lostEvent says how a client is told about a gap.
type lostEvent struct {
	name     string // empty: it is not told
	everyone bool   // not only an EventSource
}

const (
	defaultLostEvent = "lost"
	lostOff          = "off"
)

func newLostEvent(setting string) lostEvent {
	switch setting {
	case "":
		return lostEvent{name: defaultLostEvent}
	case lostOff:
		return lostEvent{}
	}
	return lostEvent{name: setting, everyone: true}
}

// isToldTo reports whether a client gets the event.
func (l lostEvent) isToldTo(eventSource bool) bool {
	return l.name != "" && (l.everyone || eventSource)
}

// shareRequest is what matters of a client's request for the run that it shares.
type shareRequest struct {
	key shareKey
	sum shareSum
}

// mayShare reports whether a request is one of those that share a run.
func (x *exchange) mayShare() bool {
	if x.h.sharing == nil || asksForUpgrade(x.r.Header) {
		return false
	}
	return x.kind.resumable && hasNoBody(x.r)
}

// hasNoBody reports whether a request has no body. Over HTTP/3 a length of -1
// does not mean that there is one.
func hasNoBody(r *http.Request) bool {
	return r.ContentLength == 0 || r.Body == nil || r.Body == http.NoBody ||
		r.ProtoMajor == 3 && r.ContentLength < 0
}

// find enters the run of a request, if there is one. A client in a run keeps it
// from being ended to make room.
func (sh *sharing) find(sum shareSum) *runReader {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if r := sh.runs[sum]; r != nil {
		return r.enter()
	}
	return nil
}

// findOrBegin enters the run of a request, and starts it if there is none. It
// returns nil if the request must ask the upstream itself.
func (sh *sharing) findOrBegin(x *exchange, next caddyhttp.Handler) *runReader {
	share := x.rare.share
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if r := sh.runs[share.sum]; r != nil {
		if reader := r.enter(); reader != nil {
			return reader
		}
	}
	if sh.others.has(share.sum, now()) {
		return nil
	}
	f := openFeed(sh.budget, journal.KeepNewest, sh.history, x.upstreamsID(), nil)
	if f == nil {
		return nil
	}
	f.foreign = func() { sh.h.foreignIDs.Store(true) }
	f.journal.ServedBy(fanOut{})
	r := sh.h.newRun(sharedRun, f)
	r.host, r.path = printable(x.r.Host, 255), printable(share.key.received.Path, 1024)
	r.stays = func() time.Duration {
		if r.stage == runEnded || sh.h.isReplaced() || exit.exiting() {
			return 0
		}
		return sh.linger
	}
	r.forget = func() { sh.forget(share.sum, r) }
	if sh.runs == nil {
		sh.runs = make(map[shareSum]*run)
	}
	sh.runs[share.sum] = r
	r.endAfter(sh.runFor, maxDuration)
	reader := r.enter()
	server, _ := x.r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	go sh.serve(r, share, server, x.upstreamsID(), next)
	return reader
}

func (sh *sharing) forget(sum shareSum, r *run) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.runs[sum] == r {
		delete(sh.runs, sum)
	}
}

// serve calls the handlers after sse for a run. It keeps nothing of the client
// that started the run except the key.
func (sh *sharing) serve(r *run, share *shareRequest, server *caddyhttp.Server, began string, next caddyhttp.Handler) {
	r.call = func(ctx context.Context, lastEventID string, w runWriter) error {
		request := sh.names.request(context.WithValue(ctx, runKey{}, w), share.key, lastEventID, w, server)
		w.asked(request)
		return next.ServeHTTP(w, request)
	}
	end := r.ask(began)
	if r.answeredOther(end) {
		sh.notShared(share.sum, r.path)
	}
	r.finish(end)
}

// notShared records that the upstream's answer is not a stream, and warns of it
// at most once a minute.
func (sh *sharing) notShared(sum shareSum, path string) {
	sh.mu.Lock()
	sh.others.add(sum, now())
	sh.mu.Unlock()
	at := time.Now().UnixNano()
	last := sh.warned.Load()
	if at-last < int64(time.Minute) || !sh.warned.CompareAndSwap(last, at) {
		return
	}
	sh.h.logger.Warn("the answer to a shared request is no event stream; for a while, each client asks the upstream by itself",
		zap.String("name", sh.h.Name),
		zap.String("path", path))
}

// replace says that another configuration has replaced this one: its runs stay as
// long as they have clients, up to a limit.
func (sh *sharing) replace() {
	sh.mu.Lock()
	all := slices.Collect(maps.Values(sh.runs))
	sh.mu.Unlock()
	for _, r := range all {
		r.endAfter(replacedLimit, drained)
		r.giveWay()
	}
}

// replacedLimit is how long a run stays with a configuration that a reload has
// replaced: it keeps all of that configuration in memory.
const replacedLimit = 10 * time.Minute

// otherAnswers records for which keys the upstream's answer was not a stream.
// Clients choose the keys, so there is a limit.
type otherAnswers struct {
	until map[shareSum]instant
	order []shareSum // oldest first
}

const (
	otherAnswersFor = 10 * time.Second
	maxOtherAnswers = 1024
)

func (o *otherAnswers) has(sum shareSum, at instant) bool {
	until, known := o.until[sum]
	return known && at < until
}

func (o *otherAnswers) add(sum shareSum, at instant) {
	if o.until == nil {
		o.until = make(map[shareSum]instant)
	}
	for len(o.order) > 0 && (len(o.order) >= maxOtherAnswers || o.until[o.order[0]] <= at) {
		delete(o.until, o.order[0])
		o.order = o.order[1:]
	}
	if _, known := o.until[sum]; !known {
		o.order = append(o.order, sum)
	}
	o.until[sum] = at + instant(otherAnswersFor)
}
