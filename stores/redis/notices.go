package redis

import (
	"context"
	"strconv"
	"sync"
	"time"

	"github.com/redis/rueidis"
)

const (
	// channelIdle is for how long a channel is listened to without anybody who
	// waits: who has read will read on.
	channelIdle = 20 * time.Second

	// subscribeBatch is how many channels one command names.
	subscribeBatch = 500
)

// notices wakes those who wait for something new. Writers publish it on a channel
// of each run, and senders on one of each node: so all who wait share a
// connection, and a server has nothing to do for them until there is something.
type notices struct {
	mu       sync.Mutex
	channels map[string]*channel
	pending  chan struct{} // some channel is to be subscribed
}

// channel is what is known of one. All of it belongs to the lock of notices.
type channel struct {
	name    string
	waiting int
	since   time.Time // when the last one has left

	asked   bool // the server has been asked for it, on this connection
	live    bool // it has confirmed
	changed chan struct{}
	version uint64 // counts what has been published, and breaks

	newest uint64 // the number of the newest event, as far as is known
	over   bool   // the run has ended, or is gone
}

func newNotices() *notices {
	return &notices{channels: make(map[string]*channel), pending: make(chan struct{}, 1)}
}

// join is for who may have to wait. It is to be given back by leave.
func (n *notices) join(name string) *channel {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.channels[name]
	if c == nil {
		c = &channel{name: name, changed: make(chan struct{})}
		n.channels[name] = c
	}
	if c.waiting++; !c.asked {
		n.wantLocked()
	}
	return c
}

func (n *notices) wantLocked() {
	select {
	case n.pending <- struct{}{}:
	default:
	}
}

func (n *notices) leave(c *channel) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.waiting--; c.waiting == 0 {
		c.since = time.Now()
	}
}

// look returns what to wait for, and whether everything that comes is told there.
func (n *notices) look(c *channel) (live bool, version uint64, changed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return c.live, c.version, c.changed
}

// isAt reports whether a run is known to have nothing after an event.
func (n *notices) isAt(c *channel, after uint64) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return c.live && !c.over && c.newest > 0 && c.newest == after
}

// note takes down the number of the newest event, which the server has told while
// the channel was live.
func (n *notices) note(c *channel, newest uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.live {
		c.newest = max(c.newest, newest)
	}
}

func (c *channel) changedLocked() {
	c.version++
	close(c.changed)
	c.changed = make(chan struct{})
}

// isPublished takes a message.
func (n *notices) isPublished(m rueidis.PubSubMessage) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.channels[m.Channel]
	if c == nil {
		return
	}
	if number, err := strconv.ParseUint(m.Message, 10, 64); err == nil {
		c.newest = max(c.newest, number)
	} else {
		c.over = true
	}
	c.changedLocked()
}

func (n *notices) isConfirmed(s rueidis.PubSubSubscription) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.channels[s.Channel]; c != nil && s.Kind == "subscribe" && c.asked {
		c.live = true
		c.changedLocked()
	}
}

// listen keeps the subscriptions on a link, until it is broken.
func (n *notices) listen(l *link) {
	client, release := l.Dedicate()
	defer release()
	ended := client.SetPubSubHooks(rueidis.PubSubHooks{OnMessage: n.isPublished, OnSubscription: n.isConfirmed})
	defer n.isBroken()
	n.mu.Lock()
	n.wantLocked()
	n.mu.Unlock()
	sweep := time.NewTicker(channelIdle / 4)
	defer sweep.Stop()
	for {
		var err error
		select {
		case <-n.pending:
			err = n.each(n.unasked(), func(names []string) rueidis.Completed {
				return client.B().Subscribe().Channel(names...).Build()
			}, client)
		case <-sweep.C:
			err = n.each(n.idle(), func(names []string) rueidis.Completed {
				return client.B().Unsubscribe().Channel(names...).Build()
			}, client)
		case err = <-ended:
			if err == nil {
				err = rueidis.ErrClosing
			}
		case <-l.broken:
			return
		}
		if err != nil {
			l.cutOff(err)
			return
		}
	}
}

// each has the server do something with channels, some at a time.
func (n *notices) each(names []string, command func(names []string) rueidis.Completed, client rueidis.DedicatedClient) error {
	for len(names) > 0 {
		some := names[:min(len(names), subscribeBatch)]
		names = names[len(some):]
		ctx, cancel := context.WithTimeout(context.Background(), answerPatience)
		err := client.Do(ctx, command(some)).Error()
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}

// unasked returns the channels that the server is to be asked for.
func (n *notices) unasked() (names []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, c := range n.channels {
		if !c.asked {
			c.asked = true
			names = append(names, name)
		}
	}
	return names
}

// idle forgets the channels that nobody waits for any more, and returns them.
func (n *notices) idle() (names []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, c := range n.channels {
		if c.waiting == 0 && time.Since(c.since) > channelIdle {
			delete(n.channels, name)
			names = append(names, name)
		}
	}
	return names
}

// isBroken says that nothing is told any more.
func (n *notices) isBroken() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, c := range n.channels {
		c.asked, c.live, c.newest, c.over = false, false, 0, false
		c.changedLocked()
		if c.waiting == 0 {
			delete(n.channels, name)
		}
	}
}
