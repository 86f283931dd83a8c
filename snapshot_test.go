package caddysse_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// shownStream is a stream as a snapshot shows it.
type shownStream map[string]any

// shownSnapshot is a snapshot as a client sees it.
type shownSnapshot struct {
	At             time.Time
	Seconds        float64
	Totals, Deltas shownFigures
	Names          []struct {
		Name string
		shownFigures
	}
	Matching int
	Streams  []shownStream
}

type shownFigures struct {
	Open, Opened, Events, Bytes, Heartbeats int
	Closed                                  map[string]int
}

// observe returns a function that takes the next snapshot.
func observe(t testing.TB, query string) func() shownSnapshot {
	t.Helper()
	snapshot, err := caddysse.Observe(query)
	if err != nil {
		t.Fatal(err)
	}
	return func() (shown shownSnapshot) {
		t.Helper()
		if err := json.Unmarshal(snapshot(), &shown); err != nil {
			t.Fatal(err)
		}
		return shown
	}
}

// writeOnce opens a stream without a network, and returns after its handler has
// written to it.
func writeOnce(t testing.TB, h *caddysse.Handler, r *http.Request, text string) (end func()) {
	t.Helper()
	written, over := make(chan struct{}), make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		w := &discard{header: make(http.Header)}
		if err := h.ServeHTTP(w, r, stream(func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(text))
			close(written)
			<-over
		})); err != nil {
			t.Error(err)
		}
	})
	<-written
	end = sync.OnceFunc(func() { close(over); running.Wait() })
	t.Cleanup(end)
	return end
}

func TestASnapshotTellsWhatHasGoneBySinceTheOneBefore(t *testing.T) {
	one := provision(t, &caddysse.Handler{Name: "snapshot one", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	two := provision(t, &caddysse.Handler{Name: "snapshot two", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	w := &discard{header: make(http.Header)}
	all, ofOne := observe(t, ""), observe(t, "name=snapshot+one")
	nothing, ofTwo := observe(t, "name=snapshot+one")(), observe(t, "name=snapshot+two")().Totals
	writeOnce(t, one, prepared(w), "data: 1\n\n")
	first := ofOne()
	if first.Seconds != 0 || first.Deltas.Open != 0 || first.Deltas.Opened != 0 || first.Deltas.Events != 0 || first.Deltas.Bytes != 0 {
		t.Errorf("the first one tells %+v in %v s", first.Deltas, first.Seconds)
	}
	if then := nothing.Totals; first.Totals.Open-then.Open != 1 || first.Totals.Events-then.Events != 1 || first.Totals.Bytes-then.Bytes != 9 || first.Matching != 1 {
		t.Errorf("the totals are %+v, %d streams match", first.Totals, first.Matching)
	}
	before := all()

	time.Sleep(2 * time.Millisecond) // times in a snapshot are in milliseconds
	end := writeOnce(t, one, prepared(w), "data: 22\n\ndata: 3\n\n")
	writeOnce(t, two, prepared(w), "data: 4\n\n")
	end()
	second, after := ofOne(), all()
	if second.Seconds <= 0 || second.At.Before(first.At) {
		t.Errorf("%v s, from %v to %v", second.Seconds, first.At, second.At)
	}
	for name, figures := range map[string]struct{ got, want shownFigures }{
		"the deltas of one name": {second.Deltas, shownFigures{Opened: 1, Events: 2, Bytes: 19, Closed: map[string]int{"upstream_closed": 1}}},
		"the deltas of all":      {after.Deltas, shownFigures{Open: 1, Opened: 2, Events: 3, Bytes: 28, Closed: map[string]int{"upstream_closed": 1}}},
	} {
		for reason, n := range figures.got.Closed {
			if n != figures.want.Closed[reason] {
				t.Errorf("%s: %d closed as %s", name, n, reason)
			}
		}
		figures.got.Closed, figures.want.Closed = nil, nil
		if !reflect.DeepEqual(figures.got, figures.want) {
			t.Errorf("%s: got %+v, want %+v", name, figures.got, figures.want)
		}
	}
	if got := after.Totals.Open - before.Totals.Open; got != 1 {
		t.Errorf("%d more are open", got)
	}
	sum := 0
	for _, name := range second.Names {
		if sum += name.Open; name.Name == "snapshot two" && (name.Open != 1 || name.Events-ofTwo.Events != 1) {
			t.Errorf("of the other name: %+v", name)
		}
	}
	if sum != after.Totals.Open {
		t.Errorf("the names have %d open, all of them %d", sum, after.Totals.Open)
	}
}

func TestTheTotalsOfSnapshotsNeverGoBackwards(t *testing.T) {
	h := provision(t, &caddysse.Handler{Name: "storm of snapshots", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	stop := writers(t, h, 2)
	defer stop()
	next := observe(t, "name=storm+of+snapshots&sort=bytes")
	before := next()
	for deadline := time.Now().Add(patience); before.Totals.Open < 2; before = next() {
		if time.Now().After(deadline) {
			t.Fatalf("the totals are %+v", before.Totals)
		}
	}
	for range 30 {
		w := &discard{header: make(http.Header)}
		writeOnce(t, h, prepared(w), "data: 1\n\n")()
		after := next()
		if after.Totals.Events < before.Totals.Events || after.Totals.Bytes < before.Totals.Bytes || after.Deltas.Opened != 1 || after.Deltas.Closed["upstream_closed"] != 1 {
			t.Fatalf("%+v\nafter %+v\ndeltas %+v", after.Totals, before.Totals, after.Deltas)
		}
		before = after
	}
}

// sortedBy reports whether streams are in the order of a key, as the contract
// defines it: largest, longest, newest first, text from A to Z.
func sortedBy(key string, streams []shownStream) bool {
	return slices.IsSortedFunc(streams, func(a, b shownStream) int {
		switch value := a[key].(type) {
		case float64:
			return cmp.Compare(b[key].(float64), value)
		case bool:
			return cmp.Compare(fmt.Sprint(b[key]), fmt.Sprint(value))
		case string:
			if key == "opened_at" {
				one, _ := time.Parse(time.RFC3339Nano, value)
				other, _ := time.Parse(time.RFC3339Nano, b[key].(string))
				return other.Compare(one)
			}
			return cmp.Compare(value, b[key].(string))
		}
		panic("a key that there is not: " + key)
	})
}

func TestASnapshotIsSortedByAnyKeyOfAStream(t *testing.T) {
	h := provision(t, &caddysse.Handler{Name: "sorted", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	const streams, shown = 300, 200
	for i := range streams {
		w := &discard{header: make(http.Header)}
		r := prepared(w)
		r.Host = fmt.Sprintf("host%d.example", rand.IntN(50))
		r.Header.Set("User-Agent", fmt.Sprintf("agent/%d", rand.IntN(50)))
		if rand.IntN(2) == 0 {
			r.Header.Del("Accept")
		}
		r.ProtoMajor = 1 + i%3
		writeOnce(t, h, r, fmt.Sprintf("id: %d\n%s", rand.IntN(50), strings.Repeat("data: 1\n\n", 1+rand.IntN(50))))
	}
	keys := caddysse.SortKeys()
	for _, key := range keys {
		// In this order, because ages grow between snapshots.
		backward := observe(t, "name=sorted&sort=-"+key)()
		forward := observe(t, "name=sorted&sort="+key)()
		for _, s := range []shownSnapshot{forward, backward} {
			if s.Matching != streams || len(s.Streams) != shown {
				t.Errorf("%s: %d of %d are shown", key, len(s.Streams), s.Matching)
			}
		}
		if !sortedBy(key, forward.Streams) {
			t.Errorf("%s is not sorted: %v", key, values(key, forward.Streams))
		}
		first, last := forward.Streams[0][key], backward.Streams[0][key]
		slices.Reverse(backward.Streams)
		if !sortedBy(key, backward.Streams) {
			t.Errorf("-%s is not sorted: %v", key, values(key, backward.Streams))
		}
		// The first and the last stream are those of all streams, not only of
		// those shown.
		if both := append(forward.Streams[:1:1], backward.Streams[shown-1]); !sortedBy(key, both) {
			t.Errorf("%s: from %v to %v", key, first, last)
		}
	}
	listed := observe(t, "name=sorted")().Streams
	if len(listed) != shown || !sortedBy("duration_seconds", listed) {
		t.Errorf("without an order: %v", values("opened_at", listed))
	}
	for key := range listed[0] {
		if !slices.Contains(keys, key) {
			t.Errorf("streams can't be sorted by %s", key)
		}
	}
	if len(keys) != len(listed[0]) {
		t.Errorf("streams can be sorted by %q, and have %d keys", keys, len(listed[0]))
	}
}

func values(key string, streams []shownStream) (values []any) {
	for _, s := range streams {
		values = append(values, s[key])
	}
	return values
}

func TestStreamsThatAreEqualStayInPlace(t *testing.T) {
	h := provision(t, &caddysse.Handler{Name: "equal", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	quietStreams(t, h, 250)
	next := observe(t, "name=equal&sort=events")
	first := values("id", next().Streams)
	for range 3 {
		if again := values("id", next().Streams); !reflect.DeepEqual(again, first) {
			t.Fatalf("first %v\nthen  %v", first, again)
		}
	}
}

func TestASnapshotOfTenThousandStreamsMakesNoReportOfThoseItDoesNotShow(t *testing.T) {
	streams := 10_000
	if testing.Short() || raceEnabled {
		streams = 1000
	}
	h := provision(t, &caddysse.Handler{Name: "many", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	quietStreams(t, h, streams)
	allocsOf := func(query string) float64 {
		snapshot, err := caddysse.Observe(query)
		if err != nil {
			t.Fatal(err)
		}
		snapshot() // this allocates what later ones reuse
		return testing.AllocsPerRun(3, func() { snapshot() })
	}
	// The totals of names that earlier tests have left need some allocations
	// too.
	others := allocsOf("name=nobody")
	for _, query := range []string{"name=many", "name=many&sort=bytes", "name=many&sort=path", "name=many&sort=user_agent&path=/"} {
		// Each stream that is shown needs some for its texts and times.
		const each = 30
		if allocs := allocsOf(query) - others; !raceEnabled && allocs > each*200 {
			t.Errorf("%s: %v allocations", query, allocs)
		}
	}
}

// BenchmarkSnapshot measures a snapshot of 10,000 streams. With one snapshot a
// second, 20 ms are 2 % of a core.
func BenchmarkSnapshot(b *testing.B) {
	h := provision(b, &caddysse.Handler{Name: "snapshot", Heartbeat: &caddysse.Heartbeat{Interval: -1}})
	quietStreams(b, h, 10_000)
	for _, query := range []string{"", "sort=-opened_at", "sort=bytes", "sort=path", "sort=last_event_id", "sort=id", "path=/&client_ip=192.0.2.1"} {
		b.Run(query, func(b *testing.B) {
			snapshot, err := caddysse.Observe(query)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				snapshot()
			}
		})
	}
}
