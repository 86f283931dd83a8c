package eventstream

import (
	"bytes"
	"strings"
	"testing"
)

// Compare with bytes.Count for newlines over the same bytes, a lower limit for
// anything that searches for line ends.

func BenchmarkScan200ByteEvents(b *testing.B) {
	for _, format := range []struct{ name, event string }{
		{"LF", "data: " + strings.Repeat("x", 192) + "\n\n"},
		{"CRLF", "data: " + strings.Repeat("x", 190) + "\r\n\r\n"},
		{"IDs", "id: 1234567890\nevent: message\ndata: " + strings.Repeat("x", 162) + "\n\n"},
		{"UTF-8", "data: " + strings.Repeat("日", 64) + "\n\n"},
	} {
		event := []byte(format.event)
		if len(event) != 200 {
			b.Fatalf("%s: %d bytes", format.name, len(event))
		}
		b.Run(format.name+"/OneByOne", func(b *testing.B) { benchmarkScan(b, event) })
		b.Run(format.name+"/160AtOnce", func(b *testing.B) { benchmarkScan(b, bytes.Repeat(event, 160)) })
		b.Run(format.name+"/bytes.Count", func(b *testing.B) { benchmarkCount(b, event) })
	}
}

func BenchmarkScan1MBLines(b *testing.B) {
	for _, format := range []struct{ name, fill string }{
		{"ASCII", "x"},
		{"UTF-8", "日本語 "},
	} {
		line := []byte("data: " + strings.Repeat(format.fill, 1<<20/len(format.fill)) + "\n\n")
		b.Run(format.name+"/Scan", func(b *testing.B) { benchmarkScan(b, line) })
		b.Run(format.name+"/bytes.Count", func(b *testing.B) { benchmarkCount(b, line) })
	}
}

func benchmarkScan(b *testing.B, p []byte) {
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	var s Scanner
	for b.Loop() {
		s.Scan(p)
	}
}

func benchmarkCount(b *testing.B, p []byte) {
	b.SetBytes(int64(len(p)))
	newline := []byte{'\n'}
	for b.Loop() {
		bytes.Count(p, newline)
	}
}

// Compare with Scan over the same bytes.
func BenchmarkSplice200ByteEvents(b *testing.B) {
	event := []byte("data: " + strings.Repeat("x", 192) + "\n\n")
	f := &Frames{Comment: "heartbeat"}
	b.Run("Splice", func(b *testing.B) {
		b.SetBytes(int64(len(event)))
		b.ReportAllocs()
		var s Splicer
		for b.Loop() {
			s.Splice(f, event)
		}
	})
	b.Run("ScanBlock and AppendID", func(b *testing.B) {
		b.SetBytes(int64(len(event)))
		b.ReportAllocs()
		var s Splicer
		id := []byte("sse1-AAAAAAAAAAAAAAAAAAAAAA.1")
		dst := make([]byte, 0, 1<<10)
		for b.Loop() {
			n, idAt, _ := s.ScanBlock(event)
			dst = append(dst[:0], event[:idAt]...)
			dst = append(s.AppendID(dst, id), event[idAt:n]...)
		}
	})
	b.Run("Scan", func(b *testing.B) { benchmarkScan(b, event) })
}
