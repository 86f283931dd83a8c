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

// patience limits every wait for something that must happen. No test that
// passes waits that long.
const patience = time.Minute

// eventually polls until a condition is true, for conditions that nothing
// signals.
func eventually(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// raceEnabled is true under the race detector, which makes the tests several
// times slower and changes memory figures.
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
	playReplay() // if this process is an upstream of another process's tests
	playCaddy()
	leash()
	os.Exit(runTests(m))
}

// runTests keeps Caddy out of the user's folders, and at the end checks that
// the tests have left nothing running or open.
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

	// Most parallel subtests only wait for time to pass, so many can run at
	// once.
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

// names counts the names that uniqueName has returned.
var names atomic.Int64

// uniqueName returns a handler name that no other test has used, nor an earlier
// run of this test. Totals by name belong to the process.
func uniqueName(name string) string { return fmt.Sprint(name, names.Add(1)) }

// checkLeaks fails the test if goroutines or files are left after everything
// that was registered with t.Cleanup after this call has been cleaned up. So a
// test calls it first.
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
	files      map[string]string // what each open file is, by descriptor
}

func takeInventory() inventory {
	return inventory{goroutineStacks(), openFiles()}
}

// waitForReturn waits until everything that was not there before is gone, and
// returns what is still there when patience has passed.
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

// isExpected reports whether a goroutine is no leak although it ends late or
// with the process.
func isExpected(stack string) bool {
	for _, function := range []string{
		"testing.(*T).Run(", "testing.tRunner(", "testing.(*M).startAlarm",
		"os/signal.", "runtime.ensureSigM",
		// It belongs to a lock that has been released, which it notices within
		// 5 seconds.
		"certmagic.keepLockfileFresh(",
	} {
		if strings.Contains(stack, function) {
			return true
		}
	}
	return false
}

var goroutineID = regexp.MustCompile(`^goroutine (\d+) `)

// goroutineStacks returns the stacks of all goroutines except the caller's.
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

// openFiles returns the open file descriptors, or none if the platform does not
// tell them.
func openFiles() map[string]string {
	const dir = "/proc/self/fd"
	files := make(map[string]string)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return files
	}
	for _, entry := range entries {
		// The descriptor that ReadDir used is closed by now, and others may be
		// too.
		target, err := os.Readlink(dir + "/" + entry.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:") {
			continue // the poller's, opened once per process
		}
		files[entry.Name()] = target
	}
	return files
}
