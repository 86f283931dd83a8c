package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

// Client returns a client for one protocol: "h1" is HTTP/1.1, with or without
// TLS depending on the URL, "h2" is HTTP/2 over TLS, "h2c" is HTTP/2 without
// TLS. rootCAs are PEM files of certificates to trust, such as Caddy.RootCA.
func Client(t testing.TB, protocol string, rootCAs ...string) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	for _, path := range rootCAs {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !pool.AppendCertsFromPEM(content) {
			t.Fatalf("%s: no certificate", path)
		}
	}
	protocols := new(http.Protocols)
	switch protocol {
	case "h1":
		protocols.SetHTTP1(true)
	case "h2":
		protocols.SetHTTP2(true)
	case "h2c":
		protocols.SetUnencryptedHTTP2(true)
	default:
		t.Fatalf("protocol %q", protocol)
	}
	transport := &http.Transport{
		Protocols:          protocols,
		TLSClientConfig:    &tls.Config{RootCAs: pool},
		DisableCompression: true, // so that the body is received unchanged
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// Certificate makes a certificate for localhost and 127.0.0.1 that is its own
// CA, for programs other than Caddy. It returns paths of PEM files; both
// contains certificate and key, as HAProxy needs it.
func Certificate(t testing.TB) (certificate, key, both string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: "localhost"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	privateDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certificatePEM := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	keyPEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: privateDER}))
	return WriteFile(t, dir, "localhost.crt", certificatePEM),
		WriteFile(t, dir, "localhost.key", keyPEM),
		WriteFile(t, dir, "localhost.pem", certificatePEM+keyPEM)
}
