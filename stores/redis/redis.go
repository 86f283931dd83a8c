// Package redis keeps the events of `resume` in Redis, so that a client can come
// back to any of several nodes. It is the Caddy module
// `http.handlers.sse.stores.redis`, for Redis 7.0 or later and for Valkey.
package redis

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-sse/caddy-sse/store"
)

func init() {
	caddy.RegisterModule(Redis{})
}

const (
	defaultAddress = "localhost:6379"
	defaultPrefix  = "sse"
)

// Redis is a store for `resume` of the `sse` handler. Text values take global
// placeholders, such as `{env.REDIS_PASSWORD}` and `{file./run/secrets/redis}`.
type Redis struct {
	// The servers, as `host:port` or `unix//path`. The first one that answers and
	// is not a replica is used. Give the addresses of one server and of its
	// replicas; Redis Cluster is not supported. Default: `localhost:6379`.
	Address []string `json:"address,omitempty"`

	// The user and the password to log in with. Default: no login.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`

	// The number of the database. Default: 0.
	DB int `json:"db,omitempty"`

	// What keys and channels begin with; the same on all nodes. Default: `sse`.
	Prefix string `json:"prefix,omitempty"`

	// Encrypts connections. Default: not encrypted.
	TLS *TLS `json:"tls,omitempty"`

	secured *tls.Config       // nil: connections are not encrypted
	files   [sha256.Size]byte // a hash of the certificates in the files of TLS
}

// TLS is how connections are encrypted. The files are read when the configuration
// is loaded.
type TLS struct {
	// A file with the certificates (PEM) that the server's certificate is checked
	// by. Default: those of the system.
	CA string `json:"ca,omitempty"`

	// Files with this client's certificate and key (PEM). Default: none.
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`

	// The name that the server's certificate must have. Default: the host of the
	// address.
	ServerName string `json:"server_name,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Redis) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  store.Namespace + ".redis",
		New: func() caddy.Module { return new(Redis) },
	}
}

// Provision replaces placeholders and reads certificates. It needs no server.
func (r *Redis) Provision(caddy.Context) error {
	replacer := caddy.NewReplacer()
	for i, address := range r.Address {
		r.Address[i] = replacer.ReplaceKnown(address, "")
	}
	texts := []*string{&r.Username, &r.Password, &r.Prefix}
	if r.TLS != nil {
		texts = append(texts, &r.TLS.CA, &r.TLS.Certificate, &r.TLS.Key, &r.TLS.ServerName)
	}
	for _, text := range texts {
		*text = replacer.ReplaceKnown(*text, "")
	}
	if len(r.Address) == 0 {
		r.Address = []string{defaultAddress}
	}
	if r.Prefix == "" {
		r.Prefix = defaultPrefix
	}
	return r.prepare()
}

// prepare checks the settings and reads certificates.
func (r *Redis) prepare() error {
	if r.DB < 0 {
		return fmt.Errorf("redis: db: %d is no number of a database", r.DB)
	}
	if r.Username != "" && r.Password == "" {
		return errors.New("redis: username: it needs a password; one that is a placeholder may be empty")
	}
	for _, address := range r.Address {
		if _, err := network(address); err != nil {
			return err
		}
	}
	if r.TLS == nil {
		return nil
	}
	return r.prepareTLS()
}

func (r *Redis) prepareTLS() error {
	t, sum := r.TLS, sha256.New()
	config := &tls.Config{ServerName: t.ServerName, MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		text, err := os.ReadFile(t.CA)
		if err != nil {
			return fmt.Errorf("redis: tls: ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return fmt.Errorf("redis: tls: ca: %s has no certificate", t.CA)
		}
		sum.Write(text)
	}
	if t.Certificate != "" || t.Key != "" {
		pair, err := tls.LoadX509KeyPair(t.Certificate, t.Key)
		if err != nil {
			return fmt.Errorf("redis: tls: certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
		for _, certificate := range pair.Certificate {
			sum.Write(certificate)
		}
	}
	r.secured, r.files = config, [sha256.Size]byte(sum.Sum(nil))
	return nil
}

// network parses an address.
func network(address string) (caddy.NetworkAddress, error) {
	parsed, err := caddy.ParseNetworkAddress(address)
	if err == nil && !parsed.IsUnixNetwork() && !strings.HasPrefix(parsed.Network, "tcp") {
		err = errors.New("it has to be TCP or a Unix socket")
	}
	if err == nil && !parsed.IsUnixNetwork() && (parsed.PortRangeSize() != 1 || parsed.StartPort == 0) {
		err = errors.New("one port is needed, such as " + defaultAddress)
	}
	if err != nil {
		return parsed, fmt.Errorf("redis: address: %q: %w", address, err)
	}
	return parsed, nil
}

// Identity implements [store.Opener]. It changes when a certificate has been
// renewed.
func (r *Redis) Identity() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain fields
	}
	return fmt.Sprintf("%s %x", text, r.files)
}

// Open implements [store.Opener]. It does not connect.
func (r *Redis) Open() (store.Store, error) {
	return newRedisStore(r), nil
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store redis {
//		address  <host:port...>
//		username <name>
//		password <password>
//		db       <n>
//		prefix   <text>
//		tls {
//			ca          <file>
//			certificate <file> <key_file>
//			server_name <name>
//		}
//	}
func (r *Redis) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if d.NextArg() {
		return d.ArgErr()
	}
	given := make(map[string]bool)
	for d.NextBlock(0) {
		name := d.Val()
		if given[name] {
			return d.Errf("redis: %s is set twice; keep one of the two", name)
		}
		given[name] = true
		if err := r.unmarshal(d, name); err != nil {
			return err
		}
	}
	return nil
}

func (r *Redis) unmarshal(d *caddyfile.Dispenser, name string) error {
	texts := map[string]*string{"username": &r.Username, "password": &r.Password, "prefix": &r.Prefix}
	switch {
	case name == "tls":
		return r.unmarshalTLS(d)
	case name == "address":
		if r.Address = d.RemainingArgs(); len(r.Address) == 0 {
			return d.ArgErr()
		}
		for _, address := range r.Address {
			if strings.Contains(address, "{") {
				continue // a placeholder
			}
			if _, err := network(address); err != nil {
				return d.WrapErr(err)
			}
		}
		return nil
	case name == "db":
		var text string
		if !d.AllArgs(&text) {
			return d.ArgErr()
		}
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return d.Errf("redis: db: %q is no number of a database", text)
		}
		r.DB = n
		return nil
	case texts[name] == nil:
		return d.Errf("redis: unknown setting %q; there are address, db, password, prefix, tls, username", name)
	}
	if !d.AllArgs(texts[name]) {
		return d.ArgErr()
	}
	return nil
}

func (r *Redis) unmarshalTLS(d *caddyfile.Dispenser) error {
	r.TLS = new(TLS)
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		args := d.RemainingArgs()
		switch {
		case name == "ca" && len(args) == 1:
			r.TLS.CA = args[0]
		case name == "server_name" && len(args) == 1:
			r.TLS.ServerName = args[0]
		case name == "certificate" && len(args) == 2:
			r.TLS.Certificate, r.TLS.Key = args[0], args[1]
		default:
			return d.Errf("redis: tls: there are ca <file>, certificate <file> <key_file>, server_name <name>; got %q %q", name, args)
		}
	}
	return nil
}

const (
	// dialPatience limits how long it takes to make a connection.
	dialPatience = 2 * time.Second

	// connPatience is how long a server may take to read or to reply, before its
	// connection is closed.
	connPatience = 5 * time.Second
)

// Interface guards
var (
	_ caddy.Provisioner     = (*Redis)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
	_ store.Opener          = (*Redis)(nil)
)
