package demo

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

func TestThePlugBreaksAStreamOffAndHoldsWhatComesMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		plug := NewPlug()
		begun := make(chan time.Time, 1)
		through := plug.Through(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			begun <- time.Now()
			<-r.Context().Done()
		}))
		ask := func(ctx context.Context) (ended chan any) {
			ended = make(chan any, 1)
			go func() {
				defer func() { ended <- recover() }()
				through.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/", nil))
			}()
			return ended
		}
		first := ask(t.Context())
		<-begun
		pulled := time.Now()
		plug.Pull()
		plug.Pull() // does nothing
		if got := <-first; got != http.ErrAbortHandler {
			t.Errorf("the stream ended with %v", got)
		}

		ctx, leave := context.WithCancel(t.Context())
		second := ask(ctx)
		if waited := (<-begun).Sub(pulled); waited != plug.Out {
			t.Errorf("the next request waited %v, want %v", waited, plug.Out)
		}
		leave()
		if got := <-second; got != nil {
			t.Errorf("a client that leaves ends a stream with %v", got)
		}
		if len(plug.streams) != 0 {
			t.Errorf("%d streams are left", len(plug.streams))
		}
	})
}

func TestNumbersComeAtTheSameTimeForEverybodyAndAreNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		numbers := NewNumbers()
		watch := func(client string, d time.Duration) string {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			recorder := httptest.NewRecorder()
			numbers.ServeHTTP(recorder, httptest.NewRequestWithContext(ctx, "GET", "/plug/plain?client="+client, nil))
			return recorder.Body.String()
		}
		for _, test := range []struct{ client, want string }{
			{"a", "data: {\"n\": 1, \"asked\": 1}\n\ndata: {\"n\": 2, \"asked\": 1}\n\n"},
			{"b", "data: {\"n\": 3, \"asked\": 1}\n\ndata: {\"n\": 4, \"asked\": 1}\n\n"},
			{"a", "data: {\"n\": 5, \"asked\": 2}\n\ndata: {\"n\": 6, \"asked\": 2}\n\n"},
		} {
			if got := watch(test.client, 2*numbers.Step+time.Millisecond); got != test.want {
				t.Errorf("%s got %q, want %q", test.client, got, test.want)
			}
		}
	})
}
