package harness

import "syscall"

// processGroup makes the kernel end the process with this one: t.Cleanup does
// not run if a test panics or go test's timeout ends this process.
func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
