//go:build !linux

package harness

import (
	"io"
	"syscall"
)

func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}

// reservePort does nothing: there is no reservation that ends with the process.
func reservePort(int) (io.Closer, error) { return io.NopCloser(nil), nil }
