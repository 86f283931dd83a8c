package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

// errIdle is why the hop breaks a response off.
var errIdle = errors.New("no byte within the idle timeout")

// Hop is a proxy between the browser and Caddy, like a load balancer or a CDN: it
// breaks off a response that sends no byte for as long as idle. It records in
// endings what it sees of each.
func Hop(caddy *url.URL, idle time.Duration, endings *Endings) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(caddy)
			r.Out.Host = r.In.Host
			ctx, cancel := context.WithCancelCause(r.Out.Context())
			r.Out = r.Out.WithContext(context.WithValue(ctx, cancelKey{}, cancel))
		},
		FlushInterval: -1,
		// Compression is up to the browser and Caddy.
		Transport: &http.Transport{DisableCompression: true},
		ErrorLog:  log.New(io.Discard, "", 0), // cuts are intended
		ModifyResponse: func(response *http.Response) error {
			cancel := response.Request.Context().Value(cancelKey{}).(context.CancelCauseFunc)
			response.Body = &idleBody{
				ReadCloser: response.Body,
				request:    response.Request,
				cancel:     cancel,
				idle:       idle,
				endings:    endings,
				seen:       Ending{Status: response.StatusCode},
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.WriteHeader(http.StatusBadGateway)
		},
	}
}

type cancelKey struct{}

// idleBody is the body of a response that passes through the proxy.
type idleBody struct {
	io.ReadCloser
	request *http.Request
	cancel  context.CancelCauseFunc
	idle    time.Duration
	endings *Endings
	seen    Ending
	over    bool
}

func (b *idleBody) Read(p []byte) (int, error) {
	timer := time.AfterFunc(b.idle, func() { b.cancel(errIdle) })
	n, err := b.ReadCloser.Read(p)
	timer.Stop()
	b.seen.Bytes += int64(n)
	if err != nil && !b.over {
		b.over = true
		if context.Cause(b.request.Context()) == errIdle {
			b.endings.say(b.request, fmt.Sprintf("an idle timer on the way cut it: %v s without a byte", b.idle.Seconds()))
		}
		b.seen.Clean = err == io.EOF
		b.endings.ended(b.request, b.seen)
	}
	return n, err
}

func (b *idleBody) Close() error {
	b.cancel(nil)
	return b.ReadCloser.Close()
}
