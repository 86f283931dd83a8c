package eventstreamtest

import (
	"reflect"
	"testing"
)

// The expected results are those that the standard states next to its examples.
func TestParseReadsTheExamplesOfTheStandard(t *testing.T) {
	want := map[string]Result{
		"standard: three messages": {Events: []Event{
			{Type: "message", Data: "This is the first message."},
			{Type: "message", Data: "This is the second message, it\nhas two lines."},
			{Type: "message", Data: "This is the third message."},
		}},
		"standard: named events": {Events: []Event{
			{Type: "add", Data: "73857293"},
			{Type: "remove", Data: "2153"},
			{Type: "add", Data: "113411"},
		}},
		"standard: stock ticker": {Events: []Event{
			{Type: "message", Data: "YHOO\n+2\n10"},
		}},
		"standard: four blocks": {IDCommitted: true, Events: []Event{
			{Type: "message", Data: "first event", LastEventID: "1"},
			{Type: "message", Data: "second event"},
			{Type: "message", Data: " third event"},
		}},
		"standard: four blocks, the last without its blank line": {IDCommitted: true, Events: []Event{
			{Type: "message", Data: "first event", LastEventID: "1"},
			{Type: "message", Data: "second event"},
		}},
		"standard: empty data": {Events: []Event{
			{Type: "message", Data: ""},
			{Type: "message", Data: "\n"},
		}},
		"standard: two identical events": {Events: []Event{
			{Type: "message", Data: "test"},
			{Type: "message", Data: "test"},
		}},
	}
	for _, body := range Bodies() {
		expected, ok := want[body.Name]
		if !ok {
			continue
		}
		delete(want, body.Name)
		t.Run(body.Name, func(t *testing.T) {
			if got := Parse([]byte(body.Text)); !reflect.DeepEqual(got, expected) {
				t.Errorf("got  %+v\nwant %+v", got, expected)
			}
		})
	}
	for name := range want {
		t.Errorf("there is no body %q", name)
	}
}

func TestParseDecodesLikeTheEncodingStandard(t *testing.T) {
	for _, test := range []struct{ body, data string }{
		{"\uFEFFdata: a\n\n", "a"},
		{"data: \uFEFFa\n\n", "\uFEFFa"},
		{"data: \xFF\xFE\n\n", "\uFFFD\uFFFD"},
		{"data: \xE2\x82x\n\n", "\uFFFDx"},
		{"data: \xF0\x9F\x98\n\n", "\uFFFD"},
		{"data: \xED\xA0\x80\n\n", "\uFFFD\uFFFD\uFFFD"},
		{"data: é日😀\n\n", "é日😀"},
	} {
		got := Parse([]byte(test.body)).Events
		if len(got) != 1 || got[0].Data != test.data {
			t.Errorf("%q: got %+v, want the data %q", test.body, got, test.data)
		}
	}
}
