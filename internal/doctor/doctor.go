// Package doctor finds out what is between a client and an event stream: who
// holds headers or events back, who cuts streams, and who changes requests. It
// is what `caddy sse check` does.
//
// Measuring (measure.go, plan.go) and concluding (conclude.go, ends.go,
// listen.go) are apart: conclusions are pure functions of traces.
package doctor

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// DefaultFor is how long a check takes at most, and ShortestFor what it needs.
	DefaultFor  = 75 * time.Second
	ShortestFor = 10 * time.Second

	accept       = "text/event-stream"
	cacheControl = "no-cache"

	// maxBody is how much of a request's body a probe counts.
	maxBody = 64 << 10

	version = 1 // of the report
)

// Config is what is checked, and how.
type Config struct {
	URL      string
	Token    string              // of the probe at the URL; empty: there is none
	HTTP     string              // HTTP1, HTTP2 or HTTP3; empty: what TLS agrees on, else HTTP1
	Header   http.Header         // in place of the doctor's own; no values: not sent
	Method   string              // empty: GET, or POST where there is a body
	Data     []byte              // nil: no body
	Resolve  map[string][]string // addresses by host:port
	Insecure bool                // any certificate will do
	For      time.Duration       // bounds everything; 0: DefaultFor

	// Getenv is where the proxies are, as in os.Getenv; nil: there are none.
	Getenv func(string) string
	// Dial connects in place of the network; nil: the network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	Begin    func(plan string) // what will be done, before it is
	Done     func(Test)        // a test is over
	Progress func(line string) // what goes on
}

// check is a check that is under way.
type check struct {
	config Config
	url    *url.URL
	began  time.Time
	stalls *stalls
}

// age is the time since the check began.
func (c *check) age() time.Duration { return time.Since(c.began) }

// Check makes a check. It fails if the configuration makes no sense; whatever
// else goes wrong is in the report.
func Check(ctx context.Context, config Config) (*Report, error) {
	u, err := config.complete()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, config.For, errTimeOver)
	defer cancel()
	c := &check{config: config, url: u, began: time.Now()}
	c.stalls = watchStalls(c.began)
	defer c.stalls.close()

	r := &Report{Version: version, URL: shown(u), Tests: []Test{}, Untold: []string{}, Findings: []Finding{}}
	if config.Token != "" {
		c.ask(ctx, r)
	} else {
		c.listen(ctx, r)
	}
	if ctx.Err() != nil && context.Cause(ctx) != errTimeOver {
		r.Error = "the check was interrupted"
	}
	r.finish(c.age())
	return r, nil
}

// errTimeOver is how a check ends that has taken as long as it may.
var errTimeOver = errors.New("the time is over")

// complete fills in the defaults and reads the URL.
func (c *Config) complete() (*url.URL, error) {
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return nil, errors.New("the URL can't be read")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, errors.New("the URL is not http://… or https://…")
	}
	u.Fragment = ""
	switch c.HTTP {
	case "", HTTP1, HTTP2, HTTP3:
	default:
		return nil, errors.New("--http: there are 1.1, 2 and 3")
	}
	if c.For == 0 {
		c.For = DefaultFor
	}
	if c.For < ShortestFor {
		return nil, errors.New("--for: a check takes at least " + ShortestFor.String())
	}
	if c.Method == "" {
		c.Method = http.MethodGet
		if c.Data != nil {
			c.Method = http.MethodPost
		}
	}
	c.Method = strings.ToUpper(c.Method)
	if c.Token != "" && c.Method != http.MethodGet && c.Method != http.MethodPost {
		return nil, errors.New("--method: a probe answers GET and POST")
	}
	if c.Getenv == nil {
		c.Getenv = func(string) string { return "" }
	}
	if c.Begin == nil {
		c.Begin = func(string) {}
	}
	if c.Done == nil {
		c.Done = func(Test) {}
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	return u, nil
}

// shown is a URL without what may be secret.
func shown(u *url.URL) string {
	plain := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return clean(plain.String())
}
