package caddysse

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/journal"
	"github.com/caddy-sse/caddy-sse/store"
)

// Nodes tell each other which client reads which run. A node that has a client of
// another node's run reports that at once, and then repeatedly, so that a lost
// message does no harm for long. The run's node lists that client like its own,
// keeps the events that it has not been sent, and says when its stream must end.

// outgoing is a message that has not been sent yet.
type outgoing struct {
	to store.Node
	message
}

// message is what nodes tell each other.
type message struct {
	Op     messageOp     `json:"op"`
	Run    string        `json:"run"` // the run's key
	Reader string        `json:"reader,omitempty"`
	From   store.Node    `json:"from"`
	N      uint64        `json:"n,omitempty"`    // the last event that the client has
	Stay   time.Duration `json:"stay,omitempty"` // how long the run continues without the client
	Why    string        `json:"why,omitempty"`
}

type messageOp string

const (
	// To the node that has the run.
	clientReads messageOp = "reads" // the client is there, and has the events up to n
	clientLeft  messageOp = "left"  // the client has left
	clientStops messageOp = "stops" // the run must end, for a reason

	// To the node that has the client.
	clientEnds messageOp = "ends" // the client's stream must end, for a reason
	runUnknown messageOp = "gone" // there is no such run, or no such event
)

// maxOutbox is how many messages may wait for the store; the oldest are dropped
// first.
const maxOutbox = 10_000

// post sends a message to a node, without waiting for the store.
func (d *storeSession) post(to store.Node, m message) {
	m.From = d.node
	d.mu.Lock()
	if len(d.outbox) >= maxOutbox {
		d.outbox = d.outbox[maxOutbox/10:]
	}
	d.outbox = append(d.outbox, outgoing{to, m})
	d.mu.Unlock()
	d.sendPosted()
}

// sendPosted wakes the sender.
func (d *storeSession) sendPosted() {
	select {
	case d.posts <- struct{}{}:
	default:
	}
}

// send sends messages to a node, and waits for the store.
func (d *storeSession) send(ctx context.Context, to store.Node, name string, messages ...message) error {
	texts := make([][]byte, len(messages))
	for i, m := range messages {
		m.From = d.node
		text, err := json.Marshal(m)
		if err != nil {
			panic(err) // plain fields
		}
		texts[i] = text
	}
	var names []string
	if name != "" {
		names = []string{name}
	}
	return d.call(ctx, storeSend, storePatience, func(ctx context.Context) error {
		return d.store.Send(ctx, to, texts...)
	}, names...)
}

// keepSending sends what has been posted. A message that can't be sent is dropped,
// because its node repeats it anyway. Only clientStops is not repeated, so it is
// kept until it has been sent.
func (d *storeSession) keepSending() {
	for {
		select {
		case <-d.posts:
		case <-d.ctx.Done():
			return
		}
		d.mu.Lock()
		posted := d.outbox
		d.outbox, d.sending = nil, true
		d.mu.Unlock()
		byNode := make(map[store.Node][]message)
		var nodes []store.Node
		for _, l := range posted {
			if byNode[l.to] == nil {
				nodes = append(nodes, l.to)
			}
			byNode[l.to] = append(byNode[l.to], l.message)
		}
		var stops []outgoing
		for _, node := range nodes {
			if d.send(d.ctx, node, "", byNode[node]...) == nil {
				continue
			}
			for _, m := range byNode[node] {
				if m.Op == clientStops {
					stops = append(stops, outgoing{node, m})
				}
			}
		}
		if len(stops) > 0 {
			time.AfterFunc(storePause, d.sendPosted)
		}
		d.mu.Lock()
		d.outbox, d.sending = append(stops, d.outbox...), false
		d.tellIdleLocked()
		d.mu.Unlock()
	}
}

// keepReceiving receives the messages of other nodes.
func (d *storeSession) keepReceiving() {
	for d.ctx.Err() == nil {
		wait := d.lease / 3
		var texts [][]byte
		err := d.call(d.ctx, storeReceive, wait+storePatience, func(ctx context.Context) (err error) {
			texts, err = d.store.Receive(ctx, d.node, wait)
			return err
		})
		for _, text := range texts {
			var m message
			if json.Unmarshal(text, &m) == nil {
				d.read(m)
			}
		}
		d.dropSilentReaders()
		if err != nil {
			select {
			case <-time.After(storePause):
			case <-d.ctx.Done():
			}
		}
	}
}

// read handles one message.
func (d *storeSession) read(m message) {
	switch m.Op {
	case clientEnds, runUnknown:
		d.mu.Lock()
		f := d.followers[m.Reader]
		d.mu.Unlock()
		if f == nil {
			return
		}
		if why := reasonOf(m.Why); m.Op == clientEnds && why != notEnded && why != serverClosed {
			f.endStream(why)
		}
		f.isOver()
		return
	}
	key, err := keyFrom(m.Run)
	if err != nil {
		return
	}
	r, known := d.runs.find(key)
	if !known || r.kept == nil || r.kept.mirror == nil {
		if m.Op == clientReads {
			d.post(m.From, message{Op: runUnknown, Run: m.Run, Reader: m.Reader})
		}
		return
	}
	switch m.Op {
	case clientReads:
		r.isReadElsewhere(d, m)
	case clientLeft:
		r.leftElsewhere(m)
	case clientStops:
		if why := reasonOf(m.Why); why == endedByAdmin || m.N <= r.feed.journal.Figures().Events {
			r.stop(why)
		}
	}
}

// keyOf is the name of a run in a store, and in the table of runs.
func keyOf(token runToken) store.Key { return store.Key(hashOf(token)) }

func keyFrom(text string) (key store.Key, err error) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err == nil && copy(key[:], b) != len(key) {
		err = errors.New("not the length of a key")
	}
	return key, err
}

// reasonOf is the reason with this name; notEnded if there is none.
func reasonOf(name string) reason {
	for why := notEnded + 1; why < reasonCount; why++ {
		if why.String() == name {
			return why
		}
	}
	return notEnded
}

// remoteReader is the part of a runReader that only a client of another node
// needs.
type remoteReader struct {
	d     *storeSession
	node  store.Node
	id    string
	heard atomic.Int64 // when that node last reported the client, an instant
}

// end tells the client's node to end its stream.
func (t *remoteReader) end(r *run, why reason) {
	t.d.post(t.node, message{Op: clientEnds, Run: keyOf(r.token()).String(), Reader: t.id, Why: why.String()})
}

// maxSentAway is how many clients of other nodes a run remembers after it has
// ended their streams.
const maxSentAway = 64

// isReadElsewhere handles a report of a client of another node. Only the
// session's receiver may call it; that is also true for leftElsewhere.
func (r *run) isReadElsewhere(d *storeSession, m message) {
	r.mu.Lock()
	why, sentAway := r.kept.sentAway[m.Reader]
	reader := r.kept.remote[m.Reader]
	newest := reader != nil && r.kept.newest == reader
	r.mu.Unlock()
	switch {
	case sentAway:
		(&remoteReader{d: d, node: m.From, id: m.Reader}).end(r, why)
	case r.kept.mirror.lost.Load():
		d.post(m.From, message{Op: runUnknown, Run: m.Run, Reader: m.Reader})
		r.kept.mirror.sayAgain()
		m.Stay = r.h.resuming.window
		r.leftElsewhere(m)
	case reader == nil:
		reader = &runReader{run: r, remote: &remoteReader{d: d, node: m.From, id: m.Reader}}
		reader.remote.heard.Store(int64(now()))
		if !r.enterAt(m.N, reader) {
			d.post(m.From, message{Op: runUnknown, Run: m.Run, Reader: m.Reader})
		}
	default:
		reader.remote.heard.Store(int64(now()))
		if newest {
			reader.moveTo(m.N)
		}
		r.kept.mirror.sayAgain()
	}
}

// moveTo records that a client of another node has the events up to n, so that
// they may be dropped.
func (reader *runReader) moveTo(n uint64) {
	reader.mu.Lock()
	defer reader.mu.Unlock()
	if !reader.left {
		reader.join(journal.After(n))
	}
}

// leftElsewhere removes a client of another node from the run.
func (r *run) leftElsewhere(m message) {
	r.mu.Lock()
	reader := r.kept.remote[m.Reader]
	delete(r.kept.remote, m.Reader)
	delete(r.kept.sentAway, m.Reader)
	if reader != nil && r.kept.newest == reader {
		r.kept.stay = m.Stay
	}
	r.mu.Unlock()
	if reader != nil {
		reader.leave()
	}
}

// sendAway tells the node of a client to end its stream, without waiting for
// that. It remembers the client until its node says that it has left, because the
// node may report it again until then.
func (r *run) sendAway(reader *runReader, why reason) {
	id := reader.remote.id
	r.mu.Lock()
	delete(r.kept.remote, id)
	if r.kept.sentAway == nil {
		r.kept.sentAway = make(map[string]reason)
	}
	if len(r.kept.sentAway) >= maxSentAway {
		clear(r.kept.sentAway)
	}
	r.kept.sentAway[id] = why
	r.mu.Unlock()
	reader.remote.end(r, why)
	reader.leave()
}

// dropSilentReaders removes the clients that their nodes have not reported for as
// long as a lease. Only the receiver may call it.
func (d *storeSession) dropSilentReaders() {
	if now()-d.looked < instant(d.lease/3) {
		return
	}
	d.looked = now()
	for _, m := range d.allMirrors() {
		r := m.run
		var silent []*runReader
		r.mu.Lock()
		for id, reader := range r.kept.remote {
			if now()-instant(reader.remote.heard.Load()) > instant(d.lease) {
				delete(r.kept.remote, id)
				silent = append(silent, reader)
			}
		}
		r.mu.Unlock()
		for _, reader := range silent {
			reader.leave()
		}
	}
}
