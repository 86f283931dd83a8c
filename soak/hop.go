//go:build linux

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os/exec"
	"sync/atomic"
	"time"

	"github.com/caddy-sse/caddy-sse/internal/measure"
)

// hopArgument makes this program the hop between clients and Caddy. Caddy's two
// addresses follow, the one with TLS second.
const hopArgument = "soak-hop"

// cut is what the hop does to a connection. The client sends it first.
type cut struct {
	secure bool
	// bytes of the answer pass, then it is cut; -1: never.
	bytes int
	// afterID: count from the end of the first event with an id of Caddy's. Before
	// that, a client can't come back.
	afterID bool
	reset   bool // reset the client's connection
	// gone: Caddy is not told for this long, and the hop reads nothing.
	gone time.Duration
}

var never = cut{bytes: -1}

func (c cut) String() string {
	return fmt.Sprintf("%t %d %t %t %d\n", c.secure, c.bytes, c.afterID, c.reset, c.gone.Milliseconds())
}

func readCut(line string) (c cut, err error) {
	var gone int64
	_, err = fmt.Sscanf(line, "%t %d %t %t %d\n", &c.secure, &c.bytes, &c.afterID, &c.reset, &gone)
	c.gone = time.Duration(gone) * time.Millisecond
	return c, err
}

func serveHop(plain, secure string) error {
	if _, err := measure.RaiseFileLimit(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			lines := bufio.NewReaderSize(conn, 4<<10)
			line, err := lines.ReadString('\n')
			c, bad := readCut(line)
			if err != nil || bad != nil {
				conn.Close()
				return
			}
			to := plain
			if c.secure {
				to = secure
			}
			if proxy, err := net.Dial("tcp", to); err != nil {
				conn.Close()
			} else {
				c.pass(conn.(*net.TCPConn), lines, proxy.(*net.TCPConn))
			}
		}()
	}
}

// pass forwards in both directions, until one side has closed or the cut is due.
func (c cut) pass(client *net.TCPConn, fromClient io.Reader, proxy *net.TCPConn) {
	defer proxy.Close()
	defer client.Close()
	var isCut atomic.Bool
	go func() {
		_, _ = io.Copy(proxy, fromClient)
		if !isCut.Load() {
			proxy.Close()
		}
	}()
	left := c.bytes
	if c.afterID {
		left = -1
	}
	var seen []byte // until the first id
	buffer := make([]byte, 4<<10)
	for left != 0 {
		n, err := proxy.Read(buffer)
		if err != nil {
			return
		}
		if c.afterID && left < 0 {
			before := len(seen)
			seen = append(seen, buffer[:n]...)
			if end := afterFirstID(seen); end > 0 {
				left = c.bytes + max(end-before, 0)
			}
		}
		if left >= 0 {
			n = min(n, left)
			left -= n
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
	isCut.Store(true)
	if c.reset {
		_ = client.SetLinger(0)
	}
	client.Close()
	time.Sleep(c.gone)
}

// afterFirstID is the end of the event with the first id; 0: there is none yet.
func afterFirstID(text []byte) int {
	at := bytes.Index(text, []byte("id: sse1-"))
	if at < 0 {
		return 0
	}
	end := 0
	for _, blank := range []string{"\n\n", "\r\n\r\n", "\r\r"} {
		if i := bytes.Index(text[at:], []byte(blank)); i >= 0 && (end == 0 || at+i+len(blank) < end) {
			end = at + i + len(blank)
		}
	}
	return end
}

// hop is the process of the hop.
type hop struct {
	addr    string
	process *exec.Cmd
}

func startHop(p *proxy) (*hop, error) {
	process, addr, err := startSelf(hopArgument, p.plain, p.secure)
	return &hop{addr: addr, process: process}, err
}
