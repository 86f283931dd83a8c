package doctor

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
)

// proxyOf returns the proxy that curl would use for a URL, nil for none. Go's own
// rules use no proxy for loopback addresses, and do not know ALL_PROXY.
func proxyOf(u *url.URL, getenv func(string) string) (*url.URL, error) {
	if skipsProxy(u, first(getenv, "no_proxy", "NO_PROXY")) {
		return nil, nil
	}
	names := []string{u.Scheme + "_proxy"}
	if u.Scheme != "http" { // in a CGI script, HTTP_PROXY is the client's header Proxy
		names = append(names, strings.ToUpper(u.Scheme)+"_PROXY")
	}
	value := first(getenv, append(names, "all_proxy", "ALL_PROXY")...)
	if value == "" {
		return nil, nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	proxy, err := url.Parse(value)
	if err != nil || proxy.Host == "" {
		return nil, fmt.Errorf("the proxy in the environment (%s) is no URL", strings.Join(names, ", "))
	}
	switch proxy.Scheme {
	case "http", "https", "socks5", "socks5h":
		return proxy, nil
	}
	return nil, fmt.Errorf("the proxy in the environment is of the unknown kind %q; there are http, https, socks5, socks5h", clean(proxy.Scheme))
}

func first(getenv func(string) string, names ...string) string {
	for _, name := range names {
		if value := getenv(name); value != "" {
			return value
		}
	}
	return ""
}

// skipsProxy reports whether the URL's host is in the list of hosts, domains and
// networks.
func skipsProxy(u *url.URL, list string) bool {
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	addr, addrErr := netip.ParseAddr(host)
	for item := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == ' ' }) {
		if item == "*" {
			return true
		}
		if network, err := netip.ParsePrefix(item); err == nil && addrErr == nil && network.Contains(addr.Unmap()) {
			return true
		}
		item = strings.Trim(strings.ToLower(item), ".")
		if itemAddr, err := netip.ParseAddr(strings.Trim(item, "[]")); err == nil {
			if addrErr == nil && itemAddr.Unmap() == addr.Unmap() {
				return true
			}
			continue
		}
		if item != "" && (host == item || strings.HasSuffix(host, "."+item)) {
			return true
		}
	}
	return false
}
