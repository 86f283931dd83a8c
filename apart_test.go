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

// apartVariable makes a test binary run the one test that another one has set
// apart.
const apartVariable = "CADDYSSE_TEST_APART"

// apartAtOnce bounds how many tests run apart at a time: they mostly wait, but
// each has a Caddy.
var apartAtOnce = make(chan struct{}, 8)

// apart runs a test, or a subtest, in a process of its own and beside others, and
// reports whether it has done so. It is for tests that need the Caddy of their
// process and mostly wait:
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
		// The child's own time is over first, so that it tells what it waits for.
		left := time.Until(deadline)
		args = append(args, "-test.timeout="+(left-left/20).String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), apartVariable+"=1")
	if _, err := cmd.StdinPipe(); err != nil { // which Wait closes
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

// patternOfOne is what -run takes for one test and what of its subtests this
// process is to run.
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

// leash ends a process that runs a test apart with the one that started it.
func leash() {
	if os.Getenv(apartVariable) != "" {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
	}
}
