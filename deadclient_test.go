package caddysse_test

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-sse/caddy-sse/internal/peer"
)

func TestTheSocketIsFoundInCaddysListenerWrappers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wrapper caddy.ListenerWrapper = new(caddyhttp.HTTPRedirectListenerWrapper)
	ln = wrapper.WrapListener(ln)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for name, conn := range map[string]net.Conn{
		"http_redirect":            server,
		"TLS around http_redirect": tls.Server(server, nil),
	} {
		if peer.FromContext(peer.WithConn(t.Context(), conn)) == nil {
			t.Errorf("%s: not found", name)
		}
		if _, ok := peer.Accepted(peer.WithAccepted(t.Context(), conn)).(*net.TCPConn); !ok {
			t.Errorf("%s: what was accepted is %T, want a *net.TCPConn", name, peer.Accepted(peer.WithAccepted(t.Context(), conn)))
		}
	}
}
