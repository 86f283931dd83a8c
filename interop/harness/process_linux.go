package harness

import "syscall"

// processGroup has the kernel end the process with this one: t.Cleanup does
// not run where a test panics or go test's own time limit ends it.
func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
