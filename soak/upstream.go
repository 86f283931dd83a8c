//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// upstreamArgument makes this program the upstream. An address follows.
const upstreamArgument = "soak-upstream"

// serveUpstream answers /<site>/<kind>/<seed> according to the kind:
//
//   - script sends the script of the seed;
//   - late does so, but its headers come after 1.5 s;
//   - flood sends as fast as it can.
//
// Its answers for trials are in numbered.go.
func serveUpstream(addr string) error {
	if _, err := measure.RaiseFileLimit(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	new(numbered).handle(mux)
	mux.HandleFunc("/{site}/{kind}/{seed}", func(w http.ResponseWriter, r *http.Request) {
		seed, err := strconv.ParseUint(r.PathValue("seed"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		if r.PathValue("kind") == "late" && !wait(r, 1500*time.Millisecond) {
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		out := http.NewResponseController(w)
		if out.Flush() != nil {
			return
		}
		if r.PathValue("kind") == "flood" {
			for i := range floodLength {
				if _, err := io.WriteString(w, floodEvent(i)); err != nil {
					return
				}
			}
			return
		}
		s := newScript(seed)
		for _, piece := range s.pieces {
			if !wait(r, piece.pause) {
				return
			}
			if _, err := io.WriteString(w, piece.text); err != nil || out.Flush() != nil {
				return
			}
		}
		if s.broken {
			panic(http.ErrAbortHandler)
		}
	})
	fmt.Println(listener.Addr())
	return http.Serve(listener, mux)
}

// wait returns false if the client left in the meantime.
func wait(r *http.Request, pause time.Duration) bool {
	if pause == 0 {
		return r.Context().Err() == nil
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
		return false
	}
}

// upstream is the upstream's process.
type upstream struct {
	addr    string
	process *exec.Cmd
}

// start starts it, at its old address if it had one before.
func (u *upstream) start() (err error) {
	u.process, u.addr, err = startSelf(upstreamArgument, cmp.Or(u.addr, "127.0.0.1:0"))
	return err
}

// kill kills it without warning.
func (u *upstream) kill() { kill(u.process) }

// startSelf starts this program in another role. It says where it listens.
func startSelf(role string, args ...string) (process *exec.Cmd, addr string, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	process = exec.Command(self, append([]string{role}, args...)...)
	process.Stderr = os.Stderr
	process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := process.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := process.Start(); err != nil {
		return nil, "", err
	}
	if _, err := fmt.Fscanln(out, &addr); err != nil {
		kill(process)
		return nil, "", fmt.Errorf("%s does not say where it listens: %w", role, err)
	}
	return process, addr, nil
}

func kill(process *exec.Cmd) {
	_ = process.Process.Kill()
	_ = process.Wait()
}
