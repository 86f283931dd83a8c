//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/caddy-sse/caddy-sse/internal/eventstream/eventstreamtest"
)

func TestAVisitorReadsAStreamAsTheStandardSays(t *testing.T) {
	for _, body := range eventstreamtest.Bodies() {
		if !utf8.ValidString(body.Text) {
			continue // what a browser makes of that is not looked at
		}
		want := eventstreamtest.Parse([]byte(body.Text))
		m := messages{from: bufio.NewReader(strings.NewReader(body.Text))}
		var got []eventstreamtest.Event
		for {
			event, err := m.next()
			if err != nil {
				break
			}
			name := event.name
			if name == "" {
				name = "message"
			}
			got = append(got, eventstreamtest.Event{Type: name, Data: event.data, LastEventID: event.id})
		}
		if len(got) != len(want.Events) {
			t.Errorf("%s: %d events, want %d", body.Name, len(got), len(want.Events))
			continue
		}
		for i := range got {
			if got[i] != want.Events[i] {
				t.Errorf("%s: event %d is %.200q, want %.200q", body.Name, i, got[i], want.Events[i])
			}
		}
	}
}

func TestAFollowerFindsWhatIsWrong(t *testing.T) {
	const token = "sse1-AbCdEfGhIjKlMnOpQrStUg"
	greeting := message{name: "sse", id: token + ".0"}
	number := func(n int) message { return message{number: n, id: fmt.Sprintf("%s.%d", token, n)} }
	for name, test := range map[string]struct {
		events []message
		wrong  bool
	}{
		"all":           {[]message{greeting, number(1), number(2)}, false},
		"twice":         {[]message{greeting, number(1), number(1)}, true},
		"a gap":         {[]message{greeting, number(1), number(3)}, true},
		"lost":          {[]message{greeting, number(1), {name: "lost", data: `{"reason":"unknown"}`}}, true},
		"another id":    {[]message{greeting, {number: 1, id: token + ".2"}}, true},
		"another run":   {[]message{greeting, {number: 1, id: "sse1-BbCdEfGhIjKlMnOpQrStUg.1"}}, true},
		"greeted again": {[]message{greeting, number(1), greeting}, true},
	} {
		var f follower
		var err error
		for _, event := range test.events {
			if err == nil {
				err = f.take(event)
			}
		}
		if (err != nil) != test.wrong {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// answering accepts connections and answers each with a text, then waits.
func answering(t *testing.T, text string) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, text)
				_, _ = conn.Read(make([]byte, 1))
			}()
		}
	}()
	return listener.Addr().String()
}

func TestAHopCutsWhereItIsTold(t *testing.T) {
	const text = "HTTP/1.1 200 OK\r\n\r\nevent: sse\ndata:\nid: sse1-AbCdEfGhIjKlMnOpQrStUg.0\n\ndata: 1\n\n"
	first := strings.Index(text, "data: 1")
	addr := answering(t, text)
	for _, test := range []struct {
		c    cut
		want int
	}{
		{cut{bytes: 0}, 0},
		{cut{bytes: 7, gone: time.Millisecond}, 7},
		{cut{bytes: 0, afterID: true}, first},
		{cut{bytes: 3, afterID: true}, first + 3},
	} {
		c, err := readCut(test.c.String())
		if err != nil || c != test.c {
			t.Fatalf("%v is read as %v, %v", test.c, c, err)
		}
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		client, err := new(net.Dialer).DialContext(context.Background(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		near, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		far, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		go c.pass(near.(*net.TCPConn), near, far.(*net.TCPConn))
		got, err := io.ReadAll(client)
		if len(got) != test.want || !strings.HasPrefix(text, string(got)) {
			t.Errorf("%+v: %q, %v", test.c, got, err)
		}
	}
}

func TestTriesAreReadByTheirResult(t *testing.T) {
	const text = "caddy_sse_upstream_retries_total{name=\"a\",result=\"failed\"} 2\n" +
		"caddy_sse_upstream_retries_total{name=\"b\",result=\"failed\"} 3\ncaddy_sse_upstream_retries_total{name=\"a\",result=\"resumed\"} 1\nother{result=\"failed\"} 9\n"
	if got := metricByLabel(text, "caddy_sse_upstream_retries_total", "result"); got != "failed 5, resumed 1" {
		t.Error(got)
	}
}
