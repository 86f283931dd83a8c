package caddysse

import (
	"context"
	"time"
)

// Connections, for tests that have a client host that can vanish.

var WithConnection = withConnection

// WatchConnection does to a request's connection what a stream does that begins.
func WatchConnection(ctx context.Context, timeout time.Duration) {
	connectionOf(ctx).watch(timeout)
}

// LeaveConnection does to it what that stream does when its client is gone, and
// tells the fate.
func LeaveConnection(ctx context.Context, timeout time.Duration) string {
	c := connectionOf(ctx)
	defer c.unwatch(timeout)
	return c.fate().String()
}
