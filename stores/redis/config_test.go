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
	"math/big"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
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
		address  redis-1:6379 redis-2:6379
		username caddy
		password {env.REDIS_PASSWORD}
		db       2
		prefix   chat
		tls {
			ca          /etc/ca.pem
			certificate /etc/client.pem /etc/client.key
			server_name redis.internal
		}`)
	want := Redis{
		Address: []string{"redis-1:6379", "redis-2:6379"}, Username: "caddy", Password: "{env.REDIS_PASSWORD}", DB: 2, Prefix: "chat",
		TLS: &TLS{CA: "/etc/ca.pem", Certificate: "/etc/client.pem", Key: "/etc/client.key", ServerName: "redis.internal"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := adapt("tls"); err != nil || got.TLS == nil {
		t.Errorf("tls alone: %+v, %v", got, err)
	}
}

func TestWhatTheCaddyfileCannotMeanIsAnError(t *testing.T) {
	for settings, want := range map[string]string{
		"adress localhost:6379":       "there are address, db",
		"address":                     "argument",
		"address localhost":           "one port",
		"address localhost:1-3":       "one port",
		"address udp/localhost:6379":  "TCP",
		"db":                          "argument",
		"db two":                      "no number of a database",
		"db -1":                       "no number of a database",
		"prefix a b":                  "argument",
		"prefix a\nprefix b":          "twice",
		"tls on":                      "argument",
		"tls {\ncertificate a.pem\n}": "key_file",
		"tls {\ninsecure\n}":          "there are ca",
		"username a\nusername b":      "twice",
	} {
		if _, err := adapt(settings); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Caddyfile:") {
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
	r := &Redis{Username: "u", Password: "{env.CADDYSSE_TEST_PASSWORD}"}
	if err := provision(t, r); err != nil {
		t.Fatal(err)
	}
	if r.Password != "secret" || r.Prefix != "sse" || !reflect.DeepEqual(r.Address, []string{"localhost:6379"}) {
		t.Errorf("got %+v", r)
	}
	identities := map[string]bool{r.Identity(): true}
	for _, other := range []*Redis{
		{Username: "u", Password: "other"}, {Username: "v", Password: "secret"}, {Username: "u", Password: "secret", DB: 1},
		{Username: "u", Password: "secret", Prefix: "p"}, {Username: "u", Password: "secret", TLS: &TLS{}},
		{Username: "u", Password: "secret", Address: []string{"other:1"}},
	} {
		if err := provision(t, other); err != nil {
			t.Fatal(err)
		}
		if identities[other.Identity()] {
			t.Errorf("%+v is taken for another one", other)
		}
		identities[other.Identity()] = true
	}
	for _, bad := range []*Redis{
		{Username: "u"}, {DB: -1}, {Address: []string{"nowhere"}}, {TLS: &TLS{CA: "/nowhere"}}, {TLS: &TLS{Certificate: "/nowhere", Key: "/nowhere"}},
	} {
		if err := provision(t, bad); err == nil {
			t.Errorf("%+v is no error", bad)
		}
	}
}

func TestACertificateThatHasBeenRenewedIsUsedAfterAReload(t *testing.T) {
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	makeCertificate(t, certificate, key)
	identity := func() string {
		r := &Redis{TLS: &TLS{CA: certificate, Certificate: certificate, Key: key}}
		if err := provision(t, r); err != nil {
			t.Fatal(err)
		}
		return r.Identity()
	}
	before := identity()
	if identity() != before {
		t.Error("a reload opens another store, though nothing has changed")
	}
	makeCertificate(t, certificate, key)
	if identity() == before {
		t.Error("a reload keeps the store with the old certificate")
	}
}

func TestAServerMayWantAPasswordAndTLS(t *testing.T) {
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	makeCertificate(t, certificate, key)
	s := startServer(t, "--requirepass", "hunter2")
	// A user with the rules that the docs give.
	s.password = "hunter2"
	s.do(t, append([]string{"ACL", "SETUSER", "caddy", "on", ">secret"}, strings.Fields(documentedRules)...)...)
	_, port, _ := net.SplitHostPort(freeAddress(t))
	s.do(t, "CONFIG", "SET", "tls-cert-file", certificate, "tls-key-file", key, "tls-ca-cert-file", certificate, "tls-auth-clients", "no", "tls-port", port)

	var opens int
	for what, r := range map[string]*Redis{
		"a user":        {Address: []string{s.address}, Username: "caddy", Password: "secret"},
		"over TLS":      {Address: []string{"localhost:" + port}, Username: "caddy", Password: "secret", TLS: &TLS{CA: certificate}},
		"another name":  {Address: []string{"127.0.0.1:" + port}, Username: "caddy", Password: "secret", TLS: &TLS{CA: certificate, ServerName: "localhost"}},
		"a second host": {Address: []string{freeAddress(t), s.address}, Password: "hunter2"},
	} {
		if err := provision(t, r); err != nil {
			t.Fatal(err)
		}
		opened, err := r.Open()
		if err != nil {
			t.Fatal(err)
		}
		run := newKey()
		if err := write(t, opened, run, 1); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		got := make(chan int, 1)
		go func() {
			events, _, err := opened.Read(t.Context(), run, 1, 1, patience)
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			got <- len(events)
		}()
		if err := write(t, opened, run, 2); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if n := <-got; n != 1 {
			t.Errorf("%s: read %d events", what, n)
		}
		opens++
		node := store.Node(strconv.Itoa(opens))
		for _, err := range []error{
			opened.Renew(t.Context(), node, time.Second), opened.Renew(t.Context(), node, 0),
			opened.Send(t.Context(), node, []byte("m")), opened.Touch(t.Context(), ttl, run),
		} {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		if messages, err := opened.Receive(t.Context(), node, 0); err != nil || len(messages) != 1 {
			t.Errorf("%s: received %q, %v", what, messages, err)
		}
		if _, err := opened.Lives(t.Context(), node); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		opened.Close()
	}
	wrong := &Redis{Address: []string{"localhost:" + port}, Password: "hunter2", TLS: &TLS{}}
	if err := provision(t, wrong); err != nil {
		t.Fatal(err)
	}
	opened, _ := wrong.Open()
	defer opened.Close()
	if err := write(t, opened, newKey(), 1); err == nil {
		t.Error("a certificate of nobody's is taken")
	}
}

// documentedRules are the ACL rules in docs/several-nodes.md.
const documentedRules = "~sse:* &sse:* -@all +@connection +evalsha +script|load +hget +hset +hmget +del +xadd +xtrim +xrange +pexpire +set +exists +publish +subscribe +unsubscribe"

func TestTheRulesOfTheDocsAreThoseThatAreTested(t *testing.T) {
	text, err := os.ReadFile("../../docs/several-nodes.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), documentedRules) {
		t.Errorf("docs/several-nodes.md does not have the rules %q", documentedRules)
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// makeCertificate makes a certificate for localhost that is its own CA.
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
