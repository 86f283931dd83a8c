package eventstream

import "time"

// Splicer decides which bytes the client of an event stream gets: those of the
// upstream's body, and those that are inserted. It has no lock, no clock and no
// I/O. The caller must write its bytes in the order in which it returns them.
//
// A client that parses by the HTML Standard, section 9.2.6, sees the events, IDs
// and reconnection times of the body, and what was inserted on request. Without
// requests, it gets the body byte for byte. Only two things of the body may be
// left out: a byte order mark, which must not follow anything, and the LF of a
// CRLF if the client has it already. Only the beginning of such a mark may be
// held back.
//
// The zero value is ready for the first byte. Like a [Scanner], it must not be
// copied after first use, nor used by two goroutines at a time.
type Splicer struct {
	owed *owed // nil: nothing

	bomHeld    uint8 // how much of a byte order mark has arrived and was not sent
	bomChecked bool  // the body can't begin with a byte order mark any more
	lfOwed     bool  // the client must not get the LF of the upstream's last CR
	spoken     bool  // the client has been sent something
	resumed    bool  // the body is not the first one
	overdue    bool  // a heartbeat was due where none is allowed

	scan Scanner // last, because a write uses its first fields
}

// owed is what must be sent before anything else.
type owed struct {
	retry time.Duration // 0: none
	lead  []byte
}

// Scanner is the scanner of the body. Callers may query it, but must not feed it.
func (s *Splicer) Scanner() *Scanner { return &s.scan }

// Spoken reports whether the client has been sent anything.
func (s *Splicer) Spoken() bool { return s.spoken }

// Overdue reports whether a heartbeat was due where none is allowed, and the
// client has been sent nothing since.
func (s *Splicer) Overdue() bool { return s.overdue }

// Opaque reports whether the body has turned out to be JSON (see
// [Scanner.LooksLikeJSON]). From then on its bytes are passed on untouched, with
// nothing in between.
func (s *Splicer) Opaque() bool { return s.scan.LooksLikeJSON() }

// HasOwnIDs reports whether the upstream has sent an id field, even an empty
// one. One that clients ignore, because of a NUL, does not count.
func (s *Splicer) HasOwnIDs() bool { return s.scan.hasID() }

// OweRetry makes the client get a reconnection time before anything else. It is
// sent with whatever comes first: the upstream's bytes (unless they are JSON), a
// heartbeat or a block. It must be called before any of these.
func (s *Splicer) OweRetry(d time.Duration) {
	s.owe().retry = d
}

// OweLead makes the client get text, whole blocks with LF, before anything else
// except the reconnection time. It is sent together with that, and kept until
// then.
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
// for them: first lead, which is usually nil, then body, which is p or a part of
// it. Both can be empty.
func (s *Splicer) Splice(f *Frames, p []byte) (lead, body []byte) {
	s.scan.Scan(p)
	return s.follow(f, p)
}

// SpliceToEnd is [Splicer.Splice] for a stream that is to end early. It takes p
// only up to the next place where an end harms no event and splits no CRLF, and
// returns how many bytes that is. done is true if the stream may end after lead
// and body; the rest of p must then not be sent. It may be true while
// [Splicer.MayEnd] is false, if the rest of p shows that no LF follows a CR.
func (s *Splicer) SpliceToEnd(f *Frames, p []byte) (lead, body []byte, n int, done bool) {
	_, n, done = s.scanToEnd(p)
	lead, body = s.follow(f, p[:n])
	return lead, body, n, done || s.MayEnd()
}

// scanToEnd follows p up to the next event boundary, and returns how many bytes
// that is: up to the boundary, and with the LF of its CR, because some clients
// wait for both. certain is true if it is known that no LF follows.
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

// appendOwed appends what must be sent first, and what was held back as the
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

// Rest returns what the client gets when the body has ended, usually nil: the
// bytes that were held back as the beginning of a byte order mark.
func (s *Splicer) Rest(f *Frames) []byte {
	if s.bomHeld == 0 {
		return nil
	}
	return s.appendOwed(f, nil)
}

// MayEnd reports whether an end here harms no event and splits no CRLF.
func (s *Splicer) MayEnd() bool {
	if s.Opaque() {
		return true
	}
	return s.scan.Place().isBoundary() && !s.isTorn()
}

// isTorn reports whether the client has the CR of a possible CRLF, but not its
// LF.
func (s *Splicer) isTorn() bool {
	return s.scan.PendingCR() && s.scan.LineEnding() != CR && !s.lfOwed
}

// MayResume reports whether another body may follow here: at an event boundary
// of an event stream.
func (s *Splicer) MayResume() bool {
	return !s.Opaque() && s.scan.Place().isBoundary()
}

// Resume says that the body has broken off, and that the next byte is the first
// one of another body with which the upstream continues. For the client it is
// still one stream: IDs, reconnection times and counts continue, and a byte order
// mark at the start of the new body is dropped. It appends to dst what the client
// gets for the end of the old body: the LF of a CRLF that was split.
// [Splicer.MayResume] must be true.
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

// Frame appends a heartbeat to send now, with everything that must go before it.
// If none is allowed here, ok is false, and nothing is appended; the heartbeat is
// then overdue, unless the stream is opaque.
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
		eol = CRLF.Text() // because the LF that now goes before the frame completes one
	}
	if s.scan.PendingCR() && ending == CR {
		// An LF would become part of the CR that ends the frame.
		s.lfOwed = false
	} else {
		dst = s.endCR(dst)
	}
	s.spoken, s.overdue = true, false
	return f.heartbeat(dst, place, eol), true
}

// Block appends text, whole blocks of our own with LF, to send now, with
// everything that must go before them. [Splicer.MayEnd] must be true.
func (s *Splicer) Block(f *Frames, dst, text []byte) []byte {
	dst = s.appendOwed(f, dst)
	dst = s.endCR(dst)
	s.spoken, s.overdue = true, false
	return append(dst, text...)
}

// endCR is called before something is inserted. If the upstream's last byte was a
// CR, its LF may still come, and after the insertion it would be a blank line. So
// the client gets that LF first, and the upstream's is dropped. If lines end in
// CR, no LF is sent, but one that comes is still dropped.
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
