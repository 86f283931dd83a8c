package caddysse_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// apartVariable makes a test binary run only the test that another process runs
// apart.
const apartVariable = "CADDYSSE_TEST_APART"

// apartAtOnce limits how many tests run apart at the same time. They mostly
// wait, but each has a Caddy.
var apartAtOnce = make(chan struct{}, 8)

// apart runs a test or a subtest in its own process, in parallel with others,
// and reports whether it has done so. It is for tests that need a Caddy and
// mostly wait:
//
//	if apart(t) {
//		return
//	}
func apart(t *testing.T) bool {
	t.Helper()
	if os.Getenv(apartVariable) != "" {
		return false
	}
	t.Parallel()
	apartAtOnce <- struct{}{}
	defer func() { <-apartAtOnce }()

	ctx := t.Context()
	args := []string{"-test.v", "-test.run=" + patternOfOne(t.Name()), "-test.short=" + fmt.Sprint(testing.Short())}
	if deadline, ok := t.Deadline(); ok {
		// The child's timeout is shorter, so that its own output says where it
		// waits.
		left := time.Until(deadline)
		args = append(args, "-test.timeout="+(left-left/20).String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), apartVariable+"=1")
	if _, err := cmd.StdinPipe(); err != nil { // Wait closes it
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	switch text := string(out); {
	case err != nil:
		t.Errorf("in a process of its own: %v\n%s", err, text)
	case strings.Contains(text, "--- SKIP: "+t.Name()+" "):
		t.Skip(text)
	case !strings.Contains(text, "--- PASS: "+t.Name()+" "):
		t.Errorf("a process of its own has not run the test:\n%s", text)
	default:
		t.Log(text)
	}
	return true
}

// patternOfOne returns the -run pattern for one test, including which of its
// subtests this process was told to run.
func patternOfOne(name string) string {
	parts := strings.Split(name, "/")
	for i, part := range parts {
		parts[i] = "^" + regexp.QuoteMeta(part) + "$"
	}
	if asked := strings.Split(flag.Lookup("test.run").Value.String(), "/"); len(asked) > len(parts) {
		parts = append(parts, asked[len(parts):]...)
	}
	return strings.Join(parts, "/")
}

// leash makes a process that runs a test apart end when the process that
// started it ends.
func leash() {
	if os.Getenv(apartVariable) != "" {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
	}
}
