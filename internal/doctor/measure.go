package doctor

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/klauspost/compress/zstd"
)

// measurement is one request of a check, and its purpose.
type measurement struct {
	name     string
	script   string // empty: without a probe
	wanted   int    // events of the script
	method   string
	body     []byte
	encoding string // Accept-Encoding
	lastID   string // Last-Event-ID; empty: none
	within   time.Duration
}

// busy is the error of a probe that runs its maximum of scripts.
type busy struct{ limits Limits }

func (busy) Error() string { return "all places of the probe are taken" }

// measure sends the request and reads its answer until that ends, or until the
// time is over. Its only error is busy: other failures are in the trace.
func (c *check) measure(ctx context.Context, m measurement) (*Trace, error) {
	t := &Trace{Name: m.name, Script: m.script, Wanted: m.wanted, Started: c.age()}
	err := c.exchange(ctx, m, t)
	t.Ended = c.age()
	t.Stalls = c.stalls.during(t.Started)
	if _, full := errors.AsType[busy](err); full {
		return nil, err
	}
	if err != nil {
		t.Error = clean(plain(err).Error())
	}
	return t, nil
}

func (c *check) exchange(ctx context.Context, m measurement, t *Trace) error {
	ctx, cancel := context.WithTimeout(ctx, m.within)
	defer cancel()
	r, err := c.request(ctx, m)
	if err != nil {
		return err
	}
	tr, err := c.config.transport(r.URL)
	if err != nil {
		return err
	}
	defer tr.close()
	res, err := tr.RoundTrip(r)
	if err != nil {
		if ctx.Err() != nil {
			t.GivenUp = true
			return errors.New("there was no answer in time")
		}
		return err
	}
	defer res.Body.Close()
	t.Headers = c.age()
	t.note(res)
	if err := c.refusal(m, res); err != nil {
		return err
	}
	c.watch(ctx, res, t)
	return nil
}

func (t *Trace) note(res *http.Response) {
	t.Status = res.StatusCode
	t.Proto = versionOf(res.Proto)
	t.Type = clean(res.Header.Get("Content-Type"))
	t.Encoding = codingOf(res.Header)
	t.Via = clean(strings.Join(res.Header["Via"], ", "))
	t.Server = clean(res.Header.Get("Server"))
	t.Cache = clean(strings.Join(res.Header["Cache-Control"], ", "))
	t.Buffer = clean(res.Header.Get("X-Accel-Buffering"))
}

// versionOf is the name of an answer's HTTP version, as used in requests.
func versionOf(proto string) string {
	version := strings.TrimPrefix(proto, "HTTP/")
	return strings.TrimSuffix(version, ".0") + map[bool]string{true: ".0"}[version == "1.0"]
}

// codingOf is the content coding of an answer, empty for none (RFC 9110, section
// 8.4.1). Anything that is not a coding means text, as it does to browsers.
func codingOf(header http.Header) string {
	for _, value := range header["Content-Encoding"] {
		for coding := range strings.SplitSeq(value, ",") {
			switch coding = strings.ToLower(strings.TrimSpace(coding)); coding {
			case "gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz":
				return coding
			}
		}
	}
	return ""
}

// request makes the request of a measurement.
func (c *check) request(ctx context.Context, m measurement) (*http.Request, error) {
	u := *c.url
	if m.script != "" {
		query := "script=" + url.QueryEscape(m.script)
		if u.RawQuery != "" {
			query = u.RawQuery + "&" + query
		}
		u.RawQuery = query
	}
	var body io.Reader
	if m.body != nil {
		body = bytes.NewReader(m.body)
	}
	r, err := http.NewRequestWithContext(ctx, m.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", accept)
	r.Header.Set("Cache-Control", cacheControl)
	r.Header.Set("User-Agent", "caddy-sse-check")
	r.Header.Set("Accept-Encoding", m.encoding)
	if m.body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if m.lastID != "" {
		r.Header.Set("Last-Event-ID", m.lastID)
	}
	for name, values := range c.config.Header {
		if name == "Host" && len(values) > 0 {
			r.Host = values[0]
			continue
		}
		if len(values) == 0 {
			// net/http adds a user agent of its own, except in place of an empty one.
			values = map[bool][]string{true: {""}}[name == "User-Agent"]
		}
		r.Header[name] = values
	}
	if c.config.Token != "" {
		if r.Header.Get("Authorization") != "" || u.User != nil {
			r.Header.Set("Sse-Probe-Token", c.config.Token)
		} else {
			r.Header.Set("Authorization", "Bearer "+c.config.Token)
		}
	}
	return r, nil
}

// refusal says why an answer is not the expected one; nil: it is.
func (c *check) refusal(m measurement, res *http.Response) error {
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10))
		var said struct {
			Error  string
			Limits *Limits
		}
		ours := m.script != "" && json.Unmarshal(text, &said) == nil && said.Limits != nil
		if ours && res.StatusCode == http.StatusServiceUnavailable {
			return busy{*said.Limits}
		}
		e := &statusError{status: res.StatusCode, via: strings.Join(res.Header["Via"], ", "), server: res.Header.Get("Server"), probe: m.script != ""}
		if ours {
			e.said = said.Error
		}
		return e
	}
	mediaType, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";")
	if mediaType = strings.TrimSpace(mediaType); !strings.EqualFold(mediaType, "text/event-stream") {
		return &statusError{status: res.StatusCode, via: strings.Join(res.Header["Via"], ", "), server: res.Header.Get("Server"), probe: m.script != "", mediaType: mediaType, isType: true}
	}
	return nil
}

// watch reads the body as it arrives.
func (c *check) watch(ctx context.Context, res *http.Response, t *Trace) {
	parser := parserFor(t)
	last := t.Headers
	body := io.Reader(res.Body)
	if t.Encoding != "" {
		body = decoder(t.Encoding, &rawReader{res.Body, func(n int) {
			t.Raw = c.arrive(t.Raw, n)
			t.Longest, last = max(t.Longest, c.age()-last), c.age()
		}})
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			t.Arrivals = c.arrive(t.Arrivals, n)
			if t.Encoding == "" {
				t.Longest, last = max(t.Longest, c.age()-last), c.age()
			}
			parser.write(buf[:n])
		}
		if err != nil {
			t.Longest = max(t.Longest, c.age()-last)
			t.Clean = err == io.EOF
			t.GivenUp = ctx.Err() != nil
			return
		}
	}
}

// maxArrivals bounds how many arrivals of a stream are recorded.
const maxArrivals = 200_000

func (c *check) arrive(arrivals []Arrival, n int) []Arrival {
	arrival := Arrival{At: c.age(), Bytes: int64(n)}
	if len(arrivals) > 0 {
		arrival.Bytes += arrivals[len(arrivals)-1].Bytes
	}
	if len(arrivals) == maxArrivals {
		arrivals[maxArrivals-1] = arrival
		return arrivals
	}
	return append(arrivals, arrival)
}

type rawReader struct {
	io.Reader
	saw func(n int)
}

func (r *rawReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.saw(n)
	}
	return n, err
}

// decoder decodes what has arrived as far as possible. A coding that it does not
// know is not text, and so has no arrivals.
func decoder(coding string, raw io.Reader) io.Reader {
	return &lazyDecoder{coding: coding, raw: raw}
}

type lazyDecoder struct {
	coding string
	raw    io.Reader
	text   io.Reader
}

func (d *lazyDecoder) Read(p []byte) (n int, err error) {
	if d.text == nil {
		switch d.coding {
		case "gzip", "x-gzip":
			d.text, err = gzip.NewReader(d.raw)
		case "deflate":
			d.text, err = zlib.NewReader(d.raw)
		case "zstd":
			var text *zstd.Decoder
			text, err = zstd.NewReader(d.raw, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
			d.text = text
		default:
			_, err := io.Copy(io.Discard, d.raw)
			if err == nil {
				err = io.EOF
			}
			return 0, err
		}
		if err != nil {
			return 0, err
		}
	}
	return d.text.Read(p)
}

// statusError is an answer that is not the expected one.
type statusError struct {
	status      int
	via, server string
	said        string
	probe       bool
	mediaType   string
	isType      bool
}

func (e *statusError) Error() string {
	text := "the answer is " + strconv.Itoa(e.status) + " " + http.StatusText(e.status)
	switch {
	case e.isType && e.mediaType == "":
		text += " without a Content-Type"
	case e.isType:
		text += " of the type " + e.mediaType
	}
	if e.via != "" {
		text += ", Via: " + e.via
	}
	if e.server != "" {
		text += ", Server: " + e.server
	}
	switch {
	case e.said != "":
		text += ": " + e.said
	case e.status == http.StatusNotImplemented:
		text += ": a Caddy with response_buffers answers this to a stream that asks not to be buffered (Incremental, RFC 10036); take response_buffers out there: docs/deployment.md#caddy-in-front-of-caddy"
	case e.status == http.StatusNotFound && e.probe:
		text += ": there is no sse_probe at this URL, or its token is another one"
	case e.isType:
		text += ": it is no event stream"
	}
	return text
}

// plain removes the URL from an error: it may contain secrets.
func plain(err error) error {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		return wrapped.Err
	}
	return err
}

// clean makes text from others safe for a terminal.
func clean(text string) string {
	const limit = 512
	cleaned := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text[:min(len(text), limit)])
	return cleaned
}
