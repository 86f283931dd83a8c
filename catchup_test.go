package caddysse_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	caddysse "github.com/caddy-sse/caddy-sse"
)

func withID(n int) string { return fmt.Sprintf("id: u%d\ndata: %d\n\n", n, n) }

func withIDs(from, to int) string {
	var all strings.Builder
	for n := from; n <= to; n++ {
		all.WriteString(withID(n))
	}
	return all.String()
}

func TestAClientThatTheJournalHasNothingForCatchesUp(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""), withAdmin())
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream", "X-Run: yes")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withIDs(50, 60))
	one.expect(t, withIDs(50, 60))

	back := cl.begin(cl.request(t, "GET", "/", nil, append(asEventSource, "Last-Event-ID: u40", "X-Client: 2")...))
	res := back.headers(t)
	if res.Header.Get("X-Run") != "yes" {
		t.Error("the headers are not the run's")
	}
	two := res.follow()
	own := up.accept(t)
	if own.Header.Get("Last-Event-ID") != "u40" || own.Header.Get("X-Client") != "" {
		t.Errorf("it catches up with %v", own.Header)
	}
	// A client that sends the same id uses the same stream.
	three := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u40")...).follow()
	own.start("text/event-stream", "X-Run: no")
	own.send(withIDs(41, 49))
	two.expect(t, withIDs(41, 49))
	three.expect(t, withIDs(41, 49))
	own.send(withIDs(50, 55))
	two.expect(t, withIDs(50, 60)) // what follows 55 comes from the journal
	three.expect(t, withIDs(50, 60))
	own.expectGone()
	run.send(withID(61))
	for _, f := range []*follower{one, two, three} {
		f.expect(t, withID(61))
	}
	run.end()
	for _, f := range []*follower{one, two, three} {
		f.expectEnd(t)
	}
}

func TestTheJournalMayComeToWhereAClientHasCaughtUpTo(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withID(50))
	one.expect(t, withID(50))
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u48")...).follow()
	own := up.accept(t)
	own.start("text/event-stream")
	own.send(withIDs(49, 52)) // it is ahead of the run
	two.expect(t, withIDs(49, 52))
	run.send(withIDs(51, 53))
	two.expect(t, withID(53))
	own.expectGone()
	run.end()
	two.expectEnd(t)
}

func TestAnIDThatComesInTimeNeedsNoCatchingUp(t *testing.T) {
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	two := cl.get(t, "/", append(asEventSource, "Last-Event-ID: u2")...).follow()
	run.send(withIDs(1, 3))
	two.expect(t, withID(3))
	run.end()
	two.expectEnd(t)
}

func TestAClientEndsWithTheStreamThatItCatchesUpBy(t *testing.T) {
	if apart(t) {
		return
	}
	checkLeaks(t)
	up := newUpstream(t)
	c := startCaddy(t, sharedSite(up, ""))
	cl := c.client("h1")
	first, run := open(t, cl, up, "/", asEventSource...)
	run.start("text/event-stream")
	one := first.headers(t).follow()
	one.expectFirst(t, 0)
	run.send(withID(50))
	one.expect(t, withID(50))
	ends := map[string]func(own *upstreamCall, f *follower){
		"no-stream": func(own *upstreamCall, f *follower) {
			own.startWith(404)
			own.end()
			f.expectAbort(t)
		},
		"end": func(own *upstreamCall, f *follower) {
			own.start("text/event-stream")
			own.send(withID(31))
			f.expect(t, withID(31))
			own.end()
			f.expectEnd(t)
		},
		"abort": func(own *upstreamCall, f *follower) {
			own.start("text/event-stream")
			own.abort()
			f.expectAbort(t)
		},
	}
	clients := make(map[string]*follower)
	for id := range ends { // each test waits for a second
		clients[id] = cl.get(t, "/", append(asEventSource, "Last-Event-ID: "+id)...).follow()
	}
	for range ends {
		own := up.accept(t)
		id := own.Header.Get("Last-Event-ID")
		ends[id](own, clients[id])
	}
	run.end()
	one.expectEnd(t)
}

func TestWhoFindsNoPlaceToCatchUpIsToldAfterAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := silent()
		config.Name = uniqueName("late")
		config.Share = new(caddysse.Share)
		h := provision(t, config)
		say := make(chan string)
		var mu sync.Mutex
		var catchingUp []string
		upstream := func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", eventStream)
			w.WriteHeader(200)
			if id := r.Header.Get("Last-Event-ID"); id != "" {
				mu.Lock()
				catchingUp = append(catchingUp, id)
				mu.Unlock()
				<-r.Context().Done()
				return r.Context().Err()
			}
			for text := range say {
				write(t, w, text)
			}
			return nil
		}
		var group sync.WaitGroup
		ask := func(id string) *client {
			c, r := newClient(t), get(eventStream)
			r.Header.Set("Cache-Control", "no-cache")
			r.Header.Set("Last-Event-ID", id)
			group.Go(func() {
				if err := serve(h, c, r, upstream); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
			return c
		}
		first := ask("")
		say <- withID(50)
		for i := range 8 {
			ask(fmt.Sprint("busy", i))
		}
		time.Sleep(time.Millisecond)
		late := ask("late")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		say <- withID(51)
		synctest.Wait()
		want := "event: lost\ndata: {\"reason\":\"unknown\"}\nid: u50\n\n" + withID(51)
		if got := late.body.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		close(say)
		group.Wait()
		told := slices.IndexFunc(late.log, func(h happening) bool { return h.what == "write" })
		if told < 0 || late.log[told].at != 10*time.Second {
			t.Errorf("it was told as %v", late.log)
		}
		if len(catchingUp) != 8 || slices.Contains(catchingUp, "late") {
			t.Errorf("%v caught up", catchingUp)
		}
		if !strings.HasSuffix(first.body.String(), withIDs(50, 51)) {
			t.Errorf("the first client got %q", first.body.String())
		}
	})
}
