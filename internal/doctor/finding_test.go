package doctor

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// allFindings has a finding of each code.
var allFindings = []Finding{
	newFinding(headersHeld, HeadersHeld{1}),
	newFinding(buffered, Buffered{4096, true, 2}),
	newFinding(buffered, Buffered{5000, false, 2}),
	newFinding(bufferedToEnd, BufferedToEnd{9, 130000}),
	newFinding(delayed, Delayed{0.2}),
	newFinding(compressed, Compressed{"gzip", true}),
	newFinding(compressed, Compressed{"br", false}),
	newFinding(idleTimeout, IdleTimeout{60, false}),
	newFinding(totalCap, TotalCap{15, true}),
	newFinding(requestChanged, RequestChanged{"Accept", "text/event-stream", "*/*"}),
	newFinding(requestChanged, RequestChanged{"body", "14 bytes", "0 bytes"}),
	newFinding(lastEventIDLost, LastEventIDLost{"check-1", ""}),
	newFinding(http10, HTTP10{"HTTP/1.0"}),
	newFinding(cutOff, Cut{60, 30}),
	newFinding(clumped, Clumped{5, 3}),
}

func TestEveryFindingPointsToAPlaceThatThereIs(t *testing.T) {
	text, err := os.ReadFile("../../docs/deployment.md")
	if err != nil {
		t.Fatal(err)
	}
	var anchors []string
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(text), -1) {
		anchor := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(heading[1]), "")
		anchors = append(anchors, strings.ReplaceAll(anchor, " ", "-"))
	}
	refusal := (&statusError{status: 501}).Error()
	for _, f := range append(allFindings, Finding{Code: "501", Docs: refusal}) {
		places := regexp.MustCompile(`docs/deployment\.md#([a-z0-9-]+)`).FindAllStringSubmatch(strings.Join(append(f.Set, f.Docs), " "), -1)
		if len(places) == 0 {
			t.Errorf("%s points nowhere", f.Code)
		}
		for _, place := range places {
			if !slices.Contains(anchors, place[1]) {
				t.Errorf("%s: docs/deployment.md has no #%s", f.Code, place[1])
			}
		}
	}
}

func TestEveryFindingSaysItsNumbersAndWhatToSet(t *testing.T) {
	for _, f := range allFindings {
		if f.Seen == "" || f.Means == "" || len(f.Set) == 0 || f.Docs == "" {
			t.Errorf("%s: %+v", f.Code, f)
		}
	}
	for _, test := range []struct {
		evidence any
		code     string
		says     string
	}{
		{Buffered{4096, true, 2}, buffered, "4 KiB"},
		{Buffered{5000, false, 2}, buffered, "about 5000 bytes"},
		{IdleTimeout{60, false}, idleTimeout, "60 s"},
		{IdleTimeout{5, true}, idleTimeout, "whole answer"},
		{Clumped{5, 3}, clumped, "5 events"},
	} {
		if f := newFinding(test.code, test.evidence); !strings.Contains(f.Seen, test.says) {
			t.Errorf("%q does not say %q", f.Seen, test.says)
		}
	}
	for seconds, want := range map[float64]string{60: "15s", 30: "15s", 20: "15s", 10: "7s", 5: "3s", 1: "700ms"} {
		if got := heartbeatBelow(seconds); got != want {
			t.Errorf("below %v s: %s, want %s", seconds, got, want)
		}
	}
}
