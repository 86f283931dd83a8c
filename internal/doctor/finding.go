package doctor

import (
	"fmt"
	"strconv"
	"time"
)

// The codes of findings.
const (
	headersHeld     = "headers_held"
	buffered        = "buffered"
	bufferedToEnd   = "buffered_to_end"
	delayed         = "delayed"
	compressed      = "compressed"
	idleTimeout     = "idle_timeout"
	totalCap        = "total_cap"
	requestChanged  = "request_changed"
	lastEventIDLost = "last_event_id_lost"
	http10          = "http_1_0"
	cutOff          = "cut"
	clumped         = "clumped"
)

// Finding is one fault that streams meet on the way.
type Finding struct {
	Code     string   `json:"code"`
	Seen     string   `json:"seen"`     // in numbers
	Means    string   `json:"means"`    // for a stream
	Set      []string `json:"set"`      // in this module, and in common proxies
	Docs     string   `json:"docs"`     // where to read more
	Evidence any      `json:"evidence"` // one of the types below
}

// The evidence for findings. Durations are in seconds.
type (
	HeadersHeld struct {
		HeldSeconds float64 `json:"held_seconds"`
	}
	Buffered struct {
		BufferBytes int64   `json:"buffer_bytes"` // within a factor of two, unless exact
		Exact       bool    `json:"exact"`
		HeldSeconds float64 `json:"held_seconds"`
	}
	BufferedToEnd struct {
		HeldSeconds float64 `json:"held_seconds"`
		HeldBytes   int64   `json:"held_bytes"`
	}
	Delayed struct {
		DelaySeconds float64 `json:"delay_seconds"`
	}
	Compressed struct {
		ContentEncoding string `json:"content_encoding"`
		Flushed         bool   `json:"flushed"` // after each event
	}
	IdleTimeout struct {
		Seconds float64 `json:"seconds"`
		Clean   bool    `json:"clean"` // it looked like a complete answer
	}
	TotalCap struct {
		Seconds float64 `json:"seconds"`
		Clean   bool    `json:"clean"`
	}
	RequestChanged struct {
		Header  string `json:"header"` // or method, or body
		Sent    string `json:"sent"`
		Arrived string `json:"arrived"`
	}
	LastEventIDLost struct {
		Sent    string `json:"sent"`
		Arrived string `json:"arrived"`
	}
	HTTP10 struct {
		Arrived string `json:"arrived"`
	}
	Cut struct {
		AgeSeconds     float64 `json:"age_seconds"`
		SilenceSeconds float64 `json:"silence_seconds"`
	}
	Clumped struct {
		Events        int     `json:"events"`
		SpreadSeconds float64 `json:"spread_seconds"` // by their own times
	}
)

// Sections of docs/deployment.md.
const (
	docs         = "docs/deployment.md"
	docsKills    = docs + "#the-four-things-that-kill-a-stream-on-the-way"
	docsTimers   = docs + "#timers-by-vendor"
	docsSettings = docs + "#settings-on-their-side"
	docsNginx    = docs + "#nginx"
	docsApache   = docs + "#apache-httpd"
	docsHAProxy  = docs + "#haproxy"
	docsEnvoy    = docs + "#envoy"
	docsAWS      = docs + "#aws"
	docsAzure    = docs + "#azure"
	docsGoogle   = docs + "#google-cloud"
	docsFastly   = docs + "#fastly"
	docsCaddy    = docs + "#caddy-in-front-of-caddy"
)

func newFinding(code string, evidence any) Finding {
	f := Finding{Code: code, Evidence: evidence}
	switch e := evidence.(type) {
	case HeadersHeld:
		f.Seen = fmt.Sprintf("The response headers came with the first byte of the body, %s after they had been sent.", secondsOf(e.HeldSeconds))
		f.Means = "A hop between here and there holds the headers back until a byte of the body follows. An EventSource stays in CONNECTING until then."
		f.Set = []string{
			"here: leave `prelude` on (its default is 1s): that comment makes the hop send the headers",
			"nginx with HTTP/2: nothing to set there (" + docsNginx + ")",
		}
		f.Docs = docsNginx
	case Buffered:
		size := "about " + bytesOf(e.BufferBytes)
		if e.Exact {
			size = bytesOf(e.BufferBytes)
		}
		f.Seen = fmt.Sprintf("Events were held back until %s had come together, for up to %s.", size, secondsOf(e.HeldSeconds))
		f.Means = "A hop between here and there collects the body in a buffer and passes it on when that is full. Events come late and in clumps, and heartbeats do not get through."
		f.Set = []string{
			"nginx: `proxy_buffering off`, or take X-Accel-Buffering out of `proxy_ignore_headers` (" + docsNginx + ")",
			"Caddy: take `response_buffers` out of `reverse_proxy` (" + docsCaddy + ")",
			"Azure Application Gateway: disable the response buffer (" + docsAzure + ")",
			"here, where the hop can't be changed: `heartbeat_style` with a `pad` above the buffer's size",
		}
		f.Docs = docsSettings
	case BufferedToEnd:
		f.Seen = fmt.Sprintf("Nothing arrived before the answer was over: %s were held back for up to %s.", bytesOf(e.HeldBytes), secondsOf(e.HeldSeconds))
		f.Means = "A hop between here and there waits for the whole answer, or for more than the check has sent. A stream that goes on never arrives."
		f.Set = []string{
			"nginx: `proxy_buffering off`, or take X-Accel-Buffering out of `proxy_ignore_headers` (" + docsNginx + ")",
			"Caddy: take `response_buffers` out of `reverse_proxy` (" + docsCaddy + ")",
			"API Gateway: the response transfer mode `STREAM` (" + docsAWS + ")",
			"a scanner that needs complete bodies: an exception for this path",
		}
		f.Docs = docsSettings
	case Delayed:
		f.Seen = fmt.Sprintf("Small events arrived %s late.", secondsOf(e.DelaySeconds))
		f.Means = "A hop between here and there waits for more data before it sends small pieces. Nothing is lost, but every event is late."
		f.Set = []string{
			"HAProxy: `option http-no-delay` (" + docsHAProxy + ")",
			"programs of your own: TCP_NODELAY, and a flush after each event",
			"proxies written in Go: `FlushInterval: -1`",
		}
		f.Docs = docsHAProxy
	case Compressed:
		f.Seen = fmt.Sprintf("The answer came with Content-Encoding %s, and each event came at once.", clean(e.ContentEncoding))
		f.Means = "A hop between here and there compresses the stream although Cache-Control says no-transform. It works as long as that hop flushes after each event."
		if !e.Flushed {
			f.Seen = fmt.Sprintf("The answer came with Content-Encoding %s, and events waited in the compressor.", clean(e.ContentEncoding))
			f.Means = "A hop between here and there compresses the stream, although Cache-Control says no-transform, and does not flush. Events come late and in clumps."
		}
		f.Set = []string{
			"Apache: `SetEnv no-gzip 1` for this path (" + docsApache + ")",
			"nginx: take text/event-stream out of `gzip_types` (" + docsNginx + ")",
			"a CDN: a rule without compression for this path (" + docsSettings + ")",
			"here: leave `compression` at `deny`, and no-transform in `cache_control`",
		}
		f.Docs = docsApache
	case IdleTimeout:
		f.Seen = fmt.Sprintf("A stream was cut after %s without a byte%s, and streams with an event each second lived longer.", secondsOf(e.Seconds), likeWhole(e.Clean))
		f.Means = "A hop between here and there cuts streams that are silent for that long. Heartbeats at a shorter interval keep a stream alive."
		f.Set = []string{
			fmt.Sprintf("here: `heartbeat %s` or less", heartbeatBelow(e.Seconds)),
			"nginx: `proxy_read_timeout` (" + docsNginx + "); HAProxy: `timeout client` and `timeout server` (" + docsHAProxy + "); others: " + docsTimers,
		}
		f.Docs = docsTimers
	case TotalCap:
		f.Seen = fmt.Sprintf("Two streams that began at different times were cut at the same age, %s%s, although an event was sent each second.", secondsOf(e.Seconds), likeWhole(e.Clean))
		f.Means = "A hop between here and there limits how long an answer may take. Heartbeats do not change that."
		f.Set = []string{
			"Envoy: the route's `timeout: 0s` (" + docsEnvoy + ")",
			"Google Cloud: the backend service's timeout, Cloud Run's request timeout (" + docsGoogle + ")",
			"API Gateway: " + docsAWS,
			fmt.Sprintf("here, where the cap can't be raised: `max_duration %s`, so that streams end cleanly", below(e.Seconds)),
		}
		f.Docs = docsKills
	case RequestChanged:
		f.Seen = fmt.Sprintf("%s was %s, and arrived as %s.", e.Header, quoted(e.Sent), quoted(e.Arrived))
		f.Means = meansChanged(e.Header)
		f.Set = []string{
			"the hop that changes it: pass it on unchanged",
			"CloudFront: an origin request policy with `Accept` (" + docsAWS + ")",
		}
		if e.Header == "Accept" {
			f.Set = append(f.Set, "here, where the hop can't be changed: `resumable always`")
		}
		f.Docs = docsSettings
	case LastEventIDLost:
		f.Seen = fmt.Sprintf("Last-Event-ID was %s, and arrived as %s.", quoted(e.Sent), quoted(e.Arrived))
		f.Means = "A client that reconnects can't say where it was. It misses what was sent in the meantime, or gets everything again."
		f.Set = []string{
			"the hop that removes it: pass Last-Event-ID on",
			"CloudFront: an origin request policy with `Last-Event-ID` (" + docsAWS + ")",
		}
		f.Docs = docsAWS
	case HTTP10:
		f.Seen = fmt.Sprintf("The request arrived as %s.", clean(e.Arrived))
		f.Means = "A hop uses HTTP/1.0 for its requests. Each stream takes a connection that is never used again, and an aborted answer looks complete to the client."
		f.Set = []string{"nginx: `proxy_http_version 1.1;` and `proxy_set_header Connection \"\";` (" + docsNginx + ")"}
		f.Docs = docsNginx
	case Cut:
		f.Seen = fmt.Sprintf("The stream was broken off at an age of %s, after %s without a byte.", secondsOf(e.AgeSeconds), secondsOf(e.SilenceSeconds))
		f.Means = "A hop between here and there, or the server itself, has broken the answer off. Without a probe the check can't tell which, or why."
		f.Set = []string{
			"compare the age and the silence with the timers of the hops on the way: " + docsTimers,
			"here: switch `sse_probe` on and check with its token, which distinguishes an idle timer from a cap",
		}
		f.Docs = docsTimers
	case Clumped:
		f.Seen = fmt.Sprintf("%d events arrived together, although their own times are %s apart.", e.Events, secondsOf(e.SpreadSeconds))
		f.Means = "Events were held back after they were created: by a buffer on the way, or by the server itself."
		f.Set = []string{
			"here: switch `sse_probe` on and check with its token, which distinguishes a buffer on the way from one at the server",
			"nginx: `proxy_buffering off` (" + docsNginx + "); Azure: " + docsAzure + "; others: " + docsSettings,
		}
		f.Docs = docsSettings
	}
	return f
}

func meansChanged(header string) string {
	switch header {
	case "Accept":
		return "This module decides by Accept which streams it may end early and which get a reconnection time. No stream of a client behind this hop is resumable."
	case "Cache-Control":
		return "This module recognises an EventSource by no-cache in its request. For clients behind this hop it aborts streams that it would end cleanly, and `reconnect_on` does nothing."
	case "method":
		return "A POST does not arrive as a POST."
	}
	return "The body of a POST does not arrive as it was sent."
}

func likeWhole(clean bool) string {
	if clean {
		return " (it looked like a whole answer)"
	}
	return ""
}

func quoted(text string) string {
	if text == "" {
		return "nothing"
	}
	return strconv.Quote(text)
}

// heartbeatBelow is a heartbeat that is short enough for a timer of this many
// seconds.
func heartbeatBelow(seconds float64) string {
	return below(min(seconds, 20))
}

// below is about three quarters, in whole seconds if possible.
func below(seconds float64) string {
	d := time.Duration(seconds * 0.75 * float64(time.Second))
	if d >= 2*time.Second {
		return d.Truncate(time.Second).String()
	}
	return max(d.Truncate(100*time.Millisecond), 100*time.Millisecond).String()
}

func secondsOf(s float64) string {
	return strconv.FormatFloat(s, 'f', -1, 64) + " s"
}

func told(d time.Duration) string { return secondsOf(round(d)) }

func bytesOf(n int64) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return strconv.FormatInt(n>>20, 10) + " MiB"
	case n >= 1<<10 && n%(1<<10) == 0:
		return strconv.FormatInt(n>>10, 10) + " KiB"
	}
	return countOf(int(n), "byte")
}

func countOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}
