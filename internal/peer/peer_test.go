package peer

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// The kinds of wrappers that a listener can put around a connection.
type (
	withNetConn  struct{ inner net.Conn }
	withRaw      struct{ net.Conn }
	embedding    struct{ net.Conn }
	embeddingTCP struct{ *net.TCPConn }
	embeddingPtr struct{ *embedding }
	selfish      struct{ net.Conn }
)

func (c withNetConn) NetConn() net.Conn { return c.inner }
func (c withRaw) Raw() net.Conn         { return c.Conn }
func (c selfish) NetConn() net.Conn     { return c }

func (withNetConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (withNetConn) Write([]byte) (int, error)        { return 0, io.EOF }
func (withNetConn) Close() error                     { return nil }
func (withNetConn) LocalAddr() net.Addr              { return nil }
func (withNetConn) RemoteAddr() net.Addr             { return nil }
func (withNetConn) SetDeadline(time.Time) error      { return nil }
func (withNetConn) SetReadDeadline(time.Time) error  { return nil }
func (withNetConn) SetWriteDeadline(time.Time) error { return nil }

func TestTheSocketIsFoundInWhatWrapsIt(t *testing.T) {
	needUserTimeout(t)
	server, _ := acceptOne(t, listen(t))
	tcp := server.(*net.TCPConn)

	// Not t.TempDir, because the path of a Unix socket must be short.
	dir, err := os.MkdirTemp("", "sse")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	unix, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	overUnix, _ := acceptOne(t, unix)
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()

	for name, test := range map[string]struct {
		conn net.Conn
		want bool
	}{
		"TCP":                             {tcp, true},
		"TLS":                             {tls.Server(tcp, nil), true},
		"TLS in a wrapper":                {embedding{tls.Server(tcp, nil)}, true},
		"TLS around a wrapper":            {tls.Server(&embedding{tcp}, nil), true},
		"NetConn":                         {withNetConn{tcp}, true},
		"Raw, as proxyproto has it":       {&withRaw{tcp}, true},
		"an embedded interface":           {embedding{tcp}, true},
		"an embedded socket":              {embeddingTCP{tcp}, true},
		"embedded in what is embedded":    {embeddingPtr{&embedding{withNetConn{tcp}}}, true},
		"Unix socket":                     {overUnix, false},
		"TLS around a Unix socket":        {tls.Server(overUnix, nil), false},
		"no socket":                       {pipe, false},
		"nothing":                         {nil, false},
		"a wrapper around nothing":        {embedding{}, false},
		"a wrapper around a nil one":      {embeddingPtr{}, false},
		"a wrapper that says nothing":     {withNetConn{}, false},
		"a wrapper that is around itself": {selfish{tcp}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := FromContext(WithConn(t.Context(), test.conn))
			if (c != nil) != test.want {
				t.Fatalf("found: %v, want %v", c != nil, test.want)
			}
			c.Watch(5 * time.Second)
			if test.want {
				if got := timeoutOf(t, c.socket); got != 5*time.Second {
					t.Errorf("%v on the socket, want 5s", got)
				}
			}
			if f := c.Leave(5 * time.Second); f != Alive {
				t.Errorf("it is %v, want alive", f)
			}
		})
	}
}

func TestOnlyTheFirstToRegisterAddsTheConnection(t *testing.T) {
	server, _ := acceptOne(t, listen(t))
	ctx := WithConn(t.Context(), server)
	if again := WithConn(ctx, server); again != ctx {
		t.Error("it was added twice")
	}
	if FromContext(t.Context()) != nil {
		t.Error("there is a connection where nobody has registered")
	}
}

func TestWhatWasAcceptedIsKeptWithoutItsWrappers(t *testing.T) {
	server, _ := acceptOne(t, listen(t))
	ctx := WithAccepted(t.Context(), tls.Server(&embedding{server}, nil))
	if got := Accepted(ctx); got != server {
		t.Errorf("%T was accepted, want the %T", got, server)
	}
	other, _ := acceptOne(t, listen(t))
	if again := WithAccepted(ctx, other); again != ctx {
		t.Error("a second one took its place")
	}
	if got := Accepted(t.Context()); got != nil {
		t.Errorf("%T was accepted where nobody has registered", got)
	}
}

// blockedWrite fills a connection whose client reads nothing. It returns how
// the next write ends, which blocks.
func blockedWrite(t *testing.T, server net.Conn) (ended <-chan error) {
	t.Helper()
	flood(t, server.(*net.TCPConn))
	server.SetWriteDeadline(time.Time{})
	errs := make(chan error, 1)
	go func() {
		var err error
		for err == nil { // the buffers may still grow
			_, err = server.Write(make([]byte, 64<<10))
		}
		errs <- err
	}()
	return errs
}

func TestAWriteThatBlocksIsBrokenOffFromOutside(t *testing.T) {
	for _, test := range []struct {
		name     string
		breakOff func(net.Conn)
		want     error
	}{
		{"Expire", Expire, os.ErrDeadlineExceeded},
		{"HangUp", HangUp, syscall.EPIPE},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.want == syscall.EPIPE && runtime.GOOS == "windows" {
				t.Skip("Windows has an error of its own")
			}
			server, _ := acceptOne(t, listen(t))
			ended := blockedWrite(t, server)
			test.breakOff(server)
			for _, which := range []string{"the one that blocked", "a later one"} {
				select {
				case err := <-ended:
					if !errors.Is(err, test.want) {
						t.Errorf("%s ended with %v, want %v", which, err, test.want)
					}
				case <-time.After(patience):
					t.Fatalf("%s has not ended", which)
				}
				later := make(chan error, 1)
				go func() { _, err := server.Write([]byte("x")); later <- err }()
				ended = later
			}
		})
	}
}

func TestAClientSeesTheEndWhenItIsHungUpOn(t *testing.T) {
	server, client := acceptOne(t, listen(t))
	if _, err := io.WriteString(server, "data: 1\n\n"); err != nil {
		t.Fatal(err)
	}
	HangUp(server)
	client.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(client); err != nil || string(got) != "data: 1\n\n" {
		t.Errorf("the client got %q, %v", got, err)
	}
}

func TestWhereNothingWasAcceptedNothingIsDone(t *testing.T) {
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	for _, c := range []net.Conn{nil, pipe} {
		LimitUnsent(c)
		HangUp(c)
	}
	Expire(nil)
}
