//go:build linux

package main

import (
	"testing"
	"time"
)

func TestAPulseCountsLateBeatsAlone(t *testing.T) {
	var p pulse
	if p.share() != 0 {
		t.Errorf("before the first beat: %v", p.share())
	}
	for range 150 {
		p.add(beat)
	}
	p.add(beat + lateBeat)
	if p.share() != 0 {
		t.Errorf("with beats in time: %v", p.share())
	}
	p.add(beat + 500*time.Millisecond)
	if share := p.share(); share < 0.4 || share > 0.42 {
		t.Errorf("1.5 s of 3.66 s were stalled, share is %v", share)
	}
	p.add(time.Hour)
	if share := p.share(); share < 0.99 || share > 1 {
		t.Errorf("nearly all was stalled, share is %v", share)
	}
}
