package caddysse

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func listCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list [--json]",
		Short: "Lists the open streams",
		Long: `
Lists the open streams of a running Caddy: who is connected, for how long (AGE),
how long the upstream has been silent (IDLE), and how much was sent.
` + adminHelp + `

--json prints the unchanged answer of the admin API to GET ` + streamsPath + `.`,
		Example: `  caddy sse list
  caddy sse list --json`,
		Args: cobra.NoArgs,
	}
	addAdminFlags(cmd)
	cmd.Flags().BoolP("json", "", false, "Print the answer of the admin API")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runList)
	return cmd
}

func runList(flags caddycmd.Flags) (int, error) {
	answer, err := callAdmin(flags, http.MethodGet, streamsPath)
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

// cell makes text fit for a table. The admin API has cleaned it, but it may not
// have been the admin API that answered.
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

// age formats a duration with as much precision as a reader needs.
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
Ends one stream, the streams of one client, or all streams of a running Caddy.
Each ends after its current event. "caddy sse list" shows the ids.

An EventSource reconnects after that. To keep a client out, block it as well.
` + adminHelp,
		Example: `  caddy sse close 5b3ff9c5-8b9a-4b6d-9d3e-6a1f7f6f2f0e
  caddy sse close --client-ip 203.0.113.7
  caddy sse close --all`,
		Args: cobra.MaximumNArgs(1),
	}
	addAdminFlags(cmd)
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
	answer, err := callAdmin(flags, http.MethodDelete, uri)
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

// closeURI is the call that ends what the command line says. Giving both an id
// and a filter is an error: one of the two would be ignored.
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

// callAdmin calls the admin API at the address that the flags give.
func callAdmin(flags caddycmd.Flags, method, uri string) ([]byte, error) {
	client, err := findAdmin(flags)
	if err != nil {
		return nil, err
	}
	return client.call(method, uri)
}
