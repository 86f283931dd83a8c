package eventstream

import "unicode/utf8"

// utf8Checker checks that a body is UTF-8, across the boundaries of its pieces.
// It stops at the first error.
type utf8Checker struct {
	open    [utf8.UTFMax]byte // a sequence that is incomplete
	length  uint8             // of open
	invalid bool
}

func (c *utf8Checker) follow(p []byte) {
	if c.invalid {
		return
	}
	for c.length > 0 {
		if len(p) == 0 {
			return
		}
		c.open[c.length] = p[0]
		c.length++
		p = p[1:]
		if sequence := c.open[:c.length]; utf8.FullRune(sequence) {
			c.length = 0
			if !utf8.Valid(sequence) {
				c.invalid = true
				return
			}
		}
	}
	tail := openSequence(p)
	if !utf8.Valid(p[:len(p)-len(tail)]) {
		c.invalid = true
		return
	}
	c.length = uint8(copy(c.open[:], tail))
}

// openSequence returns the bytes at the end of p that begin a UTF-8 sequence
// without completing it.
func openSequence(p []byte) []byte {
	for i := len(p) - 1; i >= 0 && i > len(p)-utf8.UTFMax; i-- {
		if utf8.RuneStart(p[i]) {
			if utf8.FullRune(p[i:]) {
				return nil
			}
			return p[i:]
		}
	}
	return nil
}
