package caddysse

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// limits is how many streams may be open under one name; 0: any number.
type limits struct {
	total     int
	perClient int
}

// refusedFor is how long a refused client is asked to wait.
const refusedFor = 5 * time.Second

// limit is which limit refused a stream.
type limit string

const (
	limitTotal     limit = "max_streams"
	limitPerClient limit = "max_streams_per_client"
)

// refusal is the error for a refused request.
func (l limit) refusal(h *Handler) error {
	if l == limitPerClient {
		return caddyhttp.Error(http.StatusTooManyRequests,
			fmt.Errorf("sse: %s: the client has %d streams open under the name %q", l, h.limits.perClient, h.Name))
	}
	return caddyhttp.Error(http.StatusServiceUnavailable,
		fmt.Errorf("sse: %s: %d streams are open under the name %q", l, h.limits.total, h.Name))
}

// reservation is a place among the streams of a name, for a request that may
// become one of them.
type reservation uint8

const (
	noPlace      reservation = iota
	namesPlace               // it counts as a stream of the name
	clientsPlace             // and as a stream of its client
)

// reserve takes a place for a request, or returns the limit that refuses it.
func (g *group) reserve(limits limits, client clientID) (reservation, limit) {
	g.mu.Lock()
	defer g.mu.Unlock()
	full := limits.total > 0 && g.openLocked() >= limits.total
	tooMany := limits.perClient > 0 && client.isKnown() && g.clients[client] >= limits.perClient
	var gives *run
	switch {
	case tooMany:
		if gives = g.oldestIdleLocked(client); gives == nil {
			return noPlace, limitPerClient
		}
	case full:
		if gives = g.oldestIdleLocked(clientID{}); gives == nil {
			return noPlace, limitTotal
		}
	}
	if gives != nil {
		go gives.giveWay() // needs the group's lock
	}
	g.reserved++
	if g.clients == nil {
		return namesPlace, ""
	}
	g.countClientLocked(client, +1)
	return clientsPlace, ""
}

// release gives back a place of which no stream came.
func (g *group) release(r reservation, client clientID) {
	if r == noPlace {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.reserved--
	if r == clientsPlace {
		g.countClientLocked(client, -1)
	}
}

// countClients starts to count streams by client, which is done only for names
// with such a limit. Streams that are already open count too.
func (g *group) countClients() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.clients != nil {
		return
	}
	g.clients = make(map[clientID]int)
	for _, r := range g.runs.idle {
		g.countClientLocked(r.clientID(), +1)
	}
	for s := g.oldest; s != nil; s = s.next {
		g.countClientLocked(s.clientID(), +1)
	}
}

func (g *group) countClientLocked(client clientID, n int) {
	if g.clients == nil || !client.isKnown() {
		return
	}
	if g.clients[client] += n; g.clients[client] == 0 {
		delete(g.clients, client)
	}
}

// clientID identifies a client: by a key of the site's choice, or by an address.
type clientID struct {
	key  keyHash
	addr netip.Prefix
}

// keyHash stands for a key, which may be long and secret; zero: there is none.
type keyHash [16]byte

func newClientID(key keyHash, ip string) clientID {
	if key != (keyHash{}) {
		return clientID{key: key}
	}
	return clientID{addr: clientAddr(ip)}
}

// isKnown is false if nothing distinguishes clients, as on a Unix socket.
func (c clientID) isKnown() bool { return c != clientID{} }

// rememberKey records the client's key as it was when the request arrived.
func (x *exchange) rememberKey(key string) {
	if strings.TrimSpace(key) != "" {
		hash := sha256.Sum256([]byte(key))
		x.rarely().key = keyHash(hash[:])
	}
}

func (x *exchange) clientID() clientID {
	if x.rare == nil {
		return newClientID(keyHash{}, x.ip)
	}
	return newClientID(x.rare.key, x.ip)
}

func (s *stream) clientID() clientID {
	s.facts.Lock()
	defer s.facts.Unlock()
	if s.rare == nil {
		return newClientID(keyHash{}, s.client.ip)
	}
	return newClientID(s.rare.key, s.client.ip)
}

// clientAddr is an IPv4 address, or the /64 from which an IPv6 host can choose
// its addresses. It is invalid if there is no address.
func clientAddr(ip string) netip.Prefix {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return netip.Prefix{}
	}
	addr = addr.Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	key, _ := addr.Prefix(bits)
	return key
}

// place is a place among the streams of a name that a request has reserved. It is
// given back when the client leaves, whatever the handlers do, or when it is
// known that the answer is not a stream; or a stream takes it over.
type place struct {
	group  *group
	client clientID
	kind   reservation
	gone   atomic.Bool // given back, or taken over
	forget func() bool // cancels giving it back when the client leaves
}

// giveBack gives the place back, unless it is gone.
func (p *place) giveBack() {
	if p != nil && p.gone.CompareAndSwap(false, true) {
		p.group.release(p.kind, p.client)
	}
}

// use takes the place over for a stream, if it is not gone.
func (p *place) use() reservation {
	if p == nil || !p.gone.CompareAndSwap(false, true) {
		return noPlace
	}
	p.forget()
	return p.kind
}

// reserve takes a place for the request, or returns the limit that refuses it.
func (x *exchange) reserve() (*place, limit) {
	client := x.clientID()
	kind, met := x.h.group.reserve(x.h.limits, client)
	if kind == noPlace {
		return nil, met
	}
	p := &place{group: x.h.group, client: client, kind: kind}
	p.forget = context.AfterFunc(x.r.Context(), p.giveBack)
	return p, ""
}

// givePlaceBack gives back the request's place, if it has one, as soon as it is
// known that the answer is not a stream.
func (x *exchange) givePlaceBack() {
	if x.place != nil {
		x.place.forget()
		x.place.giveBack()
	}
}

// takePlace takes a place for the request, or returns an error for its refusal.
func (x *exchange) takePlace() error {
	reserved, met := x.reserve()
	if reserved != nil {
		x.place = reserved
		return nil
	}
	collector.refused.WithLabelValues(x.h.Name, string(met)).Inc()
	header := x.w.Header()
	if x.rare != nil && x.rare.siteHeader != nil {
		replaceHeader(header, x.rare.siteHeader) // the upstream set the others for a stream
	}
	header.Set("Retry-After", strconv.Itoa(int(refusedFor.Seconds())))
	return met.refusal(x.h)
}
