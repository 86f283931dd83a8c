package caddysse

import (
	"container/heap"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
)

const (
	// defaultReconnection is the reconnection time of a stream that was sent none.
	defaultReconnection = time.Second

	shortestRetryWait = 100 * time.Millisecond

	// longestDoubling is how far the waits double. A stream may have been sent a
	// longer time.
	longestDoubling = 10 * time.Second

	// triesPerSecond is how many tries the streams of a name make together: the
	// proxy must not cause a storm that keeps an upstream from coming back.
	triesPerSecond = 64
)

// reconnection is the reconnection time that a stream's client was sent: the
// upstream's last one, else ours, else the default; ours is 0 if there is none.
func reconnection(upstreamMS uint64, upstreamTold bool, ours time.Duration) time.Duration {
	switch {
	case upstreamTold:
		const longest = time.Duration(1<<63 - 1)
		if upstreamMS > uint64(longest/time.Millisecond) {
			return longest
		}
		return time.Duration(upstreamMS) * time.Millisecond
	case ours > 0:
		return ours
	}
	return defaultReconnection
}

// retryWaits chooses how long a stream waits before each try to reach its
// upstream again. The zero value, with a window, is for an upstream that has just
// broken off.
type retryWaits struct {
	window time.Duration

	first  time.Time     // when the first try is due; zero: there was none
	next   time.Duration // the longest the next wait may be, without a Retry-After
	closed bool
}

// wait chooses the next wait. told is the reconnection time of the stream, after
// the Retry-After of the try that has just failed, if any: the wait begins when
// that is over, so that streams that got the same Retry-After do not try at the
// same moment. ok is false if the wait would end after the window: there is no
// further try.
func (w *retryWaits) wait(at time.Time, told, after time.Duration) (wait time.Duration, ok bool) {
	if w.first.IsZero() && !w.closed {
		w.next = max(told, shortestRetryWait)
	}
	upTo := w.next
	wait = max(upTo/2+rand.N(upTo-upTo/2)+1, shortestRetryWait)
	if wait += max(after, 0); wait < 0 {
		wait = 1<<63 - 1
	}
	left := w.window
	if !w.first.IsZero() {
		left = w.first.Add(w.window).Sub(at)
	}
	if w.closed = w.closed || wait > left; w.closed {
		return 0, false
	}
	if w.first.IsZero() {
		w.first = at.Add(wait)
	}
	w.next = max(upTo, min(2*min(upTo, longestDoubling), longestDoubling))
	return wait, true
}

// resumed starts again, because a try has brought an event.
func (w *retryWaits) resumed() {
	*w = retryWaits{window: w.window}
}

// end is when the window is over; ok is false before the first wait.
func (w *retryWaits) end() (at time.Time, ok bool) {
	return w.first.Add(w.window), !w.first.IsZero()
}

// position is where the upstream would continue a stream: the last id that one of
// its blocks committed, and the request's own before any id field.
type position struct {
	id string
}

// positionOf is the position before the upstream has sent an id field: the
// request's Last-Event-ID, if that is not one of ours.
func positionOf(lastEventID string) position {
	var p position
	if !isRunID(lastEventID) {
		p.commit(lastEventID)
	}
	return p
}

// commit records an id that a block of the upstream has committed. After an empty
// one there is no position, nor after one that can't be sent: an earlier id would
// make the upstream send the events after it again.
func (p *position) commit(id string) {
	p.id = ""
	if len(id) <= eventstream.MaxIDLength && id != eventstream.TooLongID && canBeSent(id) {
		p.id = id
	}
}

// value is the Last-Event-ID of the next try. ok is false if there is no
// position.
func (p position) value() (id string, ok bool) {
	return p.id, p.id != ""
}

// canBeSent reports whether a header can carry the id unchanged (RFC 9110,
// section 5.5): no control characters, and no white space around it.
func canBeSent(id string) bool {
	if strings.Trim(id, " \t") != id {
		return false
	}
	for _, b := range []byte(id) {
		if b < ' ' && b != '\t' || b == 0x7F {
			return false
		}
	}
	return true
}

// tryQueue lets the streams of a name try one after the other, in the order in
// which their tries fell due: at most triesPerSecond in any second. It has one
// timer and no goroutine. The zero value is ready.
type tryQueue struct {
	mu    sync.Mutex
	turns turns
	added uint64
	free  time.Time // when the next try may be
	timer *time.Timer
}

// turn is a place in the queue.
type turn struct {
	// come is closed when it is the turn of this try.
	come chan struct{}

	due   time.Time
	order uint64 // among those that are due at the same time
	index int    // in the queue, from 1; 0: it is not there
}

// enter adds a try that is due after a wait.
func (q *tryQueue) enter(wait time.Duration) *turn {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.added++
	t := &turn{come: make(chan struct{}), due: time.Now().Add(wait), order: q.added}
	heap.Push(&q.turns, t)
	if t.index == 1 {
		q.armLocked()
	}
	return t
}

// leave removes a try of a stream that ends before its turn.
func (q *tryQueue) leave(t *turn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.index > 0 {
		heap.Remove(&q.turns, t.index-1)
	}
	if len(q.turns) == 0 && q.timer != nil {
		q.timer.Stop()
	}
}

// armLocked sets the timer for the first try.
func (q *tryQueue) armLocked() {
	if len(q.turns) == 0 {
		return
	}
	at := q.turns[0].due
	if at.Before(q.free) {
		at = q.free
	}
	if q.timer == nil {
		q.timer = time.AfterFunc(time.Until(at), q.fire)
	} else {
		q.timer.Reset(time.Until(at))
	}
}

func (q *tryQueue) fire() {
	q.mu.Lock()
	defer q.mu.Unlock()
	// The timer may fire for a try that has left.
	if at := time.Now(); len(q.turns) > 0 && !at.Before(q.free) && !at.Before(q.turns[0].due) {
		close(heap.Pop(&q.turns).(*turn).come)
		q.free = at.Add(time.Second / triesPerSecond)
	}
	q.armLocked()
}

// turns implements heap.Interface, and tells each turn where it is.
type turns []*turn

func (t turns) Len() int { return len(t) }

func (t turns) Less(i, j int) bool {
	if c := t[i].due.Compare(t[j].due); c != 0 {
		return c < 0
	}
	return t[i].order < t[j].order
}

func (t turns) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i+1, j+1
}

func (t *turns) Push(x any) {
	added := x.(*turn)
	*t = append(*t, added)
	added.index = len(*t)
}

func (t *turns) Pop() any {
	last := (*t)[len(*t)-1]
	(*t)[len(*t)-1] = nil
	*t = (*t)[:len(*t)-1]
	last.index = 0
	return last
}
