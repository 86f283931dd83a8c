package caddysse

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"reflect"
	"runtime/debug"
	"strings"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// attempt is one call of the handlers after sse: the request that they get, and
// the way to end it. It knows neither who receives the answer nor whether there
// will be another attempt.
//
// The request belongs to the attempt alone. reverse_proxy may still be dialing
// for a request that it has given up, and reads the request's fields, headers and
// Replacer without a lock. So nothing that the handlers have is modified from
// outside, and nothing that belongs to the client's request is given to handlers
// that may still run after the request is over.
//
//   - The header map has Accept-Encoding: identity if frames may be needed.
//   - The context ends with the client's request, or when cancel is called.
//   - The Replacer knows the attempt's request, so that placeholders see what
//     handlers after sse have rewritten. The client's Replacer also knows what
//     handlers set in it, such as {http.reverse_proxy.upstream.hostport} (see
//     exchange.placeholder), so that logs and error routes see it. The attempt's
//     Replacer asks the client's for what it does not know itself.
//   - Variables are the client's own, so that handlers before sse see what
//     handlers after it set. An isolated attempt has copies, which are handed
//     back when its handlers have answered or left (see isolation.handBack).
type attempt struct {
	request *http.Request
	cancel  context.CancelCauseFunc
	context attemptContext
}

// outcome is how an attempt ended.
type outcome struct {
	err      error  // what the handlers returned
	panicked any    // the value of their panic; http.ErrAbortHandler: one side broke off
	left     bool   // they have returned; if not, no one waits for them any more
	run      runEnd // how the run that fed the stream ended, if there was one
}

// attemptContext is the context of an attempt's request.
type attemptContext struct {
	context.Context // the client's, until the attempt is cancelled

	x        *exchange
	replacer *caddy.Replacer
	set      caddy.Replacer // knows what handlers have set in replacer, but does not ask the client's
	isolated *isolation     // nil on the request's goroutine
}

// exchangeKey is the key of the exchange that a request belongs to.
type exchangeKey struct{}

// idleTimeoutsKey is the key of caddyhttp.IdleTimeoutsFromContext.
const idleTimeoutsKey = caddy.CtxKey("idle_timeouts")

// routeGroupsKey is the key of the groups of routes that a request has matched.
const routeGroupsKey = caddy.CtxKey("route_group")

// Value implements context.Context.
func (c *attemptContext) Value(key any) any {
	switch key := key.(type) {
	case exchangeKey:
		return c.x
	case caddy.CtxKey:
		switch key {
		case caddy.ReplacerCtxKey:
			return c.replacer
		case idleTimeoutsKey:
			return c.x.idleTimeoutsOfHandlers()
		}
		if c.isolated != nil {
			if value := c.isolated.value(key); value != nil {
				return value
			}
		}
	}
	return c.Context.Value(key)
}

// newAttempt makes the first attempt. w is the ResponseWriter of its handlers if
// that has a header map of its own, else nil.
func (x *exchange) newAttempt(w http.ResponseWriter) *attempt {
	ctx := x.context()
	if t := x.tries(); t != nil {
		ctx = t.ctx
	}
	if w == nil {
		return x.newAttemptOf(x.r, ctx, nil, nil)
	}
	return x.newAttemptOf(x.r, ctx, w, newIsolation(x.r))
}

// newAttemptOf makes an attempt for a request, which is copied if the attempt is
// isolated.
func (x *exchange) newAttemptOf(r *http.Request, ctx context.Context, w http.ResponseWriter, isolated *isolation) *attempt {
	a := new(attempt)
	c := &a.context
	c.x = x
	c.isolated = isolated
	c.Context, a.cancel = context.WithCancelCause(ctx)
	a.request = new(http.Request)
	*a.request = *detached
	if w == nil {
		// This does what PrepareRequest does, but makes no context whose values
		// would all be replaced.
		c.replacer = caddyhttp.NewTestReplacer(a.request)
	} else {
		c.replacer = caddy.NewReplacer()
		a.request = caddyhttp.PrepareRequest(a.request, c.replacer, w, nil)
	}
	c.set = *c.replacer
	c.replacer.Map(x.clientsPlaceholder)
	// The Replacer points to the request, so the pointer must not change.
	*a.request = *r.WithContext(c)
	if c.isolated != nil {
		a.request.URL = new(*r.URL)
		a.request.Header = r.Header.Clone()
	}
	if x.accept.eventStream {
		if c.isolated == nil {
			a.request.Header = maps.Clone(x.r.Header)
		}
		a.request.Header["Accept-Encoding"] = identity
	}
	x.shown.Store(a)
	return a
}

// detached is a request with a context that has no values.
var detached = &http.Request{URL: new(url.URL)}

// identity asks for an unencoded body (RFC 9110, section 12.5.3): frames can only
// be added to text.
var identity = []string{"identity"}

// call lets the handlers answer on a goroutine of their own.
func (a *attempt) call(next caddyhttp.Handler, w http.ResponseWriter) (out outcome) {
	defer func() {
		out.left = true
		if out.panicked = recover(); out.panicked != nil && !isAbort(out.panicked) {
			// The panic continues on the request's goroutine, which has another stack.
			a.context.x.h.survive(out.panicked, debug.Stack())
		}
	}()
	out.err = next.ServeHTTP(w, a.request)
	return out
}

// upstream returns the upstream that reverse_proxy has chosen, if it has.
func (a *attempt) upstream() string {
	upstream, _ := a.context.set.GetString(upstreamPlaceholder)
	return printable(upstream, 255) // its placeholders may contain what the client sent
}

const (
	proxyPlaceholders    = "http.reverse_proxy."
	upstreamPlaceholders = proxyPlaceholders + "upstream."
	upstreamPlaceholder  = upstreamPlaceholders + "hostport"
)

// clientsPlaceholder gives handlers after sse the placeholders that handlers
// before it have set. Those of the request come from their own request.
func (x *exchange) clientsPlaceholder(key string) (any, bool) {
	if x.replacer == nil || strings.HasPrefix(key, "http.request.") || strings.HasPrefix(key, "http.vars.") ||
		strings.HasPrefix(key, "http.sse.") {
		return nil, false
	}
	return x.outer.Get(key)
}

// placeholder gives handlers before sse the placeholders that handlers after it
// have set, and those of the stream.
func (x *exchange) placeholder(key string) (any, bool) {
	if strings.HasPrefix(key, "http.sse.") {
		if x.told == nil {
			return nil, false
		}
		return x.told.placeholder(key)
	}
	// Handlers of an attempt that is over may also call this.
	a := x.shown.Load()
	if a == nil || strings.HasPrefix(key, "http.request.") {
		return nil, false
	}
	c := &a.context
	if x.relayed() && !x.rare.relay.waits.Load() || x.tries() != nil {
		return c.set.Get(key) // handlers may be running; all they add is another provider (map)
	}
	return c.replacer.Get(key)
}

// handOut makes what the handlers have set so far visible on the client's side.
// It runs while they wait, or after they have returned.
func (x *exchange) handOut() {
	if x.replacer == nil || x.attempt == nil || x.handlersGoOn() {
		return
	}
	if x.attempt.context.isolated != nil {
		x.attempt.context.isolated.handBack()
	}
	if _, proxied := x.attempt.context.set.Get(upstreamPlaceholder); proxied {
		// Values from a proxy before sse (forward_auth) would hide it.
		hiding := proxyPlaceholders
		if t := x.tries(); t != nil && !t.over {
			// The next try may need the others, such as a user's name.
			hiding = upstreamPlaceholders
		}
		x.replacer.DeleteByPrefix(hiding)
	}
}

// isolation holds copies for an attempt on a goroutine of its own, because hooks
// of handlers before sse use the client's originals at the same time.
type isolation struct {
	vars, clientsVars map[string]any
	groups            map[string]struct{}
	original          http.Request
}

func newIsolation(r *http.Request) *isolation {
	i := new(isolation)
	i.clientsVars, _ = r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	i.vars = maps.Clone(i.clientsVars)
	groups, _ := r.Context().Value(routeGroupsKey).(map[string]struct{})
	i.groups = maps.Clone(groups)
	i.original, _ = r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if i.original.URL != nil {
		i.original.URL = new(*i.original.URL)
	}
	return i
}

func (i *isolation) value(key caddy.CtxKey) any {
	switch key {
	case caddyhttp.VarsCtxKey:
		if i.vars != nil {
			return i.vars
		}
	case routeGroupsKey:
		if i.groups != nil {
			return i.groups
		}
	case caddyhttp.OriginalRequestCtxKey:
		return i.original
	}
	return nil
}

// copy returns the same for another attempt. It is not handed back: handlers of
// the first attempt may still read the client's variables.
func (i *isolation) copy() *isolation {
	again := &isolation{vars: maps.Clone(i.vars), groups: maps.Clone(i.groups), original: i.original}
	if i.original.URL != nil {
		again.original.URL = new(*i.original.URL)
	}
	return again
}

// handBack copies the variables that the handlers have set to the client's
// request. It writes as little as possible: a proxy before sse (forward_auth) may
// have given up a dial that still reads them, and the proxy after sse sets the
// same variables again.
func (i *isolation) handBack() {
	if i.clientsVars == nil {
		return
	}
	for name, value := range i.vars {
		if old, there := i.clientsVars[name]; !there || !isEqual(old, value) {
			i.clientsVars[name] = value
		}
	}
}

// isEqual reports whether two values can be compared and are the same.
func isEqual(a, b any) bool { return reflect.ValueOf(a).Comparable() && a == b }

// survive logs a panic that was recovered on a goroutine other than the
// request's. No server would recover it there, and it would end the process.
func (h *Handler) survive(panicked any, stack []byte) {
	h.logger.Error("panic beside a request", zap.Any("panic", panicked), zap.ByteString("stack", stack))
}

// isAbort reports whether a handler has panicked with net/http.ErrAbortHandler,
// which means that one side broke off.
func isAbort(panicked any) bool {
	err, ok := panicked.(error)
	return ok && errors.Is(err, http.ErrAbortHandler)
}
