package caddysse

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

const (
	// maxProbeScript is the length of the longest script, in bytes.
	maxProbeScript = 1 << 10

	// maxProbeSize is the size of the largest event or comment, in bytes.
	maxProbeSize = 64 << 10

	// maxProbeBytes is the size of the longest answer.
	maxProbeBytes = 1 << 20

	// maxProbeRepeats and minProbeSilence prevent a script that takes longer to
	// count than to answer.
	maxProbeRepeats = 1 << 20
	minProbeSilence = time.Millisecond

	// smallProbeEvent is more than an event without padding takes.
	smallProbeEvent = 96

	// smallProbeComment is the size of the shortest comment line, ":\n".
	smallProbeComment = 2
)

// probeStep is one step of a script.
type probeStep struct {
	kind    stepKind
	size    int           // of an event or a comment, in bytes; 0: its natural size
	silence time.Duration // of a silence
}

type stepKind byte

const (
	stepEvent   stepKind = 'e'
	stepComment stepKind = 'c'
	stepSilence stepKind = 'w'
	stepRequest stepKind = 'r'
	stepAbort   stepKind = 'x'
)

// probeGroup is a group of steps that are repeated together.
type probeGroup struct {
	times int
	steps []probeStep
}

// probeScript is what a probe answers with. Syntax:
//
//	script = part *( "," part )
//	part   = step / number "*(" step *( "," step ) ")"
//	step   = "e" [ size ] / "c" [ size ] / "w" duration / "r" / "x"
type probeScript []probeGroup

func parseProbeScript(text string) (probeScript, error) {
	if text == "" {
		return nil, errors.New("the script is missing")
	}
	if len(text) > maxProbeScript {
		return nil, fmt.Errorf("the script has %d bytes; at most %d are allowed", len(text), maxProbeScript)
	}
	var script probeScript
	for rest, more := text, true; more; {
		var part string
		part, rest, more = cutProbePart(rest)
		group, err := parseProbeGroup(part)
		if err != nil {
			return nil, err
		}
		script = append(script, group)
	}
	return script, nil
}

// cutProbePart cuts at the first comma that is not in parentheses.
func cutProbePart(text string) (part, rest string, more bool) {
	from := 0
	comma := strings.IndexByte(text, ',')
	if open := strings.IndexByte(text, '('); open >= 0 && (comma < 0 || open < comma) {
		from = max(strings.IndexByte(text, ')'), open)
		comma = strings.IndexByte(text[from:], ',')
	}
	if comma < 0 {
		return text, "", false
	}
	return text[:from+comma], text[from+comma+1:], true
}

func parseProbeGroup(part string) (probeGroup, error) {
	count, inner, repeats := strings.Cut(part, "*(")
	if !repeats {
		step, err := parseProbeStep(part)
		return probeGroup{times: 1, steps: []probeStep{step}}, err
	}
	times, err := parseProbeNumber(count, maxProbeRepeats)
	if err != nil || times == 0 {
		return probeGroup{}, fmt.Errorf("%q: repeats want a number from 1 to %d, as in 3*(e,w1s)", part, maxProbeRepeats)
	}
	inner, closed := strings.CutSuffix(inner, ")")
	if !closed {
		return probeGroup{}, fmt.Errorf("%q: the ) is missing, or something follows it", part)
	}
	group := probeGroup{times: times}
	for text := range strings.SplitSeq(inner, ",") {
		step, err := parseProbeStep(text)
		if err != nil {
			return probeGroup{}, err
		}
		group.steps = append(group.steps, step)
	}
	return group, nil
}

func parseProbeStep(text string) (probeStep, error) {
	if text == "" {
		return probeStep{}, errors.New("a step between two commas is empty")
	}
	step := probeStep{kind: stepKind(text[0])}
	argument := text[1:]
	var err error
	switch step.kind {
	case stepEvent, stepComment:
		if argument == "" {
			return step, nil
		}
		if step.size, err = parseProbeNumber(argument, maxProbeSize); err != nil {
			return step, fmt.Errorf("%q: the size is not a number of bytes up to %d", text, maxProbeSize)
		}
		return step, nil
	case stepSilence:
		step.silence, err = caddy.ParseDuration(argument)
		if err != nil || step.silence < minProbeSilence {
			return step, fmt.Errorf("%q: not a duration of at least %v", text, minProbeSilence)
		}
		return step, nil
	case stepRequest, stepAbort:
		if argument == "" {
			return step, nil
		}
	}
	return step, fmt.Errorf("%q is not a step; there are e[<size>], c[<size>], w<duration>, r and x", text)
}

// parseProbeNumber accepts digits only.
func parseProbeNumber(text string, largest int) (int, error) {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, err
	}
	if int(n) > largest {
		return 0, strconv.ErrRange
	}
	return int(n), nil
}

// silence is the total silence of the script.
func (s probeScript) silence() time.Duration {
	var sum time.Duration
	for _, group := range s {
		for _, step := range group.steps {
			if step.silence > (math.MaxInt64-sum)/time.Duration(group.times) {
				return math.MaxInt64
			}
			sum += step.silence * time.Duration(group.times)
		}
	}
	return sum
}

// bytes is the largest size that the answer can have, where request is the size
// of what it reports about its request.
func (s probeScript) bytes(request int) int64 {
	var sum int64
	for _, group := range s {
		for _, step := range group.steps {
			if sum += int64(step.bytes(request)) * int64(group.times); sum > maxProbeBytes {
				return sum
			}
		}
	}
	return sum
}

func (s probeStep) bytes(request int) int {
	switch s.kind {
	case stepEvent:
		return max(s.size, smallProbeEvent)
	case stepComment:
		return max(s.size, smallProbeComment)
	case stepRequest:
		return smallProbeEvent + request
	}
	return 0
}
