package caddysse_test

import (
	"math"
	"strings"
	"testing"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

func TestAProbesScriptIsReadAsWritten(t *testing.T) {
	for _, test := range []struct {
		script, steps string
		silence       time.Duration
	}{
		{"e", "e", 0},
		{"r", "r", 0},
		{"x", "x", 0},
		{"e0", "e", 0},
		{"e256,c16,w1500ms,r,x", "e256 c16 w1.5s r x", 1500 * time.Millisecond},
		{"w1d", "w24h0m0s", 24 * time.Hour},
		{"2*(e,w1s)", "e w1s e w1s", 2 * time.Second},
		{"e,2*(c),w1s,3*(e64,w2s),x", "e c c w1s e64 w2s e64 w2s e64 w2s x", 7 * time.Second},
		{"1*(e),1*(c)", "e c", 0},
		{"e65536", "e65536", 0},
	} {
		script, err := caddysse.ParseProbeScript(test.script)
		if err != nil {
			t.Errorf("%s: %v", test.script, err)
			continue
		}
		if steps := strings.Join(script.Steps(100), " "); steps != test.steps || script.Silence() != test.silence {
			t.Errorf("%s: %s in %v, want %s in %v", test.script, steps, script.Silence(), test.steps, test.silence)
		}
	}
}

func TestAMalformedProbeScriptIsAnErrorThatNamesThePlace(t *testing.T) {
	for _, test := range []struct{ script, named string }{
		{"", "missing"},
		{",", "empty"},
		{"e,", "empty"},
		{"e,,e", "empty"},
		{"E", `"E"`},
		{"e,z,e", `"z"`},
		{"e65537", "65536"},
		{"c99999999999999999999", "65536"},
		{"e-1", `"e-1"`},
		{"e+1", `"e+1"`},
		{"e 1", `"e 1"`},
		{"e1KiB", `"e1KiB"`},
		{"w", `"w"`},
		{"w0s", `"w0s"`},
		{"w-1s", `"w-1s"`},
		{"w10us", "1ms"},
		{"w1", `"w1"`},
		{"r1", `"r1"`},
		{"xx", `"xx"`},
		{"0*(e)", "0*(e)"},
		{"*(e)", "*(e)"},
		{"-1*(e)", "-1*(e)"},
		{"1048577*(e)", "1048576"},
		{"2*(e", "2*(e"},
		{"2*e", "2*e"},
		{"2*()", "empty"},
		{"2*(e)w1s", "2*(e)w1s"},
		{"2*(e,2*(e))", "2*(e"},
		{"2*(e))", "e)"},
		{"(e)", "(e)"},
		{strings.Repeat("e,", 512) + "e", "1024"},
	} {
		script, err := caddysse.ParseProbeScript(test.script)
		if err == nil {
			t.Errorf("%q is accepted, as %q", test.script, script.Steps(20))
		} else if !strings.Contains(err.Error(), test.named) {
			t.Errorf("%q: %v does not name %s", test.script, err, test.named)
		}
	}
}

func TestWhatAProbesScriptTakesDoesNotOverflow(t *testing.T) {
	script, err := caddysse.ParseProbeScript("1048576*(w200000h,w200000h),1048576*(w200000h)")
	if err != nil || script.Silence() != math.MaxInt64 {
		t.Errorf("%v, %v", script.Silence(), err)
	}
	script, err = caddysse.ParseProbeScript(strings.Repeat("1048576*(e65536),", 60) + "e")
	if err != nil || script.Bytes() <= 1<<20 {
		t.Errorf("%d bytes, %v", script.Bytes(), err)
	}
	script, err = caddysse.ParseProbeScript("16*(e65536)")
	if err != nil || script.Bytes() != 1<<20 {
		t.Errorf("%d bytes, %v", script.Bytes(), err)
	}
}

func TestAPaddedProbeEventHasExactlyItsSize(t *testing.T) {
	natural := len(caddysse.AppendProbeEvent(nil, 1, time.Second, 12, nil, 0))
	for size := range 300 {
		text := caddysse.AppendProbeEvent(nil, 1, time.Second, 12, nil, size)
		if len(text) != max(size, natural) {
			t.Fatalf("%d bytes, want %d: %q", len(text), size, text)
		}
	}
}

// FuzzProbeScript searches for scripts that crash the parser, or whose answers
// exceed the limits that it reports.
func FuzzProbeScript(f *testing.F) {
	for _, seed := range []string{
		"e", "r,w1s,e256,x", "3*(e,w1s),c16", "2*(e,2*(e))", "1048576*(w1ms)", "(", "*", ")*(", "1*(", "e,)", "2*(e),3*(c)", "w9999999999h",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		script, err := caddysse.ParseProbeScript(text)
		if err != nil {
			return
		}
		const limit = 1 << 12
		steps := script.Steps(limit)
		if len(steps) == 0 {
			t.Fatalf("%q is accepted and does nothing", text)
		}
		if len(steps) == limit {
			return
		}
		var silence time.Duration
		for _, step := range steps {
			if wait, ok := strings.CutPrefix(step, "w"); ok {
				d, err := time.ParseDuration(wait)
				if err != nil || d <= 0 {
					t.Fatalf("%q: %q: %v", text, step, err)
				}
				if silence += d; silence < 0 {
					silence = math.MaxInt64
					break
				}
			}
		}
		if silence != script.Silence() {
			t.Errorf("%q takes %v, not %v", text, silence, script.Silence())
		}
		if again, err := caddysse.ParseProbeScript(strings.Join(steps, ",")); err == nil && again.Bytes() != script.Bytes() {
			t.Errorf("%q has %d bytes, written out %d", text, script.Bytes(), again.Bytes())
		}
	})
}
