//go:build !linux

// Command soak runs this module for a long time under bad conditions. It runs
// on Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "soak: reads /proc, so it runs on Linux only")
	os.Exit(1)
}
