package peer

import (
	"net"
	"runtime"
	"testing"
)

func TestABacklogGrowsWhileNobodyReads(t *testing.T) {
	if runtime.GOOS != "linux" && runtime.GOOS != "darwin" {
		t.Skip("the platform does not tell")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	reader, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	_ = reader.(*net.TCPConn).SetReadBuffer(4 << 10)
	writer, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	b := NewBacklog(writer)
	if size, ok := b.Size(); size != 0 || !ok {
		t.Errorf("%d, %v before anything is written", size, ok)
	}
	if _, err := writer.Write(make([]byte, 100<<10)); err != nil {
		t.Fatal(err)
	}
	if size, ok := b.Size(); size < 16<<10 || !ok {
		t.Errorf("%d, %v of 100 KiB that nobody has read", size, ok)
	}
	if allocated := testing.AllocsPerRun(100, func() { b.Size() }); allocated > 0 {
		t.Errorf("a look allocates %v times", allocated)
	}
	writer.Close()
	if _, ok := b.Size(); ok {
		t.Error("it still tells of a connection that is closed")
	}
}

func TestWhatIsNoTCPSocketHasNoBacklog(t *testing.T) {
	one, two := net.Pipe()
	defer one.Close()
	defer two.Close()
	for _, c := range []net.Conn{one, nil} {
		if size, ok := NewBacklog(c).Size(); size != 0 || ok {
			t.Errorf("%d, %v", size, ok)
		}
	}
}
