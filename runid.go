package caddysse

import "strings"

// runIDPrefix begins every id that this module adds to a stream. What begins
// with it is of this form, malformed or not.
const runIDPrefix = "sse1-"

// isRunID reports whether an id is of the form that this module adds, malformed
// or not.
func isRunID(id string) bool {
	return strings.HasPrefix(id, runIDPrefix)
}
