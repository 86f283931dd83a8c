package caddysse_test

import (
	"testing"
	"time"
)

// A run may begin while the store is slow to take writes. A client that comes
// back to another node before the store has the run must not be told that it is
// unknown.
func TestARunThatASlowStoreDoesNotHaveYetIsFoundByTheOtherNode(t *testing.T) {
	checkLeaks(t)
	n := startNodes(t, "1m", "")
	n.SetWriteDelay(800 * time.Millisecond)
	_, other, called, _ := n.begin(t, "b", "/other") // that node notices that the store is slow
	res, one, call, token := n.begin(t, "a", "/")
	call.send(plainEvents(1, 2))
	one.expect(t, events(token, 1, 2))
	res.leave()
	two := n.back(t, "b", "/", token+".1").follow()
	two.expect(t, eventOf(token, 2))
	n.SetWriteDelay(0)
	call.end()
	two.expectEnd(t)
	called.end()
	other.expectEnd(t)
	n.up.expectNoCall(t)
}
