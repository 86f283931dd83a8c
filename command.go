package caddysse

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "sse",
		Usage: "<command>",
		Short: "Works with Server-Sent Events streams",
		Long: `
Works with Server-Sent Events streams that pass through the sse handler.`,
		CobraFunc: addCommands,
	})
}

// addCommands makes cmd the parent of every subcommand of `caddy sse`.
func addCommands(cmd *cobra.Command) {
	cmd.AddCommand(listCommand(), runsCommand(), closeCommand(), dashboardCommand(), topCommand(), checkCommand(), demoCommand())
	// Without these, cobra prints help for an unknown word, and the exit status is
	// 0.
	cmd.Args = cobra.ArbitraryArgs
	cmd.SuggestionsMinimumDistance = 2
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknownCommand(cmd, args[0])
	}
	cmd.SetFlagErrorFunc(func(failed *cobra.Command, err error) error {
		if words := failed.Flags().Args(); failed == cmd && len(words) > 0 {
			return unknownCommand(cmd, words[0]) // the flag of an unknown command
		}
		return err
	})
}

func unknownCommand(parent *cobra.Command, word string) error {
	var known []string
	for _, sub := range parent.Commands() {
		if sub.IsAvailableCommand() {
			known = append(known, sub.Name())
		}
	}
	advice := "there are " + strings.Join(known, ", ")
	if close := parent.SuggestionsFor(word); len(close) > 0 {
		advice = "did you mean " + strings.Join(close, " or ") + "?"
	}
	return fmt.Errorf("unknown command %q for %q; %s", printable(word, 64), parent.CommandPath(), advice)
}
