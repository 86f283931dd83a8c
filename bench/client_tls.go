//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"time"
)

// closerFunc is a function that closes something.
type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// openTLS is open for HTTP/2: a connection with one stream. It waits only until
// the request has been sent, because nginx sends the answer's headers with the
// first event.
func (f *fleet) openTLS(ctx context.Context) error {
	transport := &http.Transport{
		// The certificate is one of the bench's own.
		TLSClientConfig:    &tls.Config{InsecureSkipVerify: true},
		ForceAttemptHTTP2:  true,
		DisableCompression: true,
	}
	life, end := context.WithCancel(context.Background())
	s := f.add(closerFunc(func() error {
		end()
		transport.CloseIdleConnections()
		return nil
	}))
	sent := make(chan error, 2)
	traced := httptrace.WithClientTrace(life, &httptrace.ClientTrace{
		WroteRequest: func(info httptrace.WroteRequestInfo) { sent <- info.Err },
	})
	request, err := http.NewRequestWithContext(traced, http.MethodGet, "https://"+f.addr+f.path, nil)
	if err != nil {
		return err
	}
	request.Header.Set("Accept", "text/event-stream")
	request.Header.Set("Cache-Control", "no-cache")
	go func() {
		response, err := transport.RoundTrip(request)
		if err == nil && (response.StatusCode != http.StatusOK || response.ProtoMajor != 2) {
			err = fmt.Errorf("answered %s with status %s", response.Proto, response.Status)
		}
		if err != nil {
			s.end(err)
			sent <- err
			return
		}
		s.read(response.Body, s.body.plain, make([]byte, 2048), 0)
	}()
	select {
	case err = <-sent:
	case <-time.After(60 * time.Second):
		err = fmt.Errorf("a request could not be sent within a minute")
	case <-ctx.Done():
		err = ctx.Err()
	}
	return err
}

// plain takes the content of a body that is in no chunks.
func (b *body) plain(p []byte, each func(block []byte)) error {
	b.content(p, each)
	return nil
}
