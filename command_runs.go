package caddysse

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func runsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "runs [--json]",
		Short: "Lists the runs: the upstream streams of resume and share",
		Long: `
Lists the runs of a running Caddy: the upstream streams that several clients
share, and those that outlive their client's connection. AGE is the age of a run,
IDLE how long its upstream has been silent, and KEPT the size of its journal.
` + adminHelp + `

--json prints the unchanged answer of the admin API to GET ` + runsPath + `.`,
		Example: `  caddy sse runs
  caddy sse runs --json`,
		Args: cobra.NoArgs,
	}
	addAdminFlags(cmd)
	cmd.Flags().BoolP("json", "", false, "Print the answer of the admin API")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runRuns)
	return cmd
}

func runRuns(flags caddycmd.Flags) (int, error) {
	answer, err := callAdmin(flags, http.MethodGet, runsPath)
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse runs: %w", err)
	}
	if flags.Bool("json") {
		_, err = os.Stdout.Write(answer)
	} else {
		err = printRuns(os.Stdout, answer)
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, fmt.Errorf("sse runs: %w", err)
	}
	return caddy.ExitCodeSuccess, nil
}

// printRuns prints the admin API's list as a table for people.
func printRuns(out io.Writer, answer []byte) error {
	var list runsJSON
	if err := unmarshalAnswer(answer, &list); err != nil {
		return err
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(list.Runs) > 0 {
		fmt.Fprintln(table, "ID\tRUN\tNAME\tUSE\tSTATE\tPATH\tCLIENTS\tAGE\tIDLE\tEVENTS\tBYTES\tKEPT")
	}
	for _, r := range list.Runs {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\t%d\t%d\n",
			cell(r.ID, 64), cell(r.Run, 16), cell(r.Name, 32), cell(r.Use, 16), cell(r.State, 16), cell(r.Path, 48),
			r.Clients, age(r.DurationSeconds), age(r.IdleSeconds), r.Events, r.Bytes, r.JournalBytes)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	total := countOf(list.Total, "run")
	if listed := len(list.Runs); listed < list.Total {
		total += fmt.Sprintf(", the first %d listed", listed)
	}
	_, err := fmt.Fprintln(out, total)
	return err
}
