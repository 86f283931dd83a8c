//go:build !linux && !darwin

package peer

import (
	"errors"
	"fmt"
	"runtime"
	"time"
)

// CheckUserTimeout returns an error if Watch can do nothing on this platform. It
// reads well after the name of a setting and a colon.
func CheckUserTimeout() error {
	return fmt.Errorf("%s has no such timeout on its TCP sockets (Linux and macOS do)", runtime.GOOS)
}

func userTimeout(int) (time.Duration, error) { return 0, errors.ErrUnsupported }

func setUserTimeout(int, time.Duration) error { return errors.ErrUnsupported }

func observe(int) (observation, error) { return observation{}, errors.ErrUnsupported }

func setUnsentLimit(int, int) error { return errors.ErrUnsupported }

func unacknowledged(int) (int, error) { return 0, errors.ErrUnsupported }
