package caddysse

import (
	"sync"
	"time"
)

// tickPool calls tick on streams whose time has come, a few at a time, so that
// many streams due at the same instant do not need a goroutine each. A caller
// that is blocked by a client that does not read is replaced, so that it delays
// no other stream.
type tickPool struct {
	mu      sync.Mutex
	waiting []*stream
	callers []*caller // those that have not been replaced
	timer   *time.Timer
	watched bool // the timer is running
}

// caller is a goroutine that calls tick on one stream after another.
type caller struct {
	since    instant // when its present call began
	replaced bool
}

const (
	// tickPoolSize is how many callers work at a time. Those that were replaced do
	// not count.
	tickPoolSize = 32

	// callPatience is how long a call may take before its caller is replaced.
	callPatience = 5 * time.Millisecond
)

func (p *tickPool) add(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = append(p.waiting, s)
	p.startCallersLocked()
}

// startCallersLocked starts callers for the waiting streams, and a timer to find those
// that are blocked.
func (p *tickPool) startCallersLocked() {
	for range min(len(p.waiting), tickPoolSize-len(p.callers)) {
		member := &caller{since: now()}
		p.callers = append(p.callers, member)
		go p.work(member)
	}
	if len(p.waiting) == 0 || p.watched {
		return
	}
	p.watched = true
	if p.timer == nil {
		p.timer = time.AfterFunc(callPatience, p.replace)
	} else {
		p.timer.Reset(callPatience)
	}
}

func (p *tickPool) work(member *caller) {
	for {
		p.mu.Lock()
		if member.replaced {
			p.mu.Unlock()
			return
		}
		if len(p.waiting) == 0 {
			p.removeLocked(member)
			p.mu.Unlock()
			return
		}
		last := len(p.waiting) - 1
		s := p.waiting[0]
		p.waiting[0] = nil
		if p.waiting = p.waiting[1:]; last == 0 {
			p.waiting = nil
		}
		member.since = now()
		p.mu.Unlock()
		s.tick()
	}
}

func (p *tickPool) removeLocked(member *caller) {
	for i, other := range p.callers {
		if other == member {
			last := len(p.callers) - 1
			p.callers[i], p.callers[last] = p.callers[last], nil
			p.callers = p.callers[:last]
			return
		}
	}
}

// replace replaces the callers that are blocked.
func (p *tickPool) replace() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watched = false
	if len(p.waiting) == 0 {
		return
	}
	latest := now() - instant(callPatience)
	kept := p.callers[:0]
	for _, member := range p.callers {
		if member.since <= latest {
			member.replaced = true
		} else {
			kept = append(kept, member)
		}
	}
	clear(p.callers[len(kept):])
	p.callers = kept
	p.startCallersLocked()
}
