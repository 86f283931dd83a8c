package caddysse_test

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// seedsVariable sets the number of seeds for the test below.
const seedsVariable = "CADDYSSE_TEST_SEEDS"

// keptModel is what is known about the runs of one seed: for each token, how
// far its client has come, and whether it was ended on purpose.
type keptModel struct {
	mu     sync.Mutex
	seen   map[string]int
	killed map[string]bool
	tokens []string

	reloads sync.RWMutex // the admin API is away for a moment during a reload
}

func (m *keptModel) note(token string, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.seen[token]; !known {
		m.tokens = append(m.tokens, token)
	}
	m.seen[token] = max(m.seen[token], n)
}

// pick chooses a run and a place in it that its client has received.
func (m *keptModel) pick(r *rand.Rand) (token string, n int, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.tokens) == 0 {
		return "", 0, false
	}
	token = m.tokens[r.IntN(len(m.tokens))]
	return token, r.IntN(m.seen[token] + 1), true
}

func (m *keptModel) kill(token string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killed[token] = true
}

func (m *keptModel) isKilled(token string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.killed[token]
}

// read follows a stream for at most this many events, and compares it with the
// model: event n of a run is followed by event n+1, or by what comes after a
// reported gap. Event n of an upstream has the data n.
func (m *keptModel) read(res *reply, token string, n, most int) error {
	defer res.leave()
	defer res.Body.Close()
	lines := bufio.NewReader(res.Body)
	var data, id, event string
	for got := 0; got < most; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return nil // cut off, or ended
		}
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "data":
			data = value
		case "id":
			id = value
		case "event":
			event = value
		case "":
			if data == "" && event == "" {
				continue
			}
			itsToken, number, _ := strings.Cut(id, ".")
			itsN, err := strconv.Atoi(number)
			if err != nil {
				return fmt.Errorf("event %q %q has the id %q", event, data, id)
			}
			switch {
			case event == "lost" && strings.Contains(data, "unknown"):
				if !m.isKilled(token) {
					return fmt.Errorf("nobody has ended run %s, and its client has lost it", token)
				}
				token, n = itsToken, 0
			case event == "lost":
				var missed int
				if _, err := fmt.Sscanf(data, `{"reason":"history","events":%d}`, &missed); err != nil || itsN != n+missed || itsToken != token {
					return fmt.Errorf("%s after event %d of %s, with the id %s", data, n, token, id)
				}
				n = itsN
			default:
				if token == "" {
					token = itsToken
				}
				if itsToken != token || itsN != n+1 || data != strconv.Itoa(itsN) {
					return fmt.Errorf("%q with the id %s after event %d of %s", data, id, n, token)
				}
				n, got = itsN, got+1
			}
			m.note(token, n)
			data, event = "", ""
		}
	}
	return nil
}

// Many clients do random things at the same time with a few runs: begin one,
// come back to any place, take over, leave, stop it, end it through the admin
// API, reload. No client gets an event twice, in the wrong order or of another
// run, and none loses one without a report.
func TestRunsAgainstAModel(t *testing.T) {
	checkLeaks(t)
	seeds := 2
	if n, err := strconv.Atoi(os.Getenv(seedsVariable)); err == nil {
		seeds = n
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { testModel(t, uint64(seed)) })
	}
}

func testModel(t *testing.T, seed uint64) {
	up := newUpstreamFunc(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		pace := rand.New(rand.NewPCG(seed, uint64(len(r.URL.RawQuery))))
		w.Header().Set("Content-Type", "text/event-stream")
		rc := http.NewResponseController(w)
		for n := 1; n <= 100+pace.IntN(2000); n++ {
			fmt.Fprintf(w, ":%s\ndata: %d\n\n", strings.Repeat("x", pace.IntN(200)), n)
			if pace.IntN(4) == 0 && rc.Flush() != nil {
				return
			}
			if pace.IntN(8) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		if pace.IntN(2) == 0 {
			panic(http.ErrAbortHandler)
		}
	})
	site := `
		sse {
			name ` + fmt.Sprintf("model-%d-%d", seed, rand.Uint64()) + `
			heartbeat off
			drain off
			upstream_timeout 5s
			resume 1m any {
				history 16KiB
				lost lost
			}
		}
		reverse_proxy ` + up.addr
	c := startCaddy(t, site, withAdmin(), withLogLevel("ERROR"))
	m := &keptModel{seen: make(map[string]int), killed: make(map[string]bool)}
	failed := make(chan error, 100)
	var all sync.WaitGroup
	for worker := range 8 {
		cl := c.client(clientProtocols[worker%3])
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(worker)))
			for range 25 {
				if err := m.act(t, c, cl, r); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	for range 2 {
		time.Sleep(50 * time.Millisecond)
		m.reloads.Lock()
		c.reload(site)
		m.reloads.Unlock()
	}
	all.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if _, text := c.admin("GET", "/metrics"); testing.Verbose() {
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "caddy_sse_resumes_total{name=\"model-"+fmt.Sprint(seed)) {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	c.stopRuns()
	c.waitForNoRun()
}

// act does one random thing that a client or an operator might do.
func (m *keptModel) act(t *testing.T, c *testCaddy, cl *testClient, r *rand.Rand) error {
	const path = "/model"
	host := func(req *http.Request) *http.Request {
		req.Host = "model.example" // the same, whatever port the client uses
		return req
	}
	method := []string{"GET", "POST"}[r.IntN(2)]
	token, n, ok := m.pick(r)
	switch dice := r.IntN(20); {
	case !ok || dice < 4:
		res, err := cl.begin(host(cl.request(t, method, path, nil, "Accept: text/event-stream", notEventSource))).outcome()
		if err != nil {
			return nil // a reload
		}
		return m.read(res, "", 0, 1+r.IntN(200))
	case dice == 4:
		m.kill(token)
		res, err := cl.begin(host(cl.request(t, "DELETE", path, nil, fmt.Sprintf("Last-Event-ID: %s.%d", token, n)))).outcome()
		if err == nil {
			res.leave()
			if res.StatusCode != http.StatusNoContent && res.StatusCode != http.StatusNotFound {
				return fmt.Errorf("DELETE: %s", res.Status)
			}
		}
		return nil
	case dice == 5:
		m.reloads.RLock()
		defer m.reloads.RUnlock()
		for _, run := range c.runs("").Runs {
			if strings.HasPrefix(token, strings.TrimSuffix(run.Run, "…")) {
				m.kill(token)
				c.admin("DELETE", "/sse/runs/"+run.ID)
			}
		}
		return nil
	}
	res, err := cl.begin(host(cl.request(t, method, path, nil, "Accept: text/event-stream", notEventSource,
		fmt.Sprintf("Last-Event-ID: %s.%d", token, n)))).outcome()
	if err != nil {
		return nil
	}
	if method == "POST" {
		// The answer for a lost run is not a stream of the model.
		peek := bufio.NewReader(res.Body)
		if first, _ := peek.Peek(len("id:\nevent: error")); string(first) == "id:\nevent: error" {
			res.leave()
			res.Body.Close()
			if !m.isKilled(token) {
				return fmt.Errorf("nobody has ended run %s, and its client has lost it", token)
			}
			return nil
		}
		res.Body = readerWithClose{peek, res.Body}
	}
	return m.read(res, token, n, 1+r.IntN(300))
}

type readerWithClose struct {
	io.Reader
	io.Closer
}
