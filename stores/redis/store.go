package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"

	"github.com/caddy-sse/caddy-sse/store"
)

const (
	// messagesStay is how long messages wait for a node that does not fetch them,
	// and mostMessages how many.
	messagesStay = time.Minute
	mostMessages = 20_000

	// someMessages is how many are fetched at a time.
	someMessages = 1000
)

// redisStore is the store, with two connections: one for calls, many at a time,
// and one for notices.
type redisStore struct {
	connection *connection
	notices    *notices
	prefix     string
}

func newRedisStore(option rueidis.ClientOption, addresses []string, prefix string) *redisStore {
	s := &redisStore{connection: newConnection(option, addresses), prefix: prefix}
	s.notices = newNotices(s.connection)
	return s
}

// Close implements [store.Store].
func (s *redisStore) Close() error {
	s.connection.close()
	s.notices.work.Wait()
	return nil
}

// The two keys of a run are in one slot of a cluster, should there be one.

func (s *redisStore) hashOf(run store.Key) string   { return s.prefix + ":{" + run.String() + "}" }
func (s *redisStore) streamOf(run store.Key) string { return s.hashOf(run) + ":events" }
func (s *redisStore) leaseOf(node store.Node) string {
	return s.prefix + ":node:{" + string(node) + "}"
}
func (s *redisStore) inboxOf(node store.Node) string { return s.leaseOf(node) + ":inbox" }

// evaluate is a call of a script.
func evaluate(b rueidis.Builder, s script, keys []string, args ...string) rueidis.Completed {
	return b.Evalsha().Sha1(s.sha).Numkeys(int64(len(keys))).Key(keys...).Arg(args...).Build()
}

// run calls a script, which the server gets where it does not know it.
func (s *redisStore) run(ctx context.Context, sc script, keys []string, args ...string) rueidis.RedisResult {
	client, err := s.connection.get(ctx)
	if err != nil {
		return rueidis.NewErrorResult(err)
	}
	result := client.Do(ctx, evaluate(client.B(), sc, keys, args...))
	if isUnknownScript(result.Error()) {
		if err := s.load(ctx, client, sc); err != nil {
			return rueidis.NewErrorResult(err)
		}
		result = client.Do(ctx, evaluate(client.B(), sc, keys, args...))
	}
	s.connection.note(result.Error())
	return result
}

func (s *redisStore) load(ctx context.Context, client rueidis.Client, scripts ...script) error {
	for _, sc := range scripts {
		if err := client.Do(ctx, client.B().ScriptLoad().Script(sc.text).Build()).Error(); err != nil {
			return err
		}
	}
	return nil
}

func isUnknownScript(err error) bool {
	replied, ok := rueidis.IsRedisErr(err)
	return ok && strings.HasPrefix(replied.Error(), "NOSCRIPT")
}

// milliseconds is a time that Redis takes: at least one.
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10)
}

// Write implements [store.Store].
func (s *redisStore) Write(ctx context.Context, writes []store.Write) []error {
	errs, failed := make([]error, len(writes)), false
	client, err := s.connection.get(ctx)
	if err == nil {
		errs, failed = s.writeAll(ctx, client, writes)
		if failed && anyUnknownScript(errs) {
			// What has been done is skipped.
			if err = s.load(ctx, client, writeScript, dropScript); err == nil {
				errs, failed = s.writeAll(ctx, client, writes)
			}
		}
	}
	if err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	if failed {
		return errs
	}
	return nil
}

func anyUnknownScript(errs []error) bool {
	for _, err := range errs {
		if isUnknownScript(err) {
			return true
		}
	}
	return false
}

func (s *redisStore) writeAll(ctx context.Context, client rueidis.Client, writes []store.Write) (errs []error, failed bool) {
	errs = make([]error, len(writes))
	commands := make([]rueidis.Completed, len(writes))
	for i := range writes {
		commands[i] = s.command(client.B(), &writes[i])
	}
	failures := make(map[store.Key]error)
	for i, result := range client.DoMulti(ctx, commands...) {
		run := writes[i].Run
		done, err := result.AsInt64()
		switch {
		case failures[run] != nil:
			err = failures[run] // what comes after it is not whole
		case err == nil && done == 0:
			err = store.ErrUnknown
		}
		if err != nil {
			errs[i], failures[run], failed = err, err, true
			s.connection.note(err)
		}
	}
	return errs, failed
}

// command is the call that does a write.
func (s *redisStore) command(b rueidis.Builder, w *store.Write) rueidis.Completed {
	keys := []string{s.hashOf(w.Run), s.streamOf(w.Run)}
	if w.Drop {
		return evaluate(b, dropScript, keys, s.hashOf(w.Run))
	}
	args := make([]string, 0, 5+2*len(w.Events))
	args = append(args, s.hashOf(w.Run), milliseconds(w.TTL), strconv.FormatUint(w.Oldest, 10),
		rueidis.BinaryString(w.Begin), rueidis.BinaryString(w.End))
	for _, event := range w.Events {
		args = append(args, strconv.FormatUint(event.Number, 10), rueidis.BinaryString(event.Data))
	}
	return evaluate(b, writeScript, keys, args...)
}

// Touch implements [store.Store].
func (s *redisStore) Touch(ctx context.Context, ttl time.Duration, runs ...store.Key) error {
	keys := make([]string, 0, 2*len(runs))
	for _, run := range runs {
		keys = append(keys, s.hashOf(run), s.streamOf(run))
	}
	return s.run(ctx, touchScript, keys, milliseconds(ttl)).Error()
}

// Find implements [store.Store].
func (s *redisStore) Find(ctx context.Context, run store.Key) (store.Run, error) {
	fields, err := s.run(ctx, findScript, []string{s.hashOf(run), s.streamOf(run)}).AsStrSlice()
	switch {
	case rueidis.IsRedisNil(err):
		return store.Run{}, store.ErrUnknown
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

var errReply = errors.New("redis: the server's answer is none of a run")

// Read implements [store.Store].
func (s *redisStore) Read(ctx context.Context, run store.Key, after uint64, maxBytes int, wait time.Duration) (events []store.Event, end []byte, err error) {
	err = s.notices.wait(ctx, s.hashOf(run), wait, func() (done bool, err error) {
		events, end, err = s.read(ctx, run, after, maxBytes)
		return len(events) > 0 || end != nil, err
	})
	return events, end, err
}

func (s *redisStore) read(ctx context.Context, run store.Key, after uint64, maxBytes int) (events []store.Event, end []byte, err error) {
	fields, err := s.run(ctx, readScript, []string{s.hashOf(run), s.streamOf(run)},
		strconv.FormatUint(after, 10), strconv.Itoa(maxBytes)).AsStrSlice()
	switch {
	case rueidis.IsRedisNil(err):
		return nil, nil, store.ErrUnknown
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
func (s *redisStore) Renew(ctx context.Context, node store.Node, lease time.Duration) error {
	if lease > 0 {
		return s.run(ctx, renewScript, []string{s.leaseOf(node)}, milliseconds(lease)).Error()
	}
	client, err := s.connection.get(ctx)
	if err != nil {
		return err
	}
	return client.Do(ctx, client.B().Del().Key(s.leaseOf(node)).Build()).Error()
}

// Lives implements [store.Store].
func (s *redisStore) Lives(ctx context.Context, node store.Node) (bool, error) {
	client, err := s.connection.get(ctx)
	if err != nil {
		return false, err
	}
	n, err := client.Do(ctx, client.B().Exists().Key(s.leaseOf(node)).Build()).AsInt64()
	return n > 0, err
}

// Send implements [store.Store].
func (s *redisStore) Send(ctx context.Context, to store.Node, messages ...[]byte) error {
	args := make([]string, 0, 3+len(messages))
	args = append(args, s.inboxOf(to), milliseconds(messagesStay), strconv.Itoa(mostMessages))
	for _, message := range messages {
		args = append(args, rueidis.BinaryString(message))
	}
	return s.run(ctx, sendScript, []string{s.inboxOf(to)}, args...).Error()
}

// Receive implements [store.Store].
func (s *redisStore) Receive(ctx context.Context, node store.Node, wait time.Duration) (messages [][]byte, err error) {
	err = s.notices.wait(ctx, s.inboxOf(node), wait, func() (done bool, err error) {
		client, err := s.connection.get(ctx)
		if err != nil {
			return false, err
		}
		texts, err := client.Do(ctx, client.B().Lpop().Key(s.inboxOf(node)).Count(someMessages).Build()).AsStrSlice()
		if err != nil && !rueidis.IsRedisNil(err) {
			s.connection.note(err)
			return false, err
		}
		for _, text := range texts {
			messages = append(messages, []byte(text))
		}
		return len(messages) > 0, nil
	})
	return messages, err
}

// Interface guards
var _ store.Store = (*redisStore)(nil)
