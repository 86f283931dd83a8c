package jsonflag

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
)

// documents are request bodies, with whether they ask for a stream.
var documents = []struct {
	text string
	asks bool
}{
	{`{"model":"m","stream":true}`, true},
	{`{"model":"m","stream":false}`, false},
	{"\r\n\t { \"stream\" \n:\t true \r}", true},
	{`{"stream":true,"x":`, true},
	{`{"stream":true`, false}, // the document may continue
	{`{"stream":tru}`, false},
	{`{"stream":truer}`, false},
	{`{"stream":"true"}`, false},
	{`{"stream":1}`, false},
	{`{"stream":null}`, false},
	{`{"stream":[true]}`, false},
	{`{"stream":{"stream":true}}`, false},

	{`{"stream":false,"stream":true}`, false},
	{`{"stream":true,"stream":false}`, true},
	{`{"Stream":true,"streams":true,"strea":true,"":true}`, false},
	{`{"\u0073tream":true}`, false},
	{`{"stre\am":true,"stream":true}`, true},
	{`{"x\"stream":true}`, false},

	{`{"options":{"stream":true},"tools":[{"stream":true}]}`, false},
	{`{"text":"\"stream\":true","more":"\\"}`, false},
	{`{"text":"}","stream":true}`, true},
	{`{"a":[[["]",{"}":1}]]],"b":-1.5e3,"c":null,"stream":true}`, true},
	{`{"text":"\\\"","stream":true}`, true},
	{`{"é":"\ud83d","stream":true}`, true},

	{`[{"stream":true}]`, false},
	{`"stream"`, false},
	{`{"x" "stream":true}`, false},
	{`{"x":,"stream":true}`, false},
	{`{,"stream":true}`, false},
	{`{} {"stream":true}`, false},
	{"\ufeff" + `{"stream":true}`, false},
	{"stream=true", false},
	{"\x1f\x8b\x08", false},
	{"", false},
}

func TestADocumentThatAsksForAStreamIsNoticed(t *testing.T) {
	for _, document := range documents {
		var s Scanner
		s.Scan([]byte(document.text))
		if s.AsksForStream() != document.asks {
			t.Errorf("%s: got %t", document.text, s.AsksForStream())
		}
	}
}

func TestPiecesOfADocumentGiveTheSameAnswer(t *testing.T) {
	for _, document := range documents {
		for cut := range len(document.text) {
			var s Scanner
			s.Scan([]byte(document.text[:cut]))
			s.Scan([]byte(document.text[cut:]))
			if s.AsksForStream() != document.asks {
				t.Errorf("%s, cut after byte %d: got %t", document.text, cut, s.AsksForStream())
			}
		}
		var s Scanner
		for i := range len(document.text) {
			s.Scan([]byte{document.text[i]})
		}
		if s.AsksForStream() != document.asks {
			t.Errorf("%s, byte by byte: got %t", document.text, s.AsksForStream())
		}
	}
}

func TestAStreamIsNoticedAfterAMegabyteOfMessages(t *testing.T) {
	message := `{"role":"user","content":"is \"stream\":true in here? }]"},`
	text := `{"messages":[` + strings.Repeat(message, 1<<20/len(message)) + `{}],"stream":true`
	var s Scanner
	s.Scan([]byte(text))
	if s.Settled() {
		t.Fatal("settled before the end of the value")
	}
	s.Scan([]byte("}"))
	if !s.Settled() || !s.AsksForStream() {
		t.Errorf("settled %t, asks %t", s.Settled(), s.AsksForStream())
	}
}

func TestADeepDocumentIsFollowedWithoutMemory(t *testing.T) {
	deep := []byte(strings.Repeat("[", 1<<16))
	var s Scanner
	s.Scan([]byte(`{"deep":`))
	if allocs := testing.AllocsPerRun(5, func() { s.Scan(deep) }); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestNothingIsFollowedOnceTheAnswerIsKnown(t *testing.T) {
	for _, text := range []string{`{"stream":true,`, `{"stream":false,`, `{"stream":"`, `{}`, `[`, `x`} {
		var s Scanner
		if s.Scan([]byte(text)); !s.Settled() {
			t.Errorf("%s: not settled", text)
		}
		before := s
		if s.Scan([]byte(`{"stream":true}`)); s != before {
			t.Errorf("%s: followed further", text)
		}
	}
}

// asksByDecoding returns what encoding/json makes of a document, and whether it
// is valid. An escaped key is compared as written.
func asksByDecoding(document []byte) (asks, valid bool) {
	var members json.RawMessage
	if json.Unmarshal(document, &members) != nil {
		return false, false
	}
	decoder := json.NewDecoder(bytes.NewReader(document))
	if open, err := decoder.Token(); err != nil || open != json.Delim('{') {
		return false, true
	}
	for decoder.More() {
		start := decoder.InputOffset()
		name, err := decoder.Token()
		if err != nil {
			return false, false
		}
		written := document[start:decoder.InputOffset()]
		var value json.RawMessage
		if decoder.Decode(&value) != nil {
			return false, false
		}
		if name == key && bytes.HasSuffix(written, []byte(`"`+key+`"`)) {
			return string(value) == wanted, true
		}
	}
	return false, true
}

func FuzzScanner(f *testing.F) {
	for i, document := range documents {
		f.Add([]byte(document.text), uint64(i))
	}
	f.Fuzz(func(t *testing.T, document []byte, seed uint64) {
		before := bytes.Clone(document)
		var whole, cut Scanner
		whole.Scan(document)
		cuts := rand.New(rand.NewPCG(seed, 0))
		for rest := document; len(rest) > 0; {
			n := 1 + cuts.IntN(len(rest))
			cut.Scan(rest[:n])
			rest = rest[n:]
		}
		if whole != cut {
			t.Errorf("in one piece %+v, in pieces %+v", whole, cut)
		}
		if !bytes.Equal(document, before) {
			t.Errorf("%q became %q", before, document)
		}
		if asks, valid := asksByDecoding(document); valid && asks != whole.AsksForStream() {
			t.Errorf("%s: got %t, want %t", document, whole.AsksForStream(), asks)
		}
	})
}

func BenchmarkScanner(b *testing.B) {
	text := []byte(`{"messages":["` + strings.Repeat("some words of a long prompt ", 1<<15) + `"],"stream":true}`)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		var s Scanner
		s.Scan(text)
	}
}
