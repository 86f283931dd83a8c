package doctor

import "time"

// shortestCut is the age from which a request without an answer counts as cut,
// and not as refused.
const shortestCut = time.Second

// ending is how a stream was cut.
type ending struct {
	at      time.Duration // since the check began
	age     time.Duration // since its headers
	silence time.Duration // since its last byte
	clean   bool
}

// cut returns how the stream was cut, if it was.
func (t *Trace) cut() (ending, bool) {
	switch {
	case t.GivenUp || t.Encoding != "" || t.whole():
		return ending{}, false
	case t.Error == "":
		return ending{t.Ended, t.Ended - t.Headers, t.Ended - t.last(), t.Clean}, true
	case (t.Status == 0 || t.Status >= 500) && t.Ended-t.Started >= shortestCut:
		// If a hop holds the headers back, only the connection can be cut.
		age := t.Ended - t.Started
		return ending{t.Ended, age, age, false}, true
	}
	return ending{}, false
}

// lasted returns what prevents a conclusion from a trace's end, if the stream was
// neither cut nor complete.
func lasted(t *Trace, name string) (untold verdict, is bool) {
	if t != nil {
		if _, cut := t.cut(); cut {
			return verdict{}, false
		}
	}
	if v, is := unmade(t, name); is {
		return v, true
	}
	switch {
	case t.Encoding != "":
		return verdict{untold: []string{name + ": the answer is compressed, so what has arrived of it can't be told"}}, true
	case !t.whole():
		return verdict{untold: []string{name + ": its end did not come in time"}}, true
	}
	return verdict{}, false
}

// judgeEnds distinguishes streams that were cut for their silence from those that
// were cut for their age.
func (s *seen) judgeEnds() (v verdict) {
	capped, v := s.judgeAges()
	if w, is := lasted(s.silence, testSilence); is {
		v.add(w)
		return v
	}
	end, cut := s.silence.cut()
	switch {
	case !cut:
		return v
	case capped > 0 && closeTo(end.age, capped, s.closeness()):
		return v // it was just as old
	case s.cutWith(end.at):
		return v // judgeAges has reported it
	case s.silence.stalled(end.at-end.silence, end.at, end.silence/20):
		v.again = append(v.again, testSilence)
		return v
	}
	v.add(found(idleTimeout, IdleTimeout{round(end.silence), end.clean}))
	return v
}

// cutWith reports whether another stream was cut at that moment.
func (s *seen) cutWith(at time.Duration) bool {
	for _, t := range s.ages {
		if t == nil {
			continue
		}
		if end, cut := t.cut(); cut && closeTo(end.at, at, s.closeness()/2) {
			return true
		}
	}
	return false
}

// judgeAges compares two streams that are never silent for long. It returns the
// age at which both were cut, if they were.
func (s *seen) judgeAges() (capped time.Duration, v verdict) {
	for i, name := range []string{testAge1, testAge2} {
		w, is := lasted(s.ages[i], name)
		v.add(w)
		if is {
			return 0, v
		}
	}
	var ends [2]ending
	cuts := 0
	for _, t := range s.ages {
		end, cut := t.cut()
		if !cut {
			continue
		}
		ends[cuts] = end
		cuts++
		if t.stalled(end.at-time.Second, end.at, time.Second/tolerated) {
			v.again = []string{testAge1, testAge2} // only both together are evidence
		}
	}
	const both = testAge1 + ", " + testAge2 + ": "
	a, b := ends[0], ends[1]
	switch {
	case cuts == 0 || len(v.again) > 0:
	case cuts == 1:
		v.untold = append(v.untold, both+"one of the two streams was cut at an age of "+told(a.age)+", the other was not")
	case closeTo(a.age, b.age, s.closeness()):
		capped = (a.age + b.age) / 2
		v.add(found(totalCap, TotalCap{round(capped), a.clean}))
	case closeTo(a.at, b.at, s.closeness()):
		v.untold = append(v.untold, both+"the streams were cut at one moment, at ages of "+told(a.age)+" and "+told(b.age)+": something on the way has been restarted")
	default:
		v.untold = append(v.untold, both+"the streams were cut at ages of "+told(a.age)+" and "+told(b.age))
	}
	return capped, v
}

// closeness is how far apart two equal times may be: less than half of the time
// between the starts of the two streams, so that an age and a moment can't be
// confused.
func (s *seen) closeness() time.Duration {
	gap := ageGap
	if s.ages[0] != nil && s.ages[1] != nil {
		gap = min((s.ages[1].Started - s.ages[0].Started).Abs(), ageGap)
	}
	return gap / 2
}

func closeTo(a, b, within time.Duration) bool { return (a - b).Abs() < within }
