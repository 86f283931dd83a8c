package harness

import (
	"flag"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Main runs a package's tests. They mostly wait, so more of them run in
// parallel than there are processors:
//
//	func TestMain(m *testing.M) { harness.Main(m) }
func Main(m *testing.M) {
	flag.Parse()
	parallel := flag.Lookup("test.parallel")
	if n, err := strconv.Atoi(parallel.Value.String()); err == nil && n < 16 {
		parallel.Value.Set("16")
	}

	// t.Cleanup does not run if a signal or go test's timeout ends this
	// process, and a process group outlives its leader.
	limit := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration)
	if limit > 0 {
		time.AfterFunc(max(limit-5*time.Second, limit/2), func() { groups.kill() })
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		groups.kill()
		os.Exit(1)
	}()

	code := m.Run()
	groups.kill()
	os.Exit(code)
}

// groups are the process groups that are running.
var groups processGroups

type processGroups struct {
	mutex   sync.Mutex
	leaders map[int]bool
}

func (g *processGroups) add(leader int) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if g.leaders == nil {
		g.leaders = make(map[int]bool)
	}
	g.leaders[leader] = true
}

func (g *processGroups) remove(leader int) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	delete(g.leaders, leader)
}

func (g *processGroups) kill() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	for leader := range g.leaders {
		syscall.Kill(-leader, syscall.SIGKILL)
	}
}
