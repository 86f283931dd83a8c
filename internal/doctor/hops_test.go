package doctor_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	caddysse "github.com/caddy-sse/caddy-sse"
)

// This file is a network of pipes with a probe and hops in it. In a bubble of
// testing/synctest, a check of 75 seconds takes only the time to process its
// bytes.

// network is a set of listeners by name.
type network struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener
}

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, errors.New("connection refused")
	}
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.closed:
		return nil, errors.New("connection refused")
	}
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// serve runs a handler at an address until the test ends.
func (n *network) serve(t *testing.T, addr string, handler http.Handler) {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	if n.listeners == nil {
		n.listeners = make(map[string]*pipeListener)
	}
	n.listeners[addr] = l
	n.mu.Unlock()
	var answers sync.WaitGroup
	server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answers.Add(1)
		defer answers.Done()
		handler.ServeHTTP(w, r)
	})}
	go server.Serve(l)
	t.Cleanup(func() {
		server.Close()
		answers.Wait()
	})
}

// probe returns an sse_probe that works as in Caddy.
func probe(t *testing.T, config *caddysse.Probe) http.Handler {
	config.Token = "sesame"
	if err := config.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := config.ServeHTTP(w, r, nil)
		if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
			w.WriteHeader(handlerErr.StatusCode)
		}
	})
}

// hop passes requests on, with the faults that its fields describe.
type hop struct {
	network *network
	to      string
	request func(r *http.Request)
	http10  bool
	// body wraps the writer of the answer's body.
	body func(w http.ResponseWriter, r *http.Request) sink
	// The headers are sent with the first byte.
	headersHeld bool
	idle, total time.Duration // cut off after
	cleanly     bool
	cutsOnly    func(r *http.Request) bool // nil: every answer
	restarted   <-chan struct{}            // cuts off all answers
}

// sink takes the bytes of a body that a hop passes on.
type sink interface {
	io.Writer
	end()
}

func (h hop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	out := r.Clone(r.Context())
	out.RequestURI, out.Body, out.ContentLength = "", io.NopCloser(bytes.NewReader(body)), int64(len(body))
	out.URL.Scheme, out.URL.Host = "http", h.to
	if h.request != nil {
		h.request(out)
	}
	res, err := h.ask(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer res.Body.Close()
	for name, values := range res.Header {
		w.Header()[name] = values
	}
	if res.StatusCode != http.StatusOK {
		w.WriteHeader(res.StatusCode)
		io.Copy(w, res.Body)
		return
	}
	var to sink = flusher{w}
	if h.body != nil {
		to = h.body(w, r)
	}
	if !h.headersHeld {
		w.WriteHeader(http.StatusOK)
		http.NewResponseController(w).Flush()
	}
	if h.cutsOnly != nil && !h.cutsOnly(r) {
		h.idle, h.total = 0, 0
	}
	h.copy(to, res.Body)
	to.end()
}

func (h hop) ask(r *http.Request) (*http.Response, error) {
	if !h.http10 {
		tr := &http.Transport{DialContext: h.network.dial, DisableCompression: true, DisableKeepAlives: true}
		return tr.RoundTrip(r)
	}
	conn, err := h.network.dial(r.Context(), "tcp", h.to)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(r.Context(), func() { conn.Close() })
	var text bytes.Buffer
	r.Write(&text)
	if _, err := io.WriteString(conn, strings.Replace(text.String(), " HTTP/1.1\r\n", " HTTP/1.0\r\n", 1)); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(conn), r)
}

// copy passes the body on until one of the timers cuts it off.
func (h hop) copy(to sink, body io.ReadCloser) {
	pieces := make(chan []byte)
	broken := make(chan error, 1)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		buf := make([]byte, 32<<10)
		for {
			n, err := body.Read(buf)
			if n > 0 {
				select {
				case pieces <- bytes.Clone(buf[:n]):
				case <-stop:
					return
				}
			}
			if err != nil {
				broken <- err
				return
			}
		}
	}()
	never := make(<-chan time.Time)
	total := never
	if h.total > 0 {
		total = time.After(h.total)
	}
	for {
		idle := never
		if h.idle > 0 {
			idle = time.After(h.idle)
		}
		select {
		case piece := <-pieces:
			to.Write(piece)
			continue
		case err := <-broken:
			if err != io.EOF {
				panic(http.ErrAbortHandler)
			}
			return
		case <-idle:
		case <-total:
		case <-h.restarted:
		}
		if !h.cleanly {
			panic(http.ErrAbortHandler)
		}
		return
	}
}

// flusher passes everything on at once.
type flusher struct{ w http.ResponseWriter }

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	http.NewResponseController(f.w).Flush()
	return n, err
}

func (flusher) end() {}

// buffer passes data on only when it is full.
type buffer struct{ *bufio.Writer }

func (b buffer) end() { b.Flush() }

func bufferOf(size int) func(http.ResponseWriter, *http.Request) sink {
	return func(w http.ResponseWriter, _ *http.Request) sink {
		return buffer{bufio.NewWriterSize(flusher{w}, size)}
	}
}

// headBuffer returns a buffer whose first bytes are taken by the headers, as in
// nginx.
func headBuffer(w http.ResponseWriter, r *http.Request) sink {
	b := bufferOf(4096)(w, r).(buffer)
	hidden := &hideFirst{next: flusher{w}, left: 700}
	b.Writer = bufio.NewWriterSize(hidden, 4096)
	b.Write(make([]byte, 700))
	return b
}

type hideFirst struct {
	next io.Writer
	left int
}

func (h *hideFirst) Write(p []byte) (int, error) {
	hidden := min(h.left, len(p))
	h.left -= hidden
	n, err := h.next.Write(p[hidden:])
	return n + hidden, err
}

// collector passes the body on at its end.
type collector struct {
	bytes.Buffer
	w http.ResponseWriter
}

func (c *collector) end() { c.w.Write(c.Bytes()) }

func toEnd(w http.ResponseWriter, _ *http.Request) sink { return &collector{w: w} }

// compressor compresses the body, and flushes the encoder after each write if
// flush is set.
type compressor struct {
	*gzip.Writer
	w     http.ResponseWriter
	flush bool
}

func (c compressor) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	if c.flush {
		c.Flush()
	}
	http.NewResponseController(c.w).Flush()
	return n, err
}

func (c compressor) end() { c.Close() }

func gzipped(flush, always bool) func(http.ResponseWriter, *http.Request) sink {
	return func(w http.ResponseWriter, r *http.Request) sink {
		if !always && !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			return flusher{w}
		}
		w.Header().Set("Content-Encoding", "gzip")
		return compressor{gzip.NewWriter(w), w, flush}
	}
}

// waiter delays small writes, like Nagle's algorithm with delayed
// acknowledgements: while something is on its way, further data waits. With
// cork, the first write waits too.
type waiter struct {
	flusher
	delay time.Duration
	cork  bool

	mu      sync.Mutex
	waiting []byte
	busy    bool
}

func (n *waiter) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.waiting = append(n.waiting, p...)
	if n.busy {
		return len(p), nil
	}
	n.busy = true
	if !n.cork {
		n.send()
	}
	time.AfterFunc(n.delay, n.acknowledged)
	return len(p), nil
}

func (n *waiter) send() {
	n.flusher.Write(n.waiting)
	n.waiting = nil
}

func (n *waiter) acknowledged() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.waiting) == 0 {
		n.busy = false
		return
	}
	n.send()
	n.busy = false
	if !n.cork {
		n.busy = true
		time.AfterFunc(n.delay, n.acknowledged)
	}
}

func (n *waiter) end() {
	for {
		n.mu.Lock()
		busy := n.busy
		n.mu.Unlock()
		if !busy {
			return
		}
		time.Sleep(n.delay)
	}
}

func waits(delay time.Duration, cork bool) func(http.ResponseWriter, *http.Request) sink {
	return func(w http.ResponseWriter, _ *http.Request) sink {
		return &waiter{flusher: flusher{w}, delay: delay, cork: cork}
	}
}

// ticking passes on what it has at regular intervals.
type ticking struct {
	flusher
	mu      sync.Mutex
	waiting []byte
	stop    chan struct{}
	stopped chan struct{}
}

func ticks(every time.Duration) func(http.ResponseWriter, *http.Request) sink {
	return func(w http.ResponseWriter, _ *http.Request) sink {
		k := &ticking{flusher: flusher{w}, stop: make(chan struct{}), stopped: make(chan struct{})}
		go func() {
			defer close(k.stopped)
			for {
				select {
				case <-time.After(every):
					k.flush()
				case <-k.stop:
					return
				}
			}
		}()
		return k
	}
}

func (k *ticking) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.waiting = append(k.waiting, p...)
	return len(p), nil
}

func (k *ticking) flush() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.waiting) > 0 {
		k.flusher.Write(k.waiting)
		k.waiting = nil
	}
}

func (k *ticking) end() {
	close(k.stop)
	<-k.stopped
	k.flush()
}
