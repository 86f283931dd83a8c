package caddysse

import (
	"net"
	"net/http"
	"reflect"
	"strconv"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// Over HTTP/1.1, what an upstream sends is written to the client's connection
// directly, as a chunk (RFC 9112, section 7.1). The server and Caddy's writers
// would copy it twice and read the clock: a tenth of what an event costs. What
// goes to many clients unchanged is framed only once. The headers, heartbeats,
// large writes and the end still go through the server. The two can't mix up
// their order, because each write through the server is flushed.

// framing holds the chunk that was framed last.
type framing struct {
	of    []byte
	chunk []byte
}

var framings = sync.Pool{New: func() any { return new(framing) }}

// recycle is called when it is no longer used.
func (f *framing) recycle() {
	f.of = nil // a journal's
	framings.Put(f)
}

// frame returns p as a chunk. The result is valid until the next call.
func (f *framing) frame(p []byte) []byte {
	if len(f.of) == len(p) && &f.of[0] == &p[0] {
		return f.chunk
	}
	f.of = p
	f.chunk = strconv.AppendUint(f.chunk[:0], uint64(len(p)), 16)
	f.chunk = append(f.chunk, "\r\n"...)
	f.chunk = append(f.chunk, p...)
	f.chunk = append(f.chunk, "\r\n"...)
	return f.chunk
}

// chunkConn is the connection to which chunks of the stream may be written once
// its headers have been flushed. It is nil if the server does not use chunks for
// the body, or if a writer in between needs to see it: an encoder, or the one
// that counts bytes for the access log.
func (x *exchange) chunkConn() net.Conn {
	header := x.w.Header()
	framed := header["Transfer-Encoding"] != nil || header["Content-Length"] != nil
	if x.r.ProtoMajor != 1 || x.r.ProtoMinor < 1 || framed || !isServersOwn(x.w) {
		return nil
	}
	return peer.Served(x.r.Context())
}

// isServersOwn reports whether a writer is net/http's for HTTP/1.x, with nothing
// around it except Caddy's timeouts, which do not apply to streams.
func isServersOwn(w http.ResponseWriter) bool {
	for ; w != nil; w = unwrap(w) {
		switch w.(type) {
		case *caddyhttp.IdleTimeoutWriter, *caddyhttp.ResponseWriterWrapper:
			continue
		}
		t := reflect.TypeOf(w)
		if t.Kind() != reflect.Pointer {
			return false
		}
		switch t = t.Elem(); t.PkgPath() + "." + t.Name() {
		case "net/http.response":
			return true
		case reflect.TypeFor[caddyhttp.ResponseWriterWrapper]().PkgPath() + ".readDeadlineWriter":
		default:
			return false
		}
	}
	return false
}

// writeChunksTo makes the stream write chunks to a connection; nil: it does not.
func (s *stream) writeChunksTo(conn net.Conn) {
	s.mu.Lock()
	defer s.unlock()
	s.chunks = conn
}

// sendBodyLocked sends what the upstream has just sent, as a chunk if possible.
// Callers that send the same to many clients pass a framing; with nil, one is
// borrowed.
func (s *stream) sendBodyLocked(f *framing, lead, body []byte) error {
	if s.chunks == nil || len(lead) > 0 || len(body) > progressUnit {
		return s.sendLocked(s.lastBytes, lead, body)
	}
	if f == nil {
		f = framings.Get().(*framing)
		defer f.recycle()
	}
	return s.sendChunkLocked(f.frame(body))
}

// sendChunkLocked writes a chunk to the connection, instead of sendLocked.
func (s *stream) sendChunkLocked(chunk []byte) error {
	defer s.rests() // also after a panic
	s.moves(s.lastBytes)
	if _, err := s.chunks.Write(chunk); err != nil {
		s.failLocked(err)
		// More bytes would not be a chunk, and the alert that ends TLS is more bytes.
		s.breakConnection()
		_ = s.chunks.Close()
		return err
	}
	s.lastHeard = s.age()
	return nil
}
