package eventstream

import "bytes"

// scanPiece bounds how much the scanner gets at a time: it searches all of that
// for line ends, and is called again for each block. Without a limit, the work
// for many blocks in one piece would be quadratic.
const scanPiece = 1 << 10

// ScanBlock follows p up to the next event boundary, the LF of its CR included,
// and returns how many bytes that is. It is for callers that keep the body in
// blocks and may start to read at any of them. p is not empty.
//
// done is true if the block is complete: what follows does not belong to it. It
// is false if a CR at the end of p may still be followed by its LF. If the next p
// then begins with another byte, the block was complete without it: see
// [Scanner.PendingCR].
//
// idAt is where an id line for the block must go, as the last line before its
// blank line; -1 if it dispatches no event, or if the upstream has ids of its
// own.
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

// AppendID appends the line for the place that [Splicer.ScanBlock] returned. It
// uses the last line ending of which the scanner is certain, which can't merge
// with the bytes around it: it is a CR only if the line before ended in a CR and
// the next byte is another one.
func (s *Splicer) AppendID(dst, id []byte) []byte {
	dst = append(dst, "id: "...)
	dst = append(dst, id...)
	return append(dst, s.scan.LineEnding().Text()...)
}

// AtBoundary reports whether the stream is at an event boundary, also after a
// CR whose LF may still come.
func (s *Splicer) AtBoundary() bool { return s.scan.Place().isBoundary() }

// TakeInvalidUTF8 reports whether the body since the last call contains invalid
// UTF-8. It is for event boundaries: a line has ended there, so no sequence can
// be incomplete.
func (s *Splicer) TakeInvalidUTF8() bool {
	invalid := s.scan.utf8.invalid || s.scan.utf8.length > 0
	s.scan.utf8 = utf8Checker{}
	return invalid
}

// TakeCommit reports whether an id has been committed since the last call, even
// if it is the same as before: see [Scanner.LastEventID].
func (s *Splicer) TakeCommit() bool {
	isNew := s.scan.id.isNew
	s.scan.id.isNew = false
	return isNew
}

// PassBlocks is [Splicer.Splice] for whole blocks that have been followed before
// by [Splicer.ScanBlock]: the stream is at an event boundary before p and after
// it, no byte order mark must be dropped, and no LF is pending. It does not scan
// them, except for how the last line ends. p is not empty; events is how many of
// the blocks dispatch one, and invalid whether they contain invalid UTF-8.
//
// A client ignores a byte order mark only at the start. In the middle of a body
// it is not a byte order mark, so if a client's stream starts there, a comment
// goes before it.
func (s *Splicer) PassBlocks(f *Frames, p []byte, events uint64, invalid bool) (lead []byte) {
	s.scan.passed(p, events, invalid)
	if s.owed != nil {
		lead = s.appendOwed(f, nil)
	}
	if !s.spoken && len(lead) == 0 && bytes.HasPrefix(p, []byte(bom)) {
		lead = append(lead, ':')
		lead = append(lead, s.scan.lineEnding.Text()...)
	}
	s.bomChecked, s.spoken, s.overdue = true, true, false
	return lead
}
