package caddysse

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// resetDelay is how long an abort over HTTP/3 waits for the bytes before it: a
	// reset takes back what has not arrived (RFC 9000, section 3.2).
	resetDelay = 200 * time.Millisecond

	// probeWatch is how soon a silent probe notices that the process exits.
	probeWatch = 50 * time.Millisecond
)

// probeAnswer is the answer to one request.
type probeAnswer struct {
	w        http.ResponseWriter
	ctx      context.Context
	control  *http.ResponseController // for flushes
	deadline *http.ResponseController // for deadlines of the connection
	http3    bool
	request  []byte // what it reports about its request

	began time.Time // when its headers went out
	n     int       // events
	sent  int       // bytes
}

// newProbeAnswer makes an answer that the server's timeouts do not end, just as
// they do not end streams.
func newProbeAnswer(w http.ResponseWriter, r *http.Request, request []byte) *probeAnswer {
	if _, idle := caddyhttp.IdleTimeoutsFromContext(serverContext(r.Context())); idle != nil {
		idle.Ctrl, idle.Logger = noDeadlines, noLog
	}
	a := &probeAnswer{
		w:        w,
		ctx:      r.Context(),
		control:  http.NewResponseController(w),
		deadline: connectionWriter(w),
		http3:    r.ProtoMajor == 3,
		request:  request,
	}
	// If deadlines are not supported, there is none to clear.
	_ = a.deadline.SetReadDeadline(time.Time{})
	_ = a.deadline.SetWriteDeadline(time.Time{})
	return a
}

// serverContext is the request's context before the outermost sse handler, which
// gives the handlers after it idle timeouts of their own.
func serverContext(ctx context.Context) context.Context {
	for {
		outer, ok := ctx.Value(exchangeKey{}).(*exchange)
		if !ok {
			return ctx
		}
		ctx = outer.r.Context()
	}
}

// errProbeCut ends a probe that has not finished its script.
var errProbeCut = errors.New("the probe was cut")

// play sends the answer. It ends with an abort if the script asks for one, the
// process exits or the client takes nothing.
func (a *probeAnswer) play(script probeScript) error {
	header := a.w.Header()
	header["Content-Type"] = []string{eventStreamType}
	newHeaderPolicy("", "").apply(header)
	a.w.WriteHeader(http.StatusOK)
	a.began = time.Now()
	err := a.control.Flush()
	for _, group := range script {
		for range group.times {
			for _, step := range group.steps {
				if err == nil {
					err = a.do(step)
				}
			}
			if err != nil {
				break
			}
		}
	}
	if err != nil && a.ctx.Err() == nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

func (a *probeAnswer) do(step probeStep) error {
	switch step.kind {
	case stepSilence:
		return a.wait(step.silence)
	case stepAbort:
		if a.http3 {
			_ = a.wait(resetDelay)
		}
		return errProbeCut
	case stepComment:
		padding := max(step.size-smallProbeComment, 0)
		return a.write([]byte(":" + strings.Repeat("x", padding) + "\n"))
	case stepRequest:
		a.n++
		return a.write(appendProbeEvent(nil, a.n, time.Since(a.began), a.sent, a.request, 0))
	default:
		a.n++
		return a.write(appendProbeEvent(nil, a.n, time.Since(a.began), a.sent, nil, step.size))
	}
}

// write passes one step on. Its deadline is removed afterwards: over HTTP/2, an
// expired deadline resets even a silent stream.
func (a *probeAnswer) write(text []byte) error {
	_ = a.deadline.SetWriteDeadline(time.Now().Add(probePatience))
	n, err := a.w.Write(text)
	a.sent += n
	if err == nil {
		err = a.control.Flush()
	}
	_ = a.deadline.SetWriteDeadline(time.Time{})
	return err
}

// wait is a silence. A probe of a replaced configuration is not told that the
// process exits, so it checks.
func (a *probeAnswer) wait(silence time.Duration) error {
	until := time.Now().Add(silence)
	for {
		left := time.Until(until)
		if left <= 0 {
			return nil
		}
		select {
		case <-a.ctx.Done():
			return a.ctx.Err()
		case <-time.After(min(left, probeWatch)):
			if exit.exiting() {
				return errProbeCut
			}
		}
	}
}

// appendProbeEvent appends an event, padded to a size. request is what it reports
// about the request, if it does.
func appendProbeEvent(text []byte, n int, at time.Duration, sent int, request []byte, size int) []byte {
	begin := len(text)
	if request != nil {
		text = append(text, "event: request\n"...)
	}
	text = fmt.Appendf(text, "id: %d\ndata: {\"n\":%d,\"at\":%.6f,\"sent\":%d", n, n, at.Seconds(), sent)
	if request != nil {
		text = append(append(text, ','), request...)
	}
	const end, pad, padEnd = "}\n\n", `,"pad":"`, `"`
	missing := size - (len(text) - begin + len(end))
	if padding := missing - len(pad) - len(padEnd); padding >= 0 {
		text = append(text, pad...)
		text = append(text, strings.Repeat("x", padding)...)
		text = append(text, padEnd...)
	} else if missing > 0 { // a member does not fit
		text = append(text, strings.Repeat(" ", missing)...)
	}
	return append(text, end...)
}
