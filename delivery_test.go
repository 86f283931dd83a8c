package caddysse_test

import (
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// overEveryProtocol runs a subtest for each client protocol.
func overEveryProtocol(t *testing.T, c *testCaddy, test func(t *testing.T, cl *testClient)) {
	t.Helper()
	for _, proto := range clientProtocols {
		t.Run(proto, func(t *testing.T) { test(t, c.client(proto)) })
	}
}

// atOnceOverEveryProtocol is the same for tests that wait most of their time.
// It runs them in parallel.
func atOnceOverEveryProtocol(t *testing.T, c *testCaddy, test func(t *testing.T, cl *testClient)) {
	t.Helper()
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		t.Parallel()
		test(t, cl)
	})
}

// open sends a GET and returns both ends of it.
func open(t testing.TB, cl *testClient, up *testUpstream, path string, header ...string) (*exchange, *upstreamCall) {
	t.Helper()
	client := cl.begin(cl.request(t, http.MethodGet, path, nil, header...))
	return client, up.acceptAt(t, path)
}

// The body as it is

// writes is a body as a sequence of writes. The bytes are valid only during the
// call.
type writes func(write func(p []byte))

func inOneWrite(text string) writes {
	return func(write func([]byte)) { write([]byte(text)) }
}

func byteByByte(text string) writes {
	return func(write func([]byte)) {
		for i := range len(text) {
			write([]byte(text[i : i+1]))
		}
	}
}

// repeated writes text again and again until size is reached.
func repeated(text string, size int) writes {
	return func(write func([]byte)) {
		chunk := []byte(strings.Repeat(text, max(1, min(size, 64<<10)/len(text))))
		for left := size; left > 0; left -= len(chunk) {
			write(chunk[:min(left, len(chunk))])
		}
	}
}

// oddlyCut cuts events with all line endings into writes of random sizes.
func oddlyCut(size int) writes {
	return func(write func([]byte)) {
		random := rand.New(rand.NewPCG(1, uint64(size)))
		var text []byte
		for i := 0; len(text) < min(size, 1<<20); i++ {
			eol := []string{"\n", "\r\n", "\r"}[random.IntN(3)]
			text = fmt.Appendf(text, "id: %d%s: comment%sdata: %0*d%s%s", i, eol, eol, random.IntN(300), i, eol, eol)
		}
		for left := size; left > 0; {
			rest := text[:min(left, len(text))]
			left -= len(rest)
			for len(rest) > 0 {
				n := min(len(rest), 1+random.IntN(1<<random.IntN(17)))
				write(rest[:n])
				rest = rest[n:]
			}
		}
	}
}

func randomBytes(size int) writes {
	return func(write func([]byte)) {
		random := rand.NewChaCha8([32]byte{1})
		chunk := make([]byte, 8<<10)
		for left := size; left > 0; left -= len(chunk) {
			for i := 0; i < len(chunk); i += 8 {
				binary.LittleEndian.PutUint64(chunk[i:], random.Uint64())
			}
			write(chunk[:min(left, len(chunk))])
		}
	}
}

// digest is enough of a body to tell it from others.
type digest struct {
	size int64
	hash [sha256.Size]byte
}

func (w writes) digest() digest {
	hash := sha256.New()
	var size int64
	w(func(p []byte) {
		hash.Write(p)
		size += int64(len(p))
	})
	return digest{size, [sha256.Size]byte(hash.Sum(nil))}
}

func digestOf(body io.Reader) (digest, error) {
	hash := sha256.New()
	size, err := io.Copy(hash, body)
	return digest{size, [sha256.Size]byte(hash.Sum(nil))}, err
}

// scaled returns a smaller size if the tests must be short or run slowly.
func scaled(size int) int {
	if raceEnabled || testing.Short() {
		return size / 10
	}
	return size
}

func TestABodyOfAnyKindArrivesByteForByte(t *testing.T) {
	checkLeaks(t)
	bodies := []struct {
		name   string
		writes writes
	}{
		{"Empty", func(func([]byte)) {}},
		{"OneEvent", inOneWrite("data: hello\n\n")},
		{"ByteByByte", byteByByte("\xef\xbb\xbfid: 1\r\ndata: a\r\n\r\n: c\rdata: b\r\rdata: c\n\nretry: 5\n\n")},
		{"PartOfABOM", byteByByte("\xef\xbb")},
		{"UnfinishedEvent", inOneWrite("data: 1\n\ndata: 2")},
		{"NULs", byteByByte("data: a\x00b\n\nid: 1\x00\n\n\x00")},
		{"InvalidUTF8", byteByByte("data: \xff\xc3\x28\xe2\x82\n\n\xed\xa0\x80")},
		{"JSON", inOneWrite(`{"jsonrpc":"2.0","id":1,"result":{}}`)},
		{"OneLineOf10MB", repeated("data: x", scaled(10<<20))},
		{"OddlyCut", oddlyCut(1 << 20)},
		{"RandomBytes", randomBytes(1 << 20)},
		{"100MBOfEvents", oddlyCut(scaled(100 << 20))},
	}
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		for _, body := range bodies {
			if body.name == name {
				body.writes(func(p []byte) {
					w.Write(p)
					w.(http.Flusher).Flush()
				})
			}
		}
	})
	c := startCaddy(t, `
		handle /off/* {
			sse {
				heartbeat off
			}
			reverse_proxy `+up.addr+`
		}
		handle /never-due/* {
			sse 1h {
				prelude off
			}
			reverse_proxy `+up.addr+`
		}`)
	for _, body := range bodies {
		want := body.writes.digest()
		t.Run(body.name, func(t *testing.T) {
			overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				paths := []string{"/off/", "/never-due/"}
				if want.size > 20<<20 {
					paths = paths[1:]
				}
				for _, path := range paths {
					res := cl.get(t, path+body.name)
					got, err := digestOf(res.Body)
					res.leave()
					if got != want || err != nil {
						t.Errorf("%s: got %d bytes %x (%v), want %d bytes %x", path, got.size, got.hash, err, want.size, want.hash)
					}
				}
			})
		})
	}
}

func TestABodyWithoutLineEndsIsNotHeldInMemory(t *testing.T) {
	checkLeaks(t)
	size := scaled(100 << 20)
	body := repeated("x", size)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		body(func(p []byte) { w.Write(p) })
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	res := c.client("h1").get(t, "/")
	defer res.leave()
	buf := make([]byte, 1<<20)
	var peak, start runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&start)
	got := 0
	for next := 0; ; {
		n, err := res.Body.Read(buf)
		got += n
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if got >= next {
			next += size / 10
			var now runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&now)
			if now.HeapAlloc > peak.HeapAlloc {
				peak = now
			}
		}
	}
	if got != size {
		t.Errorf("got %d bytes, want %d", got, size)
	}
	if grown := int64(peak.HeapAlloc) - int64(start.HeapAlloc); grown > int64(size)/4 {
		t.Errorf("the heap grew by %d bytes over a body of %d", grown, size)
	}
}

func TestAStreamWithContentLengthLosesItAndNothingElse(t *testing.T) {
	checkLeaks(t)
	const body = "event: message\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"protocolVersion\":\"2025-06-18\"}}\n\n"
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Header().Set("Mcp-Session-Id", "s1")
		io.WriteString(w, body)
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		res := cl.do(t, cl.request(t, http.MethodPost, "/mcp", strings.NewReader(`{"method":"initialize"}`),
			"Accept: application/json, text/event-stream"))
		got, err := res.text()
		if got != body || err != nil {
			t.Errorf("got %q (%v)", got, err)
		}
		if length := res.Header["Content-Length"]; length != nil {
			t.Errorf("Content-Length %q", length)
		}
		if id := res.Header.Get("Mcp-Session-Id"); id != "s1" {
			t.Errorf("Mcp-Session-Id %q", id)
		}
	})
}

// Delivery

// encode flushes some responses itself, so the tests must also pass without it.
func withAndWithoutEncode(t *testing.T, test func(t *testing.T, encode string)) {
	t.Helper()
	t.Run("WithoutEncode", func(t *testing.T) { test(t, "") })
	t.Run("WithEncode", func(t *testing.T) { test(t, "encode") })
}

func TestEveryWriteArrivesBeforeTheNextIsMade(t *testing.T) {
	withAndWithoutEncode(t, everyWriteArrivesBeforeTheNextIsMade)
}

func everyWriteArrivesBeforeTheNextIsMade(t *testing.T, encode string) {
	checkLeaks(t)
	up := newUpstream(t)
	handler := newTestHandler(t)
	c := startCaddy(t, `
		`+encode+`
		sse {
			prelude off
		}
		handle /proxied {
			reverse_proxy `+up.addr+`
		}
		handle /handled {
			`+handler.directive+`
		}`)
	pieces := []string{"data: 1\n\n", "data: 2", "\r\n", "\r", "\n", ": c", "\n", "id: 3\n", "\n", strings.Repeat("x", 100<<10), "\n\n"}
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		t.Run("FromAnUpstream", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			call.start("text/event-stream")
			body := client.headers(t).follow()
			for _, piece := range pieces {
				call.send(piece)
				body.expect(t, piece)
			}
			call.end()
			body.expectEnd(t)
		})
		t.Run("FromAHandlerThatDoesNotFlush", func(t *testing.T) {
			client, call := open(t, cl, handler.testUpstream, "/handled")
			call.do(func(w http.ResponseWriter) {
				w.Header().Set("Content-Type", "text/event-stream")
				w.WriteHeader(http.StatusOK)
			})
			body := client.headers(t).follow()
			for _, piece := range pieces {
				call.do(func(w http.ResponseWriter) { io.WriteString(w, piece) })
				body.expect(t, piece)
			}
			call.end()
			body.expectEnd(t)
		})
		t.Run("FromAHandlerThatOnlyWrites", func(t *testing.T) {
			client, call := open(t, cl, handler.testUpstream, "/handled")
			call.do(func(w http.ResponseWriter) {
				w.Header().Set("Content-Type", "text/event-stream")
				io.WriteString(w, "data: 1\n\n")
			})
			body := client.headers(t).follow()
			body.expect(t, "data: 1\n\n")
			call.do(func(w http.ResponseWriter) { io.WriteString(w, "data: 2\n\n") })
			body.expect(t, "data: 2\n\n")
			call.end()
			body.expectEnd(t)
		})
		t.Run("FromAHandlerThatCopies", func(t *testing.T) {
			client, call := open(t, cl, handler.testUpstream, "/handled")
			from, to := io.Pipe()
			defer to.Close()
			copied := make(chan error, 1)
			go call.do(func(w http.ResponseWriter) {
				w.Header().Set("Content-Type", "text/event-stream")
				_, err := io.Copy(w, from)
				copied <- err
			})
			var body *follower
			for _, piece := range pieces {
				if _, err := io.WriteString(to, piece); err != nil {
					t.Fatal(err)
				}
				if body == nil {
					body = client.headers(t).follow()
				}
				body.expect(t, piece)
			}
			to.Close()
			if err := <-copied; err != nil {
				t.Error(err)
			}
			call.end()
			body.expectEnd(t)
		})
	})
}

func TestHeadersArriveWhenTheUpstreamsDo(t *testing.T) {
	withAndWithoutEncode(t, headersArriveWhenTheUpstreamsDo)
}

func headersArriveWhenTheUpstreamsDo(t *testing.T, encode string) {
	checkLeaks(t)
	up := newUpstream(t)
	handler := newTestHandler(t)
	c := startCaddy(t, `
		`+encode+`
		sse {
			heartbeat off
			compression allow
		}
		handle /proxied {
			reverse_proxy `+up.addr+`
		}
		handle /handled {
			`+handler.directive+`
		}`)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, encodings := range []string{"identity", "gzip"} {
			t.Run(encodings, func(t *testing.T) {
				client, call := open(t, cl, up, "/proxied", "Accept-Encoding: "+encodings)
				call.start("text/event-stream")
				res := client.headers(t)
				call.end()
				res.text()

				client, call = open(t, cl, handler.testUpstream, "/handled", "Accept-Encoding: "+encodings)
				call.do(func(w http.ResponseWriter) {
					w.Header().Set("Content-Type", "text/event-stream")
					w.WriteHeader(http.StatusOK)
				})
				res = client.headers(t)
				call.end()
				res.text()
			})
		}
	})
}

func TestAStreamFromRespondIsAStream(t *testing.T) {
	checkLeaks(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		header Content-Type text/event-stream
		respond "data: hello

"`)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		res := cl.get(t, "/")
		body, err := res.text()
		if body != "data: hello\n\n" || err != nil {
			t.Errorf("got %q (%v)", body, err)
		}
		if buffering := res.Header.Get("X-Accel-Buffering"); buffering != "no" {
			t.Errorf("X-Accel-Buffering %q", buffering)
		}
	})
}

// Compression

func TestByDefaultNothingCompressesAStream(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		encode
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		client, call := open(t, cl, up, "/", "Accept: text/event-stream", "Accept-Encoding: gzip, br, zstd")
		if accepted := call.Header.Get("Accept-Encoding"); accepted != "identity" {
			t.Errorf("the upstream was asked for %q", accepted)
		}
		call.start("text/event-stream")
		res := client.headers(t)
		if encoding := res.Header["Content-Encoding"]; encoding != nil {
			t.Errorf("Content-Encoding %q", encoding)
		}
		body := res.follow()
		event := "data: " + strings.Repeat("x", 2000) + "\n\n"
		call.send(event)
		body.expect(t, event)
		call.end()
		body.expectEnd(t)
	})
}

func TestACompressedStreamDeliversEveryEventAtOnce(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		encode
		sse {
			prelude off
			compression allow
		}
		reverse_proxy `+up.addr)
	decoders := map[string]func(r io.Reader) (io.ReadCloser, error){
		"gzip": func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) },
		"zstd": func(r io.Reader) (io.ReadCloser, error) {
			decoder, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
			if err != nil {
				return nil, err
			}
			return decoder.IOReadCloser(), nil
		},
	}
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for encoding, decode := range decoders {
			t.Run(encoding, func(t *testing.T) {
				client, call := open(t, cl, up, "/", "Accept: text/event-stream", "Accept-Encoding: "+encoding)
				call.start("text/event-stream")
				res := client.headers(t)
				if got := res.Header.Get("Content-Encoding"); got != encoding {
					t.Fatalf("Content-Encoding %q", got)
				}
				call.send("data: 0\n\n") // a decoder needs some bytes first
				res.Body = &decodedBody{encoded: res.Body, decode: decode}
				body := res.follow()
				body.expect(t, "data: 0\n\n")
				for i := range 20 {
					event := fmt.Sprintf("id: %d\ndata: %s\n\n", i, strings.Repeat("x", i*100))
					call.send(event)
					body.expect(t, event)
				}
				call.end()
				body.expectEnd(t)
			})
		}
	})
}

// decodedBody decodes a body, starting at its first Read.
type decodedBody struct {
	encoded io.ReadCloser
	decode  func(io.Reader) (io.ReadCloser, error)
	decoded io.ReadCloser
}

func (b *decodedBody) Read(p []byte) (int, error) {
	if b.decoded == nil {
		decoded, err := b.decode(b.encoded)
		if err != nil {
			return 0, err
		}
		b.decoded = decoded
	}
	return b.decoded.Read(p)
}

func (b *decodedBody) Close() error {
	if b.decoded != nil {
		b.decoded.Close()
	}
	return b.encoded.Close()
}

// What is no stream

// withAndWithout is a site that gives the same answers through sse and without
// it.
func withAndWithout(handlers string) string {
	return `
		handle_path /with/* {
			sse {
				prelude off
			}
			` + handlers + `
		}
		handle_path /without/* {
			` + handlers + `
		}`
}

func TestWhatIsNoStreamIsAsWithoutTheModule(t *testing.T) {
	checkLeaks(t)
	big := filepath.Join(t.TempDir(), "big")
	content := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{2}).Read(content)
	if err := os.WriteFile(big, content, 0o600); err != nil {
		t.Fatal(err)
	}
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Cache-Control", "max-age=60")
		header.Set("Etag", `"e"`)
		header.Set("Content-Type", "text/event-stream")
		if accepted := r.Header.Get("Accept-Encoding"); accepted != "" {
			header.Set("X-Accepted", accepted)
		}
		switch r.URL.Path {
		case "/type":
			header.Set("Content-Type", "text/html")
			io.WriteString(w, "<p>")
		case "/similar-type":
			header.Set("Content-Type", "text/event-stream-not")
			io.WriteString(w, "data: 1\n\n")
		case "/no-type":
			header["Content-Type"] = nil
			io.WriteString(w, "data: 1\n\n")
		case "/empty":
		case "/length":
			header.Set("Content-Type", "text/plain")
			header.Set("Content-Length", "3")
			io.WriteString(w, "abc")
		case "/encoded":
			header.Set("Content-Type", "text/plain")
			header.Set("Content-Encoding", "br")
			io.WriteString(w, "\x0b\x01\x80abc\x03")
		case "/trailers":
			header.Set("Content-Type", "text/plain")
			header.Set("Trailer", "X-Announced")
			io.WriteString(w, "abc")
			w.(http.Flusher).Flush()
			header.Set("X-Announced", "1")
			header.Set(http.TrailerPrefix+"X-Late", "2")
		default:
			status, _ := strconv.Atoi(r.URL.Path[1:])
			w.WriteHeader(status)
			if status != http.StatusNoContent && status != http.StatusNotModified {
				io.WriteString(w, "data: 1\n\n")
			}
		}
	})
	c := startCaddy(t, withAndWithout(`
		handle /big {
			root `+filepath.Dir(big)+`
			file_server
		}
		handle /error {
			error 503
		}
		handle {
			reverse_proxy `+up.addr+`
		}`))
	requests := []struct {
		method, path string
		header       []string
	}{
		{"GET", "/type", nil},
		{"GET", "/type", []string{"Accept-Encoding: gzip"}},
		{"GET", "/similar-type", nil},
		{"GET", "/no-type", nil},
		{"GET", "/length", nil},
		{"GET", "/encoded", []string{"Accept-Encoding: br"}},
		{"GET", "/trailers", nil},
		{"HEAD", "/type", nil},
		{"HEAD", "/empty", nil}, // text/event-stream
		{"GET", "/204", nil},
		{"GET", "/304", nil},
		{"GET", "/206", nil},
		{"GET", "/301", nil},
		{"GET", "/404", nil},
		{"GET", "/503", nil},
		{"POST", "/500", nil},
		{"GET", "/error", nil},
		{"GET", "/big", nil},
		{"HEAD", "/big", nil},
		{"GET", "/big", []string{"Range: bytes=1000000-2000000"}},
		{"GET", "/big", []string{"Range: bytes=0-9,100-109"}},
		{"GET", "/big", []string{"Range: bytes=9000000-"}},
	}
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, request := range requests {
			with := everythingOf(t, cl, request.method, "/with"+request.path, request.header)
			without := everythingOf(t, cl, request.method, "/without"+request.path, request.header)
			if !maps.Equal(with, without) {
				t.Errorf("%s %s %v:\nwith    %v\nwithout %v", request.method, request.path, request.header, with, without)
			}
		}
	})
}

// everythingOf returns everything that a client sees of an answer.
func everythingOf(t *testing.T, cl *testClient, method, path string, header []string) map[string]string {
	t.Helper()
	res := cl.do(t, cl.request(t, method, path, nil, header...))
	body, err := res.text()
	everything := make(map[string]string)
	for name, values := range res.Header {
		everything[name] = fmt.Sprintf("%q", values)
	}
	for name, values := range res.Trailer {
		everything["trailer "+name] = fmt.Sprintf("%q", values)
	}
	delete(everything, "Date")
	if _, boundary, ok := strings.Cut(res.Header.Get("Content-Type"), "boundary="); ok {
		body = strings.ReplaceAll(body, boundary, "")
		delete(everything, "Content-Type")
	}
	everything["status"] = res.Status
	everything["length"] = fmt.Sprint(res.ContentLength)
	if res.ContentLength <= 0 && body == "" {
		// Whether Caddy has noticed by then that nothing follows is random.
		delete(everything, "Content-Length")
		delete(everything, "length")
	}
	everything["encodings"] = fmt.Sprint(res.TransferEncoding)
	everything["body"] = fmt.Sprintf("%x", sha256.Sum256([]byte(body)))
	everything["error"] = fmt.Sprint(err)
	return everything
}

func TestTrailersOfAStreamArrive(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Trailer", "X-Announced")
		io.WriteString(w, "data: 1\n\n")
		w.(http.Flusher).Flush()
		w.Header().Set("X-Announced", "1")
		w.Header().Set(http.TrailerPrefix+"X-Late", "2")
	})
	c := startCaddy(t, withAndWithout("reverse_proxy "+up.addr))
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		var trailers [2]http.Header
		for i, path := range []string{"/with/", "/without/"} {
			res := cl.get(t, path)
			if body, err := res.text(); body != "data: 1\n\n" || err != nil {
				t.Errorf("%s: got %q (%v)", path, body, err)
			}
			trailers[i] = res.Trailer
		}
		if fmt.Sprint(trailers[0]) != fmt.Sprint(trailers[1]) {
			t.Errorf("trailers with %v, without %v", trailers[0], trailers[1])
		}
	})
}

func TestEarlyHintsArriveBeforeTheHeaders(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	for _, contentType := range []string{"text/html", "text/event-stream"} {
		// quic-go's client has its own way to report informational responses.
		for _, proto := range clientProtocols {
			t.Run(contentType+"/"+proto, func(t *testing.T) {
				cl := c.client(proto)
				hints := make(chan string, 10)
				req := cl.request(t, http.MethodGet, "/", nil)
				req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
					Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
						hints <- fmt.Sprint(code, " ", header.Get("Link"))
						return nil
					},
				}))
				client := cl.begin(req)
				call := up.accept(t)
				call.do(func(w http.ResponseWriter) {
					w.Header().Set("Link", "</style.css>; rel=preload")
					w.WriteHeader(http.StatusEarlyHints)
				})
				select {
				case got := <-hints:
					if want := "103 </style.css>; rel=preload"; got != want {
						t.Errorf("got %q, want %q", got, want)
					}
				case <-time.After(patience):
					t.Error("no early hints")
				}
				call.start(contentType)
				res := client.headers(t)
				call.send("data: 1\n\n")
				call.end()
				if body, err := res.text(); body != "data: 1\n\n" || err != nil {
					t.Errorf("got %q (%v)", body, err)
				}
			})
		}
	}
}

func TestAWebSocketWorks(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+
			r.Header.Get("Upgrade")+"\r\nContent-Type: text/event-stream\r\n\r\n")
		io.Copy(conn, rw)
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		reverse_proxy `+up.addr)
	conn, err := net.Dial("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Accept: text/event-stream\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	reader := bufio.NewReader(conn)
	res, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Incremental") != "" {
		t.Fatalf("%s %v", res.Status, res.Header)
	}
	for _, message := range []string{"\x81\x05hello", "data: 1\n\n", strings.Repeat("\x00\xff", 50<<10)} {
		go io.WriteString(conn, message)
		echo := make([]byte, len(message))
		if _, err := io.ReadFull(reader, echo); err != nil || string(echo) != message {
			t.Fatalf("%.20q came back as %.20q (%v)", message, echo, err)
		}
	}
}

// Header operations

func TestOnlyADeferredHeaderOperationHasTheLastWord(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "data: 1\n\n")
	})
	proxy := "\nreverse_proxy " + up.addr + "\n}\n"
	c := startCaddy(t, `
		handle /deferred {
			sse {
				prelude off
			}
			header >Cache-Control deferred`+proxy+`
		handle /deferred-block {
			sse {
				prelude off
			}
			header {
				Cache-Control deferred
				defer
			}`+proxy+`
		handle /at-once {
			sse {
				prelude off
			}
			header Cache-Control at-once`+proxy)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for path, want := range map[string]string{
			"/deferred":       "deferred",
			"/deferred-block": "deferred",
			"/at-once":        "no-cache, no-store, no-transform",
		} {
			res := cl.get(t, path)
			res.text()
			if got := res.Header["Cache-Control"]; !slices.Equal(got, []string{want}) {
				t.Errorf("%s: Cache-Control %q, want %q", path, got, want)
			}
		}
	})
}

// What others see of a request

// reverse_proxy may still be dialing when the upstream's headers arrive: it
// uses a connection that has become free, and keeps dialing one for later. The
// dial reads the request's variables, so nothing may write them.
func TestAStreamLeavesTheRequestsVariablesAlone(t *testing.T) {
	checkLeaks(t)
	handler := newTestHandler(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		`+handler.directive)
	client, call := open(t, c.client("h1"), handler.testUpstream, "/", "Accept: text/event-stream")
	variables := call.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	before := slices.Sorted(maps.Keys(variables))
	call.start("text/event-stream")
	call.send("data: 1\n\n")
	if after := slices.Sorted(maps.Keys(variables)); !slices.Equal(before, after) {
		t.Errorf("%q before, %q after", before, after)
	}
	call.end()
	client.headers(t).text()
}

func TestTheIDOfAStreamIsThatOfItsRequest(t *testing.T) {
	checkLeaks(t)
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "data: 1\n\n")
	})
	c := startCaddy(t, `
		sse {
			prelude off
		}
		header /asked-before X-Id {http.request.uuid}
		header /asked-after >X-Id {http.request.uuid}
		reverse_proxy `+up.addr)
	cl := c.client("h1")
	for i, path := range []string{"/asked-before", "/asked-after"} {
		res := cl.get(t, path)
		res.text()
		if id := c.waitForLog("stream closed", i)["id"]; id != res.Header.Get("X-Id") || id == "" {
			t.Errorf("%s: the stream is %q, the request %q", path, id, res.Header.Get("X-Id"))
		}
	}
}

// Many

func TestThousandsOfShortPOSTStreamsArriveWhole(t *testing.T) {
	checkLeaks(t)
	// The answer echoes the request, so that all answers differ.
	answer := func(request string) string {
		var b strings.Builder
		for i := range 5 {
			fmt.Fprintf(&b, "data: {\"index\":%d,\"delta\":%q}\n\n", i, request[:10])
		}
		fmt.Fprintf(&b, "data: {\"usage\":%d}\n\ndata: [DONE]\n\n", len(request))
		return b.String()
	}
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		request, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for event := range strings.SplitAfterSeq(answer(string(request)), "\n\n") {
			io.WriteString(w, event)
			w.(http.Flusher).Flush()
		}
	})
	c := startCaddy(t, `
		sse {
			heartbeat off
		}
		reverse_proxy `+up.addr, withoutLogs())
	totals := map[string]int{"h1": 4000, "h2": 2000, "h3": 500}
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		total := totals[cl.proto]
		if raceEnabled || testing.Short() {
			total /= 5
		}
		var sent, failed atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for failed.Load() < 10 {
					n := int(sent.Add(1))
					if n > total {
						return
					}
					request := fmt.Sprintf("%010d%s", n, strings.Repeat("prompt ", 300+n%500))
					res, err := cl.begin(cl.request(t, http.MethodPost, "/v1/chat/completions", strings.NewReader(request),
						"Content-Type: application/json", "Accept: application/json")).outcome()
					if err != nil {
						failed.Add(1)
						t.Error(err)
						return
					}
					if got, err := res.text(); got != answer(request) || err != nil {
						failed.Add(1)
						t.Errorf("request %d: got %q (%v)", n, got, err)
					}
				}
			})
		}
		wg.Wait()
	})
}

// Upstreams and clients that break off

func TestAnUpstreamThatBreaksOffIsAnAbortForTheClient(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	handler := newTestHandler(t)
	c := startCaddy(t, `
		sse {
			prelude off
		}
		handle /proxied {
			reverse_proxy `+up.addr+`
		}
		handle /handled {
			`+handler.directive+`
		}`)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		// sofar makes the client read first, because an HTTP/3 reset overtakes
		// data that is on its way.
		sofar := func(t *testing.T, client *exchange, call *upstreamCall, text string, header ...string) *follower {
			t.Helper()
			call.start("text/event-stream", header...)
			body := client.headers(t).follow()
			if text != "" {
				call.send(text)
			}
			body.expect(t, text)
			return body
		}
		t.Run("InMidEvent", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			body := sofar(t, client, call, "data: 1\n\ndata: 2")
			call.abort()
			body.expectAbort(t)
		})
		t.Run("BehindItsHeaders", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			body := sofar(t, client, call, "")
			call.abort()
			body.expectAbort(t)
		})
		t.Run("ShortOfItsContentLength", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			body := sofar(t, client, call, "data: 1\n\n", "Content-Length: 100")
			call.end()
			body.expectAbort(t)
		})
		t.Run("BeforeItsHeaders", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			call.abort()
			if res := client.headers(t); res.StatusCode != http.StatusBadGateway {
				t.Error(res.Status)
			} else {
				res.text()
			}
		})
		t.Run("HandlerPanics", func(t *testing.T) {
			client, call := open(t, cl, handler.testUpstream, "/handled")
			body := sofar(t, client, call, "data: 1\n\n")
			call.panic("a bug in some handler")
			body.expectAbort(t)
		})
		t.Run("HandlerErrs", func(t *testing.T) {
			client, call := open(t, cl, handler.testUpstream, "/handled")
			body := sofar(t, client, call, "data: 1\n\n")
			call.fail(errors.New("a handler's error"))
			body.expectAbort(t)
		})
		t.Run("AndTheNextRequestIsFine", func(t *testing.T) {
			client, call := open(t, cl, up, "/proxied")
			call.start("text/event-stream")
			call.send("data: 1\n\n")
			call.end()
			if got, err := client.headers(t).text(); got != "data: 1\n\n" || err != nil {
				t.Errorf("got %q (%v)", got, err)
			}
		})
	})
}

func TestAClientThatLeavesFreesItsUpstream(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	handler := newTestHandler(t)
	c := startCaddy(t, `
		encode
		sse {
			prelude off
		}
		handle /proxied {
			reverse_proxy `+up.addr+`
		}
		handle /handled {
			`+handler.directive+`
		}`)
	overEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
		for _, source := range []struct {
			path string
			up   *testUpstream
		}{{"/proxied", up}, {"/handled", handler.testUpstream}} {
			t.Run(source.path[1:], func(t *testing.T) {
				stages := []struct {
					name string
					lead func(call *upstreamCall, client *exchange)
				}{
					{"BeforeTheHeaders", func(*upstreamCall, *exchange) {}},
					{"BehindTheHeaders", func(call *upstreamCall, client *exchange) {
						call.start("text/event-stream")
						client.headers(t)
					}},
					{"InMidEvent", func(call *upstreamCall, client *exchange) {
						call.start("text/event-stream")
						call.send("data: 1\n\ndata")
						client.headers(t).follow().expect(t, "data: 1\n\ndata")
					}},
					{"WithoutReadingOn", func(call *upstreamCall, client *exchange) {
						call.start("text/event-stream")
						client.headers(t)
						call.floodUntilStuck()
					}},
				}
				for _, stage := range stages {
					t.Run(stage.name, func(t *testing.T) {
						client, call := open(t, cl, source.up, source.path)
						stage.lead(call, client)
						client.leave()
						call.expectGone()
						call.end()
					})
				}
			})
		}
	})
	for _, entry := range c.logs() {
		if entry.level() == "warn" && entry.logger() == "http.handlers.sse" || strings.Contains(entry.message(), "panic") {
			t.Errorf("logged: %v", entry)
		}
	}
}

// Heartbeats over real sockets

// Their times are tested with a clock in heartbeat_test.go.
func TestASilentStreamsFramesReachTheClientAtOnce(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, `
		handle /often/* {
			sse 200ms
			reverse_proxy `+up.addr+`
		}
		handle /prelude/* {
			sse 1h {
				prelude 200ms
			}
			reverse_proxy `+up.addr+`
		}`)
	const shortest = 150 * time.Millisecond // wait for a frame
	for name, frames := range map[string]int{"often": 5, "prelude": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			atOnceOverEveryProtocol(t, c, func(t *testing.T, cl *testClient) {
				client, call := open(t, cl, up, "/"+name+"/"+cl.proto, acceptStream)
				began := time.Now()
				call.start(eventStream)
				body := client.headers(t).follow()
				text, err := body.wait(func(unread string) bool { return strings.Count(unread, ":heartbeat\n\n") >= frames })
				if err != nil {
					t.Fatalf("after %q: %v", text, err)
				}
				// A busy machine may delay a frame, but never send it early.
				if took := time.Since(began); took < time.Duration(frames)*shortest {
					t.Errorf("%d frames came within %v", frames, took)
				}
				call.send("data: 1\n\n")
				call.end()
				text, err = body.rest()
				if text = strings.ReplaceAll(text, ":heartbeat\n\n", ""); text != "data: 1\n\n" || err != io.EOF {
					t.Errorf("got %q, %v", text, err)
				}
			})
		})
	}
}

// The server decides by the client's own method, and writes no body.
func TestARequestThatWasAHEADGetsNoBody(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	for name, site := range map[string]string{
		"alone":  "sse 1h\nreverse_proxy " + up.addr,
		"shared": sharedSite(up, ""),
		"kept":   "sse 1h {\nresume 1m any\n}\nreverse_proxy " + up.addr,
	} {
		t.Run(name, func(t *testing.T) {
			c := startCaddy(t, "route {\nmethod GET\n"+site+"\n}")
			conn, err := net.Dial("tcp", c.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprint(conn, "HEAD /x HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n")
			call := up.acceptAt(t, "/x")
			call.start(eventStream)
			call.send("data: 1\n\n")
			call.end()
			// The next bytes on the connection must be the next answer.
			fmt.Fprint(conn, "HEAD /y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
			other := up.acceptAt(t, "/y")
			other.start("text/plain")
			other.end()
			text, err := io.ReadAll(conn)
			if _, rest, _ := strings.Cut(string(text), "\r\n\r\n"); err != nil || !strings.HasPrefix(rest, "HTTP/1.1 200") {
				t.Errorf("got %q, %v", text, err)
			}
		})
	}
}
