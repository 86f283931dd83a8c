package caddysse

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
	"github.com/caddy-sse/caddy-sse/internal/journal"
)

func newTestFeed(t testing.TB, policy journal.Policy) *feed {
	t.Helper()
	f := openFeed(journal.NewBudget(policy, 64<<20), policy, 1<<20, "", nil)
	if f == nil {
		t.Fatal("there is no journal")
	}
	return f
}

// all returns what a reader gets that joins at the beginning.
func (f *feed) all(t testing.TB) string {
	t.Helper()
	c, ok := f.journal.Join(journal.After(0), nil)
	if !ok {
		t.Fatal("the beginning is unknown")
	}
	defer c.Leave()
	var text strings.Builder
	for {
		p, err := c.Next()
		if len(p) == 0 || err != nil {
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			return text.String()
		}
		text.Write(p)
		c.Advance(len(p))
	}
}

func (f *feed) feedAll(t testing.TB, pieces ...string) {
	t.Helper()
	for _, p := range pieces {
		if n, err := f.write([]byte(p)); n != len(p) || err != nil {
			t.Fatalf("%q: %d, %v", p, n, err)
		}
	}
}

func TestAFeedAddsIDsInTheLineEndingOfTheUpstream(t *testing.T) {
	for _, eol := range []string{"\n", "\r\n", "\r"} {
		body := strings.ReplaceAll("data: 1||: comment||data: 2|more: x||retry: 5||", "|", eol)
		for size := 1; size <= len(body); size++ {
			f := newTestFeed(t, journal.KeepNewest)
			for rest := body; rest != ""; {
				n := min(size, len(rest))
				f.feedAll(t, rest[:n])
				rest = rest[n:]
			}
			id := func(n int) string { return "id: " + runID{f.token, uint64(n)}.String() + "|" }
			want := strings.ReplaceAll("data: 1|"+id(1)+"|: comment||data: 2|more: x|"+id(2)+"|retry: 5||", "|", eol)
			got := f.all(t)
			if f.journal.Close(nil); eol == "\r" || got == want {
				got = f.all(t) // the last CR may be the first half of a CRLF
			}
			if !strings.HasPrefix(want, got) || len(got) < len(want)-len(eol) {
				t.Fatalf("%q in pieces of %d: got %q, want %q", eol, size, got, want)
			}
			if events := f.journal.Figures().Events; events != 2 {
				t.Errorf("%d events", events)
			}
		}
	}
}

func TestAFeedLeavesAnUpstreamsIDsAlone(t *testing.T) {
	f := newTestFeed(t, journal.KeepNewest)
	f.feedAll(t, "data: 1\n\n", "id: a\ndata: 2\n\ndata: 3\n\n")
	want := "data: 1\nid: " + runID{f.token, 1}.String() + "\n\nid: a\ndata: 2\n\ndata: 3\n\n"
	if got := f.all(t); got != want {
		t.Errorf("%q", got)
	}
	if id, ok := f.upstreamPosition(); id != "a" || !ok {
		t.Errorf("position %q, %v", id, ok)
	}
	// The next attempt continues without our ids, and the incomplete event is
	// dropped.
	f.feedAll(t, "data: half")
	f.again()
	f.feedAll(t, "\uFEFFdata: 4\n\n")
	if got := f.all(t); got != want+"data: 4\n\n" {
		t.Errorf("%q", got)
	}
}

func TestAByteOrderMarkIsNotKept(t *testing.T) {
	for size := 1; size < 5; size++ {
		f := newTestFeed(t, journal.KeepNewest)
		body := "\uFEFFdata: 1\n\n"
		for rest := body; rest != ""; {
			n := min(size, len(rest))
			f.feedAll(t, rest[:n])
			rest = rest[n:]
		}
		if got, want := f.all(t), "data: 1\nid: "+(runID{f.token, 1}).String()+"\n\n"; got != want {
			t.Errorf("%q", got)
		}
	}
}

func TestAFeedRefusesJSON(t *testing.T) {
	f := newTestFeed(t, journal.KeepNewest)
	if _, err := f.write([]byte(" {\"a\": 1}")); !errors.Is(err, errOtherBody) {
		t.Error(err)
	}
}

// TestAClientOfAFeedSeesTheUpstreamsEvents compares what a reader gets with
// what a parser of the standard sees in the upstream's body, however the body
// is cut.
func TestAClientOfAFeedSeesTheUpstreamsEvents(t *testing.T) {
	rng := rand.New(rand.NewPCG(16, 3))
	pieces := []string{"data: x", "data", "\n", "\n", "\r\n", "\r", ":c", "event: e", "retry: 7", "\n\n", "\r\n\r\n", "\r\r", "x"}
	for range 20_000 {
		var body strings.Builder
		for range rng.IntN(20) {
			body.WriteString(pieces[rng.IntN(len(pieces))])
		}
		body.WriteString("\n\n\n")
		f := newTestFeed(t, journal.KeepNewest)
		for rest := body.String(); rest != ""; {
			n := 1 + rng.IntN(len(rest))
			f.feedAll(t, rest[:n])
			rest = rest[n:]
		}
		var want, got []string
		for _, e := range eventstreamtest.Parse([]byte(body.String())).Events {
			want = append(want, fmt.Sprintf("%s %q", e.Type, e.Data))
		}
		for n, e := range eventstreamtest.Parse([]byte(f.all(t))).Events {
			got = append(got, fmt.Sprintf("%s %q", e.Type, e.Data))
			if id := (runID{f.token, uint64(n + 1)}).String(); e.LastEventID != id {
				t.Fatalf("%q: event %d has the id %q", body.String(), n+1, e.LastEventID)
			}
		}
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Fatalf("%q: %q\ngot  %q\nwant %q", body.String(), f.all(t), got, want)
		}
	}
}
