package redis

import (
	"bufio"
	"errors"
	"io"
	"strconv"
)

// This is RESP2 (https://redis.io/docs/latest/develop/reference/protocol-spec/).

// replyError is an error that the server sent as a reply.
type replyError string

func (e replyError) Error() string { return "redis: " + string(e) }

var (
	// errProtocol is the error for a server that speaks another protocol.
	errProtocol = errors.New("redis: the server does not speak RESP")

	errReply = errors.New("redis: the server's answer is none of a store")
)

func appendCommand(out []byte, command []string) []byte {
	line := func(kind byte, n int) {
		out = append(out, kind)
		out = strconv.AppendInt(out, int64(n), 10)
		out = append(out, "\r\n"...)
	}
	line('*', len(command))
	for _, argument := range command {
		line('$', len(argument))
		out = append(out, argument...)
		out = append(out, "\r\n"...)
	}
	return out
}

const (
	// largestReply is the most bytes that a reply may have.
	largestReply = 64 << 20

	// elementCost is what an element of a reply counts for, in addition to its
	// bytes.
	elementCost = 32

	// deepestReply is how deeply lists may be nested: the reply to HELLO has
	// modules with arguments.
	deepestReply = 8
)

func readReply(in *bufio.Reader) (any, error) {
	room := int64(largestReply)
	return readReplyIn(in, &room, deepestReply)
}

// readReplyIn reads a reply of at most room bytes.
func readReplyIn(in *bufio.Reader, room *int64, depth int) (any, error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	if *room -= int64(len(line)) + elementCost; len(line) < 3 || line[len(line)-2] != '\r' {
		return nil, errProtocol
	}
	kind, text := line[0], string(line[1:len(line)-2])
	switch kind {
	case '+':
		return text, nil
	case '-':
		if text == "" {
			return nil, errProtocol
		}
		return replyError(text), nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, errProtocol
	}
	switch {
	case kind == ':':
		return n, nil
	case n == -1 && (kind == '$' || kind == '*'):
		return nil, nil
	case n < 0 || n > *room:
		return nil, errProtocol
	case kind == '$':
		return readText(in, room, n)
	case kind == '*' && depth > 0:
		return readList(in, room, n, depth-1)
	}
	return nil, errProtocol
}

func readText(in *bufio.Reader, room *int64, n int64) (any, error) {
	*room -= n
	b := make([]byte, n+2)
	if _, err := io.ReadFull(in, b); err != nil {
		return nil, err
	}
	if string(b[n:]) != "\r\n" {
		return nil, errProtocol
	}
	return string(b[:n]), nil
}

func readList(in *bufio.Reader, room *int64, n int64, depth int) (any, error) {
	var all []any
	for range n {
		one, err := readReplyIn(in, room, depth)
		if err != nil {
			return nil, err
		}
		if *room < 0 {
			return nil, errProtocol
		}
		all = append(all, one)
	}
	return all, nil
}

// texts returns the strings of a reply.
func texts(reply any) ([]string, error) {
	all, ok := reply.([]any)
	if !ok {
		return nil, errReply
	}
	found := make([]string, len(all))
	for i, one := range all {
		if found[i], ok = one.(string); !ok {
			return nil, errReply
		}
	}
	return found, nil
}
