package journal

import (
	"testing"
	"unsafe"
)

// By the time of their next event, most journals are no longer in the
// processor's caches, so each cache line that the event uses is fetched from
// memory.
func TestWhatAnEventUsesStandsTogether(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("the lines are those of 64 bits")
	}
	const cacheLine = 64
	var (
		j Journal
		c chunk
		r Cursor
	)
	for name, end := range map[string]uintptr{
		"journal": unsafe.Offsetof(j.alone) + unsafe.Sizeof(j.alone),
		"chunk":   unsafe.Offsetof(c.next) + unsafe.Sizeof(c.next),
		"cursor":  unsafe.Offsetof(r.held) + unsafe.Sizeof(r.held),
	} {
		if end > 2*cacheLine {
			t.Errorf("an event uses the first %d bytes of a %s, want at most %d", end, name, 2*cacheLine)
		}
	}
	// The allocator aligns objects of such sizes to a cache line.
	for name, size := range map[string]uintptr{"chunk": unsafe.Sizeof(c), "cursor": unsafe.Sizeof(r)} {
		if size%cacheLine != 0 {
			t.Errorf("a %s has %d bytes, which is no multiple of %d", name, size, cacheLine)
		}
	}
}
