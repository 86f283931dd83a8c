//go:build linux

package main

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// The figures are worth what the clients' reading is worth.
func TestAClientCountsWhatWasSentHoweverItIsCut(t *testing.T) {
	c := newChunk()
	var sent string
	for i := range 5 {
		c.set(clock(), int64(i+1))
		sent += string(c)
	}
	beat := ":heartbeat\n\n"
	sent += fmt.Sprintf("%x\r\n%s\r\n", len(beat), beat)
	line := ":heartbeat\n"
	sent += fmt.Sprintf("%x\r\n%s\r\n", len(line), line)
	c.set(clock(), 6)
	// Two chunks of one event.
	event := string(c[len("c8\r\n") : len(c)-2])
	sent += fmt.Sprintf("64\r\n%s\r\n64;extension\r\n%s\r\n", event[:100], event[100:])
	sent += "0\r\n\r\n"

	for size := 1; size <= len(sent); size++ {
		s := new(clientStream)
		var err error
		for rest := sent; rest != "" && err == nil; rest = rest[min(size, len(rest)):] {
			err = s.body.feed([]byte(rest[:min(size, len(rest))]), s.note)
		}
		if !errors.Is(err, errBodyEnd) {
			t.Fatalf("in pieces of %d: %v", size, err)
		}
		s.counts.lastCount = 0
		if want := (received{Events: 6, Heartbeats: 2}); s.counts != want || len(s.latencies) != 6 {
			t.Fatalf("in pieces of %d: %+v", size, s.counts)
		}
	}
}

func TestAClientNoticesWhatIsMissingOrWrong(t *testing.T) {
	s := new(clientStream)
	c := newChunk()
	feed := func(c chunk) {
		if err := s.body.feed(c, s.note); err != nil {
			t.Fatal(err)
		}
	}
	c.set(clock(), 1)
	feed(c)
	c.set(clock(), 3)
	feed(c)
	feed(chunk("9\r\ndata: x\n\n\r\n"))
	if s.counts.Events != 2 || s.counts.OutOfOrder != 1 || s.counts.Corrupt != 1 || s.counts.wrong() == nil {
		t.Errorf("%+v", s.counts)
	}
}

func TestARatioIsTheMedianOfThoseOfTheSameTurn(t *testing.T) {
	r := new(report)
	for turn, pair := range [][2]float64{{10, 11}, {20, 20}, {40, 60}} {
		r.add("s", "m", "", "plain", turn, pair[0])
		r.add("s", "m", "", "sse", turn, pair[1])
	}
	r.Results[0].sum()
	if got := r.Results[0]; got.Ratio != 1.1 || got.Medians["plain"] != 20 || len(got.Ratios) != 3 {
		t.Errorf("%+v", got)
	}
}

func TestTheDensestSecondIsFound(t *testing.T) {
	start := time.Now()
	var times []time.Time
	for _, ms := range []int{0, 900, 1500, 1600, 1700, 3000} {
		times = append(times, start.Add(time.Duration(ms)*time.Millisecond))
	}
	if got := densest(times); got != 4 {
		t.Error(got)
	}
}
