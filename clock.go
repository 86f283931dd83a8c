package caddysse

import (
	"math"
	"time"
)

// instant is a moment on the monotonic clock. It takes a third of the memory of a
// time.Time.
type instant time.Duration

// clockStart is where instants count from.
var clockStart = time.Now()

func now() instant { return instant(time.Since(clockStart)) }

// plus is the moment after a wait; if it overflows, the last possible one.
func (i instant) plus(wait time.Duration) instant { return instant(sum(time.Duration(i), wait)) }

// never is a wait without end.
const never = time.Duration(math.MaxInt64)

// sum adds durations; if the sum overflows, it is never.
func sum(durations ...time.Duration) (total time.Duration) {
	for _, d := range durations {
		if d > 0 && total > never-d {
			return never
		}
		total += d
	}
	return total
}
