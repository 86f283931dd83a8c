package caddysse

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// addressUsage is what every command that calls the admin API says of --address.
const addressUsage = "The address of the admin API, if not the default (which CADDY_ADMIN can change)"

func listCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list [--address <address>] [--json]",
		Short: "Lists the streams that are open",
		Long: `
Lists the streams that are open in a running Caddy: who is connected, since
when (AGE), when its upstream sent something last (IDLE), and what went by.

It asks the admin API, which therefore has to be enabled. --address is where
that listens, if not at the default address; it can be unix//path/to/socket.

--json prints the answer of the admin API, GET ` + streamsPath + `, as it is.`,
		Example: `  caddy sse list
  caddy sse list --json`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringP("address", "", "", addressUsage)
	cmd.Flags().BoolP("json", "", false, "Print the answer of the admin API")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runList)
	return cmd
}

func runList(flags caddycmd.Flags) (int, error) {
	answer, err := callAdmin(flags.String("address"), http.MethodGet, streamsPath)
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse list: %w", err)
	}
	if flags.Bool("json") {
		_, err = os.Stdout.Write(answer)
	} else {
		err = printStreams(os.Stdout, answer)
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse list: %w", err)
	}
	return caddy.ExitCodeSuccess, nil
}

// printStreams prints the admin API's list as a table for people.
func printStreams(out io.Writer, answer []byte) error {
	var list streamsJSON
	if err := unmarshalAnswer(answer, &list); err != nil {
		return err
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(list.Streams) > 0 {
		fmt.Fprintln(table, "ID\tNAME\tCLIENT\tPROTO\tSTATE\tPATH\tAGE\tIDLE\tEVENTS\tBYTES\tHEARTBEATS")
	}
	for _, s := range list.Streams {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\n",
			cell(s.ID, 64), cell(s.Name, 32), cell(s.ClientIP, 64), cell(s.Proto, 16), cell(s.State, 16), cell(s.Path, 48),
			age(s.DurationSeconds), age(s.IdleSeconds), s.Events, s.Bytes, s.Heartbeats)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	total := countOf(list.Total, "stream") + " open"
	if listed := len(list.Streams); listed < list.Total {
		total += fmt.Sprintf(", the first %d listed", listed)
	}
	_, err := fmt.Fprintln(out, total)
	return err
}

// cell makes text fit for a table. The admin API has cleaned it; whether it was
// the admin API that answered is not known here.
func cell(text string, limit int) string {
	cleaned := printable(text, len(text)*3)
	switch runes := []rune(cleaned); {
	case cleaned == "":
		return "-"
	case len(runes) > limit:
		return string(runes[:limit-1]) + "…"
	}
	return cleaned
}

// age is a duration as exact as somebody looks at it.
func age(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func countOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func closeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "close <id> | --client-ip <address> | --all",
		Short: "Ends streams",
		Long: `
Ends one stream, those of one client or all of them in a running Caddy, each
behind the event that is on its way to the client. "caddy sse list" shows the
ids.

An EventSource that was ended comes back: to keep a client out, block it too.

It asks the admin API, which therefore has to be enabled. --address is where
that listens, if not at the default address; it can be unix//path/to/socket.`,
		Example: `  caddy sse close 5b3ff9c5-8b9a-4b6d-9d3e-6a1f7f6f2f0e
  caddy sse close --client-ip 203.0.113.7
  caddy sse close --all`,
		Args: cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringP("address", "", "", addressUsage)
	cmd.Flags().StringP("client-ip", "", "", "End the streams of the client with this IP address")
	cmd.Flags().BoolP("all", "", false, "End every stream")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runClose)
	return cmd
}

func runClose(flags caddycmd.Flags) (int, error) {
	uri, err := closeURI(flags)
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse close: %w", err)
	}
	answer, err := callAdmin(flags.String("address"), http.MethodDelete, uri)
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse close: %w", err)
	}
	var ending endingJSON
	if err := unmarshalAnswer(answer, &ending); err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse close: %w", err)
	}
	fmt.Println(countOf(ending.Ending, "stream"), "ending")
	return caddy.ExitCodeSuccess, nil
}

// closeURI is the call that ends what the command line says. Saying it twice is
// an error: one of the two would be ignored.
func closeURI(flags caddycmd.Flags) (string, error) {
	ids, byClient, all := flags.Args(), flags.Changed("client-ip"), flags.Bool("all")
	given := len(ids)
	if byClient {
		given++
	}
	if all {
		given++
	}
	if given != 1 {
		return "", errors.New("say which streams by exactly one of <id>, --client-ip and --all")
	}
	switch {
	case all:
		return streamsPath + "?all=true", nil
	case byClient:
		ip := flags.String("client-ip")
		if ip == "" {
			return "", errors.New("--client-ip: the address is missing")
		}
		return streamsPath + "?client_ip=" + url.QueryEscape(ip), nil
	}
	if ids[0] == "" {
		return "", errors.New("the id is empty")
	}
	return streamsPath + "/" + url.PathEscape(ids[0]), nil
}

// callAdmin calls the admin API of a running Caddy, where Caddy's own commands
// would find it, and says plainly why there is no answer.
func callAdmin(address, method, uri string) ([]byte, error) {
	address, err := caddycmd.DetermineAdminAPIAddress(address, nil, "", "")
	if err != nil {
		return nil, fmt.Errorf("finding the admin API: %w", err)
	}
	response, err := caddycmd.AdminAPIRequest(address, method, uri, nil, nil)
	if err != nil {
		return nil, explainAdminError(address, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("reading the answer of the admin API at %s: %w", address, err)
	}
	return answer, nil
}

// explainAdminError reads the text of an error of caddycmd.AdminAPIRequest,
// which is all that it tells.
func explainAdminError(address string, err error) error {
	if cause, ok := strings.CutPrefix(err.Error(), "performing request: "); ok {
		return fmt.Errorf("no Caddy answers at the admin address %s: %s", address, cause)
	}
	refusal, ok := strings.CutPrefix(err.Error(), "caddy responded with error: ")
	if !ok {
		return err
	}
	status, body, _ := strings.Cut(refusal, ": ")
	var said struct {
		Error string `json:"error"`
	}
	if json.Unmarshal([]byte(body), &said) == nil && said.Error != "" {
		return errors.New(printable(said.Error, 1024))
	}
	if status == "HTTP 404" {
		return fmt.Errorf("the Caddy at the admin address %s has no sse module", address)
	}
	return fmt.Errorf("the admin API at %s answers %s: %s", address, status, printable(body, 1024))
}

func unmarshalAnswer(answer []byte, into any) error {
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("the answer is none of Caddy's admin API: %w", err)
	}
	return nil
}
