package caddysse

import (
	"testing"
	"unsafe"
)

// By the time of their next write, most streams are no longer in the
// processor's caches, so each cache line that the write uses is fetched from
// memory.
func TestWhatAWriteUsesStandsTogether(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("the lines are those of 64 bits")
	}
	const cacheLine = 64
	var s stream
	// The last 16 bytes of the splicer are for rare bodies.
	end := unsafe.Offsetof(s.splicer) + unsafe.Sizeof(s.splicer) - 16
	if end > 3*cacheLine {
		t.Errorf("a write uses the first %d bytes of a stream, want at most %d", end, 3*cacheLine)
	}
	for field, offset := range map[string]uintptr{
		"w": unsafe.Offsetof(s.w), "frames": unsafe.Offsetof(s.frames), "arrived": unsafe.Offsetof(s.arrived),
		"lastHeard": unsafe.Offsetof(s.lastHeard), "lastBytes": unsafe.Offsetof(s.lastBytes), "moved": unsafe.Offsetof(s.moved),
		"longestGap": unsafe.Offsetof(s.longestGap), "bytes": unsafe.Offsetof(s.bytes), "wait": unsafe.Offsetof(s.wait),
		"stage": unsafe.Offsetof(s.stage), "failed": unsafe.Offsetof(s.failed), "gone": unsafe.Offsetof(s.gone),
	} {
		if offset > unsafe.Offsetof(s.splicer) {
			t.Errorf("%s stands after what a write uses", field)
		}
	}
	// For a feed that adds ids and has a client that keeps up.
	var f feed
	if end := unsafe.Offsetof(f.splicer) + unsafe.Sizeof(f.splicer) - 16; end > 3*cacheLine {
		t.Errorf("a write uses the first %d bytes of a feed, want at most %d", end, 3*cacheLine)
	}
	var r runReader
	if end := unsafe.Offsetof(r.cursor) + unsafe.Sizeof(r.cursor); end > cacheLine {
		t.Errorf("a write uses the first %d bytes of a reader, want at most %d", end, cacheLine)
	}
	var x exchange
	if end := unsafe.Offsetof(x.role); end >= cacheLine {
		t.Errorf("a write uses the first %d bytes of an exchange", end)
	}
}
