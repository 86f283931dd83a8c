package caddysse

// The commands, for tests that have a real Caddy to talk to.
var (
	ListCommand  = listCommand
	CloseCommand = closeCommand
)
