package caddysse

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// response is the ResponseWriter that the handlers of an attempt get. At the
// final header the exchange decides what the answer is; everything else passes
// through.
type response struct{ x *exchange }

// unwrap returns the writer that another one wraps, nil for a connection's own.
func unwrap(w http.ResponseWriter) http.ResponseWriter {
	if outer, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
		return outer.Unwrap()
	}
	return nil
}

func (rw *response) Header() http.Header { return rw.x.w.Header() }

// Unwrap lets http.ResponseController find methods that this type does not have.
func (rw *response) Unwrap() http.ResponseWriter { return rw.x.w }

// Push implements http.Pusher.
func (rw *response) Push(target string, opts *http.PushOptions) error {
	return (&caddyhttp.ResponseWriterWrapper{ResponseWriter: rw.x.w}).Push(target, opts)
}

// Hijack gives the connection away: what follows on it is not HTTP.
func (rw *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	x := rw.x
	if x.stream != nil {
		return nil, nil, http.ErrNotSupported // heartbeats go to the connection
	}
	conn, buffered, err := http.NewResponseController(x.w).Hijack()
	if err == nil && x.role == undecided {
		x.role = aside
		x.givePlaceBack()
	}
	return conn, buffered, err
}

func (rw *response) WriteHeader(status int) { rw.writeHeader(status, rw.Header()) }

// writeHeader is WriteHeader for handlers whose header map is header.
func (rw *response) writeHeader(status int, header http.Header) {
	x := rw.x
	if status < 200 && status != http.StatusSwitchingProtocols {
		x.writeInformational(status, header)
		return
	}
	if x.role == undecided {
		x.decide(status, header)
	}
	if x.role == aside {
		if !x.headed {
			x.headed = true
			x.takeHeader(header)
		}
		x.w.WriteHeader(status)
	}
}

// writeInformational passes a 1xx on, unless the final header has been sent.
func (x *exchange) writeInformational(status int, header http.Header) {
	switch {
	case x.stream != nil:
	case x.relayed():
		writeInformationalWith(x.w, status, header)
	default:
		x.w.WriteHeader(status)
	}
}

// begin decides for handlers that write or flush before they call WriteHeader,
// which means 200 (net/http.ResponseWriter). It asks for the header map only if a
// decision is needed, because that call goes through every writer around this
// one.
func (rw *response) begin() {
	if rw.x.role == undecided {
		rw.beginWith(rw.Header())
	}
}

// beginWith is begin for handlers whose header map is header.
func (rw *response) beginWith(header http.Header) {
	x := rw.x
	if x.role != undecided {
		return
	}
	if hasEventStreamType(header) || x.relayed() && x.startedEarly {
		rw.writeHeader(http.StatusOK, header)
	} else {
		x.role = aside
		x.headed = true
		x.takeHeader(header)
		x.givePlaceBack()
		x.lendIdleTimeouts()
	}
}

func (rw *response) Write(p []byte) (int, error) {
	rw.begin()
	switch rw.x.role {
	case streaming:
		return rw.x.stream.write(p)
	case answered:
		return len(p), nil // the error's body, which is not sent
	case refused:
		return 0, rw.x.rare.refusal
	}
	return rw.x.w.Write(p)
}

// ReadFrom keeps sendfile possible for answers that are not streams.
func (rw *response) ReadFrom(r io.Reader) (int64, error) {
	rw.begin()
	if rw.x.role != aside {
		return io.Copy(writerOnly{rw}, r)
	}
	return (&caddyhttp.ResponseWriterWrapper{ResponseWriter: rw.x.w}).ReadFrom(r)
}

// writerOnly hides ReadFrom from io.Copy.
type writerOnly struct{ io.Writer }

// FlushError is what http.ResponseController flushes with.
func (rw *response) FlushError() error {
	rw.begin()
	switch rw.x.role {
	case streaming:
		return rw.x.stream.flush()
	case answered, refused:
		return nil
	}
	return http.NewResponseController(rw.x.w).Flush()
}

// SetWriteDeadline ignores a handler's deadlines on a stream: only the stream's
// write timeout applies.
func (rw *response) SetWriteDeadline(deadline time.Time) error {
	if rw.x.stream != nil {
		return nil
	}
	return http.NewResponseController(rw.x.w).SetWriteDeadline(deadline)
}

// Interface guards
var (
	_ http.ResponseWriter             = (*response)(nil)
	_ http.Pusher                     = (*response)(nil)
	_ http.Hijacker                   = (*response)(nil)
	_ io.ReaderFrom                   = (*response)(nil)
	_ interface{ FlushError() error } = (*response)(nil)
)
