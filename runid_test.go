package caddysse

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const someToken = "AbCdEfGhIjKlMnOpQrStUg"

func TestARunIDIsReadAsItWasWritten(t *testing.T) {
	for _, n := range []uint64{0, 1, 12, 1<<64 - 1} {
		id := runID{newRunToken(), n}
		if got, ok := parseRunID(id.String()); !ok || got != id {
			t.Errorf("%s is read as %v, %v", id, got, ok)
		}
	}
	if one, other := newRunToken(), newRunToken(); one == other {
		t.Error("two runs have one token")
	}
	id, ok := parseRunID("sse1-" + someToken + ".12")
	if !ok || id.n != 12 || id.String() != "sse1-"+someToken+".12" {
		t.Errorf("%v, %v", id, ok)
	}
}

func TestAMalformedRunIDIsNone(t *testing.T) {
	for _, s := range []string{
		"", "sse1-", "sse1", "12", "sse1-.1", "sse1-" + someToken, "sse1-" + someToken + ".",
		"sse1-" + someToken + ".01", "sse1-" + someToken + ".00", "sse1-" + someToken + ".+1",
		"sse1-" + someToken + ".-1", "sse1-" + someToken + ".1 ", "sse1-" + someToken + ".1.2",
		"sse1-" + someToken + ".18446744073709551616", "sse1-" + someToken + ".1_0", "sse1-" + someToken + ".0x1",
		"sse1-" + someToken[:21] + ".1", "sse1-" + someToken + "A.1", "SSE1-" + someToken + ".1",
		"sse1-" + someToken[:21] + "h.1", // bits beyond the 128
		"sse1-" + someToken[:21] + "\n.1", "sse1-" + someToken[:20] + "\r\n.1",
		"sse1-" + someToken[:21] + "+.1", "sse1-" + someToken[:21] + "=.1", " sse1-" + someToken + ".1",
	} {
		if id, ok := parseRunID(s); ok {
			t.Errorf("%q is read as %v", s, id)
		}
	}
}

func TestNoIDIsShownWithItsToken(t *testing.T) {
	for id, want := range map[string]string{
		"":                             "",
		"42":                           "42",
		"sse1-" + someToken + ".12":    "sse1-AbCd….12",
		"sse1-" + someToken + ".0":     "sse1-AbCd….0",
		"sse1-" + someToken + ".12x":   "sse1-…",
		"sse1-" + someToken[:20] + ".": "sse1-…",
		"sse1-":                        "sse1-…",
	} {
		if got := shortID(id); got != want {
			t.Errorf("%q is shown as %q, want %q", id, got, want)
		}
	}
}

func FuzzParseRunID(f *testing.F) {
	f.Add("sse1-" + someToken + ".12")
	f.Add("sse1-" + someToken + ".0")
	f.Add("sse1-x.1")
	f.Add("sse1-" + someToken[:21] + "\n.1")
	f.Fuzz(func(t *testing.T, s string) {
		if id, ok := parseRunID(s); ok && id.String() != s {
			t.Errorf("%q has another spelling: %q", s, id)
		}
		if short := shortID(s); isRunID(s) && strings.Contains(short, s[len(runIDPrefix):]) && len(s) > len(runIDPrefix)+8 {
			t.Errorf("%q is shown as %q", s, short)
		}
	})
}

func TestARunIsFoundByItsTokenAlone(t *testing.T) {
	var table runTable[string]
	a, b := newRunToken(), newRunToken()
	if _, ok := table.get(a); ok {
		t.Error("an empty table knows a run")
	}
	table.put(a, "a")
	if run, ok := table.get(a); !ok || run != "a" {
		t.Errorf("%q, %v", run, ok)
	}
	if _, ok := table.get(b); ok {
		t.Error("another token is known")
	}
	table.drop(a)
	if _, ok := table.get(a); ok {
		t.Error("a run that was dropped is known")
	}
	for key := range table.runs {
		t.Errorf("%x is left", key)
	}
}

const (
	ours   = "sse1-" + someToken + ".3"
	others = "sse1-broken"
)

// idRequest returns a request as the handler gets it after a rewrite.
func idRequest(target, original string, ids ...string) *http.Request {
	r := httptest.NewRequest("GET", original, nil)
	before := http.Request{Method: r.Method, URL: r.URL, RequestURI: r.RequestURI}
	r = r.WithContext(context.WithValue(r.Context(), caddyhttp.OriginalRequestCtxKey, before))
	r.URL, _ = url.Parse(target)
	if len(ids) > 0 {
		r.Header["Last-Event-Id"] = ids
	}
	return r
}

func TestAnIDOfOursIsTakenOutWhereverItIs(t *testing.T) {
	enc := url.QueryEscape
	for _, c := range []struct {
		name, query string
		header      []string
		brought     string
		wantQuery   string
		wantHeader  []string
	}{
		{"none", "a=1&b=2", nil, "", "a=1&b=2", nil},
		{"the header", "b=2&a=1", []string{ours}, ours, "b=2&a=1", nil},
		{"malformed", "", []string{others}, others, "", nil},
		{"an upstream's", "a", []string{"42"}, "42", "a", []string{"42"}},
		{"the query", "b=2&lastEventId=" + ours + "&a=1", nil, ours, "b=2&a=1", nil},
		{"the other key", "last_event_id=" + ours, nil, ours, "", nil},
		{"another key", "lasteventid=" + ours, nil, "", "lasteventid=" + ours, nil},
		{"an encoded key", "x&last%45ventId=" + ours + "&y", nil, ours, "x&y", nil},
		{"an encoded value", "lastEventId=%73se1%2D" + someToken + "%2e3&c=%2f", nil, ours, "c=%2f", nil},
		{"an upstream's in the query", "lastEventId=7&z=" + enc(ours), nil, "7", "lastEventId=7&z=" + enc(ours), nil},
		{"the header counts", "lastEventId=" + ours, []string{"42"}, "42", "", []string{"42"}},
		{"the header counts, ours", "lastEventId=7", []string{ours}, ours, "lastEventId=7", nil},
		{"an empty header", "lastEventId=" + ours, []string{""}, ours, "", []string{""}},
		{"two lines", "", []string{ours, "42"}, ours, "", []string{"42"}},
		{"twice", "lastEventId=" + ours + "&a=1&&last_event_id=" + others, nil, ours, "a=1&", nil},
		{"bad escapes", "lastEventId=sse1-%zz&%zz=1&a=%z", nil, "sse1-%zz", "%zz=1&a=%z", nil},
		{"odd pairs", "=&a==b&;lastEventId=" + ours + "&&", []string{ours}, ours, "=&a==b&;lastEventId=" + ours + "&&", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			original := "/shown?" + c.query
			r := idRequest("/inside?"+c.query, original, c.header...)
			header := r.Header.Clone()
			if got := broughtID(r); got != c.brought {
				t.Errorf("the client brings %q, want %q", got, c.brought)
			}
			got := withoutRunIDs(r)
			uri := strings.TrimSuffix("/shown?"+c.wantQuery, "?")
			if c.wantQuery == c.query {
				uri = original
			}
			before := got.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
			if got.URL.RawQuery != c.wantQuery || got.RequestURI != uri || before.URL.RawQuery != c.wantQuery || before.RequestURI != uri {
				t.Errorf("query %q, URI %q; original %q, %q", got.URL.RawQuery, got.RequestURI, before.URL.RawQuery, before.RequestURI)
			}
			if got.URL.Path != "/inside" || before.URL.Path != "/shown" {
				t.Errorf("paths %q, %q", got.URL.Path, before.URL.Path)
			}
			if !slices.Equal(got.Header["Last-Event-Id"], c.wantHeader) {
				t.Errorf("header %q, want %q", got.Header["Last-Event-Id"], c.wantHeader)
			}
			if inner := broughtID(got); isRunID(c.brought) && len(c.wantHeader) == 0 && !strings.Contains(c.wantQuery, "astEventId=7") && inner != c.brought {
				t.Errorf("an inner handler finds %q", inner)
			}

			// The original request, which others may be reading, is unchanged.
			was := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
			if !reflect.DeepEqual(r.Header, header) || r.URL.RawQuery != c.query || r.RequestURI != original || was.URL.RawQuery != c.query {
				t.Error("the request itself has been written to")
			}
			if c.wantQuery == c.query && slices.Equal(c.header, c.wantHeader) && got != r {
				t.Error("a request without such an id is copied")
			}
		})
	}
}

func FuzzWithoutRunIDs(f *testing.F) {
	f.Add("a=1&lastEventId=" + ours + "&b=2")
	f.Add("last%5fevent_id=sse1-&&%zz=%")
	f.Add("lastEventId=%73se1-;x=1&+=+")
	f.Fuzz(func(t *testing.T, query string) {
		got := withoutRunIDPairs(query)
		if again := withoutRunIDPairs(got); again != got {
			t.Errorf("%q becomes %q and then %q", query, got, again)
		}
		want, wantErr := url.ParseQuery(query)
		for _, key := range []string{"lastEventId", "last_event_id"} {
			if want[key] = slices.DeleteFunc(want[key], isRunID); len(want[key]) == 0 {
				delete(want, key)
			}
		}
		parsed, err := url.ParseQuery(got)
		if wantErr == nil && (err != nil || !reflect.DeepEqual(parsed, want)) {
			t.Errorf("%q becomes %q", query, got)
		}
		// What remains is unchanged and in the same order.
		pairs := strings.Split(query, "&")
		for pair := range strings.SplitSeq(got, "&") {
			i := slices.Index(pairs, pair)
			if i < 0 && got != "" {
				t.Fatalf("%q becomes %q", query, got)
			}
			pairs = pairs[i+1:]
		}
		if uri := withoutRunIDInURI("/p?" + query); uri != "/p?"+query && uri != strings.TrimSuffix("/p?"+got, "?") {
			t.Errorf("%q becomes %q", "/p?"+query, uri)
		}
	})
}
