package top

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/width"
)

// clean makes text from a client, an upstream or something that is not Caddy safe
// for a terminal: nothing that moves the cursor, starts a line or changes the
// text direction.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, text)
}

// columnsOf is how many columns a character takes.
func columnsOf(r rune) int {
	if unicode.In(r, unicode.Mn, unicode.Me) {
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// displayed is how many columns a text takes.
func displayed(text string) (columns int) {
	for _, r := range text {
		columns += columnsOf(r)
	}
	return columns
}

// fit cuts a text that takes more columns than there are.
func fit(text string, columns int) string {
	if displayed(text) <= columns {
		return text
	}
	end, taken := 0, 0
	for i, r := range text {
		if taken+columnsOf(r) > columns-1 {
			break
		}
		taken += columnsOf(r)
		end = i + utf8.RuneLen(r)
	}
	return text[:end] + "…"
}

// pad fills a text with spaces to this many columns.
func pad(text string, columns int) string {
	text = fit(text, columns)
	return text + strings.Repeat(" ", columns-displayed(text))
}

// spread aligns one text at the left and one at the right.
func spread(left, right string, columns int) string {
	room := columns - displayed(right) - 1
	if right == "" || room < 10 {
		return left
	}
	return pad(left, room) + " " + right
}

// thirds aligns three texts at fixed columns, so that they do not move when they
// change.
func thirds(columns int, texts ...string) string {
	each := columns / 3
	var line strings.Builder
	for i, text := range texts {
		if i == len(texts)-1 || displayed(text) >= each {
			line.WriteString(text + " ")
		} else {
			line.WriteString(pad(text, each))
		}
	}
	return strings.TrimRight(line.String(), " ")
}

// grouped is a number with separated thousands.
func grouped(n int64) string {
	digits := strconv.FormatInt(n, 10)
	sign := ""
	if n < 0 {
		sign, digits = "-", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}

// size formats a number of bytes with as much precision as a reader needs.
func size(bytes float64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for bytes >= 1024 && len(units) > 1 {
		bytes /= 1024
		units = units[1:]
	}
	if units[0] != "B" && bytes < 10 {
		return fmt.Sprintf("%.1f %s", bytes, units[0])
	}
	return fmt.Sprintf("%.0f %s", bytes, units[0])
}

// span formats a duration with as much precision as a reader needs.
func span(seconds float64) string {
	whole := int64(seconds)
	switch {
	case seconds < 10:
		return fmt.Sprintf("%.1fs", seconds)
	case whole < 60:
		return fmt.Sprintf("%ds", whole)
	case whole < 3600:
		return fmt.Sprintf("%dm%02ds", whole/60, whole%60)
	case whole < 86400:
		return fmt.Sprintf("%dh%02dm", whole/3600, whole/60%60)
	}
	return fmt.Sprintf("%dd%02dh", whole/86400, whole/3600%24)
}
