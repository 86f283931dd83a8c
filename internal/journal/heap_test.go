package journal

import (
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
)

// raceEnabled reports whether the race detector is on, which makes this test
// ten times slower.
var raceEnabled = func() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}()

// heapInUse returns the size of reachable memory.
func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // this empties pools
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// busyJournal is a journal whose reader keeps up, with some pauses.
type busyJournal struct {
	j *Journal
	c *Cursor
}

// event appends one event, and reads what there is if reads is true.
func (b *busyJournal) event(t *testing.T, text []byte, id string, reads bool) {
	if _, err := b.j.Append(text); err != nil {
		t.Fatal(err)
	}
	b.j.Commit(Block{Event: true, SetsID: id != "", ID: id})
	b.j.Publish()
	for reads {
		p, err := b.c.Next()
		if err != nil {
			t.Fatal(err)
		}
		if len(p) == 0 {
			return
		}
		b.c.Advance(len(p))
	}
}

// Ten million events pass through journals of both kinds, large and small, with
// ids and without. Readers come and go, and runs end and begin.
func TestTenMillionEventsDoNotMakeTheHeapGrow(t *testing.T) {
	events, ids := 10_000_000, 4096
	if testing.Short() || raceEnabled {
		events /= 20
	}
	// Ids and texts are made once, because their memory must not count.
	names := make([]string, ids)
	for i := range names {
		names[i] = strings.Repeat("i", 1+i%20) + string(rune('a'+i%26)) + string(rune('0'+i%10))
	}
	texts := [][]byte{[]byte(event(1, 20)), []byte(event(1, 200)), []byte(event(1, 3000))}
	for _, test := range []struct {
		name   string
		policy Policy
		total  int
	}{
		{"rings", KeepNewest, plenty},
		{"rings that fight for room", KeepNewest, 512 << 10},
		{"backlogs", KeepUnsent, plenty},
		{"backlogs that fight for room", KeepUnsent, 512 << 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			budget := NewBudget(test.policy, test.total)
			begin := func() *busyJournal {
				// No helpers with t: what t keeps would count as growth.
				j := budget.Open(64<<10, "", nil)
				if j == nil {
					return nil // without room, no run begins
				}
				c, ok := j.Join(After(0), nil)
				if !ok {
					t.Fatal("nobody can join")
				}
				return &busyJournal{j: j, c: c}
			}
			const journals = 16
			var all [journals]*busyJournal
			for i := range all {
				all[i] = begin()
			}
			var before uint64
			for n := range events / 4 {
				i := n % journals
				id := ""
				if test.policy == KeepNewest && i%2 == 0 {
					id = names[n/journals%ids]
				}
				text := texts[0]
				switch {
				case n%97 == 0:
					text = texts[2]
				case n%5 == 0:
					text = texts[1]
				}
				all[i].event(t, text, id, true)
				switch {
				case n%10_007 == 0: // a run ends, and another one begins
					if next := begin(); next != nil {
						all[i].c.Leave()
						all[i].j.Close(nil)
						all[i].j.Discard()
						all[i] = next
					}
				case n%1_009 == 0: // a client comes back
					all[i].c.Leave()
					c, ok := all[i].j.Join(After(all[i].j.Figures().Events), nil)
					if !ok {
						t.Fatal("its place is unknown")
					}
					all[i].c = c
				}
				if n == events/40 {
					before = heapInUse()
				}
			}
			after := heapInUse()
			used, _ := budget.Used()
			for _, b := range all {
				b.c.Leave()
				b.j.Discard()
			}
			left := heapInUse()
			t.Logf("%d events: %d KiB of heap after a tenth of them, %d KiB after all, %d KiB without the journals, which held %d KiB",
				events/4, before>>10, after>>10, left>>10, used>>10)
			if after > before+256<<10 {
				t.Errorf("the heap has grown from %d KiB to %d KiB", before>>10, after>>10)
			}
			if rest, _ := budget.Used(); rest != 0 {
				t.Errorf("%d bytes are still counted", rest)
			}
		})
	}
}

func TestAReaderThatHasLeftIsLetGo(t *testing.T) {
	j := NewBudget(KeepNewest, 1<<20).Open(64<<10, "", nil)
	gone := make(chan struct{})
	func() {
		held := new([64]byte)
		runtime.AddCleanup(held, func(struct{}) { close(gone) }, struct{}{})
		first, _ := j.Join(Live(), func() { held[0] = 1 })
		_, _ = j.Join(Live(), nil)
		first.Leave()
	}()
	for range 100 {
		runtime.GC()
		select {
		case <-gone:
			runtime.KeepAlive(j)
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Error("the journal still holds it")
	runtime.KeepAlive(j)
}
