package doctor

import (
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestProxiesAreThoseThatCurlTakes(t *testing.T) {
	for _, test := range []struct{ url, env, want string }{
		{"http://example.com/", "", ""},
		{"http://example.com/", "http_proxy=http://proxy:3128", "http://proxy:3128"},
		{"http://127.0.0.1/", "http_proxy=proxy:3128", "http://proxy:3128"},
		{"http://example.com/", "HTTP_PROXY=http://proxy", ""},
		{"https://example.com/", "HTTPS_PROXY=http://proxy", "http://proxy"},
		{"https://example.com/", "https_proxy=http://lower HTTPS_PROXY=http://upper", "http://lower"},
		{"https://example.com/", "http_proxy=http://proxy", ""},
		{"https://example.com/", "ALL_PROXY=socks5://proxy", "socks5://proxy"},
		{"https://example.com/", "all_proxy=http://proxy no_proxy=example.com", ""},
		{"https://a.example.com/", "all_proxy=http://proxy no_proxy=example.com", ""},
		{"https://a.example.com/", "all_proxy=http://proxy NO_PROXY=.example.com,other", ""},
		{"https://badexample.com/", "all_proxy=http://proxy no_proxy=example.com", "http://proxy"},
		{"https://example.com/", "all_proxy=http://proxy no_proxy=*", ""},
		{"https://10.1.2.3/", "all_proxy=http://proxy no_proxy=10.0.0.0/8", ""},
		{"https://11.1.2.3/", "all_proxy=http://proxy no_proxy=10.0.0.0/8", "http://proxy"},
		{"https://[::1]/", "all_proxy=http://proxy no_proxy=[::1]", ""},
		{"https://example.com/", "all_proxy=http://user:secret@", "error"},
		{"https://example.com/", "all_proxy=ftp://proxy", "error"},
	} {
		u, err := url.Parse(test.url)
		if err != nil {
			t.Fatal(err)
		}
		env := make(map[string]string)
		for pair := range strings.FieldsSeq(test.env) {
			name, value, _ := strings.Cut(pair, "=")
			env[name] = value
		}
		proxy, err := proxyOf(u, func(name string) string { return env[name] })
		got := ""
		if err != nil {
			got = "error"
			if strings.Contains(err.Error(), "secret") {
				t.Error(err)
			}
		} else if proxy != nil {
			got = proxy.String()
		}
		if got != test.want {
			t.Errorf("%s with %q: %q (%v), want %q", test.url, test.env, got, err, test.want)
		}
	}
}

func TestResolveTakesWhatCurlsTakes(t *testing.T) {
	for _, test := range []struct{ value, host, want string }{
		{"example.com:443:127.0.0.1", "example.com:443", "127.0.0.1:443"},
		{"Example.com:443:127.0.0.1", "EXAMPLE.com:443", "127.0.0.1:443"},
		{"+example.com:80:127.0.0.1,[::1]", "example.com:80", "127.0.0.1:80 [::1]:80"},
		{"example.com:443:::1", "example.com:443", "[::1]:443"},
		{"[2001:db8::1]:443:127.0.0.1", "[2001:db8::1]:443", "127.0.0.1:443"},
		{"*:443:127.0.0.1", "any.example:443", "127.0.0.1:443"},
		{"example.com:443:127.0.0.1", "example.com:80", "example.com:80"},
	} {
		resolve, err := ParseResolve([]string{test.value})
		if err != nil {
			t.Errorf("%s: %v", test.value, err)
			continue
		}
		c := Config{Resolve: resolve}
		if got := strings.Join(c.resolve(test.host), " "); got != test.want {
			t.Errorf("%s: %s is %q, want %q (%v)", test.value, test.host, got, test.want, slices.Collect(maps.Keys(resolve)))
		}
	}
	for _, value := range []string{"", "example.com", "example.com:443", "example.com:443:", ":443:127.0.0.1", "example.com:443:host"} {
		if _, err := ParseResolve([]string{value}); err == nil {
			t.Errorf("%q is accepted", value)
		}
	}
}

func TestOwnTimesAreReadWhereEventsSayThem(t *testing.T) {
	for _, test := range []struct {
		id, data string
		want     float64
	}{
		{"1700000000", "", 1700000000},
		{"1700000000123-0", "", 1700000000.123},
		{"1700000000123456", "", 1700000000.123456},
		{"018bcfe5-687b-7000-8000-000000000000", "", 1700000000.123},
		{"urn:uuid:018bcfe5-687b-7000-8000-000000000000", "", 1700000000.123},
		{"", `{"timestamp":"2023-11-14T22:13:20Z"}`, 1700000000},
		{"7", `{"ts":1700000000123}`, 1700000000.123},
		{"7", `{"created":1700000000}`, 1700000000},
		{"7", `{"n":1}`, 0},
		{"", "text", 0},
		{"123456789012345678901234567890", "", 0},
	} {
		got := ownTime(test.id, []byte(test.data))
		if got != got { // NaN: the event has no time
			got = 0
		}
		if diff := got - test.want; diff > 1e-6 || diff < -1e-6 {
			t.Errorf("%q %q: %f, want %f", test.id, test.data, got, test.want)
		}
	}
}

func TestEventsEndWhereTheStandardSaysSo(t *testing.T) {
	for _, test := range []struct {
		body string
		want []int64
	}{
		{"data: a\n\ndata: b\n\n", []int64{9, 18}},
		{"data: a\r\n\r\ndata: b\r\n\r\n", []int64{10, 21}}, // without the last LF
		{"data: a\r\rdata: b\r\r", []int64{9, 18}},
		{": note\n\nid: 1\n\ndata: a\n\n", []int64{24}},
		{"data: a", nil},
	} {
		for _, piece := range []int{1, 3, len(test.body)} {
			trace := new(Trace)
			p := parserFor(trace)
			for rest := test.body; rest != ""; {
				n := min(piece, len(rest))
				p.write([]byte(rest[:n]))
				rest = rest[n:]
			}
			var ends []int64
			for _, event := range trace.Events {
				ends = append(ends, event.To)
			}
			if !slices.Equal(ends, test.want) {
				t.Errorf("%q by %d: %v, want %v", test.body, piece, ends, test.want)
			}
		}
	}
}
