package caddysse

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// sseCommand returns `caddy sse`, without output.
func sseCommand(args ...string) *cobra.Command {
	root, sse := &cobra.Command{Use: "caddy", SilenceUsage: true}, &cobra.Command{Use: "sse <command>"}
	addCommands(sse)
	root.AddCommand(sse)
	root.SetArgs(append([]string{"sse"}, args...))
	root.SetOut(io.Discard)
	root.SetErr(io.Discard)
	return root
}

func TestAnUnknownSubcommandIsAnError(t *testing.T) {
	for args, says := range map[string]string{
		"clsoe":       `unknown command "clsoe" for "caddy sse"; did you mean close?`,
		"kill x":      `unknown command "kill" for "caddy sse"; there are check, close, dashboard, demo, list, runs, top`,
		"clsoe --all": `unknown command "clsoe"`,
		"--bogus":     "unknown flag: --bogus",
	} {
		if err := sseCommand(strings.Fields(args)...).Execute(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("caddy sse %s: got %v, want %s", args, err, says)
		}
	}
	if err := sseCommand().Execute(); err != nil {
		t.Errorf("caddy sse alone, which prints help: %v", err)
	}
}

func TestAdminAddressesAreTakenInEveryFormThatPeopleWrite(t *testing.T) {
	for address, want := range map[string]adminClient{
		"localhost:2019":            {network: "tcp", dial: "localhost:2019", hosts: []string{"localhost:2019"}},
		"tcp/127.0.0.1:2019":        {network: "tcp", dial: "127.0.0.1:2019", hosts: []string{"127.0.0.1:2019"}},
		"http://127.0.0.1:2019":     {network: "tcp", dial: "127.0.0.1:2019", hosts: []string{"127.0.0.1:2019"}},
		"HTTP://[::1]:2019/":        {network: "tcp", dial: "[::1]:2019", hosts: []string{"[::1]:2019"}},
		":22019":                    {network: "tcp", dial: "localhost:22019", hosts: []string{"localhost:22019", ":22019"}},
		"unix//run/caddy.sock":      {network: "unix", dial: "/run/caddy.sock", hosts: []string{""}},
		"unix//run/admin.sock|0220": {network: "unix", dial: "/run/admin.sock", hosts: []string{""}},
	} {
		got, err := newAdminClient(address)
		if err != nil || got.network != want.network || got.dial != want.dial || fmt.Sprint(got.hosts) != fmt.Sprint(want.hosts) {
			t.Errorf("%s: got %+v, %v, want %+v", address, got, err, want)
		}
	}
	for address, says := range map[string]string{
		"https://127.0.0.1:2019": "has no TLS",
		"127.0.0.1:1-9":          "it needs one port",
		"127.0.0.1":              "it needs one port",
		"http://127.0.0.1:x":     "is invalid",
		"fd/3":                   "file descriptor",
	} {
		if _, err := newAdminClient(address); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %s", address, err, says)
		}
	}
}

// adminFlags returns the flags of a command that calls the admin API.
func adminFlags(t *testing.T, args ...string) caddycmd.Flags {
	t.Helper()
	cmd := new(cobra.Command)
	addAdminFlags(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return caddycmd.Flags{FlagSet: cmd.Flags()}
}

func TestTheAdminAddressComesFromWhereCaddyReloadTakesIt(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want string, args ...string) {
		t.Helper()
		if client, err := findAdmin(adminFlags(t, args...)); err != nil || client.address != want {
			t.Errorf("%q: got %q, %v, want %s", args, client.address, err, want)
		}
	}
	expectError := func(says string, args ...string) {
		t.Helper()
		if _, err := findAdmin(adminFlags(t, args...)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: got %v, want %s", args, err, says)
		}
	}

	expect(caddy.DefaultAdminListen)
	t.Setenv("ADMIN_PORT", "22023")
	write("caddy.json", `{"admin": {"listen": "localhost:22020"}}`)
	write("other.txt", "{\n\tadmin localhost:22021\n}\n")
	write("placeholder.json", `{"admin": {"listen": "localhost:{env.ADMIN_PORT}"}}`)
	expect("localhost:22020", "--config", "caddy.json")
	expect("localhost:22021", "--config", "other.txt", "--adapter", "caddyfile")
	expect("localhost:22023", "--config", "placeholder.json")
	expectError("--adapter needs the file", "--adapter", "caddyfile")
	expectError("--address", "--config", filepath.Join(dir, "missing.json"))

	write("Caddyfile", "{\n\tadmin unix//run/caddy/admin.sock\n}\n")
	expect("unix//run/caddy/admin.sock")
	expect("localhost:22020", "--config", "caddy.json")
	expect("localhost:22022", "--address", "localhost:22022", "--config", "caddy.json")
	write("Caddyfile", "{\n\tno_such_option\n}\n")
	expectError("--address says it without a configuration file")
	expect("localhost:22022", "--address", "localhost:22022")
}

// adminServer stands in for an admin API.
func adminServer(t *testing.T, handler http.HandlerFunc) adminClient {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	client, err := newAdminClient(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// likeCaddy answers like the admin API of a Caddy without this module.
func likeCaddy(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/config/" {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Etag", `"/config/ 1"`)
	io.WriteString(w, "null\n")
}

func TestAFailedCallOfTheAdminAPIIsExplainedTruly(t *testing.T) {
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		says   string
	}{
		"a Caddy without this module": {likeCaddy, "has no sse module"},
		"something else":              {http.NotFound, "is no admin API of Caddy (404 Not Found); --address, --config and the environment variable CADDY_ADMIN say where"},
		"something else that speaks JSON": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"error":"no such page"}`)
		}, "is no admin API of Caddy"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "is no admin API of Caddy (302 Found)"},
		"another name in the configuration": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, `{"error":"host not allowed: %s"}`, r.Host)
		}, "refuses to be called by that name (host not allowed: 127.0.0.1:"},
		"an error of its own": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/config/" {
				likeCaddy(w, r)
				return
			}
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, `{"error":"\u001b[31mnot like that"}`)
		}, "\ufffd[31mnot like that"},
		"no HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "SSH-2.0-OpenSSH\r\n")
			conn.Close()
		}, "is no admin API of Caddy"},
	} {
		_, err := adminServer(t, test.answer).call(http.MethodGet, streamsPath)
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %s", name, err, test.says)
		}
	}
}

// A Caddy that has just reloaded closes some calls without reading them.
func TestACallThatAReplacedAdminServerClosedIsMadeAgain(t *testing.T) {
	for closed, want := range map[int]string{1: "<nil>", 2: "is no admin API of Caddy: EOF"} {
		var calls atomic.Int64
		client := adminServer(t, func(w http.ResponseWriter, _ *http.Request) {
			if calls.Add(1) <= int64(closed) {
				panic(http.ErrAbortHandler)
			}
			io.WriteString(w, `{"ending":1}`)
		})
		if answer, err := client.call(http.MethodDelete, streamsPath+"?all=true"); !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%d calls closed: got %s, %v, want %s", closed, answer, err, want)
		}
		if got := calls.Load(); got != 2 {
			t.Errorf("%d calls closed: %d calls in all, want 2", closed, got)
		}
	}
}

func TestAnAdminAPIThatNeverEndsIsGivenUp(t *testing.T) {
	silent := adminServer(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	endless := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	for client, says := range map[*adminClient]string{
		&silent:  "no answer from the admin address " + silent.address + " within 100ms; --address",
		&endless: "had not finished after 100ms",
	} {
		client.patience = 100 * time.Millisecond
		_, err := client.call(http.MethodGet, streamsPath)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want %s", err, says)
		}
	}
}

func TestAnAddressWithoutAHostIsCalledAsTheAdminAPIKnowsIt(t *testing.T) {
	for _, host := range []string{"localhost", ""} {
		var port string
		client := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
			if want := host + ":" + port; r.Host != want || r.Header.Get("Origin") != "http://"+want {
				w.WriteHeader(http.StatusForbidden)
				io.WriteString(w, `{"error":"host not allowed"}`)
				return
			}
			io.WriteString(w, `{"ending":1}`)
		})
		_, port, _ = net.SplitHostPort(client.dial)
		client, err := newAdminClient(":" + port)
		if err != nil {
			t.Fatal(err)
		}
		if answer, err := client.call(http.MethodDelete, streamsPath+"?all=true"); err != nil || string(answer) != `{"ending":1}` {
			t.Errorf("an admin API that calls itself %q: %s, %v", host+":"+port, answer, err)
		}
	}
}

func TestAnEndlessAnswerOfTheAdminAPIIsNotKept(t *testing.T) {
	client := adminServer(t, func(w http.ResponseWriter, _ *http.Request) {
		block := make([]byte, 1<<20)
		for range maxAdminAnswer>>20 + 2 {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	client.patience = time.Minute
	if answer, err := client.call(http.MethodGet, streamsPath); !errors.Is(err, errTooLong) {
		t.Errorf("%d bytes, %v", len(answer), err)
	}
}
