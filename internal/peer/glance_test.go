package peer

import (
	"testing"
	"time"
)

func TestWhatGlancesTell(t *testing.T) {
	const timeout = 4 * time.Second
	s, ms := time.Second, time.Millisecond
	healthy := observation{acked: 100, received: 10}
	with := func(changes ...func(*observation)) observation {
		o := healthy
		for _, change := range changes {
			change(&o)
		}
		return o
	}
	busy := func(d time.Duration) func(*observation) { return func(o *observation) { o.busy = d } }
	heard := func(d time.Duration) func(*observation) { return func(o *observation) { o.heard = d } }
	waiting := func(o *observation) { o.waiting = true }
	probing := func(o *observation) { o.probing = true }
	shut := func(o *observation) { o.shut = true }
	acked := func(o *observation) { o.acked += 50; o.received++ }
	segment := func(o *observation) { o.received++ }
	closed := func(o *observation) { o.phase = phaseClosed }
	leaving := func(o *observation) { o.phase = phaseLeaving }

	type step struct {
		after time.Duration // since the glance before; if negative, the socket is closed then
		o     observation
	}
	for _, test := range []struct {
		name  string
		steps []step // after a healthy glance
		want  Fate
	}{
		{"given up", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{1200 * ms, with(closed, busy(4100*ms), heard(4200*ms))},
		}, Dead},
		{"given up and closed", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{-1100 * ms, observation{}},
		}, Dead},
		{"given up, though segments come", []step{
			{1 * s, with(waiting, busy(900*ms))},
			{1 * s, with(waiting, busy(1900*ms), segment)},
			{1 * s, with(waiting, busy(2900*ms), segment, segment)},
			{1200 * ms, with(closed, busy(4100*ms), segment, segment, segment)},
		}, Dead},
		{"given up, with no glance between", []step{
			{5 * s, with(closed, busy(4100*ms), heard(5*s))},
		}, Dead},
		{"given up after a keepalive probe", []step{
			{1 * s, with(probing, heard(2*s))},
			{1 * s, with(probing, heard(3*s))},
			{1 * s, with(probing, closed, heard(4*s))},
		}, Dead},
		{"given up after a keepalive probe and closed", []step{
			{1 * s, with(probing, heard(2*s))},
			{1 * s, with(probing, heard(3*s))},
			{-1 * s, observation{}},
		}, Dead},
		{"given up between two glances, after a keepalive probe", []step{
			{1 * s, with(heard(9 * s))},
			{1 * s, with(probing, closed, heard(10*s))},
		}, Dead},
		{"reset in answer to a keepalive probe", []step{
			{1 * s, with(heard(9 * s))},
			{1 * s, with(probing, closed, segment, heard(10*s))},
		}, Alive},
		{"reset in answer to a retransmission", []step{
			{1 * s, with(waiting, busy(900*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1900*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2900*ms), heard(3*s))},
			{900 * ms, with(closed, segment, busy(3800*ms), heard(3900*ms))},
		}, Alive},
		{"reset in the last moment", []step{
			{1 * s, with(waiting, busy(1*s), heard(1*s))},
			{2 * s, with(waiting, busy(3*s), heard(3*s))},
			{999 * ms, with(closed, segment, busy(3999*ms), heard(3999*ms))},
		}, Alive},
		{"reset and closed", []step{
			{1 * s, with(waiting, busy(200*ms), heard(1*s))},
			{1 * s, with(waiting, busy(1200*ms), heard(2*s))},
			{1 * s, with(waiting, busy(2200*ms), heard(3*s))},
			{-1 * s, observation{}},
		}, Alive},
		{"reset of a stream that never rests, and closed", []step{
			{1 * s, with(waiting, busy(1*s), acked, heard(10*ms))},
			{1 * s, with(waiting, busy(2*s), acked, acked, heard(10*ms))},
			{1 * s, with(waiting, busy(3*s), acked, acked, acked, heard(10*ms))},
			{-1 * s, observation{}},
		}, Alive},
		{"reset while quiet", []step{
			{1 * s, with(heard(20 * s))},
			{1 * s, with(closed, segment, heard(21*s))},
		}, Alive},
		{"reset while quiet and closed", []step{
			{1 * s, with(heard(20 * s))},
			{-1 * s, observation{}},
		}, Alive},
		{"acknowledged in time", []step{
			{1 * s, with(waiting, busy(1*s))},
			{2 * s, with(waiting, busy(3*s))},
			{900 * ms, with(acked, busy(3900*ms))},
			{200 * ms, with(acked, closed, segment, busy(3900*ms), heard(200*ms))},
		}, Alive},
		{"half closed, with data in flight", []step{
			{1 * s, with(waiting, busy(1*s))},
			{1 * s, with(waiting, leaving, busy(2*s))},
		}, Alive},
		{"still open", []step{
			{1 * s, with(waiting, busy(1*s))},
			{5 * s, with(waiting, busy(6*s))},
		}, Alive},
		{"still open, with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
		}, Alive},
		{"given up with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{3 * s, with(closed, shut, busy(4*s))},
		}, Stalled},
		{"closed with a zero window", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{-1 * s, observation{}},
		}, Stalled},
		{"reset of a fast stream, with a zero window", []step{
			{1 * s, with(waiting, shut, acked, busy(1*s), heard(1*ms))},
			{1 * ms, with(waiting, shut, acked, acked, closed, segment, busy(1001*ms))},
		}, Alive},
		{"half closed with a zero window", []step{
			{1 * s, with(leaving, waiting, shut, busy(1*s))},
		}, Stalled},
		{"reset after a window that opened again", []step{
			{1 * s, with(waiting, shut, busy(1*s))},
			{2 * s, with(waiting, shut, busy(3*s))},
			{500 * ms, with(waiting, busy(3500*ms))},
			{-500 * ms, observation{}},
		}, Alive},
		{"the clocks stood still", []step{
			{1 * s, with(waiting, busy(1*s))},
			{2 * s, with(waiting, busy(3*s))},
			{-time.Hour, observation{}},
		}, Alive},
	} {
		t.Run(test.name, func(t *testing.T) {
			var at instant
			last, got := glance{observation: healthy}, Alive
			for _, step := range test.steps {
				if step.after < 0 {
					got = last.fateUnseen(at+instant(-step.after), timeout)
					continue
				}
				at += instant(step.after)
				last, got = last.seen(step.o, at, timeout)
			}
			if got != test.want {
				t.Errorf("it is %v, want %v (silence %v)", got, test.want, last.silence)
			}
		})
	}
}
