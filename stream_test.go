package caddysse_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	caddysse "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// heartbeatEvent is the name of the event of style event in these tests, and
// retryTime the reconnection time. No body contains either.
const (
	heartbeatEvent = "a heartbeat, for tests"
	retryTime      = 86399999 * time.Millisecond
)

// due is long enough for a frame of equivalenceHandlers.
const due = 2 * time.Second

// variant is one configuration under which a body must have the same meaning.
type variant struct {
	style string
	retry bool
}

var variants = []variant{
	{"block", false}, {"line", false}, {"event", false},
	{"block", true}, {"line", true}, {"event", true},
}

func (v variant) handler(t testing.TB) *caddysse.Handler {
	h := &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(due), Style: v.style, Comment: "x"}}
	if v.style == "event" {
		h.Heartbeat.Event = heartbeatEvent
	}
	if v.retry {
		h.Retry = &caddysse.Retry{Min: caddy.Duration(retryTime)}
	}
	return provision(t, h)
}

// checkEquivalence plays body in the given pieces, tries to insert a frame
// after each of them and, if frameFirst is true, before the first. It compares
// what clients make of the result with what they make of the body alone.
func checkEquivalence(t testing.TB, h *caddysse.Handler, v variant, pieces [][]byte, frameFirst bool) {
	t.Helper()
	body := bytes.Join(pieces, nil)
	c := play(t, h, func(w http.ResponseWriter) {
		if frameFirst {
			quiet(due)
		}
		for _, piece := range pieces {
			if n, err := w.Write(piece); err != nil || n != len(piece) {
				t.Errorf("writing %q: got (%d, %v)", piece, n, err)
			}
			quiet(due)
		}
	})
	if err := equivalent(body, c.body.Bytes(), v.retry && (frameFirst || len(pieces) > 0)); err != nil {
		t.Errorf("style %s, retry %v, frame first %v, pieces %.200q: %.500v\nthe client got %.500q", v.style, v.retry, frameFirst, pieces, err, c.body.Bytes())
	}
}

// equivalent reports whether clients see the same in sent as in body, except
// for the heartbeat events and the reconnection time.
func equivalent(body, sent []byte, retry bool) error {
	if at, isJSON := jsonAt(body); isJSON {
		// Before it, something may have been inserted, or a byte order mark
		// dropped.
		if !bytes.HasSuffix(sent, body[at:]) {
			return errors.New("the JSON is not what the upstream sent")
		}
		return nil
	}
	want, got := eventstreamtest.Parse(body), eventstreamtest.Parse(sent)
	got.Events = slices.DeleteFunc(got.Events, func(e eventstreamtest.Event) bool { return e.Type == heartbeatEvent })
	const ms = uint64(retryTime / time.Millisecond)
	switch {
	case retry && len(got.Retries) > 0 && got.Retries[0] == ms:
		got.Retries = got.Retries[1:]
	case retry && !isBOM(body): // there is nothing that it could come before
		return errors.New("the client was not told the reconnection time first")
	}
	if !slices.Equal(got.Events, want.Events) {
		return fmt.Errorf("events: got %q, want %q", got.Events, want.Events)
	}
	if !slices.Equal(got.Retries, want.Retries) {
		return fmt.Errorf("reconnection times: got %d, want %d", got.Retries, want.Retries)
	}
	if got.LastEventID != want.LastEventID || got.IDCommitted != want.IDCommitted {
		return fmt.Errorf("last event ID: got (%q, %v), want (%q, %v)", got.LastEventID, got.IDCommitted, want.LastEventID, want.IDCommitted)
	}
	return nil
}

// jsonAt returns where body turns out to be JSON.
func jsonAt(body []byte) (at int, isJSON bool) {
	text := bytes.TrimPrefix(body, []byte("\uFEFF"))
	text = bytes.TrimLeft(text, " \t\r\n")
	return len(body) - len(text), len(text) > 0 && (text[0] == '{' || text[0] == '[')
}

// isBOM reports whether body is no more than a byte order mark, or a part of
// one.
func isBOM(body []byte) bool {
	return bytes.HasPrefix([]byte("\uFEFF"), body)
}

// cutsOf returns where to cut body in two: everywhere, except inside long runs
// of equal bytes. The race detector makes this ten times as slow, and more cuts
// would not find more races.
func cutsOf(body string) []int {
	step := 1
	if raceEnabled {
		step = 7
	}
	var cuts []int
	for i := 0; i <= len(body); i += step {
		near := body[max(0, i-4):min(len(body), i+4)]
		if len(body) <= 200 || i < 12 || i > len(body)-12 || strings.ContainsAny(near, "\r\n:\x00") || i%499 == 0 {
			cuts = append(cuts, i)
		}
	}
	return cuts
}

func piecewise(body string) [][]byte {
	var pieces [][]byte
	for i := range len(body) {
		pieces = append(pieces, []byte{body[i]})
	}
	return pieces
}

func TestFramesAnywhereChangeNoEventIDOrReconnectionTime(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		t.Run(body.Name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				for _, v := range variants {
					h := v.handler(t)
					for _, frameFirst := range []bool{false, true} {
						for _, cut := range cutsOf(body.Text) {
							checkEquivalence(t, h, v, [][]byte{[]byte(body.Text[:cut]), []byte(body.Text[cut:])}, frameFirst)
						}
						checkEquivalence(t, h, v, piecewise(body.Text), frameFirst)
					}
				}
			})
		})
	}
}

// FuzzEquivalence does the same with random bodies and pieces.
func FuzzEquivalence(f *testing.F) {
	for i, body := range eventstreamtest.Bodies() {
		f.Add([]byte(body.Text), uint64(i), uint8(i), i%2 == 0, i%3 == 0)
	}
	handlers := make(map[variant]*caddysse.Handler)
	for _, v := range variants {
		handlers[v] = v.handler(f)
	}
	f.Fuzz(func(t *testing.T, body []byte, seed uint64, style uint8, retry, frameFirst bool) {
		v := variant{[]string{"block", "line", "event"}[style%3], retry}
		if bytes.Contains(body, []byte(heartbeatEvent)) {
			t.Skip("the body has what the test looks for")
		}
		cuts := rand.New(rand.NewPCG(seed, 0))
		var pieces [][]byte
		for rest := body; len(rest) > 0; {
			n := 1 + cuts.IntN(min(len(rest), 1+cuts.IntN(64)))
			pieces, rest = append(pieces, rest[:n]), rest[n:]
		}
		synctest.Test(t, func(t *testing.T) {
			checkEquivalence(t, handlers[v], v, pieces, frameFirst)
		})
	})
}

func TestWhileNoFrameIsDueTheClientGetsTheUpstreamsBytes(t *testing.T) {
	handlers := map[string]*caddysse.Handler{
		"off": silent(),
		"not due": {Heartbeat: &caddysse.Heartbeat{
			Interval: caddy.Duration(time.Hour),
			Prelude:  caddy.Duration(time.Hour),
		}},
	}
	for name, config := range handlers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := provision(t, config)
			for _, body := range eventstreamtest.Bodies() {
				for _, cut := range cutsOf(body.Text) {
					checkIdentity(t, h, body.Text[:cut], body.Text[cut:])
				}
				var pieces []string
				for _, piece := range piecewise(body.Text) {
					pieces = append(pieces, string(piece))
				}
				checkIdentity(t, h, pieces...)
			}
		})
	}
}

// checkIdentity expects each piece that has bytes, in one or more writes,
// followed by one flush.
func checkIdentity(t *testing.T, h *caddysse.Handler, pieces ...string) {
	t.Helper()
	c := play(t, h, func(w http.ResponseWriter) {
		for _, piece := range pieces {
			write(t, w, piece)
		}
	})
	want := []string{"200 ", "flush "}
	for _, piece := range pieces {
		if piece != "" {
			want = append(want, "write "+piece, "flush ")
		}
	}
	var got []string
	for i, h := range c.log {
		if i > 0 && h.what == "write" && c.log[i-1].what == "write" {
			got[len(got)-1] += h.bytes
		} else {
			got = append(got, h.what+" "+h.bytes)
		}
	}
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			t.Fatalf("%.60q…: what reached the client differs from number %d on:\ngot  %.200q\nwant %.200q", pieces, i, got[min(i, len(got)):], want[min(i, len(want)):])
		}
	}
}

func TestEachWriteIsFlushedOnce(t *testing.T) {
	h := provision(t, &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(time.Hour)}})
	want := []string{"200", "flush", "write data: a\n", "flush", "write \n", "flush"}
	pieces := []string{"data: a\n", "\n"}
	for name, body := range map[string]func(w http.ResponseWriter){
		"of a handler that only writes": func(w http.ResponseWriter) {
			for _, piece := range pieces {
				write(t, w, piece)
			}
		},
		"of a handler that flushes too": func(w http.ResponseWriter) {
			rc := http.NewResponseController(w)
			if err := rc.Flush(); err != nil {
				t.Error(err)
			}
			for _, piece := range pieces {
				write(t, w, piece)
				if err := errors.Join(rc.Flush(), rc.Flush()); err != nil {
					t.Error(err)
				}
			}
		},
		"of a handler that writes nothing in between": func(w http.ResponseWriter) {
			for _, piece := range pieces {
				write(t, w, "")
				write(t, w, piece)
			}
		},
		"of a copy": func(w http.ResponseWriter) {
			n, err := w.(io.ReaderFrom).ReadFrom(&inPieces{pieces: pieces})
			if n != 9 || err != nil {
				t.Errorf("copying: got (%d, %v)", n, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			expect(t, "what reached the client", play(t, h, body).happenings(), want)
		})
	}
	t.Run("and never by a detour past the module", func(t *testing.T) {
		c := capable{newClient(t)}
		err := h.ServeHTTP(c, get(), stream(func(w http.ResponseWriter) {
			_, _ = io.Copy(w, &inPieces{pieces: pieces})
		}))
		if err != nil {
			t.Error(err)
		}
		if slices.Contains(c.happenings(), "sendfile data: a\n\n") {
			t.Errorf("what reached the client: %q", c.happenings())
		}
	})
}

// inPieces is read piece by piece.
type inPieces struct{ pieces []string }

func (r *inPieces) Read(p []byte) (n int, err error) {
	if len(r.pieces) == 0 {
		return 0, io.EOF
	}
	n = copy(p, r.pieces[0])
	r.pieces = r.pieces[1:]
	return n, nil
}

func TestTheHeadersGoOutAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := provision(t, &caddysse.Handler{Retry: &caddysse.Retry{Min: caddy.Duration(time.Second)}})
		c := newClient(t)
		_ = serve(h, c, get(), func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(201)
			expect(t, "what reached the client", c.happenings(), []string{"201", "flush"})
			return nil
		})
	})
}

func TestAStreamsTrailersAreSent(t *testing.T) {
	c := newClient(t)
	_ = serve(provision(t, silent()), c, get(), func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Trailer", "Checksum")
		w.WriteHeader(200)
		write(t, w, "data: a\n\n")
		w.Header().Set("Checksum", "1")
		w.Header().Set(http.TrailerPrefix+"Late", "2")
		return nil
	})
	if c.sent.Get("Trailer") != "Checksum" || c.header.Get("Checksum") != "1" || c.header.Get(http.TrailerPrefix+"Late") != "2" {
		t.Errorf("headers: %v, then %v", c.sent, c.header)
	}
}

func TestTheUpstreamLearnsThatAWriteFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient(t)
		c.fail = errors.New("the client is gone")
		_ = serve(provision(t, &caddysse.Handler{}), c, get(), stream(func(w http.ResponseWriter) {
			if n, err := io.WriteString(w, "data: a\n\n"); n != 0 || !errors.Is(err, c.fail) {
				t.Errorf("got (%d, %v), want (0, %v)", n, err, c.fail)
			}
			if n, err := io.WriteString(w, "data: a\n\n"); n != 0 || err == nil {
				t.Errorf("the next one: got (%d, %v)", n, err)
			}
			quiet(time.Hour) // no frame follows
		}))
		expect(t, "what reached the client", c.happenings(), []string{"200", "flush", "write data: a\n\n"})
	})
}

func TestAHandlerThatOutlivesItsRequestWritesNothing(t *testing.T) {
	var late http.ResponseWriter
	c := play(t, provision(t, silent()), func(w http.ResponseWriter) { late = w })
	if _, err := io.WriteString(late, "data: a\n\n"); err == nil {
		t.Error("the write seems to have worked")
	}
	_ = http.NewResponseController(late).Flush()
	expect(t, "what reached the client", c.happenings(), []string{"200", "flush"})
}

// discard is a client that stores nothing.
type discard struct {
	header http.Header
	bytes  int64
}

func (d *discard) Header() http.Header { return d.header }
func (d *discard) WriteHeader(int)     {}
func (d *discard) FlushError() error   { return nil }
func (d *discard) Write(p []byte) (int, error) {
	d.bytes += int64(len(p))
	return len(p), nil
}

func TestALineOfAnyLengthTakesNoMemory(t *testing.T) {
	size := 100 << 20
	if raceEnabled {
		size = 10 << 20
	}
	h := provision(t, &caddysse.Handler{Heartbeat: &caddysse.Heartbeat{Interval: caddy.Duration(time.Hour)}})
	for _, opening := range []string{"data: ", "", ":", "id: ", "event: ", "retry: 1", " ", "\xEF\xBB"} {
		d := &discard{header: make(http.Header)}
		chunk := bytes.Repeat([]byte("x"), 64<<10)
		var before, after runtime.MemStats
		err := h.ServeHTTP(d, prepared(d), stream(func(w http.ResponseWriter) {
			write(t, w, opening)
			runtime.ReadMemStats(&before)
			for range size / len(chunk) {
				_, _ = w.Write(chunk)
			}
			runtime.ReadMemStats(&after)
		}))
		if err != nil {
			t.Fatal(err)
		}
		if d.bytes != int64(size+len(opening)) {
			t.Errorf("%q: %d bytes arrived, want %d", opening, d.bytes, size)
		}
		// Other goroutines of the tests allocate too.
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
			t.Errorf("%q: %d bytes were allocated", opening, grown)
		}
	}
}

func TestJSONIsUntouchedFromItsFirstByteOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, v := range variants {
			h := v.handler(t)
			for _, text := range []string{"{}", "[1]", "{\n\n\"a\":1}\n\n", "[\n\n1\n\n,\n\n]\n\n"} {
				c := play(t, h, func(w http.ResponseWriter) {
					for i := range len(text) {
						write(t, w, text[i:i+1])
						quiet(due)
					}
					quiet(time.Hour)
				})
				if got := c.body.String(); got != text {
					t.Errorf("%v: got %q, want %q", v, got, text)
				}
				for _, space := range []string{" ", "\n", "\r\n \t", "\uFEFF", "\uFEFF\n\n"} {
					c := play(t, h, func(w http.ResponseWriter) {
						write(t, w, space+text)
						quiet(time.Hour)
					})
					if got := c.body.String(); got != space+text {
						t.Errorf("%v: got %q, want %q", v, got, space+text)
					}
				}
			}
		}
	})
}

func TestTheFuzzCorpusIsCommitted(t *testing.T) {
	for _, target := range []string{"FuzzEquivalence", "FuzzCaddyfile"} {
		files, err := filepath.Glob(filepath.Join("testdata", "fuzz", target, "*"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: %d files, %v", target, len(files), err)
		}
		for _, file := range files {
			if text, err := os.ReadFile(file); err != nil || !bytes.HasPrefix(text, []byte("go test fuzz v1\n")) {
				t.Errorf("%s: %q, %v", file, text, err)
			}
		}
	}
}
