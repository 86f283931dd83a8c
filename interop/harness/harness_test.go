//go:build interop

package harness_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-sse/caddy-sse/interop/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

func TestAStreamPassesInEveryProtocol(t *testing.T) {
	t.Parallel()
	upstream := harness.Serve(t, func(w http.ResponseWriter, r *http.Request) {
		harness.Begin(w)
		harness.Send(w, "id: 7\nevent: greeting\ndata: hello\ndata: you\n\n")
		<-r.Context().Done()
	})
	caddy := harness.StartSite(t, "sse 2s\nreverse_proxy "+upstream)
	for _, client := range []struct{ protocol, url, proto string }{
		{"h1", caddy.URL, "HTTP/1.1"},
		{"h2c", caddy.URL, "HTTP/2.0"},
		{"h1", caddy.TLSURL, "HTTP/1.1"},
		{"h2", caddy.TLSURL, "HTTP/2.0"},
	} {
		stream := harness.Open(t, harness.Client(t, client.protocol, caddy.RootCA), client.url+"/")
		if stream.Response.Proto != client.proto {
			t.Errorf("%s: %s", client.protocol, stream.Response.Proto)
		}
		event := stream.Next(t, time.Second)
		event.At = time.Time{}
		if want := (harness.Event{Type: "greeting", Data: "hello\nyou", ID: "7"}); event != want {
			t.Errorf("%s: %+v", client.protocol, event)
		}
		for range 2 {
			if comment := stream.NextComment(t, 3*time.Second); comment.Text != "heartbeat" {
				t.Errorf("%s: comment %q", client.protocol, comment.Text)
			}
		}
		if open := caddy.OpenStreams(t); len(open) != 1 {
			t.Errorf("%s: streams open: %q", client.protocol, open)
		}
		stream.Close()
		if closed := caddy.AwaitClosed(t); closed.Reason != "client_closed" || closed.Proto != client.proto || closed.Events != 1 {
			t.Errorf("%s: %+v", client.protocol, closed)
		}
	}
	caddy.CheckNoErrors(t)
}

func TestAReloadTakesAnotherCaddyfile(t *testing.T) {
	t.Parallel()
	plain, tls := harness.FreeAddr(t), harness.FreePort(t)
	caddy := harness.StartCaddy(t, harness.SiteCaddyfile(plain, tls, "respond first"))
	caddy.Reload(t, harness.SiteCaddyfile(plain, tls, "respond 204"))
	response, err := harness.Client(t, "h1").Get("http://" + plain)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusNoContent {
		t.Error(response.Status)
	}
}

func TestAProcessEndsWithItsChildren(t *testing.T) {
	t.Parallel()
	var p *harness.Process
	t.Run("starts it", func(t *testing.T) {
		p = harness.Start(t, harness.Command("sh", "-c", "sleep 600 & echo $! started; wait"))
		p.AwaitOutput(t, "started")
	})
	if p.Running() {
		t.Error("still running after its test")
	}
	child, err := strconv.Atoi(strings.Fields(p.Output())[0])
	if err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, time.Second, "its child is gone", func() bool {
		// If nothing reads its exit status, it remains as a zombie. That counts
		// as gone too.
		state, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
		return errors.Is(syscall.Kill(child, 0), syscall.ESRCH) || strings.Contains(string(state), ") Z ")
	})
}
