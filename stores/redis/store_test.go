package redis

import (
	"testing"

	"github.com/caddy-sse/caddy-sse/store"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

// settings are those of a node that uses the server.
func (s *server) settings() settings {
	return settings{Network: "tcp", Address: s.addr, Prefix: defaultPrefix}
}

func TestItDoesWhatAStoreHasToDo(t *testing.T) {
	s := startServer(t)
	storetest.Run(t, func(*testing.T) store.Store { return open(s.settings()) })
}
