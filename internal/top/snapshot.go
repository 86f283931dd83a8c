// Package top shows the streams of a running Caddy in a terminal: it turns the
// snapshots of a watch into lines, and draws the lines on a screen. It knows
// neither Caddy nor HTTP.
package top

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Snapshot is one snapshot of a watch.
type Snapshot struct {
	At       time.Time `json:"at"`
	Seconds  float64   `json:"seconds"` // since the previous one; 0: it is the first
	Totals   Figures   `json:"totals"`
	Deltas   Figures   `json:"deltas"`
	Names    []Name    `json:"names"`
	Matching int       `json:"matching"`
	Streams  []Stream  `json:"streams"`
}

// Figures count what has passed through streams.
type Figures struct {
	Open       int64            `json:"open"`
	Opened     int64            `json:"opened"`
	Closed     map[string]int64 `json:"closed"` // by reason
	Events     int64            `json:"events"`
	Bytes      int64            `json:"bytes"`
	Heartbeats int64            `json:"heartbeats"`
}

// Name is how many streams the handlers of one name have open.
type Name struct {
	Name string `json:"name"`
	Open int64  `json:"open"`
}

// Stream is an open stream.
type Stream struct {
	Name            string  `json:"name"`
	State           string  `json:"state"`
	ClientIP        string  `json:"client_ip"`
	Path            string  `json:"path"`
	Proto           string  `json:"proto"`
	UserAgent       string  `json:"user_agent"`
	Upstream        string  `json:"upstream"`
	DurationSeconds float64 `json:"duration_seconds"`
	IdleSeconds     float64 `json:"idle_seconds"`
	Events          int64   `json:"events"`
	Bytes           int64   `json:"bytes"`
	Heartbeats      int64   `json:"heartbeats"`
}

// maxLine bounds how much of one snapshot is read. One with 200 streams is below
// 1 MiB.
const maxLine = 16 << 20

// Read reads a watch to its end and calls told with each snapshot. The error is
// nil if the watch ended cleanly, as it does when Caddy reloads.
func Read(watch io.Reader, told func(Snapshot)) error {
	lines := bufio.NewScanner(watch)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	for lines.Scan() {
		// A watch has one line of data in each event, and one type of event.
		data, found := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !found {
			continue
		}
		var snapshot Snapshot
		if err := json.Unmarshal(data, &snapshot); err != nil {
			return fmt.Errorf("reading a snapshot: %w", err)
		}
		told(snapshot)
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return errors.New("reading a snapshot: it is too long")
	}
	return lines.Err()
}
