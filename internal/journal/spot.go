package journal

// Spot is the place that a reader of a ring has reached, for later queries. Any
// goroutine may use it.
type Spot struct {
	cursor *Cursor // nil: no place yet
	chunk  *chunk
	offset int64
	number uint64
	given  bool // the reader has been given an id that was in force before it
}

// Number is how many events come before the spot, Since how many came before the
// place where the reader began.
func (s Spot) Number() uint64 { return s.number }
func (s Spot) Since() uint64 {
	if s.cursor == nil {
		return 0
	}
	return s.cursor.begin.Number
}

// ID is the upstream's id in force there, as shown to others. ok is false if the
// reader has been given none.
func (s Spot) ID() (id string, ok bool) {
	if s.cursor == nil {
		return "", false
	}
	s.cursor.j.mu.Lock()
	defer s.cursor.j.mu.Unlock()
	m := s.chunk.idAt(s.offset)
	if m.offset <= s.cursor.beginAt && !s.given {
		return "", false
	}
	if m.told != "" {
		return m.told, true
	}
	return m.id, true
}
