package caddysse

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-sse/caddy-sse/internal/top"
)

// pseudoTerminal is a terminal with the test at its other end.
type pseudoTerminal struct {
	t        *testing.T
	keyboard *os.File // the test's end: it writes keys and reads the output
	terminal *os.File

	mu      sync.Mutex
	printed strings.Builder
	more    chan struct{} // something has been printed
}

func newPseudoTerminal(t *testing.T) *pseudoTerminal {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &pseudoTerminal{t: t, keyboard: keyboard, more: make(chan struct{}, 1)}
	fd := int(keyboard.Fd())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	if p.terminal, err = os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	p.resize(80, 24)
	var reading sync.WaitGroup
	reading.Go(func() {
		piece := make([]byte, 4096)
		for {
			n, err := keyboard.Read(piece)
			p.mu.Lock()
			p.printed.Write(piece[:n])
			p.mu.Unlock()
			select {
			case p.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		p.press("q\n")     // this ends a read of the terminal
		p.terminal.Close() // and this a read of the other end
		reading.Wait()
		keyboard.Close()
	})
	return p
}

func (p *pseudoTerminal) resize(columns, rows uint16) {
	p.t.Helper()
	if err := unix.IoctlSetWinsize(int(p.keyboard.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pseudoTerminal) press(keys string) {
	p.t.Helper()
	if _, err := io.WriteString(p.keyboard, keys); err != nil {
		p.t.Fatal(err)
	}
}

// await waits for output, after the output that earlier calls waited for.
func (p *pseudoTerminal) await(text string) {
	p.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		printed := p.printed.String()
		_, after, found := strings.Cut(printed, text)
		if found {
			p.printed.Reset()
			p.printed.WriteString(after)
		}
		p.mu.Unlock()
		if found {
			return
		}
		select {
		case <-p.more:
		case <-timeout:
			p.t.Fatalf("%q is not in %q", text, printed)
		}
	}
}

func (p *pseudoTerminal) settings() unix.Termios {
	p.t.Helper()
	settings, err := unix.IoctlGetTermios(int(p.terminal.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *settings
}

// watchServer stands in for an admin API whose watches send what the test says,
// and end when it says "end".
func watchServer(t *testing.T) (client adminClient, say chan<- string, asked <-chan string) {
	t.Helper()
	saying, asking := make(chan string), make(chan string, 10)
	over := make(chan struct{})
	client = adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		asking <- r.URL.RawQuery
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case text := <-saying:
				if text == "end" {
					return
				}
				fmt.Fprintf(w, "event: snapshot\ndata: %s\n\n", text)
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			case <-over:
				return
			}
		}
	})
	t.Cleanup(func() { close(over) })
	return client, saying, asking
}

// topFlags returns the flags of the command.
func topFlags(t *testing.T, args ...string) caddycmd.Flags {
	t.Helper()
	cmd := topCommand()
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return caddycmd.Flags{FlagSet: cmd.Flags()}
}

func TestTopShowsAWatchComesBackAndLeavesTheTerminalAsItWas(t *testing.T) {
	t.Setenv("TERM", "xterm")
	for name, leave := range map[string]func(p *pseudoTerminal, stop func()){
		"by q":      func(p *pseudoTerminal, _ func()) { p.press("q") },
		"by Ctrl-C": func(p *pseudoTerminal, _ func()) { p.press("\x03") },
		"by signal": func(_ *pseudoTerminal, stop func()) { stop() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			admin, say, asked := watchServer(t)
			p := newPseudoTerminal(t)
			before := p.settings()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			flags := topFlags(t, "--address", admin.address, "--interval", "2s", "--sort=-idle_seconds", "--client-ip", "203.0.113.7", "--path", "/a b")
			ended := make(chan error, 1)
			go func() { ended <- watchInTerminal(ctx, flags, p.terminal, p.terminal) }()

			if got, want := <-asked, "client_ip=203.0.113.7&interval=2s&path=%2Fa+b&sort=-idle_seconds"; got != want {
				t.Errorf("it asks for %s, want %s", got, want)
			}
			p.await("\x1b[?1049h")
			say <- `{"matching":1,"totals":{"open":7},"streams":[{"client_ip":"203.0.113.7","path":"/a b/\u001b[31mred"}]}`
			p.await("open 7")
			p.await("sort -idle_seconds  client ip 203.0.113.7  path /a b")
			p.await("/a b/\ufffd[31mred")

			p.resize(40, 10)
			p.await("\x1b[2J")
			p.await("\x1b[10;1Hq or Ctrl-C")

			say <- "end"
			p.await("trying again: the watch ended")
			<-asked
			say <- `{"totals":{"open":8}}`
			p.await("open 8")

			p.press("x") // not one of our keys
			leave(p, stop)
			p.await("\x1b[?25h\x1b[?1049l")
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if after := p.settings(); after != before {
				t.Errorf("the terminal was %+v and is %+v", before, after)
			}
		})
	}
}

func TestTopNeedsATerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	admin, _, _ := watchServer(t)
	p := newPseudoTerminal(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for name, files := range map[string][2]*os.File{
		"no input": {null, p.terminal}, "no output": {p.terminal, null}, "neither": {null, null},
	} {
		err := watchInTerminal(t.Context(), topFlags(t, "--address", admin.address), files[0], files[1])
		if err == nil || !strings.Contains(err.Error(), top.ErrNoTerminal.Error()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv("TERM", "dumb")
	if err := watchInTerminal(t.Context(), topFlags(t, "--address", admin.address), p.terminal, p.terminal); err == nil {
		t.Error("a dumb terminal is taken")
	}
}

func TestTopSaysPlainlyWhatIsWrongAndLeavesTheTerminalAlone(t *testing.T) {
	t.Setenv("TERM", "xterm")
	p := newPseudoTerminal(t)
	refusing := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/config/" {
			likeCaddy(w, r)
			return
		}
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"sort: \"x\" is no key of a stream"}`)
	})
	for says, flags := range map[string]caddycmd.Flags{
		`sort: "x" is no key of a stream`: topFlags(t, "--address", refusing.address, "--sort", "x"),
		"has no sse module":               topFlags(t, "--address", adminServer(t, likeCaddy).address),
		"is no admin API of Caddy":        topFlags(t, "--address", adminServer(t, func(http.ResponseWriter, *http.Request) {}).address),
		"--name: the value is missing":    topFlags(t, "--address", refusing.address, "--name", ""),
	} {
		err := watchInTerminal(t.Context(), flags, p.terminal, p.terminal)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
	if p.printed.Len() > 0 {
		t.Errorf("printed %q", p.printed.String())
	}
}
