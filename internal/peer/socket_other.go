//go:build !linux && !darwin

package peer

import (
	"errors"
	"fmt"
	"runtime"
	"time"
)

// CheckUserTimeout reports whether this platform has what
// dead_client_timeout needs: this one has not.
func CheckUserTimeout() error {
	return fmt.Errorf("%s has no such timeout on its TCP sockets (Linux and macOS do)", runtime.GOOS)
}

func userTimeout(int) (time.Duration, error) { return 0, errors.ErrUnsupported }

func setUserTimeout(int, time.Duration) error { return errors.ErrUnsupported }

func observe(int) (observation, error) { return observation{}, errors.ErrUnsupported }

func setUnsentLimit(int, int) error { return errors.ErrUnsupported }
