package caddysse

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// feed puts what an upstream sends into a journal: blocks, with ids where the
// upstream has none of its own. Its methods are for one goroutine at a time,
// that of the handlers, but for those that say otherwise.
//
// There are many of them, most of them quiet. What a write uses stands together and
// first, as most feeds have left the processor's caches by the time of the next one.
type feed struct {
	journal *journal.Journal
	policy  journal.Policy
	partial bool // bytes have been appended since the last event boundary
	mark    bool // a byte order mark may come: a later attempt begins
	plain   bool // no ids are added: the upstream has its own
	passes  bool // unkeep has been called
	follows bool // there is a lastID

	ownIDs   atomic.Bool   // the upstream has sent an id field
	heard    atomic.Int64  // when it has sent something last, an instant
	bytes    atomic.Uint64 // of all attempts
	numbered atomic.Uint64 // events that have got an id
	scanned  uint64        // events of this attempt
	events   uint64        // of all attempts
	mirror   *mirror       // nil: the journal is all there is

	// attached is the newest client of a run of its own, while it reads.
	attached atomic.Pointer[runReader]

	token   runToken // of the ids that are added
	splicer eventstream.Splicer

	// What a write seldom uses.
	stop     <-chan struct{} // closed when nobody wants any more
	markHeld int             // how much of a byte order mark has come
	lastID   string          // of this attempt, as the scanner has it
	waits    atomic.Bool     // for room: the upstream is not listened to
	useless  atomic.Bool     // the upstream's answer is: all that there is tells so

	// unkeep is called when nothing may be kept any more: the upstream has ids of
	// its own, or sends no events, or one that is too large. It returns false where
	// nobody is there who could have what comes next. With it, the feed goes on
	// without keeping.
	unkeep func() bool
	over   error // nobody was there

	// foreign is called when the upstream commits an id of the form that this
	// module adds.
	foreign func()

	mu       sync.Mutex
	position position
	retry    time.Duration // the last one that the upstream told
	told     bool          // it has told one
}

// errNotKept ends a run whose client is away when nothing may be kept any more.
var errNotKept = errors.New("the stream can't be kept any more, and its client is away")

// errOtherBody ends a run whose body turns out to be none of events.
var errOtherBody = errors.New("the upstream's body is no event stream")

// openFeed makes a feed. began is the upstream's id that the run begins after,
// empty for none.
func openFeed(budget *journal.Budget, policy journal.Policy, history int, began string, evicted func()) *feed {
	j := budget.Open(history, began, evicted)
	if j == nil {
		return nil
	}
	f := &feed{journal: j, policy: policy, token: newRunToken(), position: position{id: began}}
	f.hears()
	return f
}

// hears notes that the upstream has sent something.
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

// publish lets the clients have what there is.
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

// dropMark takes out a byte order mark that a later attempt begins with. It holds
// back what may become one.
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

// endCR looks whether a CR at a boundary, where p begins, is followed by its LF.
func (f *feed) endCR(p []byte) []byte {
	if !f.splicer.Scanner().PendingCR() || !f.splicer.AtBoundary() {
		return p
	}
	switch {
	case p[0] != '\n' && f.partial:
		f.commit()
	case p[0] == '\n' && !f.partial && f.policy == journal.KeepNewest:
		// The block is complete already. One that begins with this LF would
		// begin with a line of its own.
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

// append waits until the journal has taken all.
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
		f.hears() // the upstream was not listened to meanwhile
		if err != nil {
			return err
		}
	}
}

// commit says to the journal that a block is complete.
func (f *feed) commit() {
	f.partial = false
	scanner := f.splicer.Scanner()
	if f.policy == journal.KeepNewest && scanner.Place() == eventstream.Start {
		f.journal.Rollback() // a byte order mark, which is none in the middle of a stream
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

// commitID takes note of an id that the upstream has committed, and returns it
// if a client can bring it back.
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

// again prepares for what the next attempt sends. A ring drops the unfinished
// event of the last one: no client has seen any of it.
func (f *feed) again() {
	if f.policy == journal.KeepUnsent && f.partial && f.splicer.AtBoundary() {
		f.commit() // no LF comes after the CR
	}
	f.journal.Rollback()
	if f.mirror != nil {
		f.mirror.rollback()
	}
	f.splicer = eventstream.Splicer{}
	f.partial, f.scanned = false, 0
	f.mark, f.markHeld = f.policy == journal.KeepUnsent, 0
}

// end says that no more comes: no LF after a last CR either.
func (f *feed) end() {
	if f.mirror != nil && f.partial && f.splicer.AtBoundary() {
		f.commit()
	}
}

// upstreamPosition is where the upstream would go on; ok is false where there is
// no such place. It is for any goroutine.
func (f *feed) upstreamPosition() (id string, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position.value()
}

// upstreamRetry is the reconnection time that the upstream told last, if any. It
// is for any goroutine.
func (f *feed) upstreamRetry() (d time.Duration, told bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.retry, f.told
}

// mayGoOn reports whether what another attempt sends may follow here. What has
// gone out of an unfinished event can't be taken back.
func (f *feed) mayGoOn() bool {
	return f.policy == journal.KeepNewest || f.splicer.MayResume()
}

// place is the id of an event boundary, as a client that starts there is told
// it: the upstream's where it has one there, else ours. It is for any goroutine.
func (f *feed) place(at journal.Place) string {
	if f.ownIDs.Load() && at.ID != "" {
		return at.ID
	}
	return runID{token: f.token, n: at.Number}.String()
}
