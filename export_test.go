package caddysse

// The commands, for tests that have a real Caddy to talk to.
var (
	ListCommand  = listCommand
	CloseCommand = closeCommand
)

// DrainStreams is what the handler does when its server begins to stop.
func (h *Handler) DrainStreams() { h.drainStreams() }

// RegisterMetrics puts the module's metrics on a registry.
var RegisterMetrics = registerMetrics

// SetExiting lets the process seem to end, or not, until undo is called.
func SetExiting(is bool) (undo func()) {
	before := exiting
	exiting = func() bool { return is }
	return func() { exiting = before }
}
