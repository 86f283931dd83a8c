// Package harness is shared by the tests of the interop suite. It builds Caddy
// with this module, starts it and programs of other projects as real processes
// on loopback, installs what they need, and reads event streams with the time
// at which each byte arrived. interop/README.md shows what a test looks like.
package harness

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Patience limits every wait for something that must happen. A test that passes
// does not wait that long, but the machine can be busy: starting a browser or
// Java, or writing to the disk, has taken more than 30 seconds.
const Patience = 90 * time.Second

// Missing reports that this machine can't provide something. It skips the test,
// or fails it if CADDY_SSE_INTEROP=all forbids skips. Without -v it fails the
// test too: go test does not show the skips of a package that passes, and a
// skip that nobody sees looks like a pass.
func Missing(t testing.TB, what string, cause error) {
	t.Helper()
	message := fmt.Sprintf("SKIPPED, NOT SHOWN: %s: %v", what, cause)
	switch {
	case os.Getenv("CADDY_SSE_INTEROP") == "all":
		t.Fatalf("%s: %v (CADDY_SSE_INTEROP=all: nothing may be skipped)", what, cause)
	case !testing.Verbose():
		t.Fatalf("%s (a failure because go test shows skips only with -v)", message)
	default:
		t.Skip(message)
	}
}

// Root returns the folder of the checkout, or a path in it: Root(t, "examples",
// "flask").
func Root(t testing.TB, elements ...string) string {
	t.Helper()
	dir, err := os.Getwd() // go test runs a test in its package's folder
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "interop", "go.mod")); err == nil {
			return filepath.Join(append([]string{dir}, elements...)...)
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("the tests do not run in a checkout: no interop/go.mod above them")
		}
	}
}

// cache returns the folder where installs are kept between runs: in the user's
// cache folder, or the folder that CADDY_SSE_INTEROP_CACHE names.
func cache(t testing.TB, elements ...string) string {
	t.Helper()
	dir := os.Getenv("CADDY_SSE_INTEROP_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			user = filepath.Join(os.TempDir(), "cache-"+strconv.Itoa(os.Getuid()))
		}
		dir = filepath.Join(user, "caddy-sse-interop")
	}
	dir = filepath.Join(append([]string{dir}, elements...)...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// lock excludes other test processes, because go test runs packages in
// parallel. The returned function releases it, and so does the end of the
// process.
func lock(t testing.TB, name string) (unlock func()) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(cache(t), name+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { file.Close() }
}

// once fills a folder of the cache by calling fill, unless that has been done
// already. The key identifies what the content depends on.
func once(t testing.TB, kind string, key string, fill func(dir string) error) (string, error) {
	t.Helper()
	defer lock(t, kind)()
	dir := filepath.Join(cache(t, kind), key)
	done := filepath.Join(dir, ".complete")
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	// What is there was left incomplete.
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := fill(dir); err != nil {
		return "", err
	}
	return dir, os.WriteFile(done, nil, 0o644)
}

func digest(parts ...string) string {
	sum := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(sum, "%d %s\n", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil)[:8])
}

// builtFolders are folders that tools create in a project and that are not part
// of it.
var builtFolders = []string{"node_modules", "target", "__pycache__", ".venv", "dist"}

// sources returns the files of a project's folder by their relative paths.
func sources(dir string) (map[string][]byte, error) {
	files := make(map[string][]byte)
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != dir && slices.Contains(builtFolders, entry.Name()):
			return filepath.SkipDir
		case !entry.Type().IsRegular():
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(dir, path)
		files[relative] = content
		return err
	})
	return files, err
}

func writeSources(files map[string][]byte, dir string) error {
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

var (
	portsMutex sync.Mutex
	portsGiven = make(map[int]io.Closer) // and their reservations
)

// FreePort returns a port on loopback on which nothing listens. It is below the
// ports that the kernel uses for outgoing connections, which could otherwise
// take it before its listener does.
func FreePort(t testing.TB) int {
	t.Helper()
	portsMutex.Lock()
	defer portsMutex.Unlock()
	for range 1000 {
		port := 15000 + rand.IntN(17000)
		if portsGiven[port] != nil {
			continue
		}
		reservation, err := reservePort(port)
		if err != nil {
			continue
		}
		if inUse(fmt.Sprintf("127.0.0.1:%d", port)) {
			reservation.Close()
			continue
		}
		portsGiven[port] = reservation
		return port
	}
	t.Fatal("no free port on loopback")
	return 0
}

// inUse reports whether something listens on an address. It does not try to listen
// there: a process that is being started shares all sockets of this one until it runs
// its program, so the address could stay taken for a moment.
func inUse(addr string) bool {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Listen listens on an address of FreeAddr, also if a listener there was closed just
// now, which a process that is being started may still share.
func Listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	for deadline := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		listener, err := net.Listen("tcp", addr)
		if err == nil {
			return listener
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// FreeAddr returns 127.0.0.1 with a free port.
func FreeAddr(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", FreePort(t))
}

// ShortTempDir is like t.TempDir, but its path is short enough for Unix
// sockets.
func ShortTempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// WriteFile writes a file into a folder and returns its path.
func WriteFile(t testing.TB, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// ReadFile returns the content of a file.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// Replace returns text with each old string replaced by the new one that
// follows it. If an old string is missing, the test fails: if the Caddyfile of
// an example changes, it must not be tested with its own ports by accident.
func Replace(t testing.TB, text string, oldnew ...string) string {
	t.Helper()
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			t.Fatalf("there is no %q in:\n%s", oldnew[i], text)
		}
	}
	return strings.NewReplacer(oldnew...).Replace(text)
}

// Eventually polls until the condition is true, and fails the test if that
// takes too long.
func Eventually(t testing.TB, within time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}
