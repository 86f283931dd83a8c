// Package redis is a store for clients of the sse handler that come back to any
// of several nodes: a server of Redis 7, of Valkey, or of what speaks as they do.
package redis

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-sse/caddy-sse/store"
)

func init() {
	caddy.RegisterModule(new(Redis))
}

const (
	defaultPort   = "6379"
	defaultPrefix = "caddy-sse:"
)

// Redis is a store in one Redis server, or whatever answers at one address as
// such: a primary with a name that moves, a proxy, a managed service. It is no
// client of Redis Cluster or Sentinel.
//
// All settings but `db` take global placeholders, such as
// `{env.REDIS_PASSWORD}` and `{file./run/secrets/redis}`. They are replaced when
// the configuration is loaded.
type Redis struct {
	// Where the server is: `host:port`, `host` for port 6379, or
	// `unix//path/of/its/socket`. Required.
	Address string `json:"address,omitempty"`

	// The user. Default: that of Redis, `default`. Needs a password.
	Username string `json:"username,omitempty"`

	// The user's password. Default: none.
	Password string `json:"password,omitempty"`

	// Speaks TLS with the server. Default: no TLS.
	TLS *TLS `json:"tls,omitempty"`

	// What all keys and channels begin with. Nodes whose clients may come back to
	// each other have the same. Default: `caddy-sse:`.
	Prefix string `json:"prefix,omitempty"`

	// The number of the database. Channels do not heed it: servers that have
	// several need a prefix for each. Default: 0.
	DB int `json:"db,omitempty"`

	settings settings
}

// TLS says how to speak TLS with the server. Empty, its certificate has to be for
// the host of the address and from an authority that the system trusts.
type TLS struct {
	// Files with certificates, PEM, of the authorities that may have signed the
	// server's. Default: those that the system trusts.
	CA []string `json:"ca,omitempty"`

	// Files with a certificate and its key, PEM, for servers that ask their
	// clients for one. Both or none. They are read at each connection.
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`

	// The name that the server's certificate is for. Default: the host of the
	// address.
	ServerName string `json:"server_name,omitempty"`
}

// settings are what a Redis says, with its placeholders replaced.
type settings struct {
	Network, Address   string
	Username, Password string
	Prefix             string
	DB                 int
	TLS                *TLS
}

// CaddyModule implements caddy.Module.
func (*Redis) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  store.Namespace + ".redis",
		New: func() caddy.Module { return new(Redis) },
	}
}

// Provision implements caddy.Provisioner. It does not look for the server.
func (r *Redis) Provision(caddy.Context) error {
	if err := r.provision(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	return nil
}

func (r *Redis) provision() error {
	s := settings{DB: r.DB}
	var address string
	texts := []text{
		{"address", r.Address, &address},
		{"username", r.Username, &s.Username},
		{"password", r.Password, &s.Password},
		{"prefix", r.Prefix, &s.Prefix},
	}
	if r.TLS != nil {
		s.TLS = &TLS{CA: make([]string, len(r.TLS.CA))}
		for i, file := range r.TLS.CA {
			texts = append(texts, text{"tls: ca", file, &s.TLS.CA[i]})
		}
		texts = append(texts,
			text{"tls: certificate", r.TLS.Certificate, &s.TLS.Certificate},
			text{"tls: key", r.TLS.Key, &s.TLS.Key},
			text{"tls: server_name", r.TLS.ServerName, &s.TLS.ServerName})
	}
	replacer := caddy.NewReplacer()
	for _, t := range texts {
		if err := t.replace(replacer); err != nil {
			return err
		}
	}
	s.Prefix = cmp.Or(s.Prefix, defaultPrefix)
	switch {
	case address == "":
		return errors.New("there is no address; say where the server is: address <host>:<port>")
	case s.Username != "" && s.Password == "":
		return errors.New("there is a username and no password; set both, or none for servers that want none")
	case s.DB < 0:
		return fmt.Errorf("db: %d is not the number of a database; they count from 0", s.DB)
	}
	var err error
	if s.Network, s.Address, err = splitAddress(address); err != nil {
		return err
	}
	if s.TLS != nil {
		if _, err := s.TLS.config(s.Address); err != nil {
			return fmt.Errorf("tls: %w", err)
		}
	}
	r.settings = s
	return nil
}

// text is a setting that takes global placeholders.
type text struct {
	name, written string
	value         *string
}

// replace replaces its placeholders. Errors do not tell what it is: it may be a
// secret.
func (t text) replace(replacer *caddy.Replacer) error {
	request := ""
	requested := caddy.NewEmptyReplacer()
	requested.Map(func(key string) (any, bool) {
		if strings.HasPrefix(key, "http.") {
			request = key
		}
		return nil, false
	})
	requested.ReplaceKnown(t.written, "")
	if request != "" {
		return fmt.Errorf("%s: {%s} is known for a request only; here placeholders are replaced when the configuration is loaded", t.name, request)
	}
	*t.value = replacer.ReplaceKnown(t.written, "")
	if t.written != "" && *t.value == "" {
		return fmt.Errorf("%s: it is empty once its placeholders are replaced; set what they stand for, or leave it out", t.name)
	}
	return nil
}

// splitAddress returns what to dial.
func splitAddress(address string) (network, target string, err error) {
	if path, ok := strings.CutPrefix(address, "unix/"); ok {
		return "unix", path, nil
	}
	if strings.Contains(address, "://") {
		return "", "", errors.New(`address: it is a URL; say <host>:<port>, and "tls" for rediss://`)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		if host, port, err = net.SplitHostPort(net.JoinHostPort(strings.Trim(address, "[]"), defaultPort)); err != nil {
			return "", "", fmt.Errorf("address: %q is not <host>:<port>", address)
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", "", fmt.Errorf("address: %q is not a port", port)
	}
	if host == "" {
		return "", "", fmt.Errorf("address: %q has no host", address)
	}
	return "tcp", net.JoinHostPort(host, port), nil
}

// Identity implements store.Opener.
func (r *Redis) Identity() string {
	text, err := json.Marshal(r.settings)
	if err != nil {
		panic(err) // plain fields
	}
	return string(text)
}

// Open implements store.Opener.
func (r *Redis) Open() (store.Store, error) {
	return open(r.settings), nil
}

// UnmarshalCaddyfile reads the block of the store:
//
//	store redis {
//		address  <host>:<port>
//		username <name>
//		password <password>
//		tls {
//			ca          <file...>
//			certificate <file> <key_file>
//			server_name <name>
//		}
//		prefix   <prefix>
//		db       <number>
//	}
func (r *Redis) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the module's name
	if d.NextArg() {
		return d.Err("sse: resume: store redis takes no arguments; its settings are in its block")
	}
	given := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if given[name] {
			return d.Errf("sse: resume: store redis: %s is set twice; keep one of the two", name)
		}
		given[name] = true
		if err := r.unmarshalSetting(d, name); err != nil {
			return err
		}
	}
	return nil
}

func (r *Redis) unmarshalSetting(d *caddyfile.Dispenser, name string) error {
	single := map[string]*string{
		"address":  &r.Address,
		"username": &r.Username,
		"password": &r.Password,
		"prefix":   &r.Prefix,
	}
	switch value, known := single[name]; {
	case known:
		return argument(d, name, value)
	case name == "db":
		var number string
		if err := argument(d, name, &number); err != nil {
			return err
		}
		n, err := strconv.Atoi(number)
		switch {
		case err != nil && strings.HasPrefix(number, "{"):
			return d.Errf("sse: resume: store redis: db: %q is not a number; from the environment it is {$NAME}, which is replaced before", number)
		case err != nil || n < 0:
			return d.Errf("sse: resume: store redis: db: %q is not the number of a database; they count from 0", number)
		}
		r.DB = n
		return nil
	case name == "tls":
		if d.NextArg() {
			return d.Err("sse: resume: store redis: tls takes no arguments; its settings are in its block")
		}
		r.TLS = new(TLS)
		return r.TLS.unmarshal(d)
	}
	return d.Errf("sse: resume: store redis: unknown setting %q; there are address, db, password, prefix, tls, username", name)
}

func (t *TLS) unmarshal(d *caddyfile.Dispenser) error {
	given := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if given[name] {
			return d.Errf("sse: resume: store redis: tls: %s is set twice; keep one of the two", name)
		}
		given[name] = true
		switch name {
		case "ca":
			if t.CA = d.RemainingArgs(); len(t.CA) == 0 {
				return d.Err("sse: resume: store redis: tls: ca: wrong number of arguments (0); usage: ca <file...>")
			}
		case "certificate":
			files := d.RemainingArgs()
			if len(files) != 2 {
				return d.Errf("sse: resume: store redis: tls: certificate: wrong number of arguments (%d); usage: certificate <file> <key_file>", len(files))
			}
			t.Certificate, t.Key = files[0], files[1]
		case "server_name":
			if err := argument(d, "tls: server_name", &t.ServerName); err != nil {
				return err
			}
		default:
			return d.Errf("sse: resume: store redis: tls: unknown setting %q; there are ca, certificate, server_name", name)
		}
	}
	return nil
}

// argument reads the one argument of a setting.
func argument(d *caddyfile.Dispenser, name string, value *string) error {
	args := d.RemainingArgs()
	if len(args) != 1 {
		return d.Errf("sse: resume: store redis: %s: wrong number of arguments (%d); usage: %s <value>", name, len(args), name[strings.LastIndex(name, " ")+1:])
	}
	if args[0] == "" {
		return d.Errf("sse: resume: store redis: %s: \"\" is an empty argument; leave it out for the default", name)
	}
	*value = args[0]
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner     = (*Redis)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
	_ store.Opener          = (*Redis)(nil)
)
