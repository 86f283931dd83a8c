package top

import (
	"fmt"
	"os"

	"golang.org/x/sys/windows"
)

// obeySequences makes a console interpret control sequences, instead of printing
// them.
func obeySequences(out *os.File) (restore func() error, err error) {
	var mode uint32
	console := windows.Handle(out.Fd())
	if err := windows.GetConsoleMode(console, &mode); err != nil {
		return nil, fmt.Errorf("asking for the console's mode: %w", err)
	}
	if err := windows.SetConsoleMode(console, mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING); err != nil {
		return nil, fmt.Errorf("setting the console's mode: %w", err)
	}
	return func() error { return windows.SetConsoleMode(console, mode) }, nil
}
