package caddysse

import (
	"testing"
	"time"
)

func TestSilenceDoesNotCountWhileTheProcessIsStopped(t *testing.T) {
	const pulse = time.Second
	at := func(d time.Duration) instant { return instant(d) }
	var s silence
	if got := s.look(at(time.Second), 0, pulse); got != time.Second {
		t.Errorf("%v after a second", got)
	}
	if got := s.look(at(61*time.Second), 0, pulse); got != time.Second+pulse+stopSlack {
		t.Errorf("%v after a minute in which nobody has looked", got)
	}
	if got := s.look(at(62*time.Second), at(61500*time.Millisecond), pulse); got != 500*time.Millisecond {
		t.Errorf("%v after half a second", got)
	}
	if got := s.look(at(63*time.Second), at(61500*time.Millisecond), pulse); got != 1500*time.Millisecond {
		t.Errorf("%v after a second and a half", got)
	}
}
