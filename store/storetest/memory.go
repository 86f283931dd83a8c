package storetest

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

// Memory is a store in the memory of the process that can be made to fail. Each
// node of a test opens its own handle.
type Memory struct {
	mu      sync.Mutex
	runs    map[store.Key]*memoryRun
	leases  map[store.Node]time.Time
	inboxes map[store.Node][][]byte
	changed chan struct{} // closed when something has changed

	failure    error
	delay      time.Duration
	writeDelay time.Duration
	full       bool
}

type memoryRun struct {
	store.Run
	events []store.Event
	until  time.Time
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	m := &Memory{changed: make(chan struct{}), leases: make(map[store.Node]time.Time), inboxes: make(map[store.Node][][]byte)}
	m.runs = make(map[store.Key]*memoryRun)
	return m
}

// The errors of a store that was made to fail.
var (
	ErrAway = errors.New("the store is away")
	ErrFull = errors.New("the store is full")
)

// SetAway makes every call fail from now on, or not.
func (m *Memory) SetAway(away bool) {
	m.change(func() {
		if m.failure = nil; away {
			m.failure = ErrAway
		}
	})
}

// SetFull makes writes fail that would add something, or not.
func (m *Memory) SetFull(full bool) { m.change(func() { m.full = full }) }

// SetDelay makes every call take this long.
func (m *Memory) SetDelay(delay time.Duration) { m.change(func() { m.delay = delay }) }

// SetWriteDelay makes every Write take this much longer.
func (m *Memory) SetWriteDelay(delay time.Duration) { m.change(func() { m.writeDelay = delay }) }

// Flush removes everything.
func (m *Memory) Flush() {
	m.change(func() {
		clear(m.runs)
		clear(m.leases)
		clear(m.inboxes)
	})
}

// LoseNewest removes the newest events of all runs, and their ends, like a
// failover to a replica.
func (m *Memory) LoseNewest(n uint64) {
	m.change(func() {
		for _, run := range m.runs {
			run.Last -= min(n, run.Last)
			run.Oldest, run.End = min(run.Oldest, run.Last+1), nil
			run.events = slices.DeleteFunc(run.events, func(event store.Event) bool { return event.Number > run.Last })
		}
	})
}

// EndLease ends a node's lease.
func (m *Memory) EndLease(node store.Node) { m.change(func() { delete(m.leases, node) }) }

// LoseMessages removes messages that were sent and not received.
func (m *Memory) LoseMessages() { m.change(func() { clear(m.inboxes) }) }

// Runs returns the keys of all runs.
func (m *Memory) Runs() (keys []store.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key := range m.runs {
		if m.runLocked(key) != nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// Contents returns everything that is kept of all runs, in one string.
func (m *Memory) Contents() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []byte
	for key, run := range m.runs {
		all = append(append(all, key.String()...), run.Begin...)
		for _, event := range run.events {
			all = append(all, event.Data...)
		}
		all = append(all, run.End...)
	}
	return string(all)
}

func (m *Memory) change(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
	m.changedLocked()
}

func (m *Memory) changedLocked() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// runLocked returns a run that has not expired, or nil.
func (m *Memory) runLocked(key store.Key) *memoryRun {
	run := m.runs[key]
	if run != nil && !time.Now().Before(run.until) {
		delete(m.runs, key)
		return nil
	}
	return run
}

// Open returns a handle on the store.
func (m *Memory) Open() *Handle {
	h := &Handle{m: m}
	h.ctx, h.cancel = context.WithCancelCause(context.Background())
	return h
}

// Handle is one node's access to a [Memory].
type Handle struct {
	m      *Memory
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu    sync.Mutex
	cut   bool
	nodes []store.Node // nodes that have renewed their lease through this handle
}

// SetCut disconnects only this node from the store, or not.
func (h *Handle) SetCut(cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cut = cut
}

// Die disconnects this node permanently, and ends its lease.
func (h *Handle) Die() {
	h.SetCut(true)
	h.mu.Lock()
	nodes := h.nodes
	h.mu.Unlock()
	for _, node := range nodes {
		h.m.EndLease(node)
	}
}

var errClosed = errors.New("the store has been closed")

// Close implements [store.Store].
func (h *Handle) Close() error {
	h.cancel(errClosed)
	return nil
}

// do calls f with the lock held, unless the store fails. It repeats that after
// each change until f returns true, or the wait is over.
func (h *Handle) do(ctx context.Context, wait time.Duration, f func() (done bool)) error {
	m := h.m
	m.mu.Lock()
	delay := m.delay
	m.mu.Unlock()
	if delay > 0 {
		if err := h.sleep(ctx, delay, nil); err != nil {
			return err
		}
	}
	until := time.Now().Add(wait)
	for {
		h.mu.Lock()
		cut := h.cut
		h.mu.Unlock()
		m.mu.Lock()
		changed := m.changed
		switch {
		case cut:
			m.mu.Unlock()
			return ErrAway
		case m.failure != nil:
			defer m.mu.Unlock()
			return m.failure
		case context.Cause(h.ctx) != nil:
			m.mu.Unlock()
			return context.Cause(h.ctx)
		case ctx.Err() != nil:
			m.mu.Unlock()
			return ctx.Err()
		}
		done := f()
		m.mu.Unlock()
		left := time.Until(until)
		if done || left <= 0 {
			return nil
		}
		if err := h.sleep(ctx, left, changed); err != nil {
			return err
		}
	}
}

// sleep waits for d, or until something changes.
func (h *Handle) sleep(ctx context.Context, d time.Duration, changed <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-changed:
	case <-ctx.Done():
		return ctx.Err()
	case <-h.ctx.Done():
		return context.Cause(h.ctx)
	}
	return nil
}

// Write implements [store.Store].
func (h *Handle) Write(ctx context.Context, writes []store.Write) []error {
	errs := make([]error, len(writes))
	failed := make(map[store.Key]error)
	h.m.mu.Lock()
	delay := h.m.writeDelay
	h.m.mu.Unlock()
	_ = h.sleep(ctx, delay, nil) // do returns the error
	err := h.do(ctx, 0, func() bool {
		for i := range writes {
			w := &writes[i]
			if errs[i] = failed[w.Run]; errs[i] == nil {
				errs[i] = h.m.writeLocked(w)
			}
			if errs[i] != nil {
				failed[w.Run] = errs[i]
			}
		}
		h.m.changedLocked()
		return true
	})
	switch {
	case err != nil:
		for i := range errs {
			errs[i] = err
		}
		return errs
	case len(failed) > 0:
		return errs
	}
	return nil
}

func (m *Memory) writeLocked(w *store.Write) error {
	if w.Drop {
		delete(m.runs, w.Run)
		return nil
	}
	if m.full {
		return ErrFull
	}
	run := m.runLocked(w.Run)
	switch {
	case run == nil && w.Begin == nil:
		return store.ErrUnknown
	case run != nil && run.Last < w.After:
		return store.ErrUnknown
	case run == nil:
		run = &memoryRun{Run: store.Run{Begin: slices.Clone(w.Begin), Oldest: 1}}
		m.runs[w.Run] = run
	}
	for _, event := range w.Events {
		if event.Number > run.Last {
			run.events = append(run.events, store.Event{Number: event.Number, Data: slices.Clone(event.Data)})
			run.Last = event.Number
		}
	}
	run.Oldest = max(run.Oldest, min(w.Oldest, run.Last+1))
	run.events = slices.DeleteFunc(run.events, func(event store.Event) bool { return event.Number < run.Oldest })
	if w.End != nil {
		run.End = slices.Clone(w.End)
	}
	run.until = time.Now().Add(w.TTL)
	return nil
}

// Touch implements [store.Store].
func (h *Handle) Touch(ctx context.Context, ttl time.Duration, runs ...store.Key) error {
	return h.do(ctx, 0, func() bool {
		for _, key := range runs {
			if run := h.m.runLocked(key); run != nil {
				run.until = time.Now().Add(ttl)
			}
		}
		return true
	})
}

// Find implements [store.Store].
func (h *Handle) Find(ctx context.Context, key store.Key) (found store.Run, err error) {
	var unknown error
	err = h.do(ctx, 0, func() bool {
		if run := h.m.runLocked(key); run != nil {
			found = run.Run
		} else {
			unknown = store.ErrUnknown
		}
		return true
	})
	return found, cmp.Or(err, unknown)
}

// Read implements [store.Store].
func (h *Handle) Read(ctx context.Context, key store.Key, after uint64, maxBytes int, wait time.Duration) (events []store.Event, end []byte, err error) {
	var unknown error
	err = h.do(ctx, wait, func() bool {
		run := h.m.runLocked(key)
		if run == nil {
			unknown = store.ErrUnknown
			return true
		}
		first, _ := slices.BinarySearchFunc(run.events, after+1, func(event store.Event, n uint64) int {
			return cmp.Compare(event.Number, n)
		})
		size, last := 0, first
		for ; last < len(run.events) && (size < maxBytes || last == first); last++ {
			size += len(run.events[last].Data)
		}
		events = slices.Clone(run.events[first:last])
		if last == len(run.events) {
			end = run.End
		}
		return len(events) > 0 || end != nil
	})
	return events, end, cmp.Or(err, unknown)
}

// Renew implements [store.Store].
func (h *Handle) Renew(ctx context.Context, node store.Node, lease time.Duration) error {
	h.mu.Lock()
	if !slices.Contains(h.nodes, node) {
		h.nodes = append(h.nodes, node)
	}
	h.mu.Unlock()
	return h.do(ctx, 0, func() bool {
		h.m.leases[node] = time.Now().Add(lease)
		return true
	})
}

// Lives implements [store.Store].
func (h *Handle) Lives(ctx context.Context, node store.Node) (lives bool, err error) {
	err = h.do(ctx, 0, func() bool {
		lives = time.Now().Before(h.m.leases[node])
		return true
	})
	return lives, err
}

// Send implements [store.Store].
func (h *Handle) Send(ctx context.Context, to store.Node, messages ...[]byte) error {
	return h.do(ctx, 0, func() bool {
		for _, message := range messages {
			h.m.inboxes[to] = append(h.m.inboxes[to], slices.Clone(message))
		}
		h.m.changedLocked()
		return true
	})
}

// Receive implements [store.Store].
func (h *Handle) Receive(ctx context.Context, node store.Node, wait time.Duration) (messages [][]byte, err error) {
	err = h.do(ctx, wait, func() bool {
		messages = h.m.inboxes[node]
		delete(h.m.inboxes, node)
		return len(messages) > 0
	})
	return messages, err
}

// Interface guards
var _ store.Store = (*Handle)(nil)
