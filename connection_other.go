//go:build !linux && !darwin

package caddysse

import (
	"errors"
	"fmt"
	"runtime"
	"time"
)

// checkDeadClientTimeout reports whether this platform has what
// dead_client_timeout needs: this one has not.
func checkDeadClientTimeout() error {
	return fmt.Errorf("sse: dead_client_timeout: %s has no such timeout on its TCP sockets (Linux and macOS do); leave it out or set it to off", runtime.GOOS)
}

func userTimeout(int) (time.Duration, error) { return 0, errors.ErrUnsupported }

func setUserTimeout(int, time.Duration) error { return errors.ErrUnsupported }

func observe(int) (observation, error) { return observation{}, errors.ErrUnsupported }

func setUnsentLimit(int, int) error { return errors.ErrUnsupported }
