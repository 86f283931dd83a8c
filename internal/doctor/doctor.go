// Package doctor finds out what is between a client and an event stream: what
// holds headers or events back, what cuts streams, and what changes requests. It
// is `caddy sse check`.
//
// Measuring (measure.go, plan.go) and concluding (conclude.go, ends.go,
// listen.go) are separate: conclusions are pure functions of traces.
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
	// DefaultFor is the default for Config.For, and ShortestFor the shortest that
	// is enough.
	DefaultFor  = 75 * time.Second
	ShortestFor = 10 * time.Second

	accept       = "text/event-stream"
	cacheControl = "no-cache"

	// maxBody is how much of a request's body a probe counts.
	maxBody = 64 << 10

	version = 1 // of the report
)

// Config says what to check, and how.
type Config struct {
	URL      string
	Token    string              // of the probe at the URL; empty: check without a probe
	HTTP     string              // HTTP1, HTTP2 or HTTP3; empty: what TLS negotiates, else HTTP1
	Header   http.Header         // replaces the doctor's own fields; no values: removes one
	Method   string              // empty: GET, or POST with Data
	Data     []byte              // nil: no body
	Resolve  map[string][]string // addresses by host:port
	Insecure bool                // accept any certificate
	For      time.Duration       // the longest time for the whole check; 0: DefaultFor

	// Getenv returns the environment variables for proxies, like os.Getenv; nil:
	// there are none.
	Getenv func(string) string
	// Dial connects instead of the network; nil: the network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	Begin    func(plan string) // says what the check will do, before it starts
	Done     func(Test)        // is called after each test
	Progress func(line string) // says what the check is doing
}

// check is a running check.
type check struct {
	config Config
	url    *url.URL
	began  time.Time
	stalls *stalls
}

// age is the time since the check began.
func (c *check) age() time.Duration { return time.Since(c.began) }

// Check runs a check. It returns an error only if the configuration is invalid;
// all other failures are in the report.
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

// errTimeOver ends a check that has used up its time.
var errTimeOver = errors.New("the time is over")

// complete fills in the defaults and parses the URL.
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

// shown is a URL without the parts that may be secret.
func shown(u *url.URL) string {
	plain := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return clean(plain.String())
}
