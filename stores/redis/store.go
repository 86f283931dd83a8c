package redis

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// messagesStay is how long messages wait for a node that does not receive
	// them, and mostMessages how many may wait.
	messagesStay = time.Minute
	mostMessages = 20_000

	// someMessages is how many are received at a time.
	someMessages = 1000
)

var told = strconv.Itoa(mostTold)

// redisStore is the store. It has two connections: one for calls, many at a time,
// and one for notices.
type redisStore struct {
	connection *connection
	notices    *notices
	prefix     string

	mu       sync.Mutex
	lastCame map[store.Node]string // the id of the last message that was received
}

func newRedisStore(r *Redis) *redisStore {
	s := &redisStore{connection: newConnection(r), prefix: r.Prefix, lastCame: make(map[store.Node]string)}
	s.notices = newNotices(s.connection)
	return s
}

// Close implements [store.Store].
func (s *redisStore) Close() error {
	s.connection.close()
	s.notices.work.Wait()
	return nil
}

// The braces put both keys of a run into the same slot of a cluster.

func (s *redisStore) hashOf(run store.Key) string   { return s.prefix + ":{" + run.String() + "}" }
func (s *redisStore) streamOf(run store.Key) string { return s.hashOf(run) + ":events" }
func (s *redisStore) leaseOf(node store.Node) string {
	return s.prefix + ":node:{" + string(node) + "}"
}
func (s *redisStore) inboxOf(node store.Node) string { return s.leaseOf(node) + ":inbox" }

// evaluate returns the command that calls a script.
func evaluate(sc script, keys []string, args ...string) []string {
	command := make([]string, 0, 3+len(keys)+len(args))
	command = append(command, "EVALSHA", sc.sha, strconv.Itoa(len(keys)))
	return append(append(command, keys...), args...)
}

// run calls a script, and loads it first if the server does not know it.
func (s *redisStore) run(ctx context.Context, sc script, keys []string, args ...string) (any, error) {
	reply, err := s.connection.one(ctx, evaluate(sc, keys, args...)...)
	if isUnknownScript(err) {
		if err := s.load(ctx, sc); err != nil {
			return nil, err
		}
		reply, err = s.connection.one(ctx, evaluate(sc, keys, args...)...)
	}
	return reply, err
}

func (s *redisStore) load(ctx context.Context, scripts ...script) error {
	for _, sc := range scripts {
		if _, err := s.connection.one(ctx, "SCRIPT", "LOAD", sc.text); err != nil {
			return err
		}
	}
	return nil
}

func isUnknownScript(err error) bool {
	refused, ok := errors.AsType[replyError](err)
	return ok && refused.isOf("NOSCRIPT")
}

// milliseconds formats a time for Redis: at least 1.
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10)
}

// Write implements [store.Store].
func (s *redisStore) Write(ctx context.Context, writes []store.Write) []error {
	errs := s.writeAll(ctx, writes)
	if !slices.ContainsFunc(errs, isUnknownScript) {
		return errs
	}
	if err := s.load(ctx, writeScript, dropScript); err != nil {
		return allFailed(writes, err)
	}
	return s.writeAll(ctx, writes) // writes that were applied are skipped
}

func allFailed(writes []store.Write, err error) []error {
	errs := make([]error, len(writes))
	for i := range errs {
		errs[i] = err
	}
	return errs
}

// writeAll returns nil if all writes were applied.
func (s *redisStore) writeAll(ctx context.Context, writes []store.Write) (errs []error) {
	commands := make([][]string, len(writes))
	for i := range writes {
		commands[i] = s.command(&writes[i])
	}
	replies, err := s.connection.do(ctx, commands...)
	if err != nil {
		return allFailed(writes, err)
	}
	failures := make(map[store.Key]error)
	for i, reply := range replies {
		run := writes[i].Run
		refused, isRefused := reply.(replyError)
		switch {
		case failures[run] != nil: // an earlier write of the run has failed
		case isRefused:
			failures[run] = refused
		case reply == int64(0):
			failures[run] = store.ErrUnknown
		case reply != int64(1):
			failures[run] = errReply
		}
		if failures[run] != nil {
			if errs == nil {
				errs = make([]error, len(writes))
			}
			errs[i] = failures[run]
		}
	}
	return errs
}

// command is the command for a write.
func (s *redisStore) command(w *store.Write) []string {
	keys := []string{s.hashOf(w.Run), s.streamOf(w.Run)}
	if w.Drop {
		return evaluate(dropScript, keys, s.hashOf(w.Run))
	}
	args := make([]string, 0, 7+2*len(w.Events))
	args = append(args, s.hashOf(w.Run), milliseconds(w.TTL), strconv.FormatUint(w.Oldest, 10), string(w.Begin), string(w.End), told, strconv.FormatUint(w.After, 10))
	for _, event := range w.Events {
		args = append(args, strconv.FormatUint(event.Number, 10), string(event.Data))
	}
	return evaluate(writeScript, keys, args...)
}

// Touch implements [store.Store].
func (s *redisStore) Touch(ctx context.Context, ttl time.Duration, runs ...store.Key) error {
	keys := make([]string, 0, 2*len(runs))
	for _, run := range runs {
		keys = append(keys, s.hashOf(run), s.streamOf(run))
	}
	_, err := s.run(ctx, touchScript, keys, milliseconds(ttl))
	return err
}

// ask calls a script that returns strings about a run.
func (s *redisStore) ask(ctx context.Context, sc script, run store.Key, args ...string) ([]string, error) {
	reply, err := s.run(ctx, sc, []string{s.hashOf(run), s.streamOf(run)}, args...)
	switch {
	case err != nil:
		return nil, err
	case reply == nil:
		return nil, store.ErrUnknown
	}
	return texts(reply)
}

// Find implements [store.Store].
func (s *redisStore) Find(ctx context.Context, run store.Key) (store.Run, error) {
	fields, err := s.ask(ctx, findScript, run)
	switch {
	case err != nil:
		return store.Run{}, err
	case len(fields) != 4:
		return store.Run{}, errReply
	}
	last, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return store.Run{}, fmt.Errorf("%w: %w", errReply, err)
	}
	found := store.Run{Begin: []byte(fields[0]), Oldest: last + 1, Last: last}
	if fields[2] != "" {
		if found.Oldest, err = strconv.ParseUint(fields[2], 10, 64); err != nil {
			return store.Run{}, fmt.Errorf("%w: %w", errReply, err)
		}
	}
	if fields[3] != "" {
		found.End = []byte(fields[3])
	}
	return found, nil
}

// Read implements [store.Store].
func (s *redisStore) Read(ctx context.Context, run store.Key, after uint64, maxBytes int, wait time.Duration) (events []store.Event, end []byte, err error) {
	if wait <= 0 {
		return s.read(ctx, run, after, maxBytes)
	}
	name := s.hashOf(run)
	err = s.notices.wait(ctx, name, wait, func(lost bool) (done bool, err error) {
		var ask bool
		var doubts uint64
		if events, ask, doubts = s.notices.told(name, after, maxBytes); len(events) > 0 || !ask && !lost {
			return len(events) > 0, nil
		}
		events, end, err = s.read(ctx, run, after, maxBytes)
		switch {
		case err != nil || end != nil:
			return true, err
		case len(events) == 0:
			s.notices.found(name, after, after, doubts)
			return false, nil
		}
		s.notices.found(name, after, events[len(events)-1].Number, doubts)
		return true, nil
	})
	return events, end, err
}

func (s *redisStore) read(ctx context.Context, run store.Key, after uint64, maxBytes int) (events []store.Event, end []byte, err error) {
	fields, err := s.ask(ctx, readScript, run, strconv.FormatUint(after, 10), strconv.Itoa(maxBytes))
	switch {
	case err != nil:
		return nil, nil, err
	case len(fields)%2 != 1:
		return nil, nil, errReply
	}
	for i := 1; i < len(fields); i += 2 {
		n, err := strconv.ParseUint(fields[i], 10, 64)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errReply, err)
		}
		events = append(events, store.Event{Number: n, Data: []byte(fields[i+1])})
	}
	if fields[0] != "" {
		end = []byte(fields[0])
	}
	return events, end, nil
}

// Renew implements [store.Store].
func (s *redisStore) Renew(ctx context.Context, node store.Node, lease time.Duration) (err error) {
	if lease > 0 {
		_, err = s.run(ctx, renewScript, []string{s.leaseOf(node)}, milliseconds(lease))
	} else {
		_, err = s.connection.one(ctx, "DEL", s.leaseOf(node))
	}
	return err
}

// Lives implements [store.Store].
func (s *redisStore) Lives(ctx context.Context, node store.Node) (bool, error) {
	n, err := s.connection.one(ctx, "EXISTS", s.leaseOf(node))
	if err == nil && n != int64(0) && n != int64(1) {
		err = errReply
	}
	return n == int64(1), err
}

// Send implements [store.Store].
func (s *redisStore) Send(ctx context.Context, to store.Node, messages ...[]byte) error {
	args := make([]string, 0, 3+len(messages))
	args = append(args, s.inboxOf(to), milliseconds(messagesStay), strconv.Itoa(mostMessages))
	for _, message := range messages {
		args = append(args, string(message))
	}
	_, err := s.run(ctx, sendScript, []string{s.inboxOf(to)}, args...)
	return err
}

// Receive implements [store.Store]. The server keeps the messages until the next
// call confirms them.
func (s *redisStore) Receive(ctx context.Context, node store.Node, wait time.Duration) (messages [][]byte, err error) {
	look := func(bool) (done bool, err error) {
		reply, err := s.run(ctx, receiveScript, []string{s.inboxOf(node)}, s.cameLast(node), strconv.Itoa(someMessages))
		if err != nil {
			return false, err
		}
		found, err := texts(reply)
		if err != nil || len(found)%2 != 0 {
			return false, errReply
		}
		for i := 0; i < len(found); i += 2 {
			messages = append(messages, []byte(found[i+1]))
		}
		if len(found) == 0 {
			return false, nil
		}
		s.came(node, found[len(found)-2])
		return true, nil
	}
	if wait <= 0 {
		_, err = look(false)
	} else {
		err = s.notices.wait(ctx, s.inboxOf(node), wait, look)
	}
	return messages, err
}

// cameLast is the id of the last message for a node that Receive has returned.
func (s *redisStore) cameLast(node store.Node) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id, some := s.lastCame[node]; some {
		return id
	}
	return "0-0" // no message has this id
}

func (s *redisStore) came(node store.Node, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastCame[node] = id
}

// Interface guards
var _ store.Store = (*redisStore)(nil)
