package caddysse

import "time"

// The commands, for tests that have a real Caddy to talk to.
var (
	ListCommand  = listCommand
	CloseCommand = closeCommand
)

// DrainStreams is what the handler does when its server begins to stop.
func (h *Handler) DrainStreams() { h.drainStreams() }

// DrainOver is what it does at a reload, with another window.
func (h *Handler) DrainOver(window time.Duration, stop <-chan struct{}) { h.drainOver(window, stop) }

// RegisterMetrics puts the module's metrics on a registry.
var RegisterMetrics = registerMetrics

// EndHandler ends a handler's streams as the end of the grace period does.
func EndHandler(h *Handler) { endStreams(h.liveStreams()) }
