// Package peertest has client hosts that can vanish, for tests.
package peertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// requireNetns is an environment variable. If it is set, tests that need network
// namespaces fail where there are none, and are not skipped.
const requireNetns = "CADDY_SSE_REQUIRE_NETNS"

// Host is a host of its own, as far as the network goes: a network namespace at
// the other end of a cable (veth) that can be cut. From there, 127.0.0.1 is our
// side, so that it reaches every server of a test:
//
//	host := peertest.NewHost(t)
//	client.Transport.(*http.Transport).DialContext = host.Dial
//	…
//	host.Vanish()
//
// The namespace has no name and only this process holds it, so nothing of it stays
// however the process ends. A socket belongs to the
// namespace that its thread was in when it was made, and can then be used from
// anywhere: no other process is needed.
type Host struct {
	t        testing.TB
	ns, home int    // the namespaces
	cable    string // our end of it
	addr     string // the host's

	mu    sync.Mutex
	conns []net.Conn // what it has dialled
}

// The cable's ends know each other's address: a cut is then not noticed by
// asking for it in vain. A host beyond a router vanishes just like this.
const (
	hostEnd = "02:00:00:00:00:02"
	ourEnd  = "02:00:00:00:00:01"
)

// NewHost needs Linux, root and the program ip (iproute2). If something is missing
// it skips the test, or fails it if CADDY_SSE_REQUIRE_NETNS is set. The host is
// removed at the end of the test.
func NewHost(t testing.TB) *Host {
	t.Helper()
	h := &Host{t: t, ns: -1, home: -1}
	t.Cleanup(h.close)
	if err := h.open(); err != nil {
		if os.Getenv(requireNetns) != "" {
			t.Fatalf("%s is set, and there can be no host that vanishes: %v", requireNetns, err)
		}
		t.Skipf("SKIPPED, NOT SHOWN: there can be no host that vanishes (it takes root and iproute2): %v", err)
	}
	return h
}

func (h *Host) open() (err error) {
	if _, err := exec.LookPath("ip"); err != nil {
		return err
	}
	if h.home, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	cable := fmt.Sprintf("sse%08x", rand.Uint32())
	err = h.onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace: %w", err)
		}
		ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		h.ns = ns
		return ip("link add eth0 address %s type veth peer name %s address %s netns /proc/%d/fd/%d",
			hostEnd, cable, ourEnd, os.Getpid(), h.home)
	})
	if err != nil {
		return err
	}
	h.cable = cable
	if err := errors.Join(
		letLocalhostThrough(cable),
		ip("link set %s up", cable),
	); err != nil {
		return err
	}
	for range 10 {
		// One of 198.18.0.0/15, which is for tests of networks (RFC 2544).
		h.addr = fmt.Sprintf("198.%d.%d.%d", 18+rand.IntN(2), rand.IntN(256), 1+rand.IntN(254))
		if err = ip("route add %s dev %s", h.addr, cable); err == nil {
			break // else somebody else has it
		}
	}
	if err != nil {
		return err
	}
	if err := ip("neigh replace %s lladdr %s dev %s nud permanent", h.addr, hostEnd, cable); err != nil {
		return err
	}
	if err := h.run(func() error {
		return errors.Join(letLocalhostThrough("eth0"), ip("addr add %s/32 dev eth0", h.addr))
	}); err != nil {
		return err
	}
	return h.plugIn()
}

// letLocalhostThrough has an interface carry packets from and to 127.0.0.1
// (route_localnet, Documentation/networking/ip-sysctl.rst).
func letLocalhostThrough(device string) error {
	return os.WriteFile("/proc/sys/net/ipv4/conf/"+device+"/route_localnet", []byte("1"), 0)
}

// ip runs the program, in the namespace of the calling thread.
func ip(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", line, err, out)
	}
	return nil
}

// onThread runs f on a thread that may change its namespace.
func (h *Host) onThread(f func() error) error {
	done := make(chan error)
	go func() {
		// A thread that can't come home ends with its goroutine.
		runtime.LockOSThread()
		err := f()
		if unix.Setns(h.home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// run runs f on the host: the sockets it makes are the host's, and so is what
// the programs it starts see.
func (h *Host) run(f func() error) error {
	return h.onThread(func() error {
		if err := unix.Setns(h.ns, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// Dial connects from the host, for http.Transport.DialContext. The connections are
// closed when the test ends, as a client does not close those that it has given up.
func (h *Host) Dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = h.run(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	if err == nil {
		h.mu.Lock()
		h.conns = append(h.conns, conn)
		h.mu.Unlock()
	}
	return conn, err
}

// Vanish cuts the cable: nothing arrives any more, in neither direction.
func (h *Host) Vanish() {
	h.t.Helper()
	if err := h.run(func() error { return ip("link set eth0 down") }); err != nil {
		h.t.Fatal(err)
	}
}

// ComeBack undoes Vanish.
func (h *Host) ComeBack() {
	h.t.Helper()
	if err := h.plugIn(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *Host) plugIn() error {
	return h.run(func() error {
		return errors.Join(
			ip("link set eth0 up"),
			ip("route add 127.0.0.1 dev eth0 src %s", h.addr),
			ip("neigh replace 127.0.0.1 lladdr %s dev eth0 nud permanent", ourEnd),
		)
	})
}

func (h *Host) close() {
	for _, conn := range h.conns {
		conn.Close()
	}
	if h.cable != "" {
		if err := ip("link del %s", h.cable); err != nil {
			h.t.Error(err)
		}
	}
	for _, fd := range []int{h.ns, h.home} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
