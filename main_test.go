package caddysse_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// patience bounds every wait for something that has to happen; nothing waits
// for it where all is well.
const patience = time.Minute

// eventually waits for a condition that nothing says anything of.
func eventually(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// raceEnabled says that the tests run under the race detector, several times
// slower and with memory figures of its own.
var raceEnabled = func() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, setting := range info.Settings {
		if setting.Key == "-race" {
			return setting.Value == "true"
		}
	}
	return false
}()

func TestMain(m *testing.M) {
	playUpstream()
	playReplay() // where this process is an upstream of another one's tests
	playCaddy()
	leash()
	os.Exit(runTests(m))
}

// runTests keeps Caddy out of the user's own folders, and at the end looks
// for what the tests have left running or open.
func runTests(m *testing.M) int {
	home, err := os.MkdirTemp("", "caddysse")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(home)
	for _, variable := range []string{"XDG_DATA_HOME", "XDG_CONFIG_HOME"} {
		os.Setenv(variable, home)
	}

	// Most parallel subtests wait for a time to pass: let them do so together.
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = flag.Set("test.parallel", "16")
	}

	before := takeInventory()
	code := m.Run()
	if left := before.waitForReturn(patience); left != "" {
		fmt.Fprintf(os.Stderr, "after the last test:\n%s", left)
		if code == 0 {
			code = 1
		}
	}
	return code
}

// names counts those that uniqueName has made.
var names atomic.Int64

// uniqueName makes a name of a handler that no other test has had, nor this one
// when it ran before: totals by name belong to the process.
func uniqueName(name string) string { return fmt.Sprint(name, names.Add(1)) }

// checkLeaks fails the test if goroutines or files are left when everything
// registered with t.Cleanup after this call is cleaned up. So it comes first
// in a test.
func checkLeaks(t testing.TB) {
	t.Helper()
	before := takeInventory()
	t.Cleanup(func() {
		if left := before.waitForReturn(patience); left != "" && !t.Failed() {
			t.Errorf("left behind:\n%s", left)
		}
	})
}

// inventory is what the process had at one moment.
type inventory struct {
	goroutines map[string]string // stacks by id
	files      map[string]string // what open files are, by descriptor
}

func takeInventory() inventory {
	return inventory{goroutineStacks(), openFiles()}
}

// waitForReturn waits until nothing is there that was not there before, and
// tells what still is when the time is over.
func (before inventory) waitForReturn(patience time.Duration) string {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		left := before.whatIsNew()
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

func (before inventory) whatIsNew() string {
	var left strings.Builder
	for id, stack := range goroutineStacks() {
		if _, known := before.goroutines[id]; !known && !isExpected(stack) {
			fmt.Fprintf(&left, "%s\n\n", stack)
		}
	}
	for fd, target := range openFiles() {
		if before.files[fd] == "" {
			fmt.Fprintf(&left, "file descriptor %s: %s\n", fd, target)
		}
	}
	return left.String()
}

// isExpected knows the goroutines that end with the process, or late, and are
// nobody's leak.
func isExpected(stack string) bool {
	for _, function := range []string{
		"testing.(*T).Run(", "testing.tRunner(", "testing.(*M).startAlarm",
		"os/signal.", "runtime.ensureSigM",
		// Of a lock that is released already; it notices within 5 seconds.
		"certmagic.keepLockfileFresh(",
	} {
		if strings.Contains(stack, function) {
			return true
		}
	}
	return false
}

var goroutineID = regexp.MustCompile(`^goroutine (\d+) `)

// goroutineStacks returns the stacks of all goroutines but the caller's.
func goroutineStacks() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	stacks := make(map[string]string)
	for i, stack := range bytes.Split(buf, []byte("\n\n")) {
		if id := goroutineID.FindSubmatch(stack); id != nil && i > 0 {
			stacks[string(id[1])] = string(stack)
		}
	}
	return stacks
}

// openFiles returns the open file descriptors; none where the platform does
// not tell.
func openFiles() map[string]string {
	const dir = "/proc/self/fd"
	files := make(map[string]string)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return files
	}
	for _, entry := range entries {
		// The descriptor that ReadDir used is gone again, as one is that was
		// closed meanwhile.
		target, err := os.Readlink(dir + "/" + entry.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:") {
			continue // the poller's, opened once
		}
		files[entry.Name()] = target
	}
	return files
}
