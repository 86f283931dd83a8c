//go:build linux

package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// script is what the upstream sends on one stream. The upstream and the client
// make the same one of its seed, so nothing has to be told between them.
type script struct {
	pieces []piece
	// broken: the upstream breaks off after the last piece.
	broken bool
	// lingers: the upstream makes a pause of more than a second inside an event,
	// which the module does not wait for when it ends a stream.
	lingers bool
}

// piece is written at once, after a pause.
type piece struct {
	pause time.Duration
	text  string
}

func (s script) text() string {
	var b strings.Builder
	for _, p := range s.pieces {
		b.WriteString(p.text)
	}
	return b.String()
}

// newScript draws a body that breaks the habits of parsers, and when its bytes
// come. It takes about 15 seconds.
func newScript(seed uint64) script {
	r := rand.New(rand.NewPCG(seed, 1))
	var s script
	s.broken = r.IntN(20) == 0
	slow := r.IntN(50) == 0
	finished := true // the last block's event
	// "": another one for each line
	ending := []string{"\n", "\n", "\r\n", "\r", ""}[r.IntN(5)]
	for i := range 1 + r.IntN(30) {
		text := newBlock(r, ending)
		if i == 0 && r.IntN(8) == 0 {
			text = "\uFEFF" + text
		}
		silence := time.Duration(r.ExpFloat64() * float64(700*time.Millisecond))
		if r.IntN(40) == 0 {
			silence += 4 * time.Second
		}
		if i == 0 && r.IntN(2) == 0 {
			silence = 0
		}
		if !finished { // only one that lingers is silent inside an event
			silence = min(silence, 100*time.Millisecond)
		}
		finished = strings.HasSuffix(text, "\n\n") || strings.HasSuffix(text, "\r\r") || strings.HasSuffix(text, "\r\n\r\n")
		for first := true; text != ""; first = false {
			n := len(text)
			if r.IntN(3) == 0 {
				n = 1 + r.IntN(n)
			}
			next := piece{text: text[:n]}
			switch {
			case first:
				next.pause = silence
			case slow && r.IntN(4) == 0:
				next.pause = 1500 * time.Millisecond
				s.lingers = true
			default:
				next.pause = time.Duration(r.IntN(100)) * time.Millisecond
			}
			text = text[n:]
			s.pieces = append(s.pieces, next)
		}
	}
	return s
}

var words = []string{"a", "event", "data:", ":", " ", "日本語", "é", "😀", "\t", "0", "\x00", "\xFF", "{", "\uFEFF", "id: 1", "retry"}

// bodies are those of the tests for the parser, the largest left out.
var bodies = sync.OnceValue(func() (texts []string) {
	for _, body := range eventstreamtest.Bodies() {
		if len(body.Text) < 4000 {
			texts = append(texts, body.Text)
		}
	}
	return texts
})

// newBlock draws lines, most often a complete event.
func newBlock(r *rand.Rand, ending string) string {
	if r.IntN(12) == 0 {
		return bodies()[r.IntN(len(bodies()))]
	}
	var b strings.Builder
	line := func(name, value string) {
		b.WriteString(name + value)
		if ending != "" {
			b.WriteString(ending)
		} else {
			b.WriteString([]string{"\n", "\r\n", "\r"}[r.IntN(3)])
		}
	}
	for range r.IntN(4) {
		switch r.IntN(6) {
		case 0:
			line(":", newText(r))
		case 1:
			line("id:", newText(r))
		case 2:
			line("event: ", newText(r))
		case 3:
			line("retry: ", fmt.Sprint(r.IntN(100000)))
		case 4:
			line(newText(r), newText(r))
		case 5:
			line("id", "")
		}
	}
	for range 1 + r.IntN(3) {
		text := newText(r)
		if r.IntN(200) == 0 {
			text = strings.Repeat(text+" ", 5000)
		}
		line("data: ", text)
	}
	if r.IntN(10) != 0 {
		line("", "")
	}
	return b.String()
}

func newText(r *rand.Rand) string {
	var b strings.Builder
	for range 1 + r.IntN(12) {
		b.WriteString(words[r.IntN(len(words))])
	}
	return b.String()
}

// floodEvent is the i-th event of an upstream that never waits.
func floodEvent(i int) string {
	return fmt.Sprintf("id: %d\ndata: %s\n\n", i, strings.Repeat("flood ", 2700))
}

// floodLength is the number of events of a flood: 64 MB, much more than the
// buffers between the upstream and a client that does not read.
const floodLength = 4000
