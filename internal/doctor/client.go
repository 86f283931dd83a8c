package doctor

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// The supported versions of HTTP.
const (
	HTTP1 = "1.1"
	HTTP2 = "2"
	HTTP3 = "3"
)

// dialTimeout bounds how long connecting may take.
const dialTimeout = 15 * time.Second

// transport is a client with one connection: each test has one of its own, so
// that a fault of one connection can't affect two tests.
type transport struct {
	http.RoundTripper
	close func()
}

func (c *Config) transport(u *url.URL) (transport, error) {
	secure := &tls.Config{InsecureSkipVerify: c.Insecure}
	if c.HTTP == HTTP3 {
		return c.http3(u, secure)
	}
	proxy, err := proxyOf(u, c.Getenv)
	if err != nil {
		return transport{}, err
	}
	protocols := new(http.Protocols)
	switch {
	case c.HTTP == HTTP1, c.HTTP == "" && u.Scheme == "http":
		protocols.SetHTTP1(true)
	case c.HTTP == "":
		protocols.SetHTTP1(true)
		protocols.SetHTTP2(true)
	case u.Scheme == "https":
		protocols.SetHTTP2(true)
	case proxy != nil:
		return transport{}, errors.New("HTTP/2 in clear does not go through a proxy; use --http 1.1, or set no_proxy")
	default:
		protocols.SetUnencryptedHTTP2(true)
	}
	t := &http.Transport{
		Protocols:           protocols,
		TLSClientConfig:     secure,
		TLSHandshakeTimeout: dialTimeout,
		DisableCompression:  true, // each test sets Accept-Encoding itself
		Proxy:               func(*http.Request) (*url.URL, error) { return proxy, nil },
		DialContext:         c.dial,
	}
	return transport{t, t.CloseIdleConnections}, nil
}

// http3 ignores proxies: no proxy in common use supports it.
func (c *Config) http3(u *url.URL, secure *tls.Config) (transport, error) {
	if u.Scheme != "https" {
		return transport{}, errors.New("HTTP/3 needs an https URL")
	}
	t := &http3.Transport{
		TLSClientConfig:    secure,
		QUICConfig:         &quic.Config{MaxIdleTimeout: c.For + time.Minute, HandshakeIdleTimeout: dialTimeout},
		DisableCompression: true,
		Dial: func(ctx context.Context, addr string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			var all []error
			for _, addr := range c.resolve(addr) {
				conn, err := quic.DialAddrEarly(ctx, addr, tlsConfig, config)
				if err == nil {
					return conn, nil
				}
				all = append(all, err)
			}
			return nil, errors.Join(all...)
		},
	}
	return transport{t, func() { t.Close() }}, nil
}

// dial connects, to the address of --resolve if there is one.
func (c *Config) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	dial := c.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	var all []error
	for _, addr := range c.resolve(addr) {
		conn, err := dial(ctx, network, addr)
		if err == nil {
			return conn, nil
		}
		all = append(all, err)
	}
	return nil, errors.Join(all...)
}

func (c *Config) resolve(addr string) []string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return []string{addr}
	}
	for _, host := range []string{strings.ToLower(host), "*"} {
		if addrs := c.Resolve[net.JoinHostPort(host, port)]; len(addrs) > 0 {
			return addrs
		}
	}
	return []string{addr}
}

// ParseResolve parses host:port:addr[,addr...], as curl does.
func ParseResolve(values []string) (map[string][]string, error) {
	resolve := make(map[string][]string)
	for _, value := range values {
		host, rest, _ := strings.Cut(strings.TrimPrefix(value, "+"), ":")
		if inner, after, found := strings.Cut(value, "]:"); found && strings.HasPrefix(value, "[") {
			host, rest = inner[1:], after
		}
		port, list, found := strings.Cut(rest, ":")
		if host == "" || port == "" || list == "" || !found {
			return nil, fmt.Errorf("--resolve: %q is not host:port:address", value)
		}
		var addrs []string
		for addr := range strings.SplitSeq(list, ",") {
			addr = strings.Trim(addr, "[]")
			if net.ParseIP(addr) == nil {
				return nil, fmt.Errorf("--resolve: %q is no IP address", addr)
			}
			addrs = append(addrs, net.JoinHostPort(addr, port))
		}
		resolve[net.JoinHostPort(strings.ToLower(host), port)] = addrs
	}
	return resolve, nil
}
