//go:build !linux

package harness

import "syscall"

func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
