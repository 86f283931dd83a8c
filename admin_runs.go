package caddysse

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"
)

const runsPath = "/sse/runs"

// runJSON is a run as the admin API shows it.
type runJSON struct {
	ID              string    `json:"id"`  // for this API
	Run             string    `json:"run"` // what its event ids begin with, shortened
	Name            string    `json:"name"`
	Use             string    `json:"use"`
	State           string    `json:"state"`
	Host            string    `json:"host"`
	Path            string    `json:"path"`
	Upstream        string    `json:"upstream"`
	BeganAt         time.Time `json:"began_at"`
	DurationSeconds float64   `json:"duration_seconds"`
	IdleSeconds     float64   `json:"idle_seconds"`
	Clients         int       `json:"clients"`
	ClientsTotal    int       `json:"clients_total"`
	DetachedSeconds float64   `json:"detached_seconds"`
	Events          uint64    `json:"events"`
	Bytes           uint64    `json:"bytes"`
	JournalBytes    int       `json:"journal_bytes"`
	Undelivered     uint64    `json:"undelivered"`
}

var runUseNames = [...]string{sharedRun: "share", resumedRun: "resume"}

func newRunJSON(f runFigures) runJSON {
	return runJSON{
		ID:              f.id.String(),
		Run:             f.token,
		Name:            f.name,
		Use:             runUseNames[f.use],
		State:           runStageNames[f.stage],
		Host:            f.host,
		Path:            f.path,
		Upstream:        f.upstream,
		BeganAt:         f.began.Round(time.Millisecond),
		DurationSeconds: seconds(f.age),
		IdleSeconds:     seconds(f.idle),
		Clients:         f.clients,
		ClientsTotal:    f.joined,
		DetachedSeconds: seconds(f.detached),
		Events:          f.events,
		Bytes:           f.bytes,
		JournalBytes:    f.journal,
		Undelivered:     f.undelivered,
	}
}

type runsJSON struct {
	Runs  []runJSON `json:"runs"`
	Total int       `json:"total"` // of all that match, whatever the limit
}

// serveRuns lists runs.
func (adminAPI) serveRuns(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return methodNotAllowed(w, r, "GET")
	}
	values, err := parseQuery(r.URL, "name", "state", "limit")
	if err != nil {
		return badRequest(err)
	}
	state, limit := values["state"], defaultListLimit
	if state != "" && !slices.Contains(runStageNames[:], state) {
		return badRequest(fmt.Errorf("state: %q is none of a run; there are waiting, open, retrying, ending, ended", printable(state, 64)))
	}
	if given := values["limit"]; given != "" {
		if limit, err = strconv.Atoi(given); err != nil || limit < 0 {
			return badRequest(fmt.Errorf("limit: %q is not a number of runs", printable(given, 64)))
		}
	}
	answer := runsJSON{Runs: []runJSON{}}
	for _, run := range live.runs() {
		if name := values["name"]; name != "" && name != run.h.Name {
			continue
		}
		f := run.figures()
		if state != "" && state != runStageNames[f.stage] {
			continue
		}
		answer.Total++
		if len(answer.Runs) < limit {
			answer.Runs = append(answer.Runs, newRunJSON(f))
		}
	}
	return writeJSON(w, http.StatusOK, answer)
}

// serveRun shows one run or ends it.
func (adminAPI) serveRun(w http.ResponseWriter, r *http.Request) error {
	return endpoint[run]{
		path: runsPath, kind: "run", find: live.run,
		show: func(r *run) any { return newRunJSON(r.figures()) },
		end:  func(r *run) bool { return r.stop(endedByAdmin) },
	}.serve(w, r)
}
