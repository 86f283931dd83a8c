package caddysse

import (
	"sync"
	"time"
)

// crew calls the tick of streams whose time has come: a few at a time, so that
// many streams due at the same instant do not need a goroutine each. If a client
// that does not read blocks its caller, that caller is replaced, so that no other
// stream is delayed.
type crew struct {
	mu      sync.Mutex
	waiting []*stream
	callers []*caller // those that have not been replaced
	timer   *time.Timer
	watched bool // the timer is running
}

// caller is a goroutine that calls streams.
type caller struct {
	since    instant // when it began to call the present one
	replaced bool
}

const (
	// crewSize is how many streams are called at a time.
	crewSize = 32

	// callPatience is how long a call may take until its caller is replaced.
	callPatience = 5 * time.Millisecond
)

func (c *crew) add(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, s)
	c.employLocked()
}

// employLocked lets callers work on the waiting streams. If all callers are busy,
// it looks again after a while.
func (c *crew) employLocked() {
	for range min(len(c.waiting), crewSize-len(c.callers)) {
		member := &caller{since: now()}
		c.callers = append(c.callers, member)
		go c.work(member)
	}
	if len(c.waiting) == 0 || c.watched {
		return
	}
	c.watched = true
	if c.timer == nil {
		c.timer = time.AfterFunc(callPatience, c.replace)
	} else {
		c.timer.Reset(callPatience)
	}
}

func (c *crew) work(member *caller) {
	for {
		c.mu.Lock()
		if member.replaced {
			c.mu.Unlock()
			return
		}
		if len(c.waiting) == 0 {
			c.dismissLocked(member)
			c.mu.Unlock()
			return
		}
		last := len(c.waiting) - 1
		s := c.waiting[0]
		c.waiting[0] = nil
		if c.waiting = c.waiting[1:]; last == 0 {
			c.waiting = nil
		}
		member.since = now()
		c.mu.Unlock()
		s.tick()
	}
}

func (c *crew) dismissLocked(member *caller) {
	for i, other := range c.callers {
		if other == member {
			last := len(c.callers) - 1
			c.callers[i], c.callers[last] = c.callers[last], nil
			c.callers = c.callers[:last]
			return
		}
	}
}

// replace replaces the callers that are blocked.
func (c *crew) replace() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watched = false
	if len(c.waiting) == 0 {
		return
	}
	latest := now() - instant(callPatience)
	kept := c.callers[:0]
	for _, member := range c.callers {
		if member.since <= latest {
			member.replaced = true
		} else {
			kept = append(kept, member)
		}
	}
	clear(c.callers[len(kept):])
	c.callers = kept
	c.employLocked()
}
