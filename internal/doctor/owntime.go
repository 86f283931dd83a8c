package doctor

import (
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"time"
)

// Numbers outside this range can't be the time of an event.
const (
	earliestOwn = 1_500_000_000 // 2017
	latestOwn   = 4_000_000_000 // 2096
)

// ownTime is when an event says that it was created, in seconds since 1970; NaN
// if it does not say. Streams of Redis, Kafka or Mercure say so in their ids,
// others in a member of their data.
func ownTime(id string, data []byte) float64 {
	if own := timeOf(id); !math.IsNaN(own) {
		return own
	}
	var members map[string]json.RawMessage
	if json.Unmarshal(data, &members) != nil {
		return math.NaN()
	}
	for _, name := range []string{"time", "timestamp", "ts", "at", "date", "created_at", "created", "sent_at"} {
		value, found := members[name]
		if !found {
			continue
		}
		if own := timeOf(strings.Trim(string(value), `"`)); !math.IsNaN(own) {
			return own
		}
	}
	return math.NaN()
}

// timeOf parses seconds, milliseconds or microseconds since 1970, with or without
// a counter after them, a time of RFC 3339, and a UUID of version 7 (RFC 9562,
// section 5.7).
func timeOf(text string) float64 {
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return inRange(float64(at.UnixNano()) / 1e9)
	}
	if uuid := strings.TrimPrefix(text, "urn:uuid:"); len(uuid) == 36 && uuid[14] == '7' {
		if ms, err := strconv.ParseUint(uuid[:8]+uuid[9:13], 16, 64); err == nil {
			return inRange(float64(ms) / 1e3)
		}
	}
	number, _, _ := strings.Cut(text, "-")
	value, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return math.NaN()
	}
	for _, unit := range []float64{1, 1e3, 1e6} {
		if own := inRange(value / unit); !math.IsNaN(own) {
			return own
		}
	}
	return math.NaN()
}

func inRange(seconds float64) float64 {
	if seconds < earliestOwn || seconds > latestOwn {
		return math.NaN()
	}
	return seconds
}
