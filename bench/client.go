//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// fleet are the clients of one system.
type fleet struct {
	addr string
	path string
	tls  bool // HTTP/2, a connection each

	mutex   sync.Mutex
	streams []*clientStream
	ended   func(*clientStream) // called when a stream has ended that was not closed here
}

// clientStream is one response, read by a goroutine of its own.
type clientStream struct {
	fleet *fleet
	conn  io.Closer
	body  body

	mutex     sync.Mutex
	counts    received
	latencies []uint32 // of the events since the last collection, in units of 100 ns
	closed    bool     // by us
}

// received is what arrived, and whether it was what was sent.
type received struct {
	Events, Heartbeats    int
	Corrupt, OutOfOrder   int
	CleanEnds, BrokenEnds int
	lastCount             int64
}

func (r *received) add(other received) {
	r.Events += other.Events
	r.Heartbeats += other.Heartbeats
	r.Corrupt += other.Corrupt
	r.OutOfOrder += other.OutOfOrder
	r.CleanEnds += other.CleanEnds
	r.BrokenEnds += other.BrokenEnds
}

func (r received) wrong() error {
	if r.Corrupt+r.OutOfOrder > 0 {
		return fmt.Errorf("received %d corrupt events, %d out of order", r.Corrupt, r.OutOfOrder)
	}
	return nil
}

// open adds one stream to the fleet.
func (f *fleet) open(ctx context.Context) error {
	if f.tls {
		return f.openTLS(ctx)
	}
	dialer := net.Dialer{Timeout: 30 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", f.addr)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(60 * time.Second))
	if _, err := io.WriteString(conn, "GET "+f.path+" HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"); err != nil {
		conn.Close()
		return err
	}
	buffer := make([]byte, 2048)
	read, end := 0, -1
	for end < 0 {
		n, err := conn.Read(buffer[read:])
		if err != nil {
			conn.Close()
			return fmt.Errorf("the response's header: %w", err)
		}
		read += n
		end = bytes.Index(buffer[:read], []byte("\r\n\r\n"))
	}
	head := bytes.ToLower(buffer[:end])
	if !bytes.HasPrefix(head, []byte("http/1.1 200 ")) || !bytes.Contains(head, []byte("transfer-encoding: chunked")) {
		conn.Close()
		return fmt.Errorf("answered %q", buffer[:end])
	}
	conn.SetDeadline(time.Time{})
	s := f.add(conn)
	rest := copy(buffer, buffer[end+4:read])
	go s.read(conn, s.body.feed, buffer, rest)
	return nil
}

// add registers a stream.
func (f *fleet) add(conn io.Closer) *clientStream {
	s := &clientStream{fleet: f, conn: conn}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.streams = append(f.streams, s)
	return s
}

// read reads a stream to its end. Its first n bytes are in the buffer already.
func (s *clientStream) read(from io.Reader, feed func(p []byte, each func(block []byte)) error, buffer []byte, n int) {
	for {
		s.mutex.Lock()
		err := feed(buffer[:n], s.note)
		s.mutex.Unlock()
		if err == nil {
			n, err = from.Read(buffer)
		}
		if err == nil {
			continue
		}
		s.end(err)
		return
	}
}

// end counts how a stream has ended.
func (s *clientStream) end(err error) {
	s.conn.Close()
	s.mutex.Lock()
	if !s.closed {
		if errors.Is(err, errBodyEnd) || errors.Is(err, io.EOF) && s.fleet.tls {
			s.counts.CleanEnds++
		} else {
			s.counts.BrokenEnds++
		}
	}
	tell := !s.closed && s.fleet.ended != nil
	s.mutex.Unlock()
	if tell {
		s.fleet.ended(s)
	}
}

// note takes one block of the stream, with its blank line.
func (s *clientStream) note(block []byte) {
	// A heartbeat can be a comment line with no blank line after it.
	for block[0] == ':' {
		s.counts.Heartbeats++
		end := bytes.IndexByte(block, '\n')
		if block = block[end+1:]; len(block) == 1 {
			return
		}
	}
	switch {
	case !isEvent(block):
		s.counts.Corrupt++
	default:
		sent := number(block[timeAt : timeAt+timeSize])
		count := number(block[countAt : countAt+countSize])
		if count != s.counts.lastCount+1 {
			s.counts.OutOfOrder++
		}
		s.counts.lastCount = count
		s.counts.Events++
		s.latencies = append(s.latencies, uint32(min((clock()-sent)/100, 1<<32-1)))
	}
}

// isEvent reports whether a block is one of the upstream's events. A shared
// stream adds an id to each.
func isEvent(block []byte) bool {
	if len(block) < eventSize || !bytes.HasPrefix(block, []byte("data: ")) {
		return false
	}
	added := block[eventSize-1:] // after the data line
	return len(block) == eventSize || bytes.HasPrefix(added, []byte("id: sse1-"))
}

func number(digits []byte) (n int64) {
	for _, digit := range digits {
		n = n*10 + int64(digit-'0')
	}
	return n
}

var errBodyEnd = errors.New("the body is complete")

// body parses chunks (RFC 9112, section 7.1), and the blocks of an event stream
// whose lines end in LF.
type body struct {
	left    int  // bytes of this chunk
	trailer int  // bytes of CRLF after a chunk that are still to come
	last    bool // the chunk of size 0 came
	size    []byte
	block   []byte // the beginning of one
}

func (b *body) feed(p []byte, each func(block []byte)) error {
	for len(p) > 0 {
		switch {
		case b.left > 0:
			n := min(b.left, len(p))
			b.content(p[:n], each)
			p = p[n:]
			if b.left -= n; b.left == 0 {
				b.trailer = 2
			}
		case b.trailer > 0:
			n := min(b.trailer, len(p))
			b.trailer -= n
			p = p[n:]
			if b.last && b.trailer == 0 {
				return errBodyEnd
			}
		default:
			end := bytes.IndexByte(p, '\n')
			if end < 0 {
				b.size = append(b.size, p...)
				return nil
			}
			b.size = append(b.size, p[:end]...)
			p = p[end+1:]
			digits, _, _ := bytes.Cut(b.size, []byte{';'}) // an extension may follow
			size, err := strconv.ParseUint(string(bytes.TrimSpace(digits)), 16, 31)
			if err != nil {
				return err
			}
			b.size = b.size[:0]
			b.left = int(size)
			if size == 0 {
				b.last, b.trailer = true, 2
			}
		}
	}
	return nil
}

func (b *body) content(p []byte, each func(block []byte)) {
	if len(b.block) > 0 {
		old := len(b.block)
		b.block = append(b.block, p...)
		end := bytes.Index(b.block[old-1:], []byte("\n\n"))
		if end < 0 {
			return
		}
		end += old - 1 + 2
		each(b.block[:end])
		p = p[end-old:]
		b.block = b.block[:0]
	}
	for len(p) > 0 {
		end := bytes.Index(p, []byte("\n\n"))
		if end < 0 {
			b.block = append(b.block, p...)
			return
		}
		each(p[:end+2])
		p = p[end+2:]
	}
}

// openAll opens n streams, some at a time.
func (f *fleet) openAll(ctx context.Context, n int) error {
	return sideBySide(ctx, 50, n, func() error { return f.open(ctx) })
}

// sideBySide calls a function n times, atATime in parallel, until it fails.
func sideBySide(ctx context.Context, atATime, n int, do func() error) error {
	var group sync.WaitGroup
	var next atomic.Int64
	errs := make(chan error, atATime)
	for range atATime {
		group.Go(func() {
			for next.Add(1) <= int64(n) && ctx.Err() == nil {
				if err := do(); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	group.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return ctx.Err()
	}
}

func (f *fleet) all() []*clientStream {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	return slices.Clone(f.streams)
}

func (s *clientStream) close() {
	s.mutex.Lock()
	s.closed = true
	s.mutex.Unlock()
	s.conn.Close()
}

func (f *fleet) close() {
	for _, s := range f.all() {
		s.close()
	}
}

// counts is what all streams have received.
func (f *fleet) counts() (sum received) {
	for _, s := range f.all() {
		s.mutex.Lock()
		sum.add(s.counts)
		s.mutex.Unlock()
	}
	return sum
}

// collect waits until so many events have arrived since the last call, and
// returns how long each was on its way, sorted.
func (f *fleet) collect(want int) ([]time.Duration, error) {
	var took []time.Duration
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		for _, s := range f.all() {
			s.mutex.Lock()
			for _, latency := range s.latencies {
				took = append(took, time.Duration(latency)*100)
			}
			s.latencies = s.latencies[:0]
			s.mutex.Unlock()
		}
		if len(took) >= want || time.Now().After(deadline) {
			break
		}
	}
	slices.Sort(took)
	if len(took) != want {
		counts := f.counts()
		return took, fmt.Errorf("%d events arrived, %d were sent, and %d streams ended by themselves",
			len(took), want, counts.CleanEnds+counts.BrokenEnds)
	}
	return took, f.counts().wrong()
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
