package redis

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-sse/caddy-sse"
	"github.com/caddy-sse/caddy-sse/store"
)

func adapt(settings string) (Redis, error) {
	config := ":8080 {\nsse {\nresume 1m {\nstore redis {\n" + settings + "\n}\n}\n}\nrespond ok\n}"
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return Redis{}, err
	}
	_, rest, _ := strings.Cut(string(adapted), `"store":`)
	var r struct {
		Redis
		Store string `json:"store"`
	}
	err = json.NewDecoder(strings.NewReader(rest)).Decode(&r)
	return r.Redis, err
}

func TestTheCaddyfileSetsEverything(t *testing.T) {
	got, err := adapt(`
		address  redis.internal:6380
		username caddy
		password {env.REDIS_PASSWORD}
		db       2
		prefix   chat:
		tls {
			ca          /etc/ca.pem /etc/other.pem
			certificate /etc/client.pem /etc/client.key
			server_name redis
		}`)
	want := Redis{
		Address: "redis.internal:6380", Username: "caddy", Password: "{env.REDIS_PASSWORD}", DB: 2, Prefix: "chat:",
		TLS: &TLS{CA: []string{"/etc/ca.pem", "/etc/other.pem"}, Certificate: "/etc/client.pem", Key: "/etc/client.key", ServerName: "redis"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := adapt("tls"); err != nil || got.TLS == nil {
		t.Errorf("tls alone: %+v, %v", got, err)
	}
}

func TestWhatTheCaddyfileCannotMeanIsAnErrorWithItsPlace(t *testing.T) {
	for settings, want := range map[string]string{
		"adress localhost:6379":       "there are address, db",
		"address":                     "usage: address <value>",
		"db":                          "usage: db <value>",
		"db two":                      "count from 0",
		"db -1":                       "count from 0",
		"db {env.DB}":                 "{$NAME}",
		"prefix a b":                  "usage: prefix <value>",
		"prefix \"\"":                 "leave it out for the default",
		"prefix a\nprefix b":          "twice",
		"tls on":                      "in its block",
		"tls {\nca\n}":                "usage: ca <file...>",
		"tls {\ncertificate a.pem\n}": "usage: certificate <file> <key_file>",
		"tls {\nserver_name\n}":       "usage: server_name <value>",
		"tls {\ninsecure\n}":          "there are ca",
		"tls {\nca a\nca b\n}":        "twice",
		"username a\nusername b":      "twice",
	} {
		_, err := adapt(settings)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Caddyfile:") || !strings.Contains(err.Error(), "store redis") {
			t.Errorf("%q: %v, want %q", settings, err, want)
		}
	}
	if err := new(Redis).UnmarshalCaddyfile(caddyfile.NewTestDispenser("redis host:1")); err == nil {
		t.Error("an argument after the name is taken")
	}
}

func provision(t *testing.T, r *Redis) error {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	return r.Provision(ctx)
}

func TestPlaceholdersAreReplacedAndEverySettingCounts(t *testing.T) {
	t.Setenv("CADDYSSE_TEST_PASSWORD", "secret")
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("kept\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &Redis{Address: "redis", Username: "u", Password: "{env.CADDYSSE_TEST_PASSWORD}{file." + secret + "}"}
	if err := provision(t, r); err != nil {
		t.Fatal(err)
	}
	if s := r.settings; s.Password != "secretkept" || s.Prefix != "caddy-sse:" || s.Address != "redis:6379" {
		t.Errorf("got %+v", s)
	}
	identities := map[string]bool{r.Identity(): true}
	for _, other := range []*Redis{
		{Address: "redis", Username: "u", Password: "other"}, {Address: "redis", Username: "v", Password: "secretkept"},
		{Address: "redis", Username: "u", Password: "secretkept", DB: 1}, {Address: "redis", Username: "u", Password: "secretkept", Prefix: "p"},
		{Address: "redis", Username: "u", Password: "secretkept", TLS: &TLS{}}, {Address: "other", Username: "u", Password: "secretkept"},
	} {
		if err := provision(t, other); err != nil {
			t.Fatal(err)
		}
		if identities[other.Identity()] {
			t.Errorf("%+v is taken for another one", other)
		}
		identities[other.Identity()] = true
	}
}

func TestWhatCannotWorkIsAnErrorWithoutSecrets(t *testing.T) {
	t.Setenv("CADDYSSE_TEST_EMPTY", "")
	for want, bad := range map[string]*Redis{
		"address <host>:<port>":   {Password: "hunter2"},
		"has no host":             {Address: ":6379"},
		"is not a port":           {Address: "redis:no"},
		"it is a URL":             {Address: "rediss://user:hunter2@redis"},
		"username and no pass":    {Address: "redis", Username: "u"},
		"count from 0":            {Address: "redis", DB: -1},
		"password: it is empty":   {Address: "redis", Password: "{env.CADDYSSE_TEST_EMPTY}"},
		"for a request only":      {Address: "redis", Password: "hunter2{http.request.host}"},
		"tls: ca: open /nowhere":  {Address: "redis", TLS: &TLS{CA: []string{"/nowhere"}}},
		"is not PEM":              {Address: "redis", TLS: &TLS{CA: []string{"redis.go"}}},
		"certificate: open /no":   {Address: "redis", TLS: &TLS{Certificate: "/nowhere", Key: "/nowhere"}},
		"a certificate needs its": {Address: "redis", TLS: &TLS{Certificate: "/nowhere"}},
		"set server_name":         {Address: "unix//run/redis.sock", TLS: &TLS{}},
	} {
		err := provision(t, bad)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%+v: %v, want %q", bad, err, want)
		}
	}
}

func newKey() (key store.Key) {
	_, _ = rand.Read(key[:])
	return key
}

// use calls each method of a store.
func use(t *testing.T, what string, opened store.Store) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	run := newKey()
	check := func(op string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %s: %v", what, op, err)
		}
	}
	check("Write", errors.Join(opened.Write(ctx, []store.Write{{Run: run, Begin: []byte("b"), Events: []store.Event{{Number: 1, Data: []byte("1")}}, TTL: time.Second}})...))
	got := make(chan int, 1)
	go func() {
		events, _, err := opened.Read(ctx, run, 1, 1, patience)
		check("Read", err)
		got <- len(events)
	}()
	check("Write", errors.Join(opened.Write(ctx, []store.Write{{Run: run, Events: []store.Event{{Number: 2, Data: []byte("2")}}, Oldest: 2, End: []byte("e"), TTL: time.Second}})...))
	if n := <-got; n != 1 {
		t.Errorf("%s: read %d events", what, n)
	}
	_, err := opened.Find(ctx, run)
	check("Find", err)
	check("Renew", errors.Join(opened.Renew(ctx, "n", time.Second), opened.Renew(ctx, "n", time.Second), opened.Renew(ctx, "n", 0)))
	check("Touch", opened.Touch(ctx, time.Second, run))
	check("Send", opened.Send(ctx, "n", []byte("m")))
	messages, err := opened.Receive(ctx, "n", patience)
	check("Receive", err)
	if len(messages) != 1 {
		t.Errorf("%s: received %q", what, messages)
	}
	_, err = opened.Lives(ctx, "n")
	check("Lives", err)
	check("Write", errors.Join(opened.Write(ctx, []store.Write{{Run: run, Drop: true}})...))
}

func TestAServerMayWantAUserAndTLS(t *testing.T) {
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	makeCertificate(t, certificate, key)
	socket := filepath.Join(dir, "socket")
	port := portOf(freeAddress(t))
	s := startServer(t, "--unixsocket", socket, "--tls-port", port, "--tls-cert-file", certificate, "--tls-key-file", key,
		"--tls-ca-cert-file", certificate, "--tls-auth-clients", "optional")
	// What the docs give a user of its own.
	s.must(append([]string{"ACL", "SETUSER", "caddy", "on", ">hunter2"}, strings.Fields(documentedRules)...)...)
	s.must("ACL", "SETUSER", "default", "off")

	for what, r := range map[string]*Redis{
		"a user":         {Address: s.addr, Username: "caddy", Password: "hunter2"},
		"a socket":       {Address: "unix/" + socket, Username: "caddy", Password: "hunter2"},
		"over TLS":       {Address: "localhost:" + port, Username: "caddy", Password: "hunter2", TLS: &TLS{CA: []string{certificate}}},
		"another name":   {Address: "127.0.0.1:" + port, Username: "caddy", Password: "hunter2", TLS: &TLS{CA: []string{certificate}, ServerName: "localhost"}},
		"a certificate":  {Address: "localhost:" + port, Username: "caddy", Password: "hunter2", TLS: &TLS{CA: []string{certificate}, Certificate: certificate, Key: key}},
		"another prefix": {Address: s.addr, Username: "caddy", Password: "hunter2", Prefix: "caddy-sse:2:"},
	} {
		if err := provision(t, r); err != nil {
			t.Fatal(err)
		}
		opened, err := r.Open()
		if err != nil {
			t.Fatal(err)
		}
		use(t, what, opened)
		opened.Close()
	}
	for what, r := range map[string]*Redis{
		"a certificate of nobody's": {Address: "localhost:" + port, Username: "caddy", Password: "hunter2", TLS: &TLS{}},
		"another password":          {Address: s.addr, Username: "caddy", Password: "hunter1"},
		"keys of others":            {Address: s.addr, Username: "caddy", Password: "hunter2", Prefix: "other:"},
	} {
		if err := provision(t, r); err != nil {
			t.Fatal(err)
		}
		opened, _ := r.Open()
		errs := opened.Write(t.Context(), []store.Write{{Run: newKey(), Begin: []byte("b"), TTL: time.Second}})
		if err := errors.Join(errs...); err == nil || !strings.Contains(err.Error(), r.settings.Address) || strings.Contains(err.Error(), "hunter") {
			t.Errorf("%s: %v", what, err)
		}
		opened.Close()
	}
}

// documentedRules are those of docs/several-nodes.md.
const documentedRules = "~caddy-sse:* &caddy-sse:* -@all +@connection +evalsha +script|load +hget +hset +hmget +del +xadd +xtrim +xrange +pexpire +set +exists +publish +subscribe +unsubscribe +rpush +lpop"

func TestTheRulesOfTheDocsAreThoseThatAreTested(t *testing.T) {
	text, err := os.ReadFile("../../docs/several-nodes.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), documentedRules) {
		t.Errorf("docs/several-nodes.md does not have the rules %q", documentedRules)
	}
}

// makeCertificate makes one for localhost that is its own authority.
func makeCertificate(t *testing.T, certificateFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{certificateFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
