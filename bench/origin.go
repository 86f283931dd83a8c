//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// originArgument makes this program the upstream.
const originArgument = "bench-origin"

// Every event has this size and says when it was sent and as which one on its
// stream: `data: `, 20 digits of nanoseconds, a space, 10 digits, padding.
const (
	eventSize = 200
	timeAt    = len("data: ")
	timeSize  = 20
	countAt   = timeAt + timeSize + 1
	countSize = 10
)

// clock is the same in all processes.
func clock() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err)
	}
	return now.Nano()
}

// chunk is an event as a chunk of HTTP/1.1 (RFC 9112, section 7.1).
type chunk []byte

func newChunk() chunk {
	event := append([]byte("data: "), bytes.Repeat([]byte{'x'}, eventSize-len("data: ")-2)...)
	event[countAt-1], event[countAt+countSize] = ' ', ' '
	return fmt.Appendf(nil, "%x\r\n%s\n\n\r\n", eventSize, event)
}

func (c chunk) set(now, count int64) {
	event := c[len("c8\r\n"):]
	digits(event[timeAt:timeAt+timeSize], now)
	digits(event[countAt:countAt+countSize], count)
}

func digits(into []byte, n int64) {
	for i := len(into) - 1; i >= 0; i-- {
		into[i] = byte('0' + n%10)
		n /= 10
	}
}

// order is a command to the upstream, a line of JSON.
type order struct {
	Group int `json:"group"` // the port, which is to say the system
	// Do is "count" the streams, "send" Rounds events to each, one round per
	// Interval with the streams spread over it, or "burst": one to each at once,
	// which all say when the first was sent. "broadcast" is Rounds bursts, one
	// per Interval, and "fill" Rounds long comments to each.
	Do       string        `json:"do"`
	Rounds   int           `json:"rounds"`
	Interval time.Duration `json:"interval"`
}

type result struct {
	Streams int    `json:"streams"`
	Sent    int    `json:"sent"`
	Ports   []int  `json:"ports,omitempty"`
	Error   string `json:"error,omitempty"`
}

// upstreamGroup are the streams of one port.
type upstreamGroup struct {
	mutex   sync.Mutex
	streams map[*upstreamStream]struct{}
}

type upstreamStream struct {
	conn  net.Conn
	mutex sync.Mutex
	count int64
}

func serveOrigin() {
	if _, err := measure.RaiseFileLimit(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	orders, results := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var first order // Rounds is the number of ports
	if err := orders.Decode(&first); err != nil {
		return
	}
	groups := make([]*upstreamGroup, first.Rounds)
	var ready result
	for i := range groups {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			results.Encode(result{Error: err.Error()})
			return
		}
		groups[i] = &upstreamGroup{streams: make(map[*upstreamStream]struct{})}
		go groups[i].accept(listener)
		ready.Ports = append(ready.Ports, listener.Addr().(*net.TCPAddr).Port)
	}
	results.Encode(ready)
	for {
		var o order
		if orders.Decode(&o) != nil {
			return
		}
		var answer result
		g := groups[o.Group]
		streams := g.all()
		switch o.Do {
		case "send":
			answer.Sent = send(streams, o.Rounds, o.Interval)
		case "burst":
			answer.Sent = burst(streams)
		case "broadcast":
			answer.Sent = broadcast(streams, o.Rounds, o.Interval)
		case "fill":
			answer.Sent = fill(streams, o.Rounds)
		}
		answer.Streams = len(streams)
		results.Encode(answer)
	}
}

func (g *upstreamGroup) all() []*upstreamStream {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	streams := make([]*upstreamStream, 0, len(g.streams))
	for s := range g.streams {
		streams = append(streams, s)
	}
	return streams
}

func (g *upstreamGroup) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "origin:", err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go g.serve(conn)
	}
}

const originHeader = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"

// serve answers one request with a stream, and returns when its client has left.
func (g *upstreamGroup) serve(conn net.Conn) {
	defer conn.Close()
	buffer := make([]byte, 1024)
	read := 0
	for !bytes.HasSuffix(buffer[:read], []byte("\r\n\r\n")) {
		n, err := conn.Read(buffer[read:])
		if err != nil || read+n == len(buffer) {
			return
		}
		read += n
	}
	hello := bytes.HasPrefix(buffer, []byte("GET /hello "))
	s := &upstreamStream{conn: conn}
	s.mutex.Lock()
	_, err := io.WriteString(conn, originHeader)
	if err == nil && hello {
		s.sendLocked(newChunk(), clock())
	}
	s.mutex.Unlock()
	if err != nil {
		return
	}
	g.mutex.Lock()
	g.streams[s] = struct{}{}
	g.mutex.Unlock()
	_, _ = conn.Read(buffer[:1])
	g.mutex.Lock()
	delete(g.streams, s)
	g.mutex.Unlock()
}

func (s *upstreamStream) sendLocked(c chunk, now int64) bool {
	s.count++
	c.set(now, s.count)
	_, err := s.conn.Write(c)
	return err == nil
}

func (s *upstreamStream) send(c chunk, now int64) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.sendLocked(c, now)
}

func (s *upstreamStream) sendRaw(p []byte) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	_, err := s.conn.Write(p)
	return err == nil
}

func send(streams []*upstreamStream, rounds int, interval time.Duration) (sent int) {
	c := newChunk()
	start := time.Now()
	total := rounds * len(streams)
	for done := 0; done < total; {
		due := min(total, int(time.Since(start)*time.Duration(len(streams))/interval)+1)
		for ; done < due; done++ {
			if streams[done%len(streams)].send(c, clock()) {
				sent++
			}
		}
		time.Sleep(time.Millisecond)
	}
	return sent
}

func burst(streams []*upstreamStream) (sent int) {
	c := newChunk()
	now := clock()
	for _, s := range streams {
		if s.send(c, now) {
			sent++
		}
	}
	return sent
}

func broadcast(streams []*upstreamStream, rounds int, interval time.Duration) (sent int) {
	ticks := time.NewTicker(interval)
	defer ticks.Stop()
	for range rounds {
		sent += burst(streams)
		<-ticks.C
	}
	return sent
}

func fill(streams []*upstreamStream, rounds int) (sent int) {
	comment := slices.Concat([]byte{':'}, bytes.Repeat([]byte{'x'}, fillerSize-3), []byte("\n\n"))
	c := fmt.Appendf(nil, "%x\r\n%s\r\n", len(comment), comment)
	for range rounds {
		for _, s := range streams {
			if s.sendRaw(c) {
				sent++
			}
		}
	}
	return sent
}

// origin is the upstream's process, as the bench uses it.
type origin struct {
	process *exec.Cmd
	orders  *json.Encoder
	results *json.Decoder
	ports   []int
}

func startOrigin(ports int) (*origin, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	process := exec.Command(self, originArgument)
	process.Stderr = os.Stderr
	process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	in, err := process.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := process.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := process.Start(); err != nil {
		return nil, err
	}
	o := &origin{process: process, orders: json.NewEncoder(in), results: json.NewDecoder(bufio.NewReader(out))}
	ready, err := o.do(order{Rounds: ports})
	o.ports = ready.Ports
	return o, err
}

func (o *origin) do(order order) (result, error) {
	if err := o.orders.Encode(order); err != nil {
		return result{}, err
	}
	var answer result
	if err := o.results.Decode(&answer); err != nil {
		return result{}, err
	}
	if answer.Error != "" {
		return result{}, errors.New(answer.Error)
	}
	return answer, nil
}

func (o *origin) stop() {
	o.process.Process.Kill()
	o.process.Wait()
}

func (o *origin) streams(group int) (int, error) {
	answer, err := o.do(order{Group: group, Do: "count"})
	return answer.Streams, err
}

// awaitNone waits until a system has no stream of the upstream open.
func (o *origin) awaitNone(group int, within time.Duration) error {
	for deadline := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		n, err := o.streams(group)
		if err != nil || n == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the upstream still has %d streams after %v", n, within)
		}
	}
}
