// Package store is what `resume` needs of a place outside the process where the
// events of runs are kept, so that a client can come back to any of several
// nodes. A store is a guest module of Caddy in the namespace
// `http.handlers.sse.stores`: an [Opener], whose [Store] does the work.
//
// A run is one upstream stream that outlives its client's connection. It stays
// on the node that began it, its producer: only that one writes the run's
// events. Any node reads them. Nodes send each other short messages through the
// store, so that the producer knows who reads. A node is dead when its lease is
// over.
//
// The sse handler does what is the same for all stores: it collects what is to
// be written, so that no stream waits for the store; it bounds what waits, and
// tries again; it gives up streams whose events the store does not take in time;
// it counts errors and warns of them. A store passes on what it is given, and
// says what came of it.
//
// [github.com/caddy-sse/caddy-sse/store/storetest.Run] checks a store.
package store

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"time"
)

// Namespace is that of Caddy modules that are stores. Such a module implements
// [Opener], and caddyfile.Unmarshaler for its block in the Caddyfile.
const Namespace = "http.handlers.sse.stores"

// Opener is what a store is to Caddy: its configuration.
type Opener interface {
	// Identity is the same for configurations that may use the same Store, so
	// that it outlives a reload: all settings count, secrets too. It is called
	// after Provision, and is neither logged nor sent anywhere.
	Identity() string

	// Open makes the Store. It must not wait for a server: a configuration loads
	// without it. It is called once for all configurations of one identity, and
	// the Store is closed when the last of them, and the last run that began with
	// one of them, are gone.
	Open() (Store, error)
}

// ErrUnknown says that a store has no such run: it never had it, or it was
// dropped, its time is over, or the store has lost it. Other errors mean that
// the store could not be asked or could not do it, whatever the reason, and that
// the same call may succeed later.
var ErrUnknown = errors.New("the store has no such run")

// Store keeps the events of runs. All methods are for any number of goroutines
// at a time, heed their context, and return its error or one that wraps it when
// that ends first. Writes of one run, and calls of Receive for one node, do not
// overlap.
type Store interface {
	// Write applies writes in their order, those of different runs in any order.
	// It returns nil where all were applied, else as many errors as there are
	// writes, nil for those that were. Those that follow a failed one of the same
	// run must fail too.
	//
	// What failed is written again, the same or with more after it, and may have
	// been applied: events that are there already are skipped, and so is a Begin of
	// a run that is there. ErrUnknown is the answer to a write without Begin of a
	// run that the store does not have, which must not be made, and to one after an
	// event that it does not have.
	Write(ctx context.Context, writes []Write) []error

	// Touch has runs stay for ttl from now on, unless they are touched or written
	// again. Runs that the store does not have are skipped.
	Touch(ctx context.Context, ttl time.Duration, runs ...Key) error

	// Find returns what the store knows of a run.
	Find(ctx context.Context, run Key) (Run, error)

	// Read returns events of a run with numbers above after, in their order, the
	// oldest that are kept first: about maxBytes of them, and one at least. Where
	// there is none and the run has not ended, it waits until there is one, or the
	// run ends or is dropped, and for no longer than wait; then it returns nothing
	// and no error. Where the run has ended and nothing is left after the events
	// that it returns, it returns the run's end with them.
	Read(ctx context.Context, run Key, after uint64, maxBytes int, wait time.Duration) (events []Event, end []byte, err error)

	// Renew says that a node lives for as long as its lease, from now on. A lease
	// of 0 ends it now.
	Renew(ctx context.Context, node Node, lease time.Duration) error

	// Lives reports whether a node has a lease.
	Lives(ctx context.Context, node Node) (bool, error)

	// Send leaves messages for a node, each of a few KiB at most. Those to a node
	// that never receives them must go after a while: a minute is long enough.
	Send(ctx context.Context, to Node, messages ...[]byte) error

	// Receive returns the messages for a node that it has not returned yet, in the
	// order in which they were sent, and waits where there are none, for no longer
	// than wait. What a call that failed was about to return comes with the next
	// one, and none twice. A message that the store itself has lost, because its
	// server has failed, does no harm for long.
	Receive(ctx context.Context, node Node, wait time.Duration) ([][]byte, error)

	// Close gives back what the Store holds. Calls that are under way fail. What
	// is kept in the store stays for its time.
	Close() error
}

// Write is a change of one run. Its parts are applied in the order of the fields.
type Write struct {
	Run Key

	// Begin makes the run, with what it says. Nil: the run is there.
	Begin []byte

	// Events are appended. Their numbers follow each other, and the last one that
	// is there. The store must not hold on to their data after Write has returned.
	Events []Event

	// After is the number of an event that the store has taken before, 0: of none.
	// Where the run's newest event is an older one, the store has lost some: nothing
	// may be changed, and the answer is ErrUnknown.
	After uint64

	// Oldest is the number of the oldest event that must be kept. Those before it
	// may go, now or later: a store should not keep many more.
	Oldest uint64

	// End says that the run has ended, and how. No events follow. Nil: it has not.
	End []byte

	// Drop removes all that there is of the run. There is nothing else in the
	// write. A run that is not there is no error.
	Drop bool

	// TTL is how long the run stays if it is neither written nor touched again.
	TTL time.Duration
}

// Event is one event of a run.
type Event struct {
	Number uint64 // counts from 1
	Data   []byte // what there is of it, in a form of the handler's; not empty
}

// Run is what a store knows of one.
type Run struct {
	Begin []byte // what it was made with

	// Last is the number of the newest event; 0: there has been none. Oldest is
	// that of the oldest event that is kept, Last+1 where none is.
	Oldest, Last uint64

	End []byte // nil: it has not ended
}

// Key names a run. It is a hash of the token that the run's ids begin with: that
// token lets a client come back, and is in no store.
type Key [sha256.Size]byte

// String is the key in base64url, 43 characters.
func (k Key) String() string { return base64.RawURLEncoding.EncodeToString(k[:]) }

// Node names a process while it uses a store. It is random, and made of letters
// and digits, `-` and `_`.
type Node string
