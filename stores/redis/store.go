package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"github.com/caddy-sse/caddy-sse/store"
)

// messagesStay is how long messages stay for a node that does not receive them.
const messagesStay = time.Minute

// receiveBatch is how many messages are received at a time.
const receiveBatch = 1000

// opened is a store that is open. What it keeps on the server, each name with the
// prefix before it:
//
//	run:<key>     hash: how the run began and ended, the number of its newest event
//	events:<key>  stream: its events, with the ids <number>-0
//	node:<node>   string: the lease of a node
//	for:<node>    list: the messages for a node
//
// Of the same names as run: and for: are the channels that tell of something new
// there.
type opened struct {
	settings settings
	links    *links
	notices  *notices

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// open opens a store. It connects on a goroutine of its own.
func open(s settings) *opened {
	o := &opened{settings: s, links: newLinks(s), notices: newNotices()}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	o.work.Go(func() { o.links.keep(o.ctx, o.notices.listen) })
	return o
}

// Close implements store.Store.
func (o *opened) Close() error {
	o.cancel()
	o.work.Wait()
	return nil
}

func (o *opened) runName(run store.Key) string { return o.settings.Prefix + "run:" + run.String() }
func (o *opened) eventsName(run store.Key) string {
	return o.settings.Prefix + "events:" + run.String()
}
func (o *opened) leaseName(node store.Node) string { return o.settings.Prefix + "node:" + string(node) }
func (o *opened) inboxName(node store.Node) string { return o.settings.Prefix + "for:" + string(node) }

// start is the beginning of each call: its context ends with the store, too.
func (o *opened) start(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if o.ctx.Err() != nil {
		cancel(errClosed)
	}
	stop := context.AfterFunc(o.ctx, func() { cancel(errClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// failure is the error of a call: with the place, and the reason of a context.
func (o *opened) failure(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = cause
	}
	return fmt.Errorf("redis %s: %w", o.settings.Address, err)
}

// do has the server execute commands, in one piece.
func (o *opened) do(ctx context.Context, build func(b rueidis.Builder) []rueidis.Completed) ([]rueidis.RedisResult, error) {
	l, err := o.links.get(ctx)
	if err != nil {
		return nil, o.failure(ctx, err)
	}
	results := l.DoMulti(ctx, build(l.B())...)
	var failure error
	for i := range results {
		if err := results[i].Error(); err != nil && !rueidis.IsRedisNil(err) {
			l.heed(ctx, err)
			if failure == nil {
				failure = o.failure(ctx, err)
			}
		}
	}
	return results, failure
}

func (o *opened) load(ctx context.Context, s script) error {
	_, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{b.ScriptLoad().Script(s.source).Build()}
	})
	return err
}

// ask calls a script for one run.
func (o *opened) ask(ctx context.Context, s script, run store.Key, args ...string) ([]rueidis.RedisMessage, error) {
	for again := false; ; again = true {
		results, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
			return []rueidis.Completed{s.call(b, []string{o.runName(run), o.eventsName(run)}, args)}
		})
		if err != nil && isUnloaded(err) && !again {
			if err := o.load(ctx, s); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		answer, err := results[0].ToArray()
		if rueidis.IsRedisNil(err) {
			return nil, store.ErrUnknown
		}
		return answer, o.failure(ctx, err)
	}
}

// Write implements store.Store.
func (o *opened) Write(ctx context.Context, writes []store.Write) []error {
	ctx, done := o.start(ctx)
	defer done()
	errs := make([]error, len(writes))
	failed := false
	for _, wave := range waves(writes) {
		for _, i := range o.writeWave(ctx, writes, wave.indexes, errs) {
			// What follows for the same run must fail, too.
			failed = true
			for _, later := range wave.later[i] {
				errs[later] = errs[i]
			}
		}
	}
	if !failed {
		return nil
	}
	return errs
}

// wave is some writes, each of another run, which are written in one go. later
// are the ones of the same run that come after each.
type wave struct {
	indexes []int
	later   map[int][]int
}

// waves puts the second write of a run into the second wave, and so on.
func waves(writes []store.Write) (all []wave) {
	byRun := make(map[store.Key][]int, len(writes))
	for i := range writes {
		byRun[writes[i].Run] = append(byRun[writes[i].Run], i)
	}
	if len(byRun) == len(writes) {
		indexes := make([]int, len(writes))
		for i := range indexes {
			indexes[i] = i
		}
		return []wave{{indexes: indexes}}
	}
	for i := range writes {
		of := byRun[writes[i].Run]
		n := 0
		for of[n] != i {
			n++
		}
		if n == len(all) {
			all = append(all, wave{later: make(map[int][]int)})
		}
		all[n].indexes = append(all[n].indexes, i)
		all[n].later[i] = of[n+1:]
	}
	return all
}

// writeWave writes those whose run has not failed, and returns those that did.
func (o *opened) writeWave(ctx context.Context, writes []store.Write, indexes []int, errs []error) (failed []int) {
	left := indexes[:0:0]
	for _, i := range indexes {
		if errs[i] == nil {
			left = append(left, i)
		}
	}
	for again := false; len(left) > 0; again = true {
		results, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
			commands := make([]rueidis.Completed, len(left))
			for n, i := range left {
				commands[n] = o.writeCommand(b, &writes[i])
			}
			return commands
		})
		var unloaded []int
		for n, i := range left {
			var applied int64
			switch {
			case results == nil:
				errs[i] = err
			default:
				applied, errs[i] = results[n].AsInt64()
			}
			switch {
			case errs[i] == nil && applied == 0:
				errs[i] = store.ErrUnknown
			case errs[i] == nil:
				continue
			case isUnloaded(errs[i]) && !again:
				unloaded = append(unloaded, i)
				continue
			case results != nil:
				errs[i] = o.failure(ctx, errs[i])
			}
			failed = append(failed, i)
		}
		left = unloaded
		if len(left) == 0 {
			break
		}
		if err := o.load(ctx, writeScript); err != nil {
			for _, i := range left {
				errs[i] = err
			}
			return append(failed, left...)
		}
	}
	return failed
}

// writeCommand is what applies a write. Commands may outlive the call, so they
// have the data in copies.
func (o *opened) writeCommand(b rueidis.Builder, w *store.Write) rueidis.Completed {
	name := o.runName(w.Run)
	names := []string{name, o.eventsName(w.Run)}
	if w.Drop {
		return writeScript.call(b, names, []string{"drop", name})
	}
	args := make([]string, 0, 7+2*len(w.Events))
	args = append(args,
		milliseconds(w.TTL), name,
		strconv.FormatUint(w.Oldest, 10),
		flag(w.Begin != nil), string(w.Begin),
		flag(w.End != nil), string(w.End))
	for _, event := range w.Events {
		args = append(args, strconv.FormatUint(event.Number, 10), string(event.Data))
	}
	return writeScript.call(b, names, args)
}

func flag(set bool) string {
	if set {
		return "1"
	}
	return "0"
}

// milliseconds is a duration as the server takes it: 0 and less would be refused.
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(max(1, d.Milliseconds()), 10)
}

// Touch implements store.Store.
func (o *opened) Touch(ctx context.Context, ttl time.Duration, runs ...store.Key) error {
	if len(runs) == 0 {
		return nil
	}
	ctx, done := o.start(ctx)
	defer done()
	_, err := o.do(ctx, func(b rueidis.Builder) (commands []rueidis.Completed) {
		for _, run := range runs {
			for _, name := range []string{o.runName(run), o.eventsName(run)} {
				commands = append(commands, b.Pexpire().Key(name).Milliseconds(max(1, ttl.Milliseconds())).Build())
			}
		}
		return commands
	})
	return err
}

// Find implements store.Store.
func (o *opened) Find(ctx context.Context, run store.Key) (found store.Run, err error) {
	ctx, done := o.start(ctx)
	defer done()
	answer, err := o.ask(ctx, findScript, run)
	if err != nil {
		return store.Run{}, err
	}
	if len(answer) < 3 {
		return store.Run{}, o.failure(ctx, errDamaged)
	}
	begin, err := answer[0].ToString()
	if err != nil {
		return store.Run{}, o.failure(ctx, errDamaged)
	}
	found.Begin = []byte(begin)
	if found.Last, err = answer[1].AsUint64(); err != nil {
		return store.Run{}, o.failure(ctx, errDamaged)
	}
	if end, err := answer[2].ToString(); err == nil {
		found.End = []byte(end)
	}
	found.Oldest = found.Last + 1
	if len(answer) > 3 && !answer[3].IsNil() {
		if found.Oldest, err = numberOf(&answer[3]); err != nil {
			return store.Run{}, o.failure(ctx, err)
		}
	}
	return found, nil
}

var errDamaged = errors.New("what the server has of a run is damaged")

// numberOf is the number of the event with an id.
func numberOf(id *rueidis.RedisMessage) (uint64, error) {
	text, err := id.ToString()
	if err != nil {
		return 0, errDamaged
	}
	number, _ := strings.CutSuffix(text, "-0")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0, errDamaged
	}
	return n, nil
}

// piece is what one look at a run has found.
type piece struct {
	events []store.Event
	end    []byte // nil: it has not ended, or more is left
	newest uint64
}

func (p *piece) isEmpty() bool { return len(p.events) == 0 && p.end == nil }

// look reads what there is.
func (o *opened) look(ctx context.Context, run store.Key, after uint64, maxBytes int) (p piece, err error) {
	answer, err := o.ask(ctx, readScript, run, strconv.FormatUint(after, 10), strconv.Itoa(max(1, maxBytes)))
	if err != nil {
		return p, err
	}
	if len(answer) < 2 || len(answer)%2 != 0 {
		return p, o.failure(ctx, errDamaged)
	}
	if p.newest, err = answer[0].AsUint64(); err != nil {
		return p, o.failure(ctx, errDamaged)
	}
	last := p.newest
	for i := 2; i < len(answer); i += 2 {
		n, err := numberOf(&answer[i])
		if err != nil {
			return p, o.failure(ctx, err)
		}
		data, err := answer[i+1].ToString()
		if err != nil {
			return p, o.failure(ctx, errDamaged)
		}
		p.events = append(p.events, store.Event{Number: n, Data: []byte(data)})
		last = n
	}
	if end, err := answer[1].ToString(); err == nil && last == p.newest {
		p.end = []byte(end)
	}
	return p, nil
}

// Read implements store.Store.
func (o *opened) Read(ctx context.Context, run store.Key, after uint64, maxBytes int, wait time.Duration) (events []store.Event, end []byte, err error) {
	ctx, done := o.start(ctx)
	defer done()
	if wait <= 0 {
		p, err := o.look(ctx, run, after, maxBytes)
		return p.events, p.end, err
	}
	c := o.notices.join(o.runName(run))
	defer o.notices.leave(c)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	waited := false
	for known := o.notices.isAt(c, after); ; known = false {
		_, version, changed := o.notices.look(c)
		if !known {
			p, err := o.look(ctx, run, after, maxBytes)
			if err != nil || !p.isEmpty() || waited {
				return p.events, p.end, err
			}
			o.notices.note(c, p.newest)
		}
		if _, now, _ := o.notices.look(c); now != version {
			continue // it has come meanwhile
		}
		select {
		case <-changed:
		case <-timer.C:
			waited = true // and whether the run is still there
		case <-ctx.Done():
			return nil, nil, o.failure(ctx, ctx.Err())
		}
	}
}

// Renew implements store.Store.
func (o *opened) Renew(ctx context.Context, node store.Node, lease time.Duration) error {
	ctx, done := o.start(ctx)
	defer done()
	name := o.leaseName(node)
	if lease <= 0 {
		_, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
			return []rueidis.Completed{b.Del().Key(name).Build()}
		})
		return err
	}
	// A server that is full takes this, and refuses what comes next.
	results, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{b.Pexpire().Key(name).Milliseconds(max(1, lease.Milliseconds())).Build()}
	})
	if err != nil {
		return err
	}
	if renewed, err := results[0].AsInt64(); err != nil || renewed == 1 {
		return o.failure(ctx, err)
	}
	_, err = o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{b.Set().Key(name).Value("1").PxMilliseconds(max(1, lease.Milliseconds())).Build()}
	})
	return err
}

// Lives implements store.Store.
func (o *opened) Lives(ctx context.Context, node store.Node) (bool, error) {
	ctx, done := o.start(ctx)
	defer done()
	results, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{b.Exists().Key(o.leaseName(node)).Build()}
	})
	if err != nil {
		return false, err
	}
	n, err := results[0].AsInt64()
	return n == 1, o.failure(ctx, err)
}

// Send implements store.Store.
func (o *opened) Send(ctx context.Context, to store.Node, messages ...[]byte) error {
	if len(messages) == 0 {
		return nil
	}
	ctx, done := o.start(ctx)
	defer done()
	name := o.inboxName(to)
	texts := make([]string, len(messages))
	for i, message := range messages {
		texts[i] = string(message)
	}
	_, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{
			b.Rpush().Key(name).Element(texts...).Build(),
			// Who receives takes all, and so removes the list. Else it goes.
			b.Pexpire().Key(name).Milliseconds(messagesStay.Milliseconds()).Nx().Build(),
			b.Publish().Channel(name).Message("1").Build(),
		}
	})
	return err
}

// Receive implements store.Store.
func (o *opened) Receive(ctx context.Context, node store.Node, wait time.Duration) ([][]byte, error) {
	ctx, done := o.start(ctx)
	defer done()
	if wait <= 0 {
		return o.take(ctx, node)
	}
	c := o.notices.join(o.inboxName(node))
	defer o.notices.leave(c)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for waited := false; ; {
		_, version, changed := o.notices.look(c)
		messages, err := o.take(ctx, node)
		if err != nil || len(messages) > 0 || waited {
			return messages, err
		}
		if _, now, _ := o.notices.look(c); now != version {
			continue
		}
		select {
		case <-changed:
		case <-timer.C:
			waited = true
		case <-ctx.Done():
			return nil, o.failure(ctx, ctx.Err())
		}
	}
}

// take takes the messages that there are.
func (o *opened) take(ctx context.Context, node store.Node) ([][]byte, error) {
	results, err := o.do(ctx, func(b rueidis.Builder) []rueidis.Completed {
		return []rueidis.Completed{b.Lpop().Key(o.inboxName(node)).Count(receiveBatch).Build()}
	})
	if err != nil {
		return nil, err
	}
	texts, err := results[0].AsStrSlice()
	if rueidis.IsRedisNil(err) {
		return nil, nil
	}
	messages := make([][]byte, len(texts))
	for i, text := range texts {
		messages[i] = []byte(text)
	}
	return messages, o.failure(ctx, err)
}

// Interface guards
var _ store.Store = (*opened)(nil)
