package redis

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
)

// config reads the files that the settings name.
func (t *TLS) config(address string) (*tls.Config, error) {
	config := &tls.Config{ServerName: t.ServerName}
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, errors.New("a socket has no host that a certificate could be for; set server_name")
		}
		config.ServerName = host
	}
	for _, file := range t.CA {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		if config.RootCAs == nil {
			config.RootCAs = x509.NewCertPool()
		}
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca: %s has no certificate, or is not PEM", file)
		}
	}
	if (t.Certificate == "") != (t.Key == "") {
		return nil, errors.New("certificate: a certificate needs its key, and a key its certificate")
	}
	if t.Certificate != "" {
		pair, err := tls.LoadX509KeyPair(t.Certificate, t.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
