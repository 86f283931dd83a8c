package storetest_test

import (
	"testing"

	"github.com/caddy-sse/caddy-sse/store"
	"github.com/caddy-sse/caddy-sse/store/storetest"
)

func TestTheStoreInMemoryIsOne(t *testing.T) {
	m := storetest.NewMemory()
	storetest.Run(t, func(*testing.T) store.Store { return m.Open() })
}
