package caddysse

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI lists streams and ends them, on Caddy's admin listener and under its
// protections.
type adminAPI struct {
	watches *watches // on this listener
}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.sse",
		New: func() caddy.Module { return &adminAPI{watches: newWatches()} },
	}
}

// Provision does what is needed for every configuration, even one without a
// handler: counters of removed handlers must not vanish, and their streams must
// be told of the exit.
func (adminAPI) Provision(ctx caddy.Context) error {
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("sse: getting the events app: %w", err)
	}
	if err := exit.subscribe(events.(*caddyevents.App)); err != nil {
		return fmt.Errorf("sse: subscribing to the end of the configuration: %w", err)
	}
	return registerMetrics(ctx.GetMetricsRegistry())
}

const (
	streamsPath  = "/sse/streams"
	handlersPath = "/sse/handlers"

	defaultListLimit = 1000
)

// Routes implements caddy.AdminRouter.
func (a adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: streamsPath, Handler: caddy.AdminHandlerFunc(a.serveStreams)},
		{Pattern: streamsPath + "/", Handler: caddy.AdminHandlerFunc(a.serveStream)},
		{Pattern: runsPath, Handler: caddy.AdminHandlerFunc(a.serveRuns)},
		{Pattern: runsPath + "/", Handler: caddy.AdminHandlerFunc(a.serveRun)},
		{Pattern: handlersPath, Handler: caddy.AdminHandlerFunc(a.serveHandlers)},
		{Pattern: watchPath, Handler: caddy.AdminHandlerFunc(a.watches.serve)},
		{Pattern: dashboardPath, Handler: caddy.AdminHandlerFunc(a.serveDashboard)},
	}
}

// streamJSON is a stream as the admin API shows it.
type streamJSON struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	State           string    `json:"state"`
	ClientIP        string    `json:"client_ip"`
	Method          string    `json:"method"`
	Host            string    `json:"host"`
	Path            string    `json:"path"`
	Proto           string    `json:"proto"`
	UserAgent       string    `json:"user_agent"`
	Upstream        string    `json:"upstream"`
	Resumable       bool      `json:"resumable"`
	OpenedAt        time.Time `json:"opened_at"`
	DurationSeconds float64   `json:"duration_seconds"`
	IdleSeconds     float64   `json:"idle_seconds"`
	Events          uint64    `json:"events"`
	Bytes           uint64    `json:"bytes"`
	Heartbeats      uint64    `json:"heartbeats"`
	LastEventID     string    `json:"last_event_id"`
}

func newStreamJSON(r report) streamJSON {
	return streamJSON{
		ID:              r.id,
		Name:            r.name,
		State:           r.state,
		ClientIP:        r.ip,
		Method:          r.method,
		Host:            r.host,
		Path:            r.path,
		Proto:           r.proto.String(),
		UserAgent:       r.userAgent,
		Upstream:        r.upstream,
		Resumable:       r.resumable,
		OpenedAt:        r.openedAt.Round(time.Millisecond),
		DurationSeconds: seconds(r.duration),
		IdleSeconds:     seconds(r.idle),
		Events:          r.counts.events,
		Bytes:           r.counts.bytes,
		Heartbeats:      r.counts.heartbeats,
		LastEventID:     r.lastEventID,
	}
}

// seconds rounds to milliseconds: no reader needs more.
func seconds(d time.Duration) float64 {
	return math.Round(d.Seconds()*1000) / 1000
}

type streamsJSON struct {
	Streams []streamJSON `json:"streams"`
	Total   int          `json:"total"` // of all that match, whatever the limit
}

type endingJSON struct {
	Ending int `json:"ending"`
}

type handlersJSON struct {
	Handlers []handlerJSON `json:"handlers"`
}

type handlerJSON struct {
	Name string `json:"name"`
	figuresJSON
}

// figuresJSON counts what has passed through streams.
type figuresJSON struct {
	Open       int               `json:"open"`
	Opened     uint64            `json:"opened"`
	Closed     map[string]uint64 `json:"closed"`
	Events     uint64            `json:"events"`
	Bytes      uint64            `json:"bytes"`
	Heartbeats uint64            `json:"heartbeats"`
}

// serveStreams lists streams or ends those that match.
func (adminAPI) serveStreams(w http.ResponseWriter, r *http.Request) error {
	switch r.Method {
	case http.MethodGet:
		filter, err := parseFilter(r.URL, "limit")
		if err != nil {
			return badRequest(err)
		}
		return writeJSON(w, http.StatusOK, filter.list())
	case http.MethodDelete:
		filter, err := parseFilter(r.URL, "all")
		if err != nil {
			return badRequest(err)
		}
		if !filter.narrows() && !filter.all {
			return badRequest(fmt.Errorf("this would end every stream: give one of name, client_ip and path, or all=true"))
		}
		return writeJSON(w, http.StatusAccepted, filter.end())
	}
	return methodNotAllowed(w, r, "GET, DELETE")
}

// serveStream shows one stream or ends it.
func (adminAPI) serveStream(w http.ResponseWriter, r *http.Request) error {
	return endpoint[stream]{
		path: streamsPath, kind: "live stream", find: live.stream,
		show: func(s *stream) any { return newStreamJSON(s.report()) },
		end:  func(s *stream) bool { return s.end(endedByAdmin) },
	}.serve(w, r)
}

// endpoint shows and ends single streams or runs, by the id that follows its path.
type endpoint[T stream | run] struct {
	path, kind string
	find       func(uuid.UUID) *T
	show       func(*T) any
	end        func(*T) bool
}

func (e endpoint[T]) serve(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		return methodNotAllowed(w, r, "GET, DELETE")
	}
	if _, err := parseQuery(r.URL); err != nil {
		return badRequest(err)
	}
	text := strings.TrimPrefix(r.URL.Path, e.path+"/")
	id, err := uuid.Parse(text)
	one := e.find(id)
	if err != nil || one == nil {
		return caddy.APIError{
			HTTPStatus: http.StatusNotFound,
			Message:    fmt.Sprintf("no %s has the id %q", e.kind, printable(text, 64)),
		}
	}
	if r.Method == http.MethodGet {
		return writeJSON(w, http.StatusOK, e.show(one))
	}
	var ending endingJSON
	if e.end(one) {
		ending.Ending = 1
	}
	return writeJSON(w, http.StatusAccepted, ending)
}

// serveHandlers shows the totals of each name.
func (adminAPI) serveHandlers(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return methodNotAllowed(w, r, "GET")
	}
	if _, err := parseQuery(r.URL); err != nil {
		return badRequest(err)
	}
	answer := handlersJSON{Handlers: []handlerJSON{}}
	for _, g := range live.all() {
		answer.Handlers = append(answer.Handlers, newHandlerJSON(g.totals()))
	}
	return writeJSON(w, http.StatusOK, answer)
}

func newHandlerJSON(t totals) handlerJSON {
	handler := handlerJSON{Name: t.name, figuresJSON: figuresJSON{
		Closed:     make(map[string]uint64, reasonCount),
		Events:     t.counts.events,
		Bytes:      t.counts.bytes,
		Heartbeats: t.counts.heartbeats,
	}}
	for p := range protoCount {
		handler.Open += t.open[p]
		handler.Opened += t.opened[p]
	}
	for why := notEnded + 1; why < reasonCount; why++ {
		handler.Closed[why.String()] = t.closed[why]
	}
	return handler
}

// filter chooses streams.
type filter struct {
	name, path string     // exact; a prefix. Empty: any
	clientIP   netip.Addr // not valid: any
	limit      int
	all        bool
}

func (f filter) narrows() bool {
	return f.name != "" || f.path != "" || f.clientIP.IsValid()
}

func (f filter) matches(s *stream) bool {
	if f.name != "" && f.name != s.h.Name {
		return false
	}
	if f.path != "" {
		if _, path := s.original(); !strings.HasPrefix(path, f.path) {
			return false
		}
	}
	if f.clientIP.IsValid() {
		ip, err := netip.ParseAddr(s.client.ip)
		return err == nil && ip.Unmap() == f.clientIP
	}
	return true
}

func (f filter) list() streamsJSON {
	answer := streamsJSON{Streams: []streamJSON{}}
	for _, s := range live.streams() {
		if !f.matches(s) {
			continue
		}
		answer.Total++
		if len(answer.Streams) < f.limit {
			answer.Streams = append(answer.Streams, newStreamJSON(s.report()))
		}
	}
	return answer
}

func (f filter) end() endingJSON {
	var answer endingJSON
	for _, s := range live.streams() {
		if f.matches(s) && s.end(endedByAdmin) {
			answer.Ending++
		}
	}
	return answer
}

// parseFilter reads the keys that choose streams, and one more.
func parseFilter(from *url.URL, more string) (filter, error) {
	values, err := parseQuery(from, append(slices.Clone(filterKeys), more)...)
	if err != nil {
		return filter{}, err
	}
	return newFilter(values)
}

// filterKeys are the keys of a query that choose streams.
var filterKeys = []string{"name", "client_ip", "path"}

func newFilter(values map[string]string) (f filter, err error) {
	f.limit = defaultListLimit
	f.name, f.path = values["name"], values["path"]
	if ip, given := values["client_ip"]; given {
		if f.clientIP, err = netip.ParseAddr(ip); err != nil {
			return f, fmt.Errorf("client_ip: %q is not an IP address", printable(ip, 64))
		}
		f.clientIP = f.clientIP.Unmap()
	}
	if limit, given := values["limit"]; given {
		if f.limit, err = strconv.Atoi(limit); err != nil || f.limit < 0 {
			return f, fmt.Errorf("limit: %q is not a number of streams", printable(limit, 64))
		}
	}
	if all, given := values["all"]; given {
		if f.all, err = strconv.ParseBool(all); err != nil {
			return f, fmt.Errorf("all: %q is neither true nor false", printable(all, 64))
		}
	}
	return f, nil
}

// parseQuery accepts only known keys, each given once and with a value: if a
// misspelt filter were ignored, a DELETE would end every stream.
func parseQuery(from *url.URL, known ...string) (map[string]string, error) {
	query, err := url.ParseQuery(from.RawQuery) // URL.Query drops what it can't read
	if err != nil {
		return nil, fmt.Errorf("reading the query: %w", err)
	}
	values := make(map[string]string)
	for _, key := range known {
		given, ok := query[key]
		if !ok {
			continue
		}
		if len(given) > 1 {
			return nil, fmt.Errorf("%s: given %d times", key, len(given))
		}
		if given[0] == "" {
			return nil, fmt.Errorf("%s: the value is missing", key)
		}
		values[key] = given[0]
		query.Del(key)
	}
	for key := range query {
		if len(known) == 0 {
			return nil, fmt.Errorf("unknown query key %q; none is known here", printable(key, 64))
		}
		return nil, fmt.Errorf("unknown query key %q; known here: %s", printable(key, 64), strings.Join(known, ", "))
	}
	return values, nil
}

func badRequest(err error) error {
	return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: err}
}

func methodNotAllowed(w http.ResponseWriter, r *http.Request, allowed string) error {
	w.Header().Set("Allow", allowed)
	return caddy.APIError{
		HTTPStatus: http.StatusMethodNotAllowed,
		Message:    fmt.Sprintf("method %s is not allowed here; allowed: %s", printable(r.Method, 32), allowed),
	}
}

func writeJSON(w http.ResponseWriter, status int, answer any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	return json.NewEncoder(w).Encode(answer)
}

// Interface guards
var (
	_ caddy.AdminRouter = (*adminAPI)(nil)
	_ caddy.Provisioner = (*adminAPI)(nil)
)
