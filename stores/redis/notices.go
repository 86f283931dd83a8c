package redis

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// noticeLinger is how long a channel on which nobody waits stays subscribed:
	// a reader that has received something usually comes back.
	noticeLinger = 15 * time.Second

	// lookAgain is how often a waiting caller looks without a notice. Notices may
	// be lost with their connection, or be forbidden.
	lookAgain = 2 * time.Second

	// noticePulse is how often the connection for notices is tested.
	noticePulse = 5 * time.Second
)

// notices tell waiting callers that there is something new. Whoever changes a
// run, or sends messages to a node, publishes a notice on its channel. All
// callers of a node share one connection. Small events are part of the notice.
type notices struct {
	connection *connection
	work       sync.WaitGroup

	mu       sync.Mutex
	channels map[string]*channel
	changed  chan struct{} // a channel is wanted, or not any more
	conn     *conn         // nil: there is none
	size     int           // bytes of all tails
}

// channel is a channel on which somebody waits, or was waiting a moment ago.
type channel struct {
	waiters int
	idle    time.Time     // since when nobody has been waiting
	heard   bool          // it is subscribed
	notice  chan struct{} // closed by the next notice; nil: nobody waits for it
	tail    tail
}

func newNotices(c *connection) *notices {
	n := &notices{connection: c, channels: make(map[string]*channel), changed: make(chan struct{}, 1)}
	c.demoted = n.renew
	n.work.Go(n.listen)
	return n
}

// enter makes the caller a waiter on a channel, until it calls leave.
func (n *notices) enter(name string) (leave func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := n.channels[name]
	if ch == nil {
		ch = new(channel)
		n.channels[name] = ch
		n.kick()
	}
	ch.waiters++
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if ch.waiters--; ch.waiters == 0 {
			ch.idle = time.Now()
		}
	}
}

// next returns what the next notice on a channel closes. The caller must have
// entered the channel. It must call next before it looks for news, so that it
// misses no notice.
func (n *notices) next(name string) <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := n.channels[name]
	if ch.notice == nil {
		ch.notice = make(chan struct{})
	}
	return ch.notice
}

// tell handles a notice: it wakes those who wait on the channel, and keeps the
// events in the notice for them.
func (n *notices) tell(name, text string) {
	events := unmarshalTold(text)
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := n.channels[name]
	if ch == nil {
		return
	}
	n.changeLocked(ch, func(t *tail) {
		if len(events) == 0 {
			t.doubt()
			return
		}
		t.add(events, min(longestTail, mostTails-n.size))
	})
	ch.tellLocked()
}

// changeLocked changes a tail, and counts its bytes. During the change, size is
// the size of the others.
func (n *notices) changeLocked(ch *channel, change func(*tail)) {
	n.size -= ch.tail.size
	change(&ch.tail)
	n.size += ch.tail.size
}

// told returns the events that notices have brought after an event, on a channel
// that was entered. ask says that the caller must ask the server. doubts is for
// found.
func (n *notices) told(name string, after uint64, maxBytes int) (events []store.Event, ask bool, doubts uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := n.channels[name]
	n.changeLocked(ch, func(t *tail) { events, ask = t.take(after, maxBytes) })
	return events, ask, ch.tail.doubts
}

// found records what the server had.
func (n *notices) found(name string, after, last uint64, doubts uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.changeLocked(n.channels[name], func(t *tail) { t.found(after, last, doubts) })
}

func (ch *channel) tellLocked() {
	if ch.notice != nil {
		close(ch.notice)
		ch.notice = nil
	}
}

func (n *notices) kick() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// listen keeps a connection for notices open.
func (n *notices) listen() {
	ctx := n.connection.ctx
	var pauses pauses
	for ctx.Err() == nil {
		if c, err := n.connection.dial(ctx); err == nil {
			n.hear(ctx, c)
			if c.lived >= steadyAfter {
				pauses = 0
			}
		}
		n.deaf()
		select {
		case <-time.After(pauses.next()):
		case <-ctx.Done():
		}
	}
}

// renew closes the connection, so that a new one is made.
func (n *notices) renew() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn != nil {
		n.conn.fail(errReplica)
	}
}

// deaf records that no channel is subscribed any more. Waiting callers look
// without a notice.
func (n *notices) deaf() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conn = nil
	for _, ch := range n.channels {
		ch.heard = false
		n.changeLocked(ch, (*tail).doubt)
		ch.tellLocked()
	}
}

// hear subscribes to channels on one connection, until it breaks.
func (n *notices) hear(ctx context.Context, c *conn) {
	n.mu.Lock()
	n.conn = c
	n.mu.Unlock()
	var work sync.WaitGroup
	defer work.Wait()
	defer c.fail(errClosed)
	work.Go(c.send)
	work.Go(func() { n.receive(c) })
	pulse := time.NewTicker(noticePulse)
	defer pulse.Stop()
	for {
		var commands [][]string
		wanted, unwanted := n.difference()
		if len(wanted) > 0 {
			commands = append(commands, append([]string{"SUBSCRIBE"}, wanted...))
		}
		if len(unwanted) > 0 {
			commands = append(commands, append([]string{"UNSUBSCRIBE"}, unwanted...))
		}
		if len(commands) > 0 && c.post(nil, commands) != nil {
			return
		}
		select {
		case <-n.changed:
		case <-pulse.C:
			if c.post(nil, [][]string{{"PING"}}) != nil { // the reply shows that the server is alive
				return
			}
		case <-c.broken:
			return
		case <-ctx.Done():
			return
		}
	}
}

// receive handles what the server sends on a connection for notices.
func (n *notices) receive(c *conn) {
	for {
		_ = c.net.SetReadDeadline(time.Now().Add(noticePulse + connPatience))
		reply, err := readReply(c.in)
		if err != nil {
			c.fail(err)
			return
		}
		if refused, ok := reply.(replyError); ok {
			c.fail(refused)
			return
		}
		message, ok := reply.([]any)
		if !ok || len(message) != 3 {
			continue
		}
		name, _ := message[1].(string)
		switch message[0] {
		case "message":
			text, _ := message[2].(string)
			n.tell(name, text)
		case "subscribe": // earlier notices did not arrive
			n.tell(name, "")
		}
	}
}

// difference returns the channels to subscribe to, and those to leave.
func (n *notices) difference() (wanted, unwanted []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, ch := range n.channels {
		switch {
		case ch.waiters == 0 && time.Since(ch.idle) > noticeLinger:
			n.size -= ch.tail.size
			delete(n.channels, name)
			if ch.heard {
				unwanted = append(unwanted, name)
			}
		case !ch.heard:
			ch.heard = true
			wanted = append(wanted, name)
		}
	}
	slices.Sort(wanted)
	return wanted, unwanted
}

// wait calls look, at once and after each notice on a channel, until it is done
// or fails, or the time is over. lost says that notices may have been lost.
func (n *notices) wait(ctx context.Context, name string, wait time.Duration, look func(lost bool) (done bool, err error)) error {
	// A reader that soon comes back is still on the channel.
	leave := n.enter(name)
	defer leave()
	until := time.Now().Add(wait)
	var timer *time.Timer // many readers need not wait
	for lost := false; ; {
		notice := n.next(name)
		if done, err := look(lost); done || err != nil {
			return err
		}
		pause := min(lookAgain, time.Until(until))
		if pause <= 0 {
			return nil
		}
		if timer == nil {
			timer = time.NewTimer(pause)
			defer timer.Stop()
		} else {
			timer.Reset(pause)
		}
		select {
		case <-notice:
			lost = false
		case <-timer.C:
			lost = true
		case <-ctx.Done():
			return ctx.Err()
		case <-n.connection.ctx.Done():
			return context.Cause(n.connection.ctx)
		}
	}
}
