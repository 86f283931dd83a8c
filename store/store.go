// Package store is the interface between `resume` and a store: a place outside
// the process that keeps the events of runs, so that a client can come back to
// any of several nodes. A store is a Caddy module in the namespace
// `http.handlers.sse.stores`. The module is an [Opener], and its [Store] does the
// work.
//
// A run is one upstream stream that outlives its client's connection. It stays on
// the node that began it, its producer. Only the producer writes the run's
// events; any node reads them. Nodes send each other short messages through the
// store, so that the producer knows who reads. A node is dead when its lease is
// over.
//
// The sse handler does what is the same for all stores. It collects writes, so
// that no stream waits for the store. It limits how much waits, and repeats
// writes that failed. It gives up streams whose events the store does not accept
// in time. It counts and logs errors. A store passes on what it is given, and
// returns the results.
//
// [github.com/caddy-sse/caddy-sse/store/storetest.Run] tests a store.
package store

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"time"
)

// Namespace is the namespace of Caddy modules that are stores. Such a module
// implements [Opener], and caddyfile.Unmarshaler for its block in the Caddyfile.
const Namespace = "http.handlers.sse.stores"

// Opener is the Caddy module of a store, with its configuration.
type Opener interface {
	// Identity is the same for configurations that may share a Store, so that it
	// outlives a reload. All settings must be part of it, secrets too. It is
	// called after Provision, and is neither logged nor sent anywhere.
	Identity() string

	// Open makes the Store. It must not wait for a server, because a
	// configuration must also load without it. It is called once for all
	// configurations with the same identity. The Store is closed when the last of
	// these configurations, and the last run that began with one of them, is
	// gone.
	Open() (Store, error)
}

// ErrUnknown says that a store does not have a run: it never had it, the run was
// dropped or has expired, or the store has lost it. Any other error means that
// the store could not be reached, or could not do what it was asked for, and that
// the same call may succeed later.
var ErrUnknown = errors.New("the store has no such run")

// Store keeps the events of runs. All methods may be called by any number of
// goroutines at the same time. If the context ends first, they return its error,
// or an error that wraps it. Writes of one run do not overlap, nor do calls of
// Receive for one node.
type Store interface {
	// Write applies writes in their order; the order among different runs does
	// not matter. It returns nil if all were applied, else one error for each
	// write, nil for those that were applied. If a write fails, later ones of the
	// same run must fail too.
	//
	// A write that failed may have been applied. It is repeated, the same or with
	// more at its end: events that are there already must be skipped, and so must
	// a Begin for a run that is there. The error is ErrUnknown for a write
	// without Begin if the store does not have the run, which must not be made
	// then, and for a write whose After is an event that the store does not have.
	Write(ctx context.Context, writes []Write) []error

	// Touch makes runs stay for ttl from now on, unless they are touched or
	// written again. Runs that the store does not have are skipped.
	Touch(ctx context.Context, ttl time.Duration, runs ...Key) error

	// Find returns what the store knows about a run.
	Find(ctx context.Context, run Key) (Run, error)

	// Read returns events of a run with numbers above after, in their order,
	// beginning with the oldest that is kept: about maxBytes of them, and at
	// least one. If there is none and the run has not ended, it waits until there
	// is one, or the run ends or is dropped, but no longer than wait. After that
	// it returns no events and no error. If the run has ended and no events
	// follow those that are returned, it also returns the run's end.
	Read(ctx context.Context, run Key, after uint64, maxBytes int, wait time.Duration) (events []Event, end []byte, err error)

	// Renew says that a node is alive for the time of its lease, from now on. A
	// lease of 0 ends it now.
	Renew(ctx context.Context, node Node, lease time.Duration) error

	// Lives reports whether a node has a lease.
	Lives(ctx context.Context, node Node) (bool, error)

	// Send leaves messages for a node, each of a few KiB at most. If the node
	// never receives them, they must be removed after some time; a minute is long
	// enough.
	Send(ctx context.Context, to Node, messages ...[]byte) error

	// Receive returns the messages for a node that it has not returned yet, in
	// the order in which they were sent. If there are none, it waits for some,
	// but no longer than wait. Messages of a call that failed are returned by the
	// next call, and none twice. It does no harm for long if the store itself
	// loses a message because its server has failed.
	Receive(ctx context.Context, node Node, wait time.Duration) ([][]byte, error)

	// Close releases what the Store holds. Calls in progress fail. Runs in the
	// store stay for their time.
	Close() error
}

// Write is a change of one run. Its parts are applied in the order of the fields.
type Write struct {
	Run Key

	// Begin makes the run. Find returns it. Nil: the run is there already.
	Begin []byte

	// Events are appended. Their numbers are consecutive, and continue those of
	// the events that are there. The store must not use their data after Write
	// has returned.
	Events []Event

	// After is the number of an event that the store has accepted before; 0:
	// none. If the run's newest event is older, the store has lost events: then
	// it must change nothing, and the error is ErrUnknown.
	After uint64

	// Oldest is the number of the oldest event that must be kept. Events before
	// it may be removed, now or later. A store should not keep many more.
	Oldest uint64

	// End says that the run has ended, and how. No events follow. Nil: it has not
	// ended.
	End []byte

	// Drop removes everything of the run. The write has nothing else then. It is
	// no error if the run is not there.
	Drop bool

	// TTL is how long the run stays if it is neither written nor touched again.
	TTL time.Duration
}

// Event is one event of a run.
type Event struct {
	Number uint64 // counts from 1
	Data   []byte // in a format of the handler; not empty
}

// Run is what a store knows about a run.
type Run struct {
	Begin []byte // as in the write that made the run

	// Last is the number of the newest event; 0: there has been none. Oldest is
	// the number of the oldest event that is kept; Last+1 if none is.
	Oldest, Last uint64

	End []byte // nil: it has not ended
}

// Key names a run. It is a hash of the token that the run's ids begin with. The
// token itself is in no store, because it lets a client come back.
type Key [sha256.Size]byte

// String is the key in base64url, 43 characters.
func (k Key) String() string { return base64.RawURLEncoding.EncodeToString(k[:]) }

// Node names a process while it uses a store. It is random, and consists of
// letters, digits, `-` and `_`.
type Node string
