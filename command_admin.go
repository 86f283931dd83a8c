package caddysse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// adminHelp says how commands that call the admin API find it.
const adminHelp = `
It uses the admin API, which must be enabled. --address is where the admin API
listens: localhost:2019, :2019, http://127.0.0.1:2019 or unix//path/to/socket.
Without it, the address is the one in the configuration file (--config and
--adapter, as for "caddy reload"), by default in ./Caddyfile if there is one,
and otherwise Caddy's default, which the environment variable CADDY_ADMIN
can change.`

// adminPatience is how long the admin API may take for a complete answer.
const adminPatience = 10 * time.Second

// maxAdminAnswer bounds how much of an answer is read: a list of 1,000 streams is
// below 1 MiB.
const maxAdminAnswer = 16 << 20

// errTooLong means that an answer exceeds it.
var errTooLong = errors.New("it is too long")

// addAdminFlags adds the flags that say where the admin API is.
func addAdminFlags(cmd *cobra.Command) {
	cmd.Flags().String("address", "", "The address of the admin API")
	cmd.Flags().StringP("config", "c", "", "The configuration file that has the address of the admin API")
	cmd.Flags().StringP("adapter", "a", "", "The config adapter for --config")
}

// adminClient calls the admin API of a running Caddy.
type adminClient struct {
	address  string // for people
	network  string // where to dial
	dial     string
	hosts    []string // names to call it by, tried one after the other; empty for a Unix socket
	patience time.Duration
}

// findAdmin looks in the same places as Caddy's own commands.
func findAdmin(flags caddycmd.Flags) (adminClient, error) {
	address := strings.TrimSpace(flags.String("address"))
	if address == "" {
		config, err := adminConfig(flags)
		if err != nil {
			return adminClient{}, err
		}
		address, err = caddycmd.DetermineAdminAPIAddress("", nil, config, flags.String("adapter"))
		if err != nil {
			return adminClient{}, fmt.Errorf("finding the address of the admin API: %w; "+
				"--address says it without a configuration file", err)
		}
		address = caddy.NewReplacer().ReplaceKnown(address, "")
	}
	return newAdminClient(address)
}

// adminConfig is the configuration file that has the address; empty for none.
func adminConfig(flags caddycmd.Flags) (string, error) {
	if config := flags.String("config"); config != "" {
		return config, nil
	}
	if flags.String("adapter") != "" {
		return "", errors.New("--adapter needs the file that it is for: --config")
	}
	const adjacent = "Caddyfile"
	_, err := os.Stat(adjacent)
	switch {
	case err == nil:
		return adjacent, nil
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	}
	return "", fmt.Errorf("looking for a Caddyfile: %w; --address says where the admin API is without one", err)
}

// newAdminClient accepts an address in any form of Caddy's configuration, or as
// copied from a browser.
func newAdminClient(address string) (adminClient, error) {
	c := adminClient{address: address, patience: adminPatience}
	if scheme, _, ok := strings.Cut(address, "://"); ok && strings.EqualFold(scheme, "https") {
		return c, fmt.Errorf("--address: %q: the admin API has no TLS at its local address; give it without https://", address)
	} else if ok && strings.EqualFold(scheme, "http") {
		address = strings.TrimRight(address[len("http://"):], "/")
	}
	parsed, err := caddy.ParseNetworkAddress(address)
	if err != nil {
		return c, fmt.Errorf("the admin address %q is invalid: %w", c.address, err)
	}
	switch {
	case parsed.IsUnixNetwork():
		// Caddy's form may end with the permissions of the socket: |0220
		path, _, _ := strings.Cut(parsed.Host, "|")
		c.network, c.dial, c.hosts = parsed.Network, path, []string{""}
		return c, nil
	case parsed.IsFdNetwork():
		return c, fmt.Errorf("the admin address %q is a file descriptor of the running Caddy, "+
			"which no other process can call; say what it is connected to with --address", c.address)
	case parsed.PortRangeSize() != 1 || parsed.StartPort == 0:
		return c, fmt.Errorf("the admin address %q is invalid: it needs one port", c.address)
	}
	// The admin API accepts the name that its configuration has for it, or any name
	// of the loopback interface if it listens there.
	named := parsed.JoinHostPort(0)
	c.network, c.dial, c.hosts = parsed.Network, named, []string{named}
	if parsed.Host == "" {
		parsed.Host = "localhost"
		c.dial = parsed.JoinHostPort(0)
		c.hosts = []string{c.dial, named}
	}
	return c, nil
}

// call returns the answer to a request, or an error that says plainly why there
// is none.
func (c adminClient) call(method, uri string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.patience)
	defer cancel()
	var refused error
	for _, host := range c.hosts {
		status, answer, err := c.exchange(ctx, host, method, uri)
		switch {
		case err != nil:
			return nil, err
		case status >= 200 && status < 300:
			return answer, nil
		}
		refused = c.explain(ctx, host, status, answer)
		if status != http.StatusForbidden {
			break
		}
	}
	return nil, refused
}

// exchange sends one request and reads the whole answer.
func (c adminClient) exchange(ctx context.Context, host, method, uri string) (status int, answer []byte, err error) {
	response, err := c.send(ctx, host, method, uri)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(response.Body, maxAdminAnswer+1))
	if err == nil && len(answer) > maxAdminAnswer {
		err = errTooLong
	}
	switch {
	case ctx.Err() != nil:
		return 0, nil, fmt.Errorf("what answers at the address %s had not finished after %s, so it is no admin API of Caddy%s",
			c.address, c.patience, elsewhere)
	case err != nil:
		return 0, nil, fmt.Errorf("reading the answer of the admin API at %s: %w", c.address, err)
	}
	return response.StatusCode, answer, nil
}

// open sends one request and returns the answer when it begins, whatever its
// status. The answer may go on without limit.
func (c adminClient) open(ctx context.Context, method, uri string) (response *http.Response, err error) {
	for i, host := range c.hosts {
		if i > 0 {
			response.Body.Close()
		}
		response, err = c.begin(ctx, host, method, uri)
		if err != nil || response.StatusCode != http.StatusForbidden {
			break
		}
	}
	return response, err
}

// refusal explains an answer of open that is not a success, and closes it.
func (c adminClient) refusal(ctx context.Context, answer *http.Response) error {
	late := time.AfterFunc(c.patience, func() { answer.Body.Close() })
	defer late.Stop()
	defer answer.Body.Close()
	said, err := io.ReadAll(io.LimitReader(answer.Body, maxAdminAnswer))
	if err != nil {
		return fmt.Errorf("reading the answer of the admin API at %s: %w", c.address, err)
	}
	host := strings.TrimPrefix(answer.Request.Header.Get("Origin"), "http://") // the name that was used
	return c.explain(ctx, host, answer.StatusCode, said)
}

// begin is send for an answer that must begin in time, but need not end.
func (c adminClient) begin(ctx context.Context, host, method, uri string) (*http.Response, error) {
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(c.patience, cancel)
	response, err := c.send(ctx, host, method, uri)
	if err != nil {
		cancel()
		return nil, err
	}
	late.Stop()
	response.Body = closing{response.Body, cancel}
	return response, nil
}

// closing is a body with a function to call when it is closed.
type closing struct {
	io.ReadCloser
	also func()
}

func (c closing) Close() error {
	defer c.also()
	return c.ReadCloser.Close()
}

// elsewhere is the hint for the case that something else than the admin API has
// answered.
const elsewhere = "; --address, --config and the environment variable CADDY_ADMIN say where the admin API is"

// send repeats a request after an EOF. Caddy stops the admin server of a replaced
// configuration after it has loaded the new one, and a net/http server that is
// told to stop closes connections that it has just accepted without reading their
// requests. So such a request has not been handled.
func (c adminClient) send(ctx context.Context, host, method, uri string) (*http.Response, error) {
	// The host name does not say where to connect.
	request, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1"+uri, nil)
	if err != nil {
		return nil, err
	}
	if host != "" {
		request.Host = host
		request.Header.Set("Origin", "http://"+host)
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, c.network, c.dial)
		},
	}
	response, err := transport.RoundTrip(request)
	if errors.Is(err, io.EOF) {
		response, err = transport.RoundTrip(request)
	}
	_, unreachable := errors.AsType[*net.OpError](err)
	switch {
	case err == nil:
		return response, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer from the admin address %s within %s%s", c.address, c.patience, elsewhere)
	case unreachable:
		return nil, fmt.Errorf("no Caddy answers at the admin address %s: %w%s", c.address, err, elsewhere)
	}
	return nil, fmt.Errorf("what answers at the address %s is no admin API of Caddy: %w%s", c.address, err, elsewhere)
}

// explain says what an answer means that is not a success.
func (c adminClient) explain(ctx context.Context, host string, status int, answer []byte) error {
	var said struct {
		Error string `json:"error"`
	}
	readable := json.Unmarshal(answer, &said) == nil && said.Error != ""
	message := printable(said.Error, 1024)
	if readable && status == http.StatusForbidden {
		return fmt.Errorf("the admin API at %s refuses to be called by that name (%s); "+
			"give --address as the configuration has it, in admin or in the origins of admin", c.address, message)
	}
	if !c.isCaddy(ctx, host) {
		return fmt.Errorf("what answers at the address %s is no admin API of Caddy (%d %s)%s",
			c.address, status, http.StatusText(status), elsewhere)
	}
	if readable {
		return errors.New(message)
	}
	if status == http.StatusNotFound {
		return fmt.Errorf("the Caddy at the admin address %s has no sse module", c.address)
	}
	return fmt.Errorf("the admin API at %s answers %d %s: %s", c.address, status, http.StatusText(status), printable(string(answer), 1024))
}

// isCaddy requests what every admin API of Caddy has: its configuration, as JSON
// with an ETag.
func (c adminClient) isCaddy(ctx context.Context, host string) bool {
	response, err := c.send(ctx, host, http.MethodGet, "/config/")
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK && response.Header.Get("Etag") != "" &&
		isMediaType(response.Header.Get("Content-Type"), "application/json")
}

func unmarshalAnswer(answer []byte, into any) error {
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("the answer is none of Caddy's admin API: %w%s", err, elsewhere)
	}
	return nil
}
