package eventstream

import (
	"slices"
	"time"
)

// Splicer decides which bytes the client of an event stream gets: those of the
// upstream's body, and what is put between them. It has no lock, no clock and
// no I/O, and whoever writes its bytes does so in the order in which it gave
// them out.
//
// A client that parses by the HTML Standard, section 9.2.6, sees the events,
// IDs and reconnection times of the body, and what was asked for in addition. While
// nothing is asked for, it gets the body byte for byte. Of the body it can be
// denied a byte order mark, which must not follow anything, and the LF of a
// CRLF that it has already; it can have to wait for the beginning of such a
// mark, and for nothing else.
//
// The zero value is ready for the first byte. As a [Scanner], it must not be
// copied after first use, nor used by two goroutines at a time.
type Splicer struct {
	owed *owed // nil: nothing

	bomHeld    uint8 // how much of a byte order mark has come and not gone out
	bomChecked bool  // the body does not begin with a byte order mark any more
	lfOwed     bool  // the client must not get the LF of the upstream's last CR
	spoken     bool  // the client has got something
	resumed    bool  // the body is not the first one
	overdue    bool  // a heartbeat was due where none may go

	scan Scanner // last, as what a write uses of it is in front
}

// owed is what goes out before anything else.
type owed struct {
	retry time.Duration // 0: none
	lead  []byte
}

// Scanner is where the body is followed. It may be asked, and must not be fed.
func (s *Splicer) Scanner() *Scanner { return &s.scan }

// Spoken reports whether the client has got anything.
func (s *Splicer) Spoken() bool { return s.spoken }

// Overdue reports whether a heartbeat was due where none may go, and the client
// has got nothing since.
func (s *Splicer) Overdue() bool { return s.overdue }

// Opaque reports whether the body has turned out to be JSON (see
// [Scanner.LooksLikeJSON]). From then on, for good, its bytes are passed on
// untouched, with nothing between them.
func (s *Splicer) Opaque() bool { return s.scan.LooksLikeJSON() }

// HasOwnIDs reports whether the upstream has sent an id field, even an empty
// one. One that clients ignore, because of a NUL, does not count.
func (s *Splicer) HasOwnIDs() bool { return s.scan.hasID() }

// OweRetry has the client told a reconnection time, in milliseconds, before
// anything else. It goes out with whatever comes first: the upstream's bytes,
// but not those of JSON, a heartbeat or a block. It is called before that.
func (s *Splicer) OweRetry(d time.Duration) {
	s.owe().retry = d
}

// OweLead has the client get text, whole blocks with LF, before anything else
// but the reconnection time. It goes out when that does, and is kept until then.
func (s *Splicer) OweLead(text []byte) {
	s.owe().lead = text
}

func (s *Splicer) owe() *owed {
	if s.owed == nil {
		s.owed = new(owed)
	}
	return s.owed
}

// Splice takes the next bytes of the upstream and returns what the client gets
// for them: first lead, which is nil for most, then body, which is p or a part
// of it. Both can be empty.
func (s *Splicer) Splice(f *Frames, p []byte) (lead, body []byte) {
	s.scan.Scan(p)
	return s.follow(f, p)
}

// SpliceToEnd is [Splicer.Splice] for a stream that is to end early. It takes p
// only up to the next place where that harms no event and tears no CRLF apart,
// and says how many bytes that is. done is true if the stream may end after
// lead and body, and the rest of p is not for the client then. It is true, and
// [Splicer.MayEnd] false, where the rest shows that no LF follows a CR.
func (s *Splicer) SpliceToEnd(f *Frames, p []byte) (lead, body []byte, n int, done bool) {
	_, n, done = s.scanToEnd(p)
	lead, body = s.follow(f, p[:n])
	return lead, body, n, done || s.MayEnd()
}

// scanToEnd follows p up to the next event boundary, and returns how many bytes
// that is: up to the boundary, and with the LF of its CR, as some clients look
// for both. certain is true where it is known that no LF will come.
func (s *Splicer) scanToEnd(p []byte) (boundary, n int, certain bool) {
	if s.Opaque() {
		s.scan.Scan(p)
		return len(p), len(p), true
	}
	if !s.scan.PendingCR() || !s.scan.Place().isBoundary() {
		boundary = s.scan.ScanToBoundary(p)
	}
	if boundary == len(p) || !s.scan.PendingCR() {
		return boundary, boundary, false
	}
	if p[boundary] != '\n' {
		return boundary, boundary, true
	}
	s.scan.Scan(p[boundary : boundary+1])
	return boundary, boundary + 1, false
}

// AppendWithIDs is [Splicer.Splice] for an upstream that sends no ids: each
// block that dispatches an event gets an id line as its last one. It appends
// what the client gets to dst. id is called once for each such block, and
// appends the value of the field, which has no line end and no NUL.
//
// From the first id field of the upstream on, no id is added, nor in the block
// that has it: see [Splicer.HasOwnIDs].
func (s *Splicer) AppendWithIDs(f *Frames, dst, p []byte, id func(dst []byte) []byte) []byte {
	start := len(dst)
	// The scanner looks for line ends in all that it is given, and is called
	// anew for each block: without a limit, the work on a long p would grow
	// with its square.
	const limit = 1 << 10
	for len(p) > 0 {
		events := s.scan.Events()
		n := s.scan.ScanToBoundary(p[:min(len(p), limit)])
		dst = s.appendScanned(dst, p[:n], n, s.scan.Events() > events, id)
		p = p[n:]
	}
	return s.followAppended(f, dst, start)
}

// AppendWithIDsToEnd is to [Splicer.AppendWithIDs] what [Splicer.SpliceToEnd]
// is to [Splicer.Splice].
func (s *Splicer) AppendWithIDsToEnd(f *Frames, dst, p []byte, id func(dst []byte) []byte) (out []byte, n int, done bool) {
	start, events := len(dst), s.scan.Events()
	boundary, n, done := s.scanToEnd(p)
	dst = s.appendScanned(dst, p[:n], boundary, s.scan.Events() > events, id)
	dst = s.followAppended(f, dst, start)
	return dst, n, done || s.MayEnd()
}

// appendScanned appends p, which has been scanned. If it has an event, that was
// dispatched by the byte before boundary, the line end that makes a line blank,
// and the id line goes in front of this byte.
//
// The id line ends as the last line did of which the scanner is certain. No byte
// next to that is taken for a part of it: it is a CR only where the line before
// ended in a CR and the byte after it is another one.
func (s *Splicer) appendScanned(dst, p []byte, boundary int, event bool, id func(dst []byte) []byte) []byte {
	if !event || s.HasOwnIDs() || s.Opaque() {
		return append(dst, p...)
	}
	dst = append(dst, p[:boundary-1]...)
	dst = append(dst, "id: "...)
	dst = id(dst)
	dst = append(dst, s.scan.LineEnding().Text()...)
	return append(dst, p[boundary-1:]...)
}

// followAppended does to what was appended after start what follow does to the
// upstream's bytes. That looks at nothing after the first id line.
func (s *Splicer) followAppended(f *Frames, dst []byte, start int) []byte {
	lead, body := s.follow(f, dst[start:])
	return slices.Replace(dst, start, len(dst)-len(body), lead...)
}

// follow returns what the client gets for p, which has been scanned.
func (s *Splicer) follow(f *Frames, p []byte) (lead, body []byte) {
	if len(p) == 0 {
		return nil, nil
	}
	if s.lfOwed {
		s.lfOwed = false
		if p[0] == '\n' {
			p = p[1:]
		}
	}
	switch {
	case s.Opaque():
		s.owed = nil
		lead = s.appendOwed(f, nil)
	case !s.bomChecked || s.owed != nil:
		lead, p = s.begin(f, p)
	}
	if len(lead) > 0 || len(p) > 0 {
		s.spoken, s.overdue = true, false
	}
	return lead, p
}

// begin is follow for the first bytes of the body.
func (s *Splicer) begin(f *Frames, p []byte) (lead, body []byte) {
	if !s.bomChecked && (s.spoken || s.resumed || s.owed != nil) {
		for len(p) > 0 && int(s.bomHeld) < len(bom) && p[0] == bom[s.bomHeld] {
			s.bomHeld++
			p = p[1:]
		}
		switch {
		case int(s.bomHeld) == len(bom):
			s.bomHeld = 0
		case len(p) == 0:
			return nil, nil
		}
	}
	s.bomChecked = true
	if len(p) == 0 {
		return nil, nil
	}
	return s.appendOwed(f, nil), p
}

// appendOwed appends what goes before anything else, and what was held as the
// beginning of a byte order mark.
func (s *Splicer) appendOwed(f *Frames, dst []byte) []byte {
	if s.owed != nil {
		if s.owed.retry > 0 {
			dst = f.retry(dst, s.owed.retry, s.scan.LineEnding().Text())
		}
		dst = append(dst, s.owed.lead...)
		s.owed = nil
	}
	dst = append(dst, bom[:s.bomHeld]...)
	s.bomHeld = 0
	return dst
}

// Rest returns what the client gets when the body has ended, nil mostly: what
// was held of a byte order mark that did not become one.
func (s *Splicer) Rest(f *Frames) []byte {
	if s.bomHeld == 0 {
		return nil
	}
	return s.appendOwed(f, nil)
}

// MayEnd reports whether an end here harms no event and tears no CRLF apart.
func (s *Splicer) MayEnd() bool {
	if s.Opaque() {
		return true
	}
	return s.scan.Place().isBoundary() && !s.isTorn()
}

// isTorn reports whether the client has the CR of what may be a CRLF, and not
// its LF.
func (s *Splicer) isTorn() bool {
	return s.scan.PendingCR() && s.scan.LineEnding() != CR && !s.lfOwed
}

// MayResume reports whether another body may follow here: at an event boundary
// of an event stream.
func (s *Splicer) MayResume() bool {
	return !s.Opaque() && s.scan.Place().isBoundary()
}

// Resume says that the body has broken off, and that the next byte is the first
// one of another body with which the upstream goes on. The client has one stream
// all the same: IDs, reconnection times and counts go on, and a byte order mark
// at the start of the new body is dropped. It appends to dst what the client gets
// for the end of the old one: the LF of a CRLF that was torn apart. It is for
// where [Splicer.MayResume] is true.
func (s *Splicer) Resume(dst []byte) []byte {
	if s.isTorn() {
		dst = append(dst, '\n')
	}
	s.lfOwed = false
	s.bomChecked = false
	s.resumed = true
	s.scan.resume()
	return dst
}

// Frame appends a heartbeat, which goes out now, with all that must go before
// it. ok is false, and nothing is appended, where none may go: then it is
// overdue, unless the stream is opaque.
func (s *Splicer) Frame(f *Frames, dst []byte) (frame []byte, ok bool) {
	if s.Opaque() {
		return dst, false
	}
	place, ending := s.scan.Place(), s.scan.LineEnding()
	if !f.mayGo(place) {
		s.overdue = true
		return dst, false
	}
	dst = s.appendOwed(f, dst)
	eol := ending.Text()
	if s.scan.PendingCR() && ending == NoLineEnding {
		eol = CRLF.Text() // as the LF that now goes before the frame makes it one
	}
	if s.scan.PendingCR() && ending == CR {
		// An LF would join the CR that ends the frame.
		s.lfOwed = false
	} else {
		dst = s.endCR(dst)
	}
	s.spoken, s.overdue = true, false
	return f.heartbeat(dst, place, eol), true
}

// Block appends text, whole blocks of our own with LF, which go out now, with
// all that must go before them. It is for where [Splicer.MayEnd] is true.
func (s *Splicer) Block(f *Frames, dst, text []byte) []byte {
	dst = s.appendOwed(f, dst)
	dst = s.endCR(dst)
	s.spoken, s.overdue = true, false
	return append(dst, text...)
}

// endCR is called before something is put in. If the upstream's last byte was a
// CR, its LF may still come, and after what is put in it would be a blank line.
// So the client gets that LF first, and the upstream's is dropped. Where lines
// end in CR it gets none, and one that comes is dropped just the same.
func (s *Splicer) endCR(dst []byte) []byte {
	if !s.scan.PendingCR() {
		return dst
	}
	if !s.lfOwed && s.scan.LineEnding() != CR {
		dst = append(dst, '\n')
	}
	s.lfOwed = true
	return dst
}
