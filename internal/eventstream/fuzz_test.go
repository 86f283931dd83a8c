package eventstream

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

// FuzzScanner cuts a body into pieces as the seed says, and compares the
// scanner's answers at each cut with those of the oracle.
func FuzzScanner(f *testing.F) {
	for i, body := range eventstreamtest.Bodies() {
		f.Add([]byte(body.Text), uint64(i))
	}
	f.Fuzz(func(t *testing.T, body []byte, seed uint64) {
		if len(body) > 8<<10 {
			t.Skip("the oracle's work grows with the square of the body")
		}
		cuts := rand.New(rand.NewPCG(seed, 0))
		var s Scanner
		for followed := 0; followed < len(body); {
			piece := body[followed : followed+1+cuts.IntN(min(64, len(body)-followed))]
			before := bytes.Clone(piece)
			if cuts.IntN(2) == 0 {
				s.Scan(piece)
				followed += len(piece)
			} else {
				n := s.ScanToBoundary(piece)
				for i := 1; i < n; i++ {
					if place, _ := placeBehind(body[:followed+i]); place.isBoundary() {
						t.Fatalf("ScanToBoundary(%q) passed a boundary %d bytes before it stopped", piece, n-i)
					}
				}
				if n < len(piece) && !s.Place().isBoundary() {
					t.Fatalf("ScanToBoundary(%q) stopped at byte %d, at no boundary", piece, n)
				}
				followed += n
			}
			if !bytes.Equal(piece, before) {
				t.Fatalf("%q became %q", before, piece)
			}
			checkAnswers(t, &s, oracle(body[:followed]), "after byte %d of %q", followed, body)
		}
	})
}
