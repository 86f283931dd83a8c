package caddysse

import (
	"strconv"
	"time"
)

// ProbeScript is a parsed script of a probe.
type ProbeScript struct{ probeScript }

// ParseProbeScript reads a script.
func ParseProbeScript(text string) (ProbeScript, error) {
	script, err := parseProbeScript(text)
	return ProbeScript{script}, err
}

// Silence and Bytes are upper limits of what an answer takes.
func (s ProbeScript) Silence() time.Duration { return s.silence() }
func (s ProbeScript) Bytes() int64           { return s.bytes(0) }

// Steps returns the script's steps as text, with repeats written out, at most
// limit.
func (s ProbeScript) Steps(limit int) []string {
	var steps []string
	for _, group := range s.probeScript {
		for range group.times {
			for _, step := range group.steps {
				if len(steps) == limit {
					return steps
				}
				text := string(rune(step.kind))
				if step.size > 0 {
					text += strconv.Itoa(step.size)
				}
				if step.silence > 0 {
					text += step.silence.String()
				}
				steps = append(steps, text)
			}
		}
	}
	return steps
}

// AppendProbeEvent appends an event of a probe.
var AppendProbeEvent = appendProbeEvent
