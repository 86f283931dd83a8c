package doctor

import (
	"bytes"
	"encoding/json"
	"math"
)

const (
	// maxData is how much of an event's data is kept until it has been read, and
	// maxEvents for how many events it is recorded when they arrived.
	maxData   = 128 << 10
	maxEvents = 100_000
)

// parser parses a stream as it arrives (HTML Standard, section 9.2.6).
type parser struct {
	offset   int64 // of the next byte
	line     []byte
	afterCR  bool
	from     int64 // where the event begins
	name     string
	id       string
	data     []byte
	hasData  bool
	sawEvent func(name, id string, data []byte, from, to int64)
	sawNote  func()
}

func (p *parser) write(text []byte) {
	for _, c := range text {
		p.offset++
		switch {
		case c == '\n' && p.afterCR:
			p.afterCR = false
			if len(p.line) == 0 && p.name == "" && !p.hasData {
				p.from = p.offset // after the LF of the CRLF that ended an event
			}
		case c == '\n' || c == '\r':
			p.afterCR = c == '\r'
			p.endLine()
		default:
			p.afterCR = false
			if len(p.line) < maxData {
				p.line = append(p.line, c)
			}
		}
	}
}

func (p *parser) endLine() {
	line := p.line
	p.line = p.line[:0]
	if len(line) == 0 {
		if p.hasData {
			p.sawEvent(p.name, p.id, p.data, p.from, p.offset)
		}
		p.from, p.name, p.data, p.hasData = p.offset, "", p.data[:0], false
		return
	}
	field, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimPrefix(value, []byte(" "))
	switch string(field) {
	case "":
		p.sawNote()
	case "event":
		p.name = string(value)
	case "id":
		p.id = string(value)
	case "data":
		if p.hasData {
			p.data = append(p.data, '\n')
		}
		p.hasData = true
		if len(p.data) < maxData {
			p.data = append(p.data, value...)
		}
	}
}

// parserFor returns a parser that writes to a trace.
func parserFor(t *Trace) *parser {
	p := new(parser)
	p.sawNote = func() { t.Comments++ }
	p.sawEvent = func(name, id string, data []byte, from, to int64) {
		if len(t.Events) == maxEvents {
			return
		}
		event := Event{Own: math.NaN(), From: from, To: to}
		if t.Script == "" {
			event.Own = ownTime(id, data)
			t.Events = append(t.Events, event)
			return
		}
		var said struct {
			N  *int     `json:"n"`
			At *float64 `json:"at"`
		}
		if json.Unmarshal(data, &said) != nil || said.N == nil || said.At == nil {
			return // from something else on the way
		}
		event.Own = *said.At
		t.Events = append(t.Events, event)
		if name == "request" {
			var request Request
			if json.Unmarshal(data, &request) == nil && request.Probe > 0 {
				t.Request = &request
			}
		}
	}
	return p
}
