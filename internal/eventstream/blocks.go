package eventstream

// scanPiece bounds what the scanner looks through at a time: it looks for line
// ends in all that it is given, and is called anew for each block. Without a
// bound, the work on many blocks in one piece would grow with its square.
const scanPiece = 1 << 10

// ScanBlock follows p up to the next event boundary, the LF of its CR included,
// and returns how many bytes that is. It is for callers that keep the body
// in blocks and may start to read at any of them. p is not empty.
//
// done is true if the block is complete: what follows does not belong to it. It
// is false where a CR at the end of p may still get its LF. Where p then begins
// with another byte, the block was complete without it: see [Scanner.PendingCR].
//
// idAt is where a line with an id goes if the block is to have one, as the last
// one before its blank line; -1 where it dispatches no event, or where the
// upstream has ids of its own.
func (s *Splicer) ScanBlock(p []byte) (n, idAt int, done bool) {
	if s.scan.PendingCR() && s.scan.Place().isBoundary() && p[0] == '\n' {
		s.scan.Scan(p[:1])
		return 1, -1, true
	}
	events := s.scan.Events()
	for n < len(p) {
		n += s.scan.ScanToBoundary(p[n:min(len(p), n+scanPiece)])
		if s.scan.Place().isBoundary() {
			break
		}
	}
	if !s.scan.Place().isBoundary() {
		return n, -1, false
	}
	idAt = -1
	if s.scan.Events() > events && !s.HasOwnIDs() && !s.Opaque() {
		idAt = n - 1
	}
	switch {
	case n == len(p):
		return n, idAt, s.MayEnd()
	case s.scan.PendingCR() && p[n] == '\n':
		s.scan.Scan(p[n : n+1])
		n++
	}
	return n, idAt, true
}

// AppendID appends the line that [Splicer.ScanBlock] tells the place of. It ends
// as the last line did of which the scanner is certain. No byte next to that is
// taken for a part of it: it is a CR only where the line before ended in a CR
// and the byte after it is another one.
func (s *Splicer) AppendID(dst, id []byte) []byte {
	dst = append(dst, "id: "...)
	dst = append(dst, id...)
	return append(dst, s.scan.LineEnding().Text()...)
}

// AtBoundary reports whether the stream is at an event boundary, also after a
// CR whose LF may still come.
func (s *Splicer) AtBoundary() bool { return s.scan.Place().isBoundary() }
