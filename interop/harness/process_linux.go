package harness

import (
	"fmt"
	"io"
	"net"
	"syscall"
)

// processGroup makes the kernel end the process with this one: t.Cleanup does
// not run if a test panics or go test's timeout ends this process.
func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// reservePort keeps the other packages of the suite, which run at the same time, from
// choosing the port, until this process ends. The socket is in the abstract namespace,
// so that nothing is left of it (unix(7)).
func reservePort(port int) (io.Closer, error) {
	return net.Listen("unix", fmt.Sprintf("@caddy-sse-interop-port-%d", port))
}
