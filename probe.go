package caddysse

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(Probe{})
	httpcaddyfile.RegisterHandlerDirective("sse_probe", parseProbeCaddyfile)
	// Between encode and sse, which was registered before.
	httpcaddyfile.RegisterDirectiveOrder("sse_probe", httpcaddyfile.After, "encode")
}

// Probe answers with an event stream that follows a script from its client, so
// that `caddy sse check` can find out what happens to streams on the way. It may
// stay on: a request without the token gets the site's own 404, and the cost of a
// probe is bounded.
type Probe struct {
	// The secret that a request needs, as `Authorization: Bearer <token>` or
	// `Sse-Probe-Token: <token>`. It takes global placeholders, such as
	// `{env.SSE_PROBE_TOKEN}`. Required.
	Token string `json:"token,omitempty"`

	// The longest total silence of a script. Default: 5m.
	MaxDuration caddy.Duration `json:"max_duration,omitempty"`

	// Maximum probes that run at a time; further requests get a 503. Default: 16.
	MaxProbes int `json:"max_probes,omitempty"`

	token       [sha256.Size]byte
	maxDuration time.Duration
	limits      probeLimits
	places      *atomic.Int64 // in use
}

// probeLimits are a probe's limits, as it reports them.
type probeLimits struct {
	DurationSeconds float64 `json:"duration_seconds"`
	Probes          int     `json:"probes"`
	Bytes           int     `json:"bytes"`
}

const (
	defaultProbeDuration = 5 * time.Minute
	defaultProbes        = 16

	// probeVersion is the version of the protocol between a probe and its client.
	probeVersion = 1

	probeTokenHeader = "Sse-Probe-Token"

	// probePatience is how long a probe waits for its client to take bytes, or to
	// send the rest of a request's body.
	probePatience = 30 * time.Second

	// maxProbeBody is how much of a request's body is read and counted.
	maxProbeBody = 64 << 10

	// maxProbeHeader is how many bytes of a request's header field a probe repeats,
	// and maxProbeHeaders of how many fields.
	maxProbeHeader  = 256
	maxProbeHeaders = 32
)

// CaddyModule returns the Caddy module information.
func (Probe) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.sse_probe",
		New: func() caddy.Module { return new(Probe) },
	}
}

// Provision fills in the defaults.
func (p *Probe) Provision(caddy.Context) error {
	if p.Token == "" {
		return errors.New("sse_probe: token: it is missing; without one, everybody could use the probe")
	}
	for _, key := range placeholders(p.Token) {
		if strings.HasPrefix(key, "http.") {
			return fmt.Errorf("sse_probe: token: {%s} is a placeholder of a request, and its client could choose the token; use a global one, such as {env.NAME}", key)
		}
	}
	token, err := caddy.NewReplacer().ReplaceOrErr(p.Token, false, false)
	if err != nil {
		return fmt.Errorf("sse_probe: token: %w", err)
	}
	if token == "" {
		return fmt.Errorf("sse_probe: token: %s is empty", p.Token)
	}
	p.token = sha256.Sum256([]byte(token))
	p.maxDuration = orDefault(p.MaxDuration, defaultProbeDuration)
	p.limits = probeLimits{
		DurationSeconds: p.maxDuration.Seconds(),
		Probes:          p.MaxProbes,
		Bytes:           maxProbeBytes,
	}
	if p.MaxProbes == 0 {
		p.limits.Probes = defaultProbes
	}
	p.places = new(atomic.Int64)
	return nil
}

// Validate reports the first setting that is invalid.
func (p *Probe) Validate() error {
	if p.MaxDuration < 0 {
		return fmt.Errorf("sse_probe: max_duration: %q is not a positive duration", time.Duration(p.MaxDuration))
	}
	if p.MaxProbes < 0 {
		return fmt.Errorf("sse_probe: max_probes: %d is not a number of probes", p.MaxProbes)
	}
	return nil
}

func parseProbeCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	p := new(Probe)
	if err := p.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	return p, nil
}

// UnmarshalCaddyfile sets up the probe from Caddyfile tokens. Syntax:
//
//	sse_probe [<matcher>] {
//		token        <secret>
//		max_duration <duration>
//		max_probes   <n>
//	}
func (p *Probe) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume directive name
	if d.NextArg() {
		return d.Errf("sse_probe: %q is no matcher, and there are no other arguments; settings go into a block", d.Val())
	}
	given := make(map[string]bool)
	for d.NextBlock(0) {
		name := d.Val()
		args := d.RemainingArgs()
		if given[name] {
			return d.Errf("sse_probe: %s is set twice; keep one of the two", name)
		}
		given[name] = true
		switch name {
		case "token", "max_duration", "max_probes":
		default:
			return d.Errf("sse_probe: unknown subdirective %q; there are max_duration, max_probes, token", name)
		}
		if len(args) != 1 || args[0] == "" {
			return d.Errf("sse_probe: %s wants exactly one argument", name)
		}
		switch name {
		case "token":
			p.Token = args[0]
		case "max_duration":
			duration, err := caddy.ParseDuration(args[0])
			if err != nil || duration <= 0 {
				return d.Errf("sse_probe: max_duration: %q is not a positive duration", args[0])
			}
			p.MaxDuration = caddy.Duration(duration)
		case "max_probes":
			n, err := strconv.Atoi(args[0])
			if err != nil || n <= 0 {
				return d.Errf("sse_probe: max_probes: %q is not a number of probes", args[0])
			}
			p.MaxProbes = n
		}
		if d.NextBlock(d.Nesting()) {
			return d.Errf("sse_probe: %s takes no block", name)
		}
	}
	if p.Token == "" {
		return d.Err("sse_probe: the token is missing; without one, everybody could use the probe: sse_probe { token <secret> }")
	}
	return nil
}

// ServeHTTP answers with what the request's script asks for.
func (p *Probe) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if !standAsideFor(r) {
		return caddyhttp.Error(http.StatusServiceUnavailable, errors.New("sse_probe: an sse handler has started the stream early"))
	}
	if !p.knows(r.Header) {
		return caddyhttp.Error(http.StatusNotFound, errors.New("sse_probe: the request has no token, or another one"))
	}
	if extra, ok := r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		extra.Set(zap.Object("sse", probeFigures{}))
	}
	switch r.Method {
	case http.MethodGet, http.MethodPost:
	default:
		w.Header().Set("Allow", "GET, POST")
		return caddyhttp.Error(http.StatusMethodNotAllowed, errors.New("sse_probe: the method is neither GET nor POST"))
	}
	script, err := p.script(r)
	if err != nil {
		return p.refuse(w, http.StatusBadRequest, err)
	}
	if p.places.Add(1) > int64(p.limits.Probes) {
		p.places.Add(-1)
		w.Header().Set("Retry-After", "1")
		return p.refuse(w, http.StatusServiceUnavailable, fmt.Errorf("%d probes are running, and no more may", p.limits.Probes))
	}
	defer p.places.Add(-1)

	body, err := countBody(w, r)
	if err != nil {
		return caddyhttp.Error(http.StatusBadRequest, fmt.Errorf("sse_probe: reading the request's body: %w", err))
	}
	request, err := p.describe(r, body)
	if err != nil {
		return err
	}
	if script.bytes(len(request)) > maxProbeBytes {
		return p.refuse(w, http.StatusBadRequest, fmt.Errorf("the answer would have more than %d bytes", maxProbeBytes))
	}
	return newProbeAnswer(w, r, request).play(script)
}

// standAsideFor makes an sse handler around this one leave the response alone. It
// reports whether that was still possible.
func standAsideFor(r *http.Request) bool {
	outer, ok := r.Context().Value(exchangeKey{}).(*exchange)
	return !ok || outer.standAside()
}

// knows reports whether a request has the token. It takes equally long for any
// other token.
func (p *Probe) knows(header http.Header) bool {
	given := []string{header.Get(probeTokenHeader)}
	for _, value := range header["Authorization"] {
		if scheme, token, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") {
			given = append(given, strings.TrimSpace(token))
		}
	}
	known := 0
	for _, token := range given {
		sum := sha256.Sum256([]byte(token))
		known |= subtle.ConstantTimeCompare(sum[:], p.token[:])
	}
	return known == 1
}

// script is the request's script, if it is valid and within the limits.
func (p *Probe) script(r *http.Request) (probeScript, error) {
	scripts := r.URL.Query()["script"]
	if len(scripts) > 1 {
		return nil, errors.New("there is more than one script in the query")
	}
	script, err := parseProbeScript(strings.Join(scripts, ""))
	if err != nil {
		return nil, err
	}
	if silence := script.silence(); silence > p.maxDuration {
		return nil, fmt.Errorf("the script takes %v; at most %v are allowed", silence, p.maxDuration)
	}
	if script.bytes(0) > maxProbeBytes {
		return nil, fmt.Errorf("the answer would have more than %d bytes", maxProbeBytes)
	}
	return script, nil
}

// refuse answers a client that knows the token, and so may know the limits.
func (p *Probe) refuse(w http.ResponseWriter, status int, reason error) error {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// A client that has left needs no answer.
	_ = json.NewEncoder(w).Encode(struct {
		Error  string      `json:"error"`
		Limits probeLimits `json:"limits"`
	}{printable("sse_probe: "+reason.Error(), 512), p.limits})
	return nil
}

// probeFigures marks a probe in the access log.
type probeFigures struct{}

func (probeFigures) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddBool("probe", true)
	return nil
}

// countBody reads the request's body, because net/http discards the rest of it
// when the headers go out.
func countBody(w http.ResponseWriter, r *http.Request) (int64, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return 0, nil
	}
	deadlines := connectionWriter(w)
	_ = deadlines.SetReadDeadline(time.Now().Add(probePatience))
	return io.Copy(io.Discard, io.LimitReader(r.Body, maxProbeBody))
}

// describe is what a probe reports about its request, as members of a JSON object
// without the braces.
func (p *Probe) describe(r *http.Request, body int64) ([]byte, error) {
	text, err := json.Marshal(struct {
		Probe     int               `json:"probe"`
		Method    string            `json:"method"`
		Proto     string            `json:"proto"`
		Host      string            `json:"host"`
		ClientIP  string            `json:"client_ip"`
		Headers   map[string]string `json:"headers"`
		BodyBytes int64             `json:"body_bytes"`
		Limits    probeLimits       `json:"limits"`
	}{probeVersion, cutTo(r.Method, 32), cutTo(r.Proto, 32), cutTo(r.Host, maxProbeHeader), clientIP(r), arrived(r), body, p.limits})
	if err != nil {
		return nil, fmt.Errorf("sse_probe: describing the request: %w", err)
	}
	return text[1 : len(text)-1], nil
}

// arrived returns the headers that show what proxies have done to a request.
func arrived(r *http.Request) map[string]string {
	headers := make(map[string]string)
	for _, field := range slices.Sorted(maps.Keys(r.Header)) {
		if name := strings.ToLower(field); len(headers) < maxProbeHeaders && tellsOfHops(name) {
			headers[name] = cutTo(strings.Join(r.Header[field], ", "), maxProbeHeader)
		}
	}
	if len(r.TransferEncoding) > 0 { // which net/http removes from the header
		headers["transfer-encoding"] = strings.Join(r.TransferEncoding, ", ")
	}
	return headers
}

func tellsOfHops(name string) bool {
	switch name {
	case "accept", "accept-encoding", "cache-control", "content-length", "content-type", "forwarded", "last-event-id", "pragma", "te", "transfer-encoding", "via":
		return true
	}
	return strings.HasPrefix(name, "x-forwarded-") && len(name) <= 64
}

func cutTo(text string, limit int) string { return text[:min(len(text), limit)] }

// Interface guards
var (
	_ caddy.Provisioner           = (*Probe)(nil)
	_ caddy.Validator             = (*Probe)(nil)
	_ caddyfile.Unmarshaler       = (*Probe)(nil)
	_ caddyhttp.MiddlewareHandler = (*Probe)(nil)
)
