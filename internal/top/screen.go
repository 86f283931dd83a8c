package top

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/term"
)

// The control sequences of ECMA-48, and the two private modes that every terminal
// since xterm has.
const (
	enter = "\x1b[?1049h\x1b[?25l\x1b[2J" // the alternate screen, without a cursor, empty
	leave = "\x1b[0m\x1b[?25h\x1b[?1049l"
)

// Screen is a terminal that shows lines.
type Screen struct {
	in, out *os.File
	before  *term.State
	restore func() error // of the output, where that is another thing

	columns, rows int // when something was last drawn
}

// ErrNoTerminal means that there is no terminal to show anything in.
var ErrNoTerminal = errors.New("standard input and output must be a terminal that can move its cursor")

// Open takes over a terminal until Close.
func Open(in, out *os.File) (*Screen, error) {
	if !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) || os.Getenv("TERM") == "dumb" {
		return nil, ErrNoTerminal
	}
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, fmt.Errorf("taking the terminal: %w", err)
	}
	s := &Screen{in: in, out: out, before: before}
	if s.restore, err = obeySequences(out); err != nil {
		return nil, errors.Join(err, term.Restore(int(in.Fd()), before))
	}
	if _, err := out.WriteString(enter); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close restores the terminal.
func (s *Screen) Close() error {
	_, err := s.out.WriteString(leave)
	return errors.Join(err, s.restore(), term.Restore(int(s.in.Fd()), s.before))
}

// Resized reports whether the terminal's size has changed since something was
// last drawn.
func (s *Screen) Resized() bool {
	columns, rows, err := term.GetSize(int(s.out.Fd()))
	return err == nil && (columns != s.columns || rows != s.rows)
}

// Draw draws a view in the terminal's size.
func (s *Screen) Draw(v View) error {
	columns, rows, err := term.GetSize(int(s.out.Fd()))
	if err != nil {
		return fmt.Errorf("asking for the terminal's size: %w", err)
	}
	var picture bytes.Buffer
	if columns != s.columns || rows != s.rows {
		picture.WriteString("\x1b[2J")
		s.columns, s.rows = columns, rows
	}
	paint(&picture, v.Lines(columns, rows))
	_, err = s.out.Write(picture.Bytes()) // in one piece, so that nothing flickers
	return err
}

// paint draws lines over what is there.
func paint(to *bytes.Buffer, lines []Line) {
	for i, line := range lines {
		fmt.Fprintf(to, "\x1b[%d;1H", i+1)
		switch line.Style {
		case Bold:
			to.WriteString("\x1b[1m")
		case Reverse:
			to.WriteString("\x1b[7m")
		}
		to.WriteString(line.Text)
		to.WriteString("\x1b[0m\x1b[K")
	}
}

// Keys calls pressed with each byte from the keyboard until that returns false,
// or there is no more input.
func (s *Screen) Keys(pressed func(key byte) (goOn bool)) {
	var keys [64]byte
	for {
		n, err := s.in.Read(keys[:])
		for _, key := range keys[:n] {
			if !pressed(key) {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
