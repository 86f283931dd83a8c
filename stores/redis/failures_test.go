package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

const ttl = time.Minute

func newKey() (key store.Key) {
	_, _ = rand.Read(key[:])
	return key
}

// within returns the context for a call that must not take longer than d.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// write writes one event, and starts its run if the event is the first.
func write(t testing.TB, s store.Store, run store.Key, n uint64) error {
	w := store.Write{Run: run, Events: []store.Event{{Number: n, Data: fmt.Appendf(nil, "event %d", n)}}, TTL: ttl}
	if n == 1 {
		w.Begin = []byte("begin")
	}
	return errors.Join(s.Write(within(t, 5*time.Second), []store.Write{w})...)
}

// eventually retries until something succeeds.
func eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func TestAServerMayComeLaterThanCaddy(t *testing.T) {
	s := startServer(t)
	s.stop()
	began := time.Now()
	opened := s.open(t)
	defer opened.Close()
	if took := time.Since(began); took > time.Second {
		t.Errorf("Open took %v", took)
	}
	if err := write(t, opened, newKey(), 1); err == nil {
		t.Error("a write succeeds without a server")
	}
	reading := make(chan error, 1)
	run := newKey()
	go func() {
		_, _, err := opened.Read(t.Context(), run, 0, 1, patience)
		reading <- err
	}()
	if err := <-reading; err == nil || errors.Is(err, store.ErrUnknown) {
		t.Errorf("a read without a server: %v", err)
	}
	s.start()
	eventually(t, "a write when the server is there", func() error { return write(t, opened, run, 1) })
	if messages, err := opened.Receive(within(t, patience), "node", 0); err != nil || messages != nil {
		t.Errorf("a receipt returns %q, %v", messages, err)
	}
}

func TestWhatIsKeptOutlivesARestart(t *testing.T) {
	s := startServer(t)
	a, b := s.open(t), s.open(t)
	defer a.Close()
	defer b.Close()
	run := newKey()
	if err := write(t, a, run, 1); err != nil {
		t.Fatal(err)
	}
	// A reader that waits either keeps waiting or is told that the server is
	// away. Either way it then gets the events that follow.
	got := make(chan []store.Event, 1)
	go func() {
		for {
			events, _, err := b.Read(t.Context(), run, 1, 1<<20, patience)
			if len(events) > 0 || t.Context().Err() != nil {
				got <- events
				return
			}
			if err != nil {
				time.Sleep(20 * time.Millisecond)
			}
		}
	}()
	for restart := range uint64(2) {
		s.stop()
		s.start()
		n := restart + 2
		eventually(t, "a write after a restart", func() error { return write(t, a, run, n) })
	}
	select {
	case events := <-got:
		if events[0].Number != 2 {
			t.Errorf("the reader got event %d", events[0].Number)
		}
	case <-time.After(patience):
		t.Fatal("the reader has got nothing")
	}
	eventually(t, "a look after a restart", func() error {
		found, err := b.Find(within(t, patience), run)
		if err == nil && found.Last != 3 {
			t.Fatalf("there are %d events", found.Last)
		}
		return err
	})
}

func TestAFullServerRefusesEventsAndLetsItsNodesLive(t *testing.T) {
	s := startServer(t, "--maxmemory", "0", "--maxmemory-policy", "noeviction")
	opened := s.open(t)
	defer opened.Close()
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	if err := opened.Renew(within(t, patience), "node", 2*time.Second); err != nil {
		t.Fatal(err)
	}
	s.do(t, "CONFIG", "SET", "maxmemory", "1")
	err := write(t, opened, run, 2)
	if err == nil || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), "OOM") {
		t.Errorf("a full server answers %v", err)
	}
	if err := opened.Renew(within(t, patience), "node", time.Minute); err != nil {
		t.Errorf("a lease is not renewed: %v", err)
	}
	events, _, err := opened.Read(within(t, patience), run, 0, 1<<20, 0)
	if err != nil || len(events) != 1 {
		t.Errorf("a full server returns %d events, %v", len(events), err)
	}
	s.do(t, "CONFIG", "SET", "maxmemory", "0")
	if err := write(t, opened, run, 2); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
}

func TestAServerThatHasLostEverythingDoesNotKnowTheRun(t *testing.T) {
	s := startServer(t)
	opened := s.open(t)
	defer opened.Close()
	run := newKey()
	for n := range uint64(3) {
		if err := write(t, opened, run, n+1); err != nil {
			t.Fatal(err)
		}
	}
	s.do(t, "FLUSHALL")
	s.do(t, "SCRIPT", "FLUSH")
	if err := write(t, opened, run, 4); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("a write of a run that is lost: %v", err)
	}
	other := newKey()
	if err := write(t, opened, other, 1); err != nil {
		t.Errorf("a new run: %v", err)
	}
	// This server has lost the newest events, as a replica may have.
	if err := write(t, opened, other, 3); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("a write after a gap: %v", err)
	}
}

// No message says that a run is gone after a server was flushed or a run's time
// is over.
func TestAReaderOfARunThatTheServerHasLostIsTold(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	opened := s.open(t)
	defer opened.Close()
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, _, err := opened.Read(t.Context(), run, 1, 1, patience)
		read <- err
	}()
	eventually(t, "it waits", func() error {
		if channels := s.do(t, "PUBSUB", "CHANNELS"); !strings.Contains(channels, run.String()) {
			return errors.New("not yet")
		}
		return nil
	})
	s.do(t, "FLUSHALL")
	if err := <-read; !errors.Is(err, store.ErrUnknown) {
		t.Errorf("it is told %v", err)
	}
}

func TestAWriteThatLacksWhatComesBeforeItLeavesNothing(t *testing.T) {
	s := startServer(t)
	opened := s.open(t)
	defer opened.Close()
	for what, w := range map[string]store.Write{
		"events before it": {Events: someEvents(3, 4)},
		"an event":         {After: 2},
	} {
		w.Run, w.Begin, w.TTL = newKey(), []byte("begin"), ttl
		if err := errors.Join(opened.Write(within(t, patience), []store.Write{w})...); !errors.Is(err, store.ErrUnknown) {
			t.Errorf("without %s: %v", what, err)
		}
		if keys := s.do(t, "KEYS", "*"+w.Run.String()+"*"); keys != "[]" {
			t.Errorf("without %s there is %s", what, keys)
		}
	}
}

func TestACallOfAServerThatHangsEndsInTime(t *testing.T) {
	s := startServer(t)
	opened := s.open(t)
	defer opened.Close()
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	s.pause()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	errs := opened.Write(ctx, []store.Write{{Run: run, Events: []store.Event{{Number: 2, Data: []byte("x")}}, TTL: ttl}})
	if len(errs) != 1 || errs[0] == nil || time.Since(began) > 5*time.Second {
		t.Errorf("a server that hangs: %v after %v", errs, time.Since(began))
	}
	s.resume()
	// The first attempt may have succeeded after all.
	eventually(t, "the same write", func() error { return write(t, opened, run, 2) })
	found, err := opened.Find(within(t, patience), run)
	if err != nil || found.Last != 2 {
		t.Errorf("there are %d events, %v", found.Last, err)
	}
}

func TestAHundredReadersShareTwoConnections(t *testing.T) {
	s := startServer(t)
	a, b := s.open(t), s.open(t)
	defer a.Close()
	defer b.Close()
	const runs = 100
	keys := make([]store.Key, runs)
	var wg sync.WaitGroup
	for i := range keys {
		keys[i] = newKey()
		if err := write(t, a, keys[i], 1); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			events, _, err := b.Read(t.Context(), keys[i], 1, 1<<20, patience)
			if err != nil || len(events) != 1 {
				t.Errorf("reader %d: %d events, %v", i, len(events), err)
			}
		})
	}
	eventually(t, "all wait", func() error {
		if channels := s.do(t, "PUBSUB", "CHANNELS"); strings.Count(channels, "sse:") < runs {
			return errors.New("not yet")
		}
		return nil
	})
	if n := strings.Count(s.do(t, "CLIENT", "LIST"), "name=caddy-sse"); n > 5 { // including the connection that asks
		t.Errorf("two nodes have %d connections", n)
	}
	for _, key := range keys {
		if err := write(t, a, key, 2); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
}

func TestAClosedStoreIsRefused(t *testing.T) {
	s := startServer(t)
	opened := s.open(t)
	if err := write(t, opened, newKey(), 1); err != nil {
		t.Fatal(err)
	}
	if err := opened.Close(); err != nil {
		t.Fatal(err)
	}
	if err := write(t, opened, newKey(), 1); !errors.Is(err, errClosed) {
		t.Errorf("a write after Close: %v", err)
	}
}
