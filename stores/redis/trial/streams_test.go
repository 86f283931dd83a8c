package trial

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// source is an upstream that counts. Each request gets its own incarnation,
// whose events contain its number and their own.
type source struct {
	*httptest.Server
	every  func() time.Duration
	events int // of each answer; 0: no end

	mu    sync.Mutex
	calls map[int64]*incarnation
	last  atomic.Int64
}

// incarnation is one answer of the source.
type incarnation struct {
	node  string
	begun time.Time

	mu    sync.Mutex
	sent  []time.Time // when event i+1 was sent
	ended time.Time
}

func newSource(t testing.TB, events int, every func() time.Duration) *source {
	s := &source{events: events, every: every, calls: make(map[int64]*incarnation)}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *source) host() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *source) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number := s.last.Add(1)
	call := &incarnation{node: r.Header.Get("X-Node"), begun: time.Now()}
	s.mu.Lock()
	s.calls[number] = call
	s.mu.Unlock()
	defer func() {
		call.mu.Lock()
		call.ended = time.Now()
		call.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(200)
	for n := 1; s.events == 0 || n <= s.events; n++ {
		select {
		case <-time.After(s.every()):
		case <-r.Context().Done():
			return
		}
		done := ""
		if n == s.events {
			done = " done"
		}
		call.mu.Lock()
		call.sent = append(call.sent, time.Now())
		call.mu.Unlock()
		fmt.Fprintf(w, "data: %d %d %d%s\n\n", number, n, time.Now().UnixNano(), done)
		if http.NewResponseController(w).Flush() != nil {
			return
		}
	}
}

func (s *source) call(number int64) *incarnation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[number]
}

// message is one event as a client receives it.
type message struct {
	event, id, data string
	hasID           bool
}

// stream is the client's side of one response.
type stream struct {
	res    *http.Response
	cancel context.CancelFunc
	r      *bufio.Reader
}

// request sends a request as an EventSource does.
func request(ctx context.Context, client *http.Client, method, url, host, lastID string) (*stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	req.Host = host
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Cache-Control", "no-cache")
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	res, err := client.Do(req)
	if err != nil {
		cancel()
		return nil, err
	}
	return &stream{res: res, cancel: cancel, r: bufio.NewReader(res.Body)}, nil
}

func (s *stream) close() {
	s.cancel()
	s.res.Body.Close()
}

// next reads up to the next blank line and returns what came, even an id
// without data.
func (s *stream) next() (m message, err error) {
	for {
		line, err := s.r.ReadString('\n')
		if err != nil {
			return message{}, err
		}
		line = strings.TrimSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "":
			if line == "" && m != (message{}) {
				return m, nil
			}
		case "event":
			m.event = value
		case "data":
			m.data += value
		case "id":
			m.id, m.hasID = value, true
		}
	}
}

// tab is a client that comes back and checks what it receives.
type tab struct {
	url, host string
	client    *http.Client

	lastID string // as an EventSource has it

	incarnation int64  // 0: none yet
	seen        int    // the last number
	brought     string // the id that it sent
	ids         bool   // the events had ids
	done        bool
	lost        bool // it was told that its events are lost
	resumed     int  // how often it has continued where it was

	turn func() // called before the next stream begins; may be nil
}

// take checks one event.
func (c *tab) take(m message) error {
	if m.hasID {
		c.lastID = m.id
	}
	if m.event == "lost" {
		var missed int
		if n, _ := fmt.Sscanf(m.data, `{"reason":"history","events":%d}`, &missed); n == 1 {
			c.seen += missed
			return nil
		}
		c.lost = true
		return nil
	}
	if m.data == "" {
		return nil
	}
	var incarnation, at int64
	var number int
	if n, _ := fmt.Sscanf(m.data, "%d %d %d", &incarnation, &number, &at); n != 3 {
		return fmt.Errorf("an event that nobody has sent: %+v", m)
	}
	if incarnation != c.incarnation {
		// Without ids, a client can't be told that it has lost something.
		if c.ids && !c.lost && !c.done {
			return fmt.Errorf("after event %d of stream %d comes event %d of stream %d, and nothing was told; it came with the id %q", c.seen, c.incarnation, number, incarnation, c.brought)
		}
		if c.turn != nil && c.incarnation != 0 {
			c.turn()
		}
		c.incarnation, c.seen, c.ids, c.done = incarnation, 0, false, false
	}
	c.lost = false
	if number != c.seen+1 {
		return fmt.Errorf("stream %d: after event %d comes event %d", incarnation, c.seen, number)
	}
	c.seen, c.ids = number, c.ids || m.id != ""
	c.done = strings.HasSuffix(m.data, " done")
	return nil
}

// visit connects once, and reads until ctx or the response ends.
func (c *tab) visit(ctx context.Context) error {
	c.brought = c.lastID
	s, err := request(ctx, c.client, "GET", c.url, c.host, c.lastID)
	if err != nil {
		return nil // it comes back
	}
	defer s.close()
	if s.res.StatusCode != 200 {
		_, _ = io.Copy(io.Discard, s.res.Body)
		return nil
	}
	before := c.incarnation
	for first := true; ; {
		m, err := s.next()
		if err != nil {
			return nil
		}
		if err := c.take(m); err != nil {
			return err
		}
		if first && m.data != "" {
			first = false
			if before != 0 && before == c.incarnation {
				c.resumed++
			}
		}
	}
}
