package eventstream

import (
	"bytes"
	"math"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// FuzzSplicer plays a body to a client as a script says. By the rules of the
// standard, the client must see what it would see of the body alone, and in
// addition only what was requested.
func FuzzSplicer(f *testing.F) {
	const odd = 1 << 3
	for i, body := range eventstreamtest.Bodies() {
		for k, round := range [][]byte{
			{feedByte, frameNow},
			{frameNow, feedByte, feedByte, odd | frameNow, blockNow},
			{byte(i<<3) + feed, odd | frameNow, feedByte, blockNow},
			{feedByte, blockNow, frameNow, feedByte, frameNow},
		} {
			script := append([]byte{byte(k<<styleShift | (i+5*k)%(1<<styleShift))}, bytes.Repeat(round, 3+i%20)...)
			f.Add([]byte(body.Text), append(script, []byte{endEarly, endBody, noMoreIDs, feedMany}[(i+k)%4]))
		}
	}
	g := new(game)
	f.Fuzz(func(t *testing.T, body, script []byte) {
		if len(body) > 4<<10 || bytes.IndexByte(body, mark) >= 0 {
			return // too slow, or the body contains the byte that marks insertions
		}
		g.play(t, body, script)
		g.judge(t)
	})
}

// A script begins with a byte of options. In each byte after it, the last three
// bits say what happens next, and the other bits are a number n.
const (
	feed      = iota // n + 1 bytes come from the upstream
	feedMany         // 16 times as many
	feedByte         // one byte
	frameNow         // a heartbeat; if n is odd, at the second attempt
	blockNow         // a block of the module, if it is allowed
	noMoreIDs        // from here on, no IDs are added
	endEarly         // the stream must end as soon as it may
	endBody          // the upstream sends no more
)

// The options. The other bits are the style.
const (
	tellsRetry = 1 << iota
	hasLead
	addsIDs
	fills
	styleShift = iota
)

const (
	mark      = '\x01' // in everything that is inserted, and in no body
	noOwnID   = "\x01"
	leadID    = "\x01lead"
	leadText  = "event: \x01lead\nid: \x01lead\ndata:\n\n"
	blockText = "event: \x01block\ndata:\n\n"
	retryTime = 86399999 * time.Millisecond
	retryText = "retry: 86399999"
)

// game is a stream from its start to its end. There is only one, so that its
// memory is used again.
type game struct {
	s          Splicer
	frames     [2]Frames
	options    byte
	body       []byte
	consumed   int // of body
	endingSoon bool
	ended      bool // early

	client []byte // what the client got
	bare   []byte // the same without added IDs
	alone  []byte // the body, as it is parsed

	told       bool // what was owed was sent
	dropped    bool // what was owed was dropped, because the body is JSON
	numberer   numberer
	lastWithID uint64 // the number of the last event that may have an ID
	heartbeats int
	ownEvents  int // heartbeats that are events, and blocks
}

func (g *game) has(option byte) bool { return g.options&option != 0 }

func (g *game) play(t *testing.T, body, script []byte) {
	*g = game{body: body, client: g.client[:0], bare: g.bare, alone: g.alone}
	if len(script) > 0 {
		g.options, script = script[0], script[1:]
	}
	if g.has(addsIDs) {
		g.lastWithID = math.MaxUint64
	}
	style := Style(g.options >> styleShift % 3)
	g.frames = [2]Frames{
		{Style: style, Comment: "\x01", Event: "\x01heartbeat", Data: "{}"},
		{Style: (style + 1) % 3, Event: "\x01heartbeat"},
	}
	if g.has(fills) {
		g.frames[0].Pad = 20
	}
	if g.has(tellsRetry) {
		g.s.OweRetry(retryTime)
	}
	if g.has(hasLead) {
		g.s.OweLead([]byte(leadText))
	}
	for _, b := range script {
		g.step(t, b&7, int(b>>3))
		if g.ended {
			return
		}
	}
	for g.consumed < len(g.body) && !g.ended {
		g.feed(t, len(g.body))
	}
	if !g.ended {
		g.out(g.s.Rest(&g.frames[0]))
	}
}

func (g *game) step(t *testing.T, what byte, n int) {
	switch what {
	case feed:
		g.feed(t, 1+n)
	case feedMany:
		g.feed(t, 16*(1+n))
	case feedByte:
		g.feed(t, 1)
	case frameNow:
		g.frame(t, &g.frames[n%2])
	case blockNow:
		if g.s.MayEnd() && !g.s.Opaque() {
			before := len(g.client)
			g.client = g.s.Block(&g.frames[0], g.client, []byte(blockText))
			g.noteOwed(len(g.client) - before)
			g.ownEvents++
		}
	case noMoreIDs:
		g.lastWithID = min(g.lastWithID, g.s.Scanner().Events())
	case endEarly:
		g.endingSoon = true
		g.ended = g.s.MayEnd()
	case endBody:
		g.body = g.body[:g.consumed]
	}
}

// out adds what the client gets next.
func (g *game) out(p []byte) {
	g.client = append(g.client, p...)
	g.noteOwed(len(p))
}

// noteOwed records what happens to what is owed when n bytes are sent.
func (g *game) noteOwed(n int) {
	if n > 0 && !g.told && !g.dropped {
		g.dropped = g.s.Opaque()
		g.told = !g.dropped
	}
}

func (g *game) feed(t *testing.T, n int) {
	p := g.body[g.consumed:min(g.consumed+n, len(g.body))]
	f := &g.frames[0]
	if g.lastWithID == math.MaxUint64 {
		p = g.numberer.add(nil, p)
	}
	n = len(p)
	var lead, body []byte
	if g.endingSoon {
		lead, body, n, g.ended = g.s.SpliceToEnd(f, p)
	} else {
		lead, body = g.s.Splice(f, p)
	}
	denied, isSuffix := bytes.CutSuffix(p[:n], body)
	isMark := bytes.HasPrefix([]byte(bom[min(g.consumed, len(bom)):]), denied)
	if !isSuffix || !isMark && string(denied) != "\n" {
		t.Fatalf("%q became %q, %q", p[:n], lead, body)
	}
	g.out(lead)
	g.out(body)
	if n < len(p) && !g.ended {
		t.Fatalf("%d bytes of %q were taken, and the stream does not end", n, p)
	}
	g.consumed += len(addedID.ReplaceAll(p[:n], nil))
}

func (g *game) frame(t *testing.T, f *Frames) {
	place := g.s.Scanner().Place()
	may := !g.s.Opaque() && place != MidLine && (place != LineStart || f.Style != Event)
	before := len(g.client)
	var ok bool
	if g.client, ok = g.s.Frame(f, g.client); ok != may {
		t.Fatalf("a frame of style %d at place %d: %v", f.Style, place, ok)
	}
	frame := g.client[before:]
	g.noteOwed(len(frame))
	switch {
	case !ok && len(frame) > 0:
		t.Fatalf("a frame that may not go is %q", frame)
	case ok && f.Style == Event:
		g.ownEvents++
	case ok && len(frame) < f.Pad:
		t.Fatalf("%q is shorter than %d", frame, f.Pad)
	}
	if ok {
		g.heartbeats++
	}
}

// judge compares what the client got with the body.
func (g *game) judge(t *testing.T) {
	body := g.body[:g.consumed]
	if g.heartbeats+g.ownEvents == 0 && !g.has(tellsRetry|hasLead) {
		if g.withoutIDs(); !bytes.Equal(g.bare, body) {
			t.Fatalf("the client got %q for %q", g.client, body)
		}
	}
	g.judgeEnd(t)
	if g.s.Opaque() {
		g.lastWithID = 0
	}
	ours := append(g.alone[:0], "id: "+noOwnID+"\n\n"...)
	g.alone = append(ours, bytes.TrimPrefix(body, []byte(bom))...)
	want, got := eventstreamtest.Parse(g.alone), eventstreamtest.Parse(g.client)
	g.judgeOwed(t, &got)
	if !slices.Equal(got.Retries, want.Retries) {
		t.Fatalf("%q sets the reconnection times %d, want %d", g.client, got.Retries, want.Retries)
	}

	ownEvents, n := 0, 0
	for _, event := range got.Events {
		switch event.Type {
		case "\x01heartbeat", "\x01block":
			ownEvents++
			continue
		}
		if n == len(want.Events) {
			t.Fatalf("the client got %q, of which %q is too much", g.client, event)
		}
		wanted := want.Events[n]
		n++
		if wanted.LastEventID == noOwnID {
			wanted.LastEventID = g.idAt(uint64(n))
		}
		if event != wanted {
			t.Fatalf("event %d of %q is %q, want %q", n, g.client, event, wanted)
		}
	}
	if n < len(want.Events) || ownEvents != g.ownEvents {
		t.Fatalf("%q has %d events and %d of our own; want %d and %d", g.client, n, ownEvents, len(want.Events), g.ownEvents)
	}
	isCommitted := want.LastEventID != noOwnID
	if !isCommitted {
		want.LastEventID = g.idAt(uint64(n))
		isCommitted = want.LastEventID != ""
	}
	if got.LastEventID != want.LastEventID || got.IDCommitted != isCommitted {
		t.Fatalf("%q leaves the ID %q, %v; want %q, %v", g.client, got.LastEventID, got.IDCommitted, want.LastEventID, isCommitted)
	}
}

// idAt returns the last event ID that a client has after this many events of an
// upstream that sends no IDs.
func (g *game) idAt(events uint64) string {
	switch last := min(events, g.lastWithID); {
	case last > 0:
		return noOwnID + strconv.FormatUint(last, 10)
	case g.has(hasLead) && g.told:
		return leadID
	}
	return ""
}

// judgeOwed checks what was sent first, and removes it from the parsed result.
func (g *game) judgeOwed(t *testing.T, got *eventstreamtest.Result) {
	if g.has(tellsRetry) && g.told {
		if !bytes.HasPrefix(g.client, []byte(retryText)) || len(got.Retries) == 0 {
			t.Fatalf("%q does not begin with the reconnection time", g.client)
		}
		got.Retries = got.Retries[1:]
	}
	if g.has(hasLead) && g.told {
		if len(got.Events) == 0 || got.Events[0] != (eventstreamtest.Event{Type: leadID, LastEventID: leadID}) {
			t.Fatalf("%q does not begin with the lead", g.client)
		}
		got.Events = got.Events[1:]
	}
}

// judgeEnd checks what an early end has cut off.
func (g *game) judgeEnd(t *testing.T) {
	if !g.ended || g.s.Opaque() {
		return
	}
	scan := g.s.Scanner()
	if !scan.Place().isBoundary() {
		t.Fatalf("the end comes at place %d, after %q", scan.Place(), g.client)
	}
	if scan.Place() == Start || len(g.client) == 0 {
		return
	}
	last := g.client[len(g.client)-1]
	if last != '\n' && last != '\r' {
		t.Fatalf("the end is inside a line: %q", g.client)
	}
	if rest := g.body[g.consumed:]; last == '\r' && scan.LineEnding() != CR && len(rest) > 0 && rest[0] == '\n' {
		t.Fatalf("the end tears a CRLF: %q, %q", g.client, rest)
	}
}

// withoutIDs sets bare.
func (g *game) withoutIDs() { g.bare = addedID.ReplaceAll(g.client, nil) }
