package caddysse

import (
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
		CobraFunc: func(cmd *cobra.Command) {
			cmd.AddCommand(listCommand(), closeCommand(), checkCommand(), demoCommand())
		},
	})
}
