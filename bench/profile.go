//go:build linux

package main

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
)

// profile writes CPU profiles of each Caddy: one under events, one while streams
// are opened and closed, and of the module one of a shared stream under events
// and a heap profile of it.
func (b *bench) profile(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	rounds := b.settings.Rounds
	b.settings.Rounds = 1
	defer func() { b.settings.Rounds = rounds }()
	err := b.withAll("profile", way{}, func(_ int, proxies []*proxy, fleets []*fleet) error {
		for i, p := range proxies {
			if p.admin == nil {
				continue
			}
			err := p.profileWhile(filepath.Join(dir, p.name+"-events.pprof"), func() error {
				return b.window(p, fleets[i], func(string, string, float64) {})
			})
			if err != nil {
				return err
			}
			err = p.profileWhile(filepath.Join(dir, p.name+"-churn.pprof"), func() error {
				return b.churnStreams(p, b.settings.Churn/10)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	for _, tls := range []bool{false, true} {
		err = errors.Join(err, b.withAll("profile", way{shared: true, tls: tls}, func(_ int, proxies []*proxy, fleets []*fleet) error {
			for i, p := range proxies {
				if p.name != "sse" {
					continue
				}
				name := "sse-shared"
				if tls {
					name += "-h2"
				}
				if err := p.keepProfile(filepath.Join(dir, name+"-heap.pprof"), "/debug/pprof/heap?gc=1"); err != nil {
					return err
				}
				return p.profileWhile(filepath.Join(dir, name+"-events.pprof"), func() error {
					return b.window(p, fleets[i], func(string, string, float64) {})
				})
			}
			return nil
		}))
	}
	return err
}

func (p *proxy) keepProfile(path, of string) error {
	content, err := p.admin.Ask(http.MethodGet, of, "", nil)
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o644)
}

// profileWhile takes a CPU profile of 10 s while something is done over and
// over.
func (p *proxy) profileWhile(path string, do func() error) error {
	profile := make(chan error, 1)
	go func() {
		profile <- p.keepProfile(path, "/debug/pprof/profile?seconds=10")
	}()
	for {
		if err := do(); err != nil {
			return err
		}
		select {
		case err := <-profile:
			return err
		default:
		}
	}
}
