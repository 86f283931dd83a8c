package caddysse

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-sse/caddy-sse/internal/doctor"
)

// tokenVariable is the environment variable with the token of a probe, if no flag
// gives it.
const tokenVariable = "SSE_PROBE_TOKEN"

// The exit statuses of `caddy sse check`, other than 0.
const (
	exitFindings = 1
	exitUnknown  = 2
)

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check <url> [--token <token>] [--json]",
		Short: "Finds out what is between here and a stream",
		Long: `
Finds out what the proxies between here and a server do to streams: whether they
hold headers or events back, compress them, cut streams that are silent or old,
or change requests.

With a token, the URL is that of an sse_probe, which sends what each test needs.
The token may also be in ` + tokenVariable + `. Without a token, the check reads the
stream at the URL, and can report only what that stream itself shows.

It uses the proxies that curl takes from the environment: http_proxy, https_proxy,
all_proxy, no_proxy. HTTP/3 does not use them.

A finding says what was seen, what it means and what to set.
docs/is-it-the-proxy.md explains an example. Progress goes to standard error.

Exit status: 1 with any finding; otherwise 0 if all tests ran; otherwise 2, also if
the command line is wrong or the answer is not a stream.`,
		Example: `  caddy sse check https://example.com/probe --token "$TOKEN"
  caddy sse check https://example.com/events
  caddy sse check --http 2 --json https://example.com/probe`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return wrongUsage(cmd, errors.New("say one URL"))
			}
			return nil
		},
		RunE:          runCheck,
		SilenceErrors: true,
	}
	cmd.SetFlagErrorFunc(wrongUsage)
	flags := cmd.Flags()
	flags.StringP("token", "", "", "The token of the sse_probe at the URL (default $"+tokenVariable+")")
	flags.StringP("http", "", "", "The version of HTTP: 1.1, 2 or 3 (default what TLS agrees on, else 1.1)")
	flags.StringArrayP("header", "H", nil, `A header, "Name: value", in place of the check's own; "Name:" sends none`)
	flags.StringP("method", "X", "", "The method (default GET, or POST with data)")
	flags.StringP("data", "d", "", "The body of the request, or @file")
	flags.StringArrayP("resolve", "", nil, "host:port:address, to connect to that address")
	flags.BoolP("insecure", "k", false, "Accept any certificate")
	flags.BoolP("json", "", false, "Print the report as JSON")
	flags.DurationP("for", "", doctor.DefaultFor, "How long the check may take")
	return cmd
}

// wrongUsage reports an error in the command line.
func wrongUsage(cmd *cobra.Command, err error) error {
	fmt.Fprintf(cmd.ErrOrStderr(), "sse check: %v; caddy sse check --help says more\n", err)
	return exitWith(cmd, exitUnknown)
}

// errExit makes caddycmd.Main exit with status 1. It is not shown.
var errExit = errors.New("sse check: exit status 1")

// exitWith makes the process exit with a status. Caddy's own way would exit with
// 0 for status 1 without an error.
func exitWith(cmd *cobra.Command, status int) error {
	if status == exitFindings {
		return errExit
	}
	return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return status, nil })(cmd, nil)
}

func runCheck(cmd *cobra.Command, args []string) error {
	config, err := checkConfig(caddycmd.Flags{FlagSet: cmd.Flags()}, args[0])
	if err != nil {
		return wrongUsage(cmd, err)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	asJSON, _ := cmd.Flags().GetBool("json")
	out := cmd.OutOrStdout()
	if !asJSON {
		config.Begin = func(plan string) { fmt.Fprintf(out, "%s\n\n", plan) }
	}
	config.Done = func(test doctor.Test) {
		if asJSON {
			config.Progress(test.Line())
		} else {
			fmt.Fprintln(out, test.Line())
		}
	}
	config.Progress = func(line string) { fmt.Fprintf(cmd.ErrOrStderr(), "sse check: %s\n", line) }
	report, err := doctor.Check(ctx, config)
	if err != nil {
		return wrongUsage(cmd, err)
	}
	if err := printReport(out, report, asJSON); err != nil {
		return wrongUsage(cmd, err)
	}
	return exitWith(cmd, report.Status())
}

func printReport(out io.Writer, report *doctor.Report, asJSON bool) error {
	if !asJSON {
		return report.WriteText(out)
	}
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(report)
}

// checkConfig reads the command line.
func checkConfig(flags caddycmd.Flags, url string) (config doctor.Config, err error) {
	config = doctor.Config{
		URL:      url,
		Token:    flags.String("token"),
		HTTP:     flags.String("http"),
		Method:   flags.String("method"),
		Insecure: flags.Bool("insecure"),
		Getenv:   os.Getenv,
	}
	if config.For, _ = flags.GetDuration("for"); config.For == 0 {
		return config, fmt.Errorf("--for: a check takes at least %v", doctor.ShortestFor)
	}
	if !flags.Changed("token") {
		config.Token = os.Getenv(tokenVariable)
	}
	headers, _ := flags.GetStringArray("header")
	if config.Header, err = checkHeader(headers); err != nil {
		return config, err
	}
	resolve, _ := flags.GetStringArray("resolve")
	if config.Resolve, err = doctor.ParseResolve(resolve); err != nil {
		return config, err
	}
	if flags.Changed("data") {
		if config.Data, err = checkData(flags.String("data")); err != nil {
			return config, err
		}
	}
	return config, nil
}

// checkHeader reads headers as curl does.
func checkHeader(fields []string) (http.Header, error) {
	header := make(http.Header)
	for _, field := range fields {
		name, value, found := strings.Cut(field, ":")
		name = textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name))
		if !found || name == "" {
			return nil, errors.New(`--header: one of them is not "Name: value"`)
		}
		if value = strings.TrimSpace(value); value != "" {
			header[name] = append(header[name], value)
		} else if header[name] == nil {
			header[name] = []string{}
		}
	}
	return header, nil
}

// checkData returns the body, which may be in a file.
func checkData(data string) ([]byte, error) {
	name, isFile := strings.CutPrefix(data, "@")
	if !isFile {
		return []byte(data), nil
	}
	if name == "-" {
		return io.ReadAll(os.Stdin)
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("--data: %w", err)
	}
	return content, nil
}
