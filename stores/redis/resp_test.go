package redis

import (
	"bufio"
	"context"
	"errors"
	"net"
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
	} {
		got, err := readReply(bufio.NewReader(strings.NewReader(text)))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %#v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "OK\r\n", "+OK", "+OK\n", "\r\n", "$x\r\n", "$-2\r\n", "$5\r\nabc", "$99999999999\r\n", "*2\r\n:1\r\n",
		strings.Repeat("*1\r\n", 1000), "HTTP/1.1 400 Bad Request\r\n",
	} {
		if got, err := readReply(bufio.NewReader(strings.NewReader(text))); err == nil {
			t.Errorf("%q is read as %#v", text, got)
		}
	}
}

// pipe is a connection to a server that the test plays.
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
		time.Sleep(10 * connPatience) // it owes nothing
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
