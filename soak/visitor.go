//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// message is an event as a page gets it.
type message struct {
	name, data string
	id         string // the last one
	number     int    // that its data begins with; 0: none
}

// messages takes a stream apart as it comes (HTML Standard, section 9.2.6).
type messages struct {
	from     *bufio.Reader
	afterCR  bool
	notFirst bool
	id       string // of the block, or the last one
	last     string
	retry    time.Duration // 0: none was told
}

// next is the next event. The error is that of the connection.
func (m *messages) next() (message, error) {
	var event message
	var data strings.Builder
	hasData := false
	for {
		line, err := m.line()
		if err != nil {
			return event, err
		}
		if line == "" {
			m.last = m.id
			if !hasData {
				event.name = ""
				continue
			}
			event.data, event.id = strings.TrimSuffix(data.String(), "\n"), m.last
			first, _, _ := strings.Cut(event.data, " ")
			event.number, _ = strconv.Atoi(first)
			return event, nil
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			event.name = value
		case "data":
			hasData = true
			data.WriteString(value + "\n")
		case "id":
			if !strings.Contains(value, "\x00") {
				m.id = value
			}
		case "retry":
			if ms, err := strconv.ParseUint(value, 10, 31); err == nil {
				m.retry = time.Duration(ms) * time.Millisecond
			}
		}
	}
}

func (m *messages) line() (string, error) {
	var line []byte
	for {
		b, err := m.from.ReadByte()
		if err != nil {
			return "", err
		}
		if afterCR := m.afterCR; b == '\n' && afterCR {
			m.afterCR = false
			continue
		}
		m.afterCR = b == '\r'
		if b != '\n' && b != '\r' {
			line = append(line, b)
			continue
		}
		text := string(line)
		if !m.notFirst {
			text, m.notFirst = strings.TrimPrefix(text, "\uFEFF"), true
		}
		return text, nil
	}
}

// visitor is a client that opens one stream, again and again: by the rules of an
// EventSource with GET, and with POST by those of a library that repeats its
// request.
type visitor struct {
	hop    string // address
	method string
	target string // path and query
	secure bool   // HTTP/2 with TLS
	random *rand.Rand

	id          string // the last one
	retry       time.Duration
	connections int
}

// visitEnd is how a visit has ended.
type visitEnd int

const (
	satisfied  visitEnd = iota // by the visitor
	unanswered                 // there were no headers, so there was no stream
	broken                     // by the connection
	clean                      // the response is complete
)

// errFinal is an answer after which an EventSource does not come back.
var errFinal = errors.New("no event stream")

// userAgent tells connections of one visitor apart in the log.
func (v *visitor) userAgent() string { return fmt.Sprintf("visit/%d", v.connections) }

// visit opens the stream over a connection of its own, and hands its events to
// on until that wants no more. pace slows the reading down; it may be nil.
func (v *visitor) visit(ctx context.Context, c cut, pace func(), on func(message) bool) (visitEnd, error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	v.connections++
	transport := v.transport(c)
	defer transport.CloseIdleConnections()
	base, body := "http://localhost", io.Reader(nil)
	if v.secure {
		base = "https://localhost"
	}
	if v.method == http.MethodPost {
		body = strings.NewReader(`{"stream":true}`)
	}
	request, err := http.NewRequestWithContext(ctx, v.method, base+v.target, body)
	if err != nil {
		return unanswered, err
	}
	request.GetBody = nil // whoever repeats it is the visitor
	request.Header.Set("Accept", "text/event-stream")
	request.Header.Set("User-Agent", v.userAgent())
	if v.method == http.MethodGet {
		request.Header.Set("Cache-Control", "no-cache")
	} else {
		request.Header.Set("Content-Type", "application/json")
	}
	if v.id != "" {
		request.Header.Set("Last-Event-ID", v.id)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return unanswered, nil
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK || response.Header.Get("Content-Type") != "text/event-stream" {
		return unanswered, fmt.Errorf("%w: %s, %s", errFinal, response.Status, response.Header.Get("Content-Type"))
	}
	stream := messages{from: bufio.NewReaderSize(response.Body, 1<<10), id: v.id, last: v.id}
	for {
		if pace != nil {
			pace()
		}
		event, err := stream.next()
		v.id = stream.last
		if stream.retry > 0 {
			v.retry = stream.retry
		}
		switch {
		case err == io.EOF:
			return clean, nil
		case err != nil:
			return broken, nil
		case !on(event):
			return satisfied, nil
		}
	}
}

func (v *visitor) transport(c cut) *http.Transport {
	c.secure = v.secure
	t := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}, DisableCompression: true,
		Protocols: new(http.Protocols), DisableKeepAlives: !v.secure, ReadBufferSize: 1 << 10,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			// Addresses of their own, so that ports do not run out.
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(rand.IntN(250)), byte(1+rand.IntN(250)))}}
			conn, err := dialer.DialContext(ctx, network, v.hop)
			if err != nil {
				return nil, err
			}
			if _, err := io.WriteString(conn, c.String()); err != nil {
				conn.Close()
				return nil, err
			}
			return conn, nil
		},
	}
	if v.secure {
		t.Protocols.SetHTTP2(true)
	} else {
		t.Protocols.SetHTTP1(true)
	}
	return t
}

// comeBack waits for the reconnection time. It is false when ctx is done.
func (v *visitor) comeBack(ctx context.Context) bool {
	wait := v.retry
	if wait == 0 {
		wait = time.Second
	}
	return pause(ctx, wait)
}
