package caddysse

import "net/http"

const dashboardPath = "/sse/"

func (adminAPI) serveDashboard(w http.ResponseWriter, r *http.Request) error { return nil }
