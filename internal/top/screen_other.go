//go:build !windows

package top

import "os"

// obeySequences has a terminal obey control sequences, as all do here.
func obeySequences(*os.File) (restore func() error, err error) {
	return func() error { return nil }, nil
}
