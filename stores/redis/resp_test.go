package redis

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRepliesAreReadAsTheServerMeansThem(t *testing.T) {
	for text, want := range map[string]any{
		"+OK\r\n":                       "OK",
		":-12\r\n":                      int64(-12),
		"$-1\r\n":                       nil,
		"*-1\r\n":                       nil,
		"$0\r\n\r\n":                    "",
		"$4\r\na\r\nb\r\n":              "a\r\nb",
		"-OOM no room\r\n":              replyError("OOM no room"),
		"*0\r\n":                        []any(nil),
		"*2\r\n:1\r\n*1\r\n$1\r\nx\r\n": []any{int64(1), []any{"x"}},
		// The modules in the answer to HELLO are nested lists.
		"*1\r\n*1\r\n*1\r\n*1\r\n$1\r\nx\r\n": []any{[]any{[]any{[]any{"x"}}}},
	} {
		got, err := readReply(bufio.NewReader(strings.NewReader(text)))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %#v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "OK\r\n", "+OK", "-\r\n", "$1\r\nabc", "*1\r\n$70000000\r\n", strings.Repeat("*1000000\r\n", 3), "+OK\n", "\r\n", "$x\r\n", "$-2\r\n", "$5\r\nabc", "$99999999999\r\n", "*2\r\n:1\r\n",
		strings.Repeat("*1\r\n", 1000), "HTTP/1.1 400 Bad Request\r\n",
	} {
		if got, err := readReply(bufio.NewReader(strings.NewReader(text))); err == nil {
			t.Errorf("%q is read as %#v", text, got)
		}
	}
}

// pipe returns a connection to a server that the test plays.
func pipe(t *testing.T) (*conn, net.Conn) {
	ours, theirs := net.Pipe()
	c := newConn(ours)
	t.Cleanup(func() { c.fail(errClosed); theirs.Close() })
	go c.send()
	go c.receive()
	return c, theirs
}

func TestACallerThatHasLeftDoesNotGetTheNextOnesReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := pipe(t)
		asked := make(chan struct{}, 2)
		go func() {
			in := bufio.NewReader(server)
			for {
				if _, err := readReply(in); err != nil { // a command has the form of a reply
					return
				}
				asked <- struct{}{}
			}
		}()
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, err := c.do(ctx, []string{"FIRST"})
			left <- err
		}()
		<-asked
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("who leaves gets %v", err)
		}
		answer := make(chan any, 1)
		go func() {
			replies, err := c.do(t.Context(), []string{"SECOND"})
			if err != nil {
				t.Error(err)
			}
			answer <- replies[0]
		}()
		<-asked
		if _, err := server.Write([]byte("+first\r\n+second\r\n")); err != nil {
			t.Fatal(err)
		}
		if got := <-answer; got != "second" {
			t.Errorf("the second call gets %q", got)
		}
	})
}

func TestAServerThatOwesRepliesIsLeftInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := pipe(t)
		go func() {
			in := bufio.NewReader(server)
			for {
				if _, err := readReply(in); err != nil {
					return
				}
			}
		}()
		time.Sleep(10 * connPatience) // no answer is pending
		if err := c.failure(); err != nil {
			t.Fatalf("a quiet connection is given up: %v", err)
		}
		began := time.Now()
		_, err := c.do(t.Context(), []string{"PING"})
		if took := time.Since(began); err == nil || took != connPatience {
			t.Errorf("given up after %v: %v", took, err)
		}
		if _, err := c.do(t.Context(), []string{"PING"}); err == nil {
			t.Error("the connection is used again")
		}
	})
}

func TestACallOfNothingWaitsForNoReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := pipe(t)
		if replies, err := c.do(t.Context()); replies != nil || err != nil {
			t.Errorf("got %v, %v", replies, err)
		}
		if len(c.pending) > 0 {
			t.Error("a reply is waited for")
		}
	})
}

func TestAListIsBoundedWhateverItHolds(t *testing.T) {
	text := "*60000000\r\n" + strings.Repeat(":1\r\n", largestReply/elementCost+1)
	if _, err := readReply(bufio.NewReader(strings.NewReader(text))); !errors.Is(err, errProtocol) {
		t.Errorf("a list that costs more than a reply may: %v", err)
	}
}

func TestACallOfAServerThatDoesNotReadHeedsItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := pipe(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := c.do(ctx, []string{"SET", strings.Repeat("x", 1<<20)}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		// The amount of unsent data is limited, and so is the time.
		var err error
		for range mostUnsent>>20 + 2 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			_, err = c.do(ctx, []string{"SET", strings.Repeat("x", 1<<20)})
		}
		if !errors.Is(err, errBehind) {
			t.Errorf("with %d bytes that wait: %v", mostUnsent, err)
		}
		<-c.broken
		if took := time.Since(began); took != connPatience {
			t.Errorf("it was given up after %v: %v", took, c.failure())
		}
	})
}

func TestAServerThatAnswersTooSlowlyDoesNotOweMoreAndMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := pipe(t)
		go func() { _, _ = io.Copy(io.Discard, server) }()
		over, cancel := context.WithCancel(t.Context())
		cancel()
		var err error
		for range mostPending + 1 {
			if _, err = c.do(over, []string{"PING"}); errors.Is(err, errBehind) {
				break
			}
		}
		if !errors.Is(err, errBehind) || len(c.pending) != mostPending {
			t.Errorf("it owes %d answers: %v", len(c.pending), err)
		}
		// After it has answered one command, it may get another.
		if _, err := server.Write([]byte("+PONG\r\n")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := c.do(over, []string{"PING"}); !errors.Is(err, context.Canceled) {
			t.Errorf("then: %v", err)
		}
	})
}

func TestAConnectionIsGivenUpAtOnceThoughItsServerReadsNothing(t *testing.T) {
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	makeCertificate(t, certificate, key)
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		go func() {
			_ = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{pair}, SessionTicketsDisabled: true}).Handshake()
		}()
		secured := tls.Client(near, &tls.Config{InsecureSkipVerify: true})
		if err := secured.Handshake(); err != nil {
			t.Fatal(err)
		}
		c := newConn(secured)
		began := time.Now()
		c.fail(errClosed) // all calls wait until it returns
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
	})
}

func TestWhatIsAskedWhileSomethingIsWrittenGoesOutTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := pipe(t)
		for range 3 {
			go func() { _, _ = c.do(t.Context(), []string{"PING"}) }()
			synctest.Wait()
		}
		sizes, piece := []int(nil), make([]byte, 1000)
		for range 2 {
			n, err := server.Read(piece)
			if err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, n)
		}
		if one := len("*1\r\n$4\r\nPING\r\n"); sizes[0] != one || sizes[1] != 2*one {
			t.Errorf("writes of %d bytes", sizes)
		}
	})
}
