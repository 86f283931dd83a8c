package peer

import "time"

// Fate is how a connection ended, as far as the kernel knows.
type Fate uint8

const (
	// Alive: it has not ended, or it ended normally, by FIN or RST, or the kernel
	// does not say.
	Alive Fate = iota

	// Dead: the kernel gave it up, because the client's host acknowledged nothing
	// within the timeout.
	Dead

	// Stalled: it ended while the client's window was zero (RFC 9293, section
	// 3.8.6.1), so the client took nothing.
	Stalled
)

// String returns "alive", "dead" or "stalled".
func (f Fate) String() string {
	switch f {
	case Dead:
		return "dead"
	case Stalled:
		return "stalled"
	}
	return "alive"
}

// phase is how far a connection is in its life.
type phase uint8

const (
	phaseOpen    phase = iota
	phaseLeaving       // one side has said that it sends no more
	phaseClosed        // reset by the client, or given up by the kernel
)

// observation is what the kernel reports about a connection at one moment.
type observation struct {
	phase   phase
	waiting bool // something that was sent, or is to be sent, is not acknowledged
	probing bool // nothing is waiting, but a keepalive probe has no answer
	shut    bool // the client's window is zero

	acked    uint64        // grows with what is acknowledged
	received uint64        // grows with every segment, a reset included
	busy     time.Duration // total time in which something was to be acknowledged
	heard    time.Duration // time since the client's last acknowledgement
}

// glance is an observation, with what it means together with those before it.
type glance struct {
	observation
	at instant

	// silence is how long the client's host has acknowledged nothing although
	// something was to be acknowledged. It is never less than what the kernel
	// compares with the timeout, and exceeds it by less than the time between two
	// acknowledgements.
	silence time.Duration

	// stalled says that the client's window is zero and that it has taken
	// nothing since the glance before. A zero window alone is not enough: a fast
	// stream fills the window for a moment.
	stalled bool
}

// clockSlack is how far our clock and the kernel's, which may tick only every 10
// ms, can differ.
const clockSlack = 25 * time.Millisecond

// followedBy returns the glance that this observation makes after g.
func (g glance) followedBy(o observation, at instant) glance {
	elapsed := time.Duration(at - g.at)
	followed := glance{observation: o, at: at, stalled: o.shut && o.acked == g.acked}
	switch {
	case o.waiting && g.waiting && o.acked == g.acked && o.shut == g.shut,
		o.phase == phaseClosed && g.waiting && o.acked == g.acked: // a close drops what was waiting
		followed.silence = g.silence + elapsed
	case o.probing && (o.phase == phaseClosed || g.probing && o.received == g.received):
		followed.silence = o.heard
	case o.waiting, o.phase == phaseClosed:
		followed.silence = min(elapsed, o.busy-g.busy)
		if o.acked != g.acked {
			followed.silence = min(followed.silence, o.heard)
		}
	}
	return followed
}

// seen returns the glance that this observation makes after g, and the fate of the
// connection.
func (g glance) seen(o observation, at instant, timeout time.Duration) (glance, Fate) {
	after := g.followedBy(o, at)
	switch {
	case o.phase == phaseOpen:
		return after, Alive
	case after.stalled:
		return after, Stalled
	case o.phase == phaseLeaving:
		return after, Alive
	}
	// A reset is a segment that acknowledges nothing.
	reset := o.received != g.received && o.heard > time.Duration(at-g.at)+clockSlack
	if reset || after.silence < timeout-clockSlack {
		return after, Alive
	}
	return after, Dead
}

// fateUnseen is the fate of a connection after g whose socket is closed.
func (g glance) fateUnseen(at instant, timeout time.Duration) Fate {
	elapsed := time.Duration(at - g.at)
	switch {
	case elapsed > timeout/2: // the process did not run: anything may have happened
		return Alive
	case g.stalled:
		return Stalled
	case g.silence > 0 && g.silence+elapsed >= timeout-clockSlack:
		return Dead
	}
	return Alive
}

// pause is the time until the next glance. It is short when the timeout is near,
// to distinguish the kernel's timeout from a reset shortly before it.
func (g glance) pause(timeout time.Duration) time.Duration {
	if g.shut || g.silence >= timeout/2 {
		return max(timeout/32, 10*time.Millisecond)
	}
	return max(timeout/4, 10*time.Millisecond)
}
