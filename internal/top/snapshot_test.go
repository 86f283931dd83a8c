package top

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestAWatchIsReadToItsEnd(t *testing.T) {
	const watch = "retry: 1000\n\nevent: snapshot\ndata: {\"seconds\":0,\"matching\":1,\"streams\":[{\"path\":\"/a\"}]}\n\n" +
		"event: snapshot\ndata: {\"seconds\":1,\"totals\":{\"open\":2,\"closed\":{\"admin\":3}},\"more\":true}\n\n"
	for name, reader := range map[string]io.Reader{
		"in one piece": strings.NewReader(watch), "byte by byte": iotest.OneByteReader(strings.NewReader(watch)),
	} {
		var told []Snapshot
		err := Read(reader, func(s Snapshot) { told = append(told, s) })
		if err != nil || len(told) != 2 || told[0].Streams[0].Path != "/a" || told[1].Totals.Open != 2 || told[1].Totals.Closed["admin"] != 3 {
			t.Errorf("%s: %+v, %v", name, told, err)
		}
	}
}

func TestAWatchThatBreaksOffIsAnError(t *testing.T) {
	broken := errors.New("broken")
	for name, test := range map[string]struct {
		watch io.Reader
		says  string
	}{
		"a read that fails":      {iotest.ErrReader(broken), "broken"},
		"what is no snapshot":    {strings.NewReader("data: {]\n"), "reading a snapshot"},
		"a line that is endless": {io.MultiReader(strings.NewReader("data: "), endless{}), "it is too long"},
	} {
		err := Read(test.watch, func(Snapshot) { t.Errorf("%s: a snapshot", name) })
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}
