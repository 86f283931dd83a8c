package redis

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// noticeLinger is how long a channel stays subscribed to that nobody waits on:
	// a reader that has got something comes again.
	noticeLinger = 15 * time.Second

	// lookAgain is how often who waits looks without a notice: one may be lost
	// with its connection, or forbidden.
	lookAgain = 2 * time.Second

	// noticePulse is how often the connection for notices is tried.
	noticePulse = 5 * time.Second
)

// notices tell who waits that there is something new: whoever changes a run, or
// sends messages to a node, publishes on its channel. All waits of a node share
// one connection.
type notices struct {
	connection *connection
	work       sync.WaitGroup

	mu       sync.Mutex
	channels map[string]*channel
	changed  chan struct{} // a channel is wanted, or not any more
}

// channel is one that somebody waits on, or has waited on a moment ago.
type channel struct {
	waiters int
	idle    time.Time     // since when there is none
	heard   bool          // the server sends its notices
	notice  chan struct{} // closed and replaced with each notice
}

func newNotices(c *connection) *notices {
	n := &notices{connection: c, channels: make(map[string]*channel), changed: make(chan struct{}, 1)}
	n.work.Go(n.listen)
	return n
}

// enter has the caller wait on a channel, until it leaves.
func (n *notices) enter(name string) (leave func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := n.channels[name]
	if ch == nil {
		ch = &channel{notice: make(chan struct{})}
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

// next returns what is closed at the next notice on a channel that has been
// entered. What was there before must be looked for after this call.
func (n *notices) next(name string) <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.channels[name].notice
}

// tell has those look who wait on a channel.
func (n *notices) tell(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if ch := n.channels[name]; ch != nil {
		ch.tellLocked()
	}
}

func (ch *channel) tellLocked() {
	close(ch.notice)
	ch.notice = make(chan struct{})
}

func (n *notices) kick() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// listen keeps a connection for notices.
func (n *notices) listen() {
	ctx := n.connection.ctx
	for ctx.Err() == nil {
		if c, err := n.connection.r.dial(ctx); err == nil {
			n.hear(ctx, c)
		}
		n.deaf()
		select {
		case <-time.After(dialPause):
		case <-ctx.Done():
		}
	}
}

// deaf says that no channel is subscribed to any more. A reader that waits
// looks by itself.
func (n *notices) deaf() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, ch := range n.channels {
		ch.heard = false
		ch.tellLocked()
	}
}

// hear subscribes to what is wanted on one connection, until that breaks.
func (n *notices) hear(ctx context.Context, c *conn) {
	defer c.fail(errClosed)
	n.work.Go(func() { n.receive(c) })
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
		if len(commands) > 0 && c.send(nil, commands) != nil {
			return
		}
		select {
		case <-n.changed:
		case <-pulse.C:
			if c.send(nil, [][]string{{"PING"}}) != nil { // the answer shows that the server lives
				return
			}
		case <-c.broken:
			return
		case <-ctx.Done():
			return
		}
	}
}

// receive passes on what the server sends on a connection for notices.
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
		// After a subscription, what came before it has not been told.
		if message, ok := reply.([]any); ok && len(message) == 3 && (message[0] == "message" || message[0] == "subscribe") {
			if name, ok := message[1].(string); ok {
				n.tell(name)
			}
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

// wait calls look again and again until it is done, fails, or the time is over.
func (n *notices) wait(ctx context.Context, name string, wait time.Duration, look func() (done bool, err error)) error {
	if wait <= 0 {
		_, err := look()
		return err
	}
	// A reader that comes again soon is still on the channel, and so looks only
	// once before the next notice.
	leave := n.enter(name)
	defer leave()
	over := time.NewTimer(wait)
	defer over.Stop()
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for {
		notice := n.next(name)
		if done, err := look(); done || err != nil {
			return err
		}
		select {
		case <-notice:
		case <-again.C:
		case <-over.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-n.connection.ctx.Done():
			return context.Cause(n.connection.ctx)
		}
	}
}
