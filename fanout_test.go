package caddysse

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/caddy-sse/caddy-sse/internal/eventstream"
	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
	"github.com/caddy-sse/caddy-sse/internal/journal"
)

// TestBlocksPassAsIfTheyWereLookedThrough has two clients read one journal from
// the same random place, one whose bytes are scanned again and one whose bytes
// are not, both with heartbeats at random moments. A parser of the standard
// must get the same from both, and the closed lines must be the same.
func TestBlocksPassAsIfTheyWereLookedThrough(t *testing.T) {
	rng := rand.New(rand.NewPCG(16, 4))
	pieces := []string{
		"data: x", "data", "\n", "\n", "\r\n", "\r", ":c", "event: e", "id: 7", "id", "id: a\x00b", "retry: 7",
		"\n\n", "\r\n\r\n", "\r\r", "x", "\xff", "data: \xc3", "data: ü", "id: " + strings.Repeat("l", 1100),
	}
	for range 20_000 {
		var body strings.Builder
		for range 1 + rng.IntN(20) {
			body.WriteString(pieces[rng.IntN(len(pieces))])
		}
		body.WriteString("\n\n\n")
		compareBlocks(t, rng, "data: first"+body.String())
	}
	for _, body := range eventstreamtest.Bodies() {
		if strings.LastIndex(body.Text, "\uFEFF") > 0 {
			continue // a client that joined before it would see another body
		}
		for range 20 {
			compareBlocks(t, rng, body.Text)
		}
	}
}

func compareBlocks(t *testing.T, rng *rand.Rand, body string) {
	t.Helper()
	f := newTestFeed(t, journal.KeepNewest)
	var looked, passed *clientOfBlocks
	joins := rng.IntN(len(body) + 1)
	for sent := 0; sent < len(body); {
		if looked == nil && sent >= joins {
			looked, passed = joinBlocks(t, f), joinBlocks(t, f)
		}
		n := 1 + rng.IntN(len(body)-sent)
		if _, err := f.write([]byte(body[sent : sent+n])); err != nil {
			return // the body is not an event stream
		}
		sent += n
		if looked == nil {
			continue
		}
		if rng.IntN(2) == 0 {
			looked.read(t, looked.look)
			passed.read(t, passed.pass)
		}
		if rng.IntN(3) == 0 {
			looked.beat()
			passed.beat()
		}
	}
	if looked == nil {
		return
	}
	looked.read(t, looked.look)
	passed.read(t, passed.pass)
	if got, want := passed.figures(), looked.figures(); got != want {
		t.Fatalf("%q, from %d on:\ngot  %s\nwant %s", body, joins, got, want)
	}
}

// clientOfBlocks is a client of a feed's journal.
type clientOfBlocks struct {
	splicer eventstream.Splicer
	frames  eventstream.Frames
	cursor  *journal.Cursor
	fed     fed
	scanned bool
	out     bytes.Buffer
}

func joinBlocks(t *testing.T, f *feed) *clientOfBlocks {
	c, ok := f.journal.Join(journal.Live(), nil)
	if !ok {
		t.Fatal("there is no journal")
	}
	client := &clientOfBlocks{cursor: c, frames: eventstream.Frames{Comment: "heartbeat"}, fed: fed{feed: f}}
	// So that no byte is the first one: the meaning of a byte order mark there
	// depends on the place where a client joins.
	client.out.Write(client.splicer.Block(&client.frames, nil, []byte("event: sse\ndata:\n\n")))
	return client
}

func (c *clientOfBlocks) read(t *testing.T, take func(p []byte)) {
	for {
		p, err := c.cursor.Next()
		if err != nil {
			t.Fatal(err)
		}
		if p == nil {
			return
		}
		take(p)
		c.cursor.Advance(len(p))
	}
}

func (c *clientOfBlocks) look(p []byte) {
	c.scanned = true
	lead, body := c.splicer.Splice(&c.frames, p)
	c.out.Write(lead)
	c.out.Write(body)
}

func (c *clientOfBlocks) pass(p []byte) {
	events, invalid, at := c.cursor.Coming()
	c.fed.at = at
	c.out.Write(c.splicer.PassBlocks(&c.frames, p, events, invalid))
	c.out.Write(p)
}

func (c *clientOfBlocks) beat() {
	frame, _ := c.splicer.Frame(&c.frames, nil)
	c.out.Write(frame)
}

// figures describes what is reported about the client, and what it sees.
func (c *clientOfBlocks) figures() string {
	scanner := c.splicer.Scanner()
	id, ok := scanner.LastEventID()
	if !c.scanned {
		id, ok = c.fed.lastID()
	}
	invalid := !scanner.ValidUTF8() || scanner.TruncatedUTF8()
	seen := eventstreamtest.Parse(c.out.Bytes())
	return fmt.Sprintf("%d events, id %.40q %v, incomplete %v, invalid %v, seen %.2000q",
		scanner.Events(), id, ok, scanner.Incomplete(), invalid, fmt.Sprint(seen))
}

func TestAByteOrderMarkInTheMiddleOfABodyIsNoneForAnybody(t *testing.T) {
	for _, spoken := range []bool{true, false} {
		f := newTestFeed(t, journal.KeepNewest)
		f.feedAll(t, "data: 1\n\n")
		c := joinBlocks(t, f)
		if !spoken {
			c.splicer = eventstream.Splicer{}
			c.out.Reset()
		}
		f.feedAll(t, "\uFEFFdata: 2\ndata: 3\n\n")
		c.read(t, c.pass)
		got := eventstreamtest.Parse(c.out.Bytes()).Events
		if last := got[len(got)-1]; last.Data != "3" {
			t.Errorf("spoken: %v: %q gives %+v", spoken, c.out.String(), got)
		}
	}
}
