package caddysse

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// feed writes what an upstream sends into a journal: blocks, with ids if the
// upstream has none of its own. Unless a method says otherwise, only the
// goroutine of the handlers may call it.
//
// There are many feeds, most of them quiet. The fields that a write uses come
// first and next to each other, because most feeds have left the processor's
// caches by the time of the next write.
type feed struct {
	journal *journal.Journal
	policy  journal.Policy
	partial bool // bytes have been appended since the last event boundary
	mark    bool // a later attempt begins, so a byte order mark may come
	plain   bool // no ids are added: the upstream has its own
	passes  bool // unkeep has been called
	follows bool // there is a lastID

	ownIDs   atomic.Bool   // the upstream has sent an id field
	heard    atomic.Int64  // when it last sent something, an instant
	bytes    atomic.Uint64 // of all attempts
	numbered atomic.Uint64 // events that have an id
	scanned  uint64        // events of this attempt
	events   uint64        // of all attempts
	mirror   *mirror       // nil: there is only the journal

	// attached is the newest client of a resumed run, while it reads.
	attached atomic.Pointer[runReader]

	token   runToken // of the ids that are added
	splicer eventstream.Splicer

	// What a write rarely uses.
	stop     <-chan struct{} // closed when no one wants more
	markHeld int             // how much of a byte order mark has arrived
	lastID   string          // of this attempt, as the scanner has it
	waits    atomic.Bool     // there is no room: the upstream is not read
	useless  atomic.Bool     // the upstream's answer is useless; the journal only has the error

	// unkeep is called when nothing may be kept any more: the upstream has ids of
	// its own, or sends no events, or an event is too large. It returns false if
	// there is no client that could get what follows. Once it is called, the feed
	// continues without keeping.
	unkeep func() bool
	over   error // not nil: there was no client

	// foreign is called when the upstream commits an id of the form that this
	// module adds.
	foreign func()

	mu       sync.Mutex
	position position
	retry    time.Duration // the upstream's last one
	told     bool          // there was one
}

// errNotKept ends a run whose client is away when nothing may be kept any more.
var errNotKept = errors.New("the stream can't be kept any more, and its client is away")

// errOtherBody ends a run whose body turns out not to be an event stream.
var errOtherBody = errors.New("the upstream's body is no event stream")

// openFeed makes a feed. began is the upstream's id after which the run begins;
// empty: none.
func openFeed(budget *journal.Budget, policy journal.Policy, history int, began string, evicted func()) *feed {
	j := budget.Open(history, began, evicted)
	if j == nil {
		return nil
	}
	f := &feed{journal: j, policy: policy, token: newRunToken(), position: position{id: began}}
	f.hears()
	return f
}

// hears records that the upstream has sent something.
func (f *feed) hears() { f.heard.Store(int64(now())) }

// write appends what the upstream has sent. It waits while the journal has no
// room.
func (f *feed) write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	f.hears()
	taken := len(p)
	f.bytes.Add(uint64(taken))
	if f.mirror != nil && f.mirror.lost.Load() {
		if f.pass(); f.over != nil {
			return 0, f.over
		}
	}
	if p = f.endCR(p); f.mark {
		p = f.dropMark(p)
	}
	for len(p) > 0 {
		n, idAt, done := f.splicer.ScanBlock(p)
		if f.splicer.Opaque() {
			if f.policy == journal.KeepNewest {
				return 0, errOtherBody
			}
			f.pass()
		}
		if err := f.appendBlock(p[:n], idAt); err != nil {
			return 0, err
		}
		p = p[n:]
		if f.partial = true; done {
			f.commit()
		}
		if f.passes && f.over != nil {
			return 0, f.over
		}
	}
	f.publish()
	return taken, nil
}

// publish makes everything appended so far visible to the clients.
func (f *feed) publish() {
	if reader := f.attached.Load(); reader == nil || !reader.publishHere(f.journal) {
		f.journal.Publish()
	}
}

// pass stops keeping what the upstream sends, once.
func (f *feed) pass() {
	if f.passes || f.unkeep == nil {
		return
	}
	f.passes, f.plain = true, true
	if !f.unkeep() {
		f.over = errNotKept
	}
}

// byteOrderMark is ignored at the beginning of a stream, and nowhere else (HTML
// Standard, section 9.2.5).
const byteOrderMark = "\uFEFF"

// dropMark removes a byte order mark at the beginning of a later attempt. It
// holds back bytes that may become one.
func (f *feed) dropMark(p []byte) []byte {
	for len(p) > 0 && f.markHeld < len(byteOrderMark) && p[0] == byteOrderMark[f.markHeld] {
		f.markHeld++
		p = p[1:]
	}
	switch {
	case f.markHeld == len(byteOrderMark):
		f.mark = false
	case len(p) > 0:
		f.mark = false
		p = append([]byte(byteOrderMark[:f.markHeld]), p...)
	}
	return p
}

// endCR checks whether a CR at a boundary, where p begins, is followed by its LF.
func (f *feed) endCR(p []byte) []byte {
	if !f.splicer.Scanner().PendingCR() || !f.splicer.AtBoundary() {
		return p
	}
	switch {
	case p[0] != '\n' && f.partial:
		f.commit()
	case p[0] == '\n' && !f.partial && f.policy == journal.KeepNewest:
		// The block is complete already. If a block began with this LF, it would
		// begin with an empty line.
		f.splicer.Scanner().Scan(p[:1])
		return p[1:]
	}
	return p
}

func (f *feed) appendBlock(p []byte, idAt int) error {
	if idAt < 0 || f.plain {
		if f.mirror != nil && !f.passes {
			f.mirror.add(p)
		}
		return f.append(p)
	}
	if err := f.append(p[:idAt]); err != nil {
		return err
	}
	if f.plain { // the event is too large to be kept
		return f.append(p[idAt:])
	}
	var idText, lineText [longestRunID + len("id: \r\n")]byte
	line := f.splicer.AppendID(lineText[:0], f.token.append(idText[:0], f.events+1))
	f.numbered.Store(f.events + 1)
	if err := f.append(line); err != nil {
		return err
	}
	if f.mirror != nil {
		f.mirror.add(p[:idAt])
		f.mirror.addID(line)
		f.mirror.add(p[idAt:])
	}
	return f.append(p[idAt:])
}

// append waits until the journal has taken all of p.
func (f *feed) append(p []byte) error {
	for {
		n, err := f.journal.Append(p)
		p = p[n:]
		if errors.Is(err, journal.ErrEventTooLarge) && f.unkeep != nil && !f.passes {
			if f.pass(); f.over != nil {
				return f.over
			}
			continue
		}
		if len(p) == 0 || err != nil {
			return err
		}
		f.waits.Store(true)
		select {
		case <-f.journal.Room():
		case <-f.stop:
			err = errStreamEnded
		}
		f.waits.Store(false)
		f.hears() // the upstream was not read in the meantime
		if err != nil {
			return err
		}
	}
}

// commit tells the journal that a block is complete.
func (f *feed) commit() {
	f.partial = false
	scanner := f.splicer.Scanner()
	if f.policy == journal.KeepNewest && scanner.Place() == eventstream.Start {
		f.journal.Rollback() // a byte order mark, which is ignored in the middle of a stream
		return
	}
	block := journal.Block{Event: scanner.Events() > f.scanned}
	f.scanned = scanner.Events()
	if f.policy == journal.KeepNewest {
		block.Invalid = f.splicer.TakeInvalidUTF8()
	}
	if f.splicer.HasOwnIDs() {
		f.plain = true
		f.ownIDs.Store(true)
		if id, committed := scanner.LastEventID(); committed && id == f.lastID && f.follows {
			block.RepeatsID = f.splicer.TakeCommit()
		} else if committed {
			f.splicer.TakeCommit()
			f.lastID, f.follows = id, true
			block.SetsID, block.ID = true, f.commitID(id)
			if block.ID == "" {
				block.Told = id
			}
		}
	}
	retold := false
	if ms, told := scanner.Retry(); told {
		retry := reconnection(ms, true, 0)
		f.mu.Lock()
		retold = !f.told || retry != f.retry
		f.retry, f.told = retry, true
		f.mu.Unlock()
	}
	f.events = f.journal.Commit(block)
	if f.mirror != nil && !f.passes {
		f.mirror.commit(block.Event, f.events, retold)
	}
	if f.ownIDs.Load() {
		f.pass()
	}
}

// commitID records an id that the upstream has committed, and returns it if a
// client can send it back.
func (f *feed) commitID(id string) string {
	if isRunID(id) && f.foreign != nil {
		f.foreign()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.position.commit(id)
	id, _ = f.position.value()
	return id
}

// again prepares for the next attempt. A shared run's journal drops the
// unfinished event of the last one: no client has seen any of it.
func (f *feed) again() {
	if f.policy == journal.KeepUnsent && f.partial && f.splicer.AtBoundary() {
		f.commit() // no LF will follow the CR
	}
	f.journal.Rollback()
	if f.mirror != nil {
		f.mirror.rollback()
	}
	f.splicer = eventstream.Splicer{}
	f.partial, f.scanned = false, 0
	f.mark, f.markHeld = f.policy == journal.KeepUnsent, 0
}

// end records that nothing more comes, not even an LF after a last CR.
func (f *feed) end() {
	if f.mirror != nil && f.partial && f.splicer.AtBoundary() {
		f.commit()
	}
}

// upstreamPosition is the id after which the upstream can continue; ok is false
// if there is none. Any goroutine may call it.
func (f *feed) upstreamPosition() (id string, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position.value()
}

// upstreamRetry is the upstream's last reconnection time, if any. Any goroutine
// may call it.
func (f *feed) upstreamRetry() (d time.Duration, told bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.retry, f.told
}

// mayGoOn reports whether another attempt may continue here. Parts of an
// unfinished event that have been sent can't be taken back.
func (f *feed) mayGoOn() bool {
	return f.policy == journal.KeepNewest || f.splicer.MayResume()
}

// place is the id of an event boundary, for a client that starts there: the
// upstream's if it has one there, else ours. Any goroutine may call it.
func (f *feed) place(at journal.Place) string {
	if f.ownIDs.Load() && at.ID != "" {
		return at.ID
	}
	return runID{token: f.token, n: at.Number}.String()
}
