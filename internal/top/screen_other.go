//go:build !windows

package top

import "os"

// obeySequences makes a terminal interpret control sequences, which all terminals
// do here.
func obeySequences(*os.File) (restore func() error, err error) {
	return func() error { return nil }, nil
}
