//go:build !linux

// Command bench measures what this module costs. It runs on Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: reads /proc, so it runs on Linux only")
	os.Exit(1)
}
