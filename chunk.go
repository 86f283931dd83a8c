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

// Over HTTP/1.1 what an upstream sends is written to the client's connection as a
// chunk (RFC 9112, section 7.1), past the server and Caddy's writers, which would copy
// it twice and ask for the time: a tenth of what an event costs. What goes to many
// clients alike is framed once. What else goes to a client, the headers, heartbeats,
// large pieces and the end, goes through the server as ever: between two writes it
// holds nothing back, as each is flushed.

// framing is what whoever writes chunks has framed last.
type framing struct {
	of    []byte
	chunk []byte
}

var framings = sync.Pool{New: func() any { return new(framing) }}

// recycle is called when nobody uses it any more.
func (f *framing) recycle() {
	f.of = nil // a journal's
	framings.Put(f)
}

// frame returns p as a chunk, until it is called again.
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

// chunkConn is the connection that chunks of the stream may be written to, once
// its headers have been flushed; nil where the server does not frame the body as
// chunks, or where a writer in between wants to see it: an encoder, or what counts
// for the access log.
func (x *exchange) chunkConn() net.Conn {
	header := x.w.Header()
	framed := header["Transfer-Encoding"] != nil || header["Content-Length"] != nil
	if x.r.ProtoMajor != 1 || x.r.ProtoMinor < 1 || framed || !isServersOwn(x.w) {
		return nil
	}
	return peer.Served(x.r.Context())
}

// isServersOwn reports whether a writer is net/http's for HTTP/1.x, with nothing
// around it but Caddy's timeouts, which do not apply to streams.
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

// writeChunksTo has chunks written to a connection, if there is one.
func (s *stream) writeChunksTo(conn net.Conn) {
	s.mu.Lock()
	defer s.unlock()
	s.chunks = conn
}

// sendBodyLocked sends what the upstream has just sent, as a chunk where the client
// can be sent one. Who sends the same to many has a framing; nil: one is borrowed.
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
		_ = s.chunks.Close() // as net/http does: what follows would be no chunk
		return err
	}
	s.lastHeard = s.age()
	return nil
}
