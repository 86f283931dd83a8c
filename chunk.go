package caddysse

import (
	"net"
	"net/http"
	"reflect"
	"strconv"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

// What goes to many clients alike is framed once, as a chunk of HTTP/1.1 (RFC
// 9112, section 7.1), and written to each client's connection. The server would
// frame it for each, and copy it twice. What else goes to these clients, heartbeats
// and the end, goes through the server as ever: between two writes it holds nothing
// back, as each is flushed.

// framing is what a worker has framed last.
type framing struct {
	of    []byte
	chunk []byte
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
	s.fed.chunks = conn
}

// sendChunkLocked writes a chunk to the connection, instead of sendLocked.
func (s *stream) sendChunkLocked(chunk []byte) error {
	defer s.rests() // also after a panic
	s.moves(s.lastBytes)
	if _, err := s.fed.chunks.Write(chunk); err != nil {
		s.failLocked(err)
		_ = s.fed.chunks.Close() // as net/http does: what follows would be no chunk
		return err
	}
	s.lastHeard = s.age()
	return nil
}
