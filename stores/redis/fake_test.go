package redis

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/store"
)

// fakeServer answers as a test tells it to.
type fakeServer struct {
	t       testing.TB
	address string

	mu     sync.Mutex
	answer func(command []string) string // "": it closes the connection; nil: it never answers
	dials  int
	conns  []net.Conn
}

const silent = "silent" // no answer comes

// fine answers like a server that accepts everything and has no data.
func fine(command []string) string {
	switch command[0] {
	case "HELLO":
		return "*4\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n"
	case "EVALSHA":
		return ":1\r\n"
	case "SUBSCRIBE", "UNSUBSCRIBE":
		return fmt.Sprintf("*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:1\r\n", len(command[1]), command[1])
	}
	return "+OK\r\n"
}

// replica answers like a server that accepts no writes.
func replica(command []string) string {
	switch command[0] {
	case "HELLO":
		return "*2\r\n$4\r\nrole\r\n$7\r\nreplica\r\n"
	case "EVALSHA":
		return "-READONLY You can't write against a read only replica.\r\n"
	}
	return fine(command)
}

// except answers like fine, except for one command.
func except(name, answer string) func([]string) string {
	return func(command []string) string {
		if command[0] == name {
			return answer
		}
		return fine(command)
	}
}

func startFake(t testing.TB, answer func([]string) string) *fakeServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeServer{t: t, address: l.Addr().String(), answer: answer}
	var work sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		f.cut()
		work.Wait()
	})
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.dials++
			f.conns = append(f.conns, conn)
			f.mu.Unlock()
			work.Go(func() { f.serve(conn, answer == nil) })
		}
	})
	return f
}

func (f *fakeServer) serve(conn net.Conn, mute bool) {
	defer conn.Close()
	if mute {
		_, _ = io.Copy(io.Discard, conn)
		return
	}
	for in := bufio.NewReader(conn); ; {
		asked, err := readReply(in) // a command has the form of a reply
		if err != nil {
			return
		}
		command, err := texts(asked)
		if err != nil {
			return
		}
		f.mu.Lock()
		answer := f.answer(command)
		f.mu.Unlock()
		switch answer {
		case "":
			return
		case silent:
			continue
		}
		if _, err := conn.Write([]byte(answer)); err != nil {
			return
		}
	}
}

// turn changes how the server answers.
func (f *fakeServer) turn(answer func([]string) string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

// cut closes all connections.
func (f *fakeServer) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, conn := range f.conns {
		conn.Close()
	}
	f.conns = nil
}

func (f *fakeServer) dialled() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// openAt opens a store on servers.
func openAt(t testing.TB, addresses ...string) store.Store {
	t.Helper()
	r := &Redis{Address: addresses, Prefix: defaultPrefix}
	if err := r.prepare(); err != nil {
		t.Fatal(err)
	}
	opened, err := r.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = opened.Close() })
	return opened
}

func TestAServerThatTurnsIntoAReplicaIsLeftForTheOtherOne(t *testing.T) {
	t.Parallel()
	first, second := startFake(t, fine), startFake(t, replica)
	opened := openAt(t, first.address, second.address)
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	first.turn(replica)
	second.turn(fine)
	if err := write(t, opened, run, 2); err == nil || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), "READONLY") {
		t.Errorf("a replica answers %v", err)
	}
	eventually(t, "a write to the other one", func() error { return write(t, opened, run, 2) })
	// Notices must come from the second server, too.
	eventually(t, "a connection for calls and one for notices", func() error {
		second.mu.Lock()
		defer second.mu.Unlock()
		if len(second.conns) < 2 {
			return errors.New("there is none")
		}
		return nil
	})
}

func TestAReplicaAloneIsAServerThatIsAway(t *testing.T) {
	t.Parallel()
	f := startFake(t, replica)
	opened := openAt(t, f.address)
	if err := write(t, opened, newKey(), 1); !errors.Is(err, errReplica) {
		t.Errorf("a write: %v", err)
	}
	f.turn(fine)
	eventually(t, "a write when it has been promoted", func() error { return write(t, opened, newKey(), 1) })
}

func TestAServerThatIsNotReadyIsLeftForTheOtherOne(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"-LOADING Redis is loading the dataset in memory\r\n", "-MASTERDOWN Link with MASTER is down\r\n"} {
		first, second := startFake(t, except("PING", answer)), startFake(t, fine)
		if err := write(t, openAt(t, first.address, second.address), newKey(), 1); err != nil {
			t.Errorf("a write: %v", err)
		}
	}
}

func TestAProxyThatDoesNotKnowHelloIsUsed(t *testing.T) {
	t.Parallel()
	const unknown = "-ERR unknown command\r\n"
	for _, command := range []string{"HELLO", "CLIENT"} {
		f := startFake(t, except(command, unknown))
		if err := write(t, openAt(t, f.address), newKey(), 1); err != nil {
			t.Errorf("without %s: %v", command, err)
		}
	}
	// Such a proxy in front of a replica.
	mute := func(command []string) string {
		if command[0] == "HELLO" {
			return unknown
		}
		return replica(command)
	}
	first, second := startFake(t, mute), startFake(t, except("HELLO", unknown))
	opened := openAt(t, first.address, second.address)
	eventually(t, "a write to the other one", func() error { return write(t, opened, newKey(), 1) })
}

func TestAServerThatWantsAPasswordIsLeftForTheOtherOne(t *testing.T) {
	t.Parallel()
	first := startFake(t, func([]string) string { return "-NOAUTH Authentication required.\r\n" })
	if err := write(t, openAt(t, first.address, startFake(t, fine).address), newKey(), 1); err != nil {
		t.Errorf("a write: %v", err)
	}
}

func TestWhateverAServerRefusesIsToldAndTriedAgain(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"MOVED 866 127.0.0.1:1", "ASK 866 127.0.0.1:1", "CLUSTERDOWN down", "LOADING loading", "MASTERDOWN down", "READONLY replica", "OOM full", "MISCONF disk", "BUSY busy", "NOPERM no", "NOAUTH no", "NOREPLICAS no", "ERR what"} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			f := startFake(t, except("EVALSHA", "-"+code+"\r\n"))
			opened := openAt(t, f.address)
			run := newKey()
			if err := write(t, opened, run, 1); err == nil || errors.Is(err, store.ErrUnknown) || !strings.Contains(err.Error(), code) {
				t.Errorf("a write: %v", err)
			}
			if _, err := opened.Find(within(t, patience), run); err == nil || errors.Is(err, store.ErrUnknown) {
				t.Errorf("Find: %v", err)
			}
			f.turn(fine)
			eventually(t, "the same write", func() error { return write(t, opened, run, 1) })
		})
	}
}

func TestARefusalAmongManyIsThatOfItsRunAlone(t *testing.T) {
	t.Parallel()
	x, y, z := newKey(), newKey(), newKey()
	refused := make(map[string]bool)
	f := startFake(t, func(command []string) string {
		if key := command[len(command)-1]; command[0] == "EVALSHA" && (strings.Contains(key, "bad")) && !refused[key] {
			refused[key] = true
			return "-OOM no room\r\n"
		}
		return fine(command)
	})
	opened := openAt(t, f.address)
	var writes []store.Write
	for _, w := range []struct {
		run   store.Key
		event string
	}{{x, "good"}, {y, "bad"}, {z, "good"}, {y, "good"}, {x, "good"}} {
		writes = append(writes, store.Write{Run: w.run, Begin: []byte("x"), Events: []store.Event{{Number: 1, Data: []byte(w.event)}}, TTL: ttl})
	}
	errs := opened.Write(within(t, patience), writes)
	if len(errs) != len(writes) {
		t.Fatalf("there are %d errors", len(errs))
	}
	for i, err := range errs {
		if failed := writes[i].Run == y; failed != (err != nil) {
			t.Errorf("write %d: %v", i, err)
		}
	}
	if errs := opened.Write(within(t, patience), writes); errs != nil {
		t.Errorf("the same writes again: %v", errs)
	}
}

func TestWhatIsNoAnswerBreaksTheConnectionAndNotTheStore(t *testing.T) {
	t.Parallel()
	for what, answer := range map[string]string{
		"nothing":         "",
		"half an answer":  "$5\r\nab",
		"one too many":    ":1\r\n:1\r\n",
		"another version": "%1\r\n+a\r\n+b\r\n",
		"an empty error":  "-\r\n",
		"HTTP":            "HTTP/1.1 400 Bad Request\r\n\r\n",
		"a huge text":     "$9223372036854775807\r\n",
		"a huge list":     "*67108864\r\n" + strings.Repeat(":1\r\n", 1000),
	} {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			t.Parallel()
			f := startFake(t, except("EVALSHA", answer))
			opened := openAt(t, f.address)
			run := newKey()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			first := errors.Join(opened.Write(ctx, []store.Write{{Run: run, Begin: []byte("x"), TTL: ttl}})...)
			if errors.Is(first, store.ErrUnknown) || first == nil && what != "one too many" {
				t.Errorf("a write: %v", first)
			}
			f.turn(fine)
			f.cut() // with half an answer, a connection lasts for connPatience
			eventually(t, "the same write", func() error { return write(t, opened, run, 1) })
		})
	}
}

func TestAServerThatLoadsItsDataAgainIsLeftForTheOtherOne(t *testing.T) {
	t.Parallel()
	loading := func([]string) string { return "-LOADING Redis is loading the dataset in memory\r\n" }
	first, second := startFake(t, fine), startFake(t, replica)
	opened := openAt(t, first.address, second.address)
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	first.turn(loading) // as a replica that loads everything from the other server
	second.turn(fine)
	eventually(t, "a write to the other one", func() error { return write(t, opened, run, 2) })
}

func TestAnAnswerOfAnotherKindSaysNothingOfRunsAndNodes(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"+OK\r\n", "$-1\r\n", ":7\r\n", "*0\r\n", "$1\r\n0\r\n"} {
		f := startFake(t, func(command []string) string {
			if command[0] == "EVALSHA" || command[0] == "EXISTS" {
				return answer
			}
			return fine(command)
		})
		opened := openAt(t, f.address)
		if err := write(t, opened, newKey(), 1); err == nil || errors.Is(err, store.ErrUnknown) {
			t.Errorf("%q: a write: %v", answer, err)
		}
		if lives, err := opened.Lives(within(t, patience), "node"); err == nil {
			t.Errorf("%q: a node lives: %v", answer, lives)
		}
	}
}

// A server that has no room for another connection says so before it gets a
// command, and closes the connection.
func TestWhyAServerTakesNoConnectionIsTold(t *testing.T) {
	t.Parallel()
	for _, why := range []string{"ERR max number of clients reached", "DENIED Redis is running in protected mode"} {
		for _, r := range []*Redis{{}, {Password: "secret"}} {
			said := false
			f := startFake(t, func([]string) string {
				if said {
					return ""
				}
				said = true
				return "-" + why + "\r\n"
			})
			c, err := r.dial(t.Context(), f.address)
			if err == nil {
				c.fail(errClosed)
			}
			if err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%q: %v", why, err)
			}
		}
	}
}

func TestAServerThatNeverAnswersIsLeftForTheOtherOne(t *testing.T) {
	t.Parallel()
	first, second := startFake(t, nil), startFake(t, fine)
	began := time.Now()
	c, err := new(Redis).dial(t.Context(), first.address, second.address)
	if err != nil || time.Since(began) < dialPatience {
		t.Fatalf("after %v: %v", time.Since(began), err)
	}
	c.fail(errClosed)
}

func TestAHandshakeThatDoesNotEndIsGivenUp(t *testing.T) {
	t.Parallel()
	f := startFake(t, nil)
	r := &Redis{secured: &tls.Config{InsecureSkipVerify: true}}
	began := time.Now()
	if _, err := r.dial(t.Context(), f.address); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) < dialPatience {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

func TestAServerThatBreaksEveryConnectionIsNotFlooded(t *testing.T) {
	t.Parallel()
	f := startFake(t, except("EVALSHA", ""))
	opened := openAt(t, f.address)
	const span = 2 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), span)
	defer cancel()
	var work sync.WaitGroup
	for range 50 {
		work.Go(func() {
			for ctx.Err() == nil {
				if _, err := opened.Find(ctx, newKey()); err == nil {
					t.Error("a run is found")
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	work.Wait()
	// At least half of each pause is certain: 1/8 s, 1/4 s, 1/2 s, 1 s. One
	// connection more is for notices.
	if n := f.dialled(); n < 3 || n > 6 {
		t.Errorf("it was dialled %d times in %v", n, span)
	}
}

func TestCloseDoesNotWaitForAServerAndLeavesNothingRunning(t *testing.T) {
	for what, answer := range map[string]func([]string) string{
		"that is silent from the start": nil,
		"that is silent":                except("EVALSHA", silent),
		"that answers":                  fine,
	} {
		f := startFake(t, answer)
		opened := openAt(t, f.address)
		failed := make(chan error, 2)
		go func() {
			_, err := opened.Find(t.Context(), newKey())
			failed <- err
		}()
		go func() {
			_, _, err := opened.Read(t.Context(), newKey(), 1, 1, patience)
			failed <- err
		}()
		eventually(t, "it is dialled twice", func() error {
			if f.dialled() < 2 {
				return errors.New("not yet")
			}
			return nil
		})
		began := time.Now()
		_ = opened.Close()
		if took := time.Since(began); took > dialPatience/2 {
			t.Errorf("a server %s: Close took %v", what, took)
		}
		for range 2 {
			if err := <-failed; err == nil {
				t.Errorf("a server %s: a call succeeds", what)
			}
		}
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for stack := range strings.SplitSeq(string(stacks), "\n\n") {
			if strings.Contains(stack, "redis.(*conn") || strings.Contains(stack, "redis.(*notices)") {
				t.Errorf("a server %s: after Close there is\n%s", what, stack)
			}
		}
	}
}

func TestAUserThatIsRemovedIsRefusedUntilItIsBack(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	user := []string{"ACL", "SETUSER", "caddy", "on", ">secret", "~sse:*", "&sse:*", "+@all"}
	s.do(t, user...)
	r := &Redis{Address: []string{s.address}, Prefix: defaultPrefix, Username: "caddy", Password: "secret"}
	opened := newRedisStore(r)
	defer opened.Close()
	run := newKey()
	if err := write(t, opened, run, 1); err != nil {
		t.Fatal(err)
	}
	s.do(t, "ACL", "DELUSER", "caddy")
	eventually(t, "it is told that nobody is of that name", func() error {
		err := write(t, opened, run, 2)
		if errors.Is(err, store.ErrUnknown) {
			t.Fatal(err)
		}
		if err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
			return fmt.Errorf("%w, not yet", err)
		}
		return nil
	})
	s.do(t, user...)
	eventually(t, "the same write", func() error { return write(t, opened, run, 2) })
}
