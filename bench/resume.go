//go:build linux

package main

// resumeDirective is that of a Caddy whose streams outlive their clients, if only
// for a moment: the next measurement waits for that. It takes part if it is asked
// for: -systems plain,sse,resume -only quiet,events.
const resumeDirective = "sse {\n\t\tresume 2s\n\t}"
