package top

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// View is everything on the screen.
type View struct {
	Address string // of the admin API
	Asked   string // the filters and the order, for people
	Trouble string // why there are no snapshots; empty: there are

	Snapshot Snapshot
}

// Style is how a line looks. All terminals support these.
type Style uint8

// The styles of lines.
const (
	Plain Style = iota
	Bold
	Reverse
)

// Line is a line on the screen.
type Line struct {
	Text  string
	Style Style
}

// Lines are those of a screen of this size, from the top. None uses the last
// column: terminals differ in what they do after a character there.
func (v View) Lines(columns, rows int) []Line {
	width := columns - 1
	if width < 1 || rows < 1 {
		return nil
	}
	s := v.Snapshot
	lines := []Line{
		{spread("caddy sse top  "+clean(v.Address), v.clock(), width), Bold},
		{thirds(width, figure("open", s.Totals.Open, change(s.Deltas.Open)),
			figure("opened", s.Totals.Opened, v.rate(s.Deltas.Opened)),
			figure("ended", sum(s.Totals.Closed), v.rate(sum(s.Deltas.Closed)))), Plain},
		{thirds(width, figure("events", s.Totals.Events, v.rate(s.Deltas.Events)),
			"bytes "+size(float64(s.Totals.Bytes))+"  "+size(v.perSecond(s.Deltas.Bytes))+"/s",
			figure("heartbeats", s.Totals.Heartbeats, v.rate(s.Deltas.Heartbeats))), Plain},
	}
	if ended := v.ended(); ended != "" {
		lines = append(lines, Line{"ended: " + ended, Plain})
	}
	if len(s.Names) > 1 {
		lines = append(lines, Line{"open: " + v.names(), Plain})
	}
	listed := listRows(rows, len(lines), len(s.Streams))
	lines = append(lines, Line{v.matching(listed), Plain})
	lines = append(lines, v.table(width, listed)...)
	if len(lines) >= rows {
		lines = lines[:rows-1]
	}
	for len(lines) < rows-1 {
		lines = append(lines, Line{})
	}
	lines = append(lines, v.footer())
	for i := range lines {
		lines[i].Text = fit(lines[i].Text, width)
		if lines[i].Style == Reverse {
			lines[i].Text = pad(lines[i].Text, width)
		}
	}
	return lines
}

// listRows is how many streams fit below this many lines, a line that says how
// many match, and the column heads, and above the last line.
func listRows(rows, above, streams int) int {
	return max(min(rows-above-3, streams), 0)
}

func (v View) clock() string {
	if v.Snapshot.At.IsZero() {
		return ""
	}
	return v.Snapshot.At.Format(time.TimeOnly)
}

func (v View) footer() Line {
	if v.Trouble != "" {
		return Line{clean(v.Trouble), Reverse}
	}
	return Line{"q or Ctrl-C ends this", Plain}
}

// perSecond is a delta as a rate; 0 in the first snapshot.
func (v View) perSecond(delta int64) float64 {
	if v.Snapshot.Seconds <= 0 {
		return 0
	}
	return float64(delta) / v.Snapshot.Seconds
}

func (v View) rate(delta int64) string {
	n := v.perSecond(delta)
	if n > 0 && n < 10 {
		return fmt.Sprintf("%.1f/s", n)
	}
	return grouped(int64(n+.5)) + "/s"
}

func figure(name string, n int64, beside string) string {
	return name + " " + grouped(n) + "  " + beside
}

func change(n int64) string {
	if n >= 0 {
		return "+" + grouped(n)
	}
	return grouped(n)
}

func sum(closed map[string]int64) (n int64) {
	for _, some := range closed {
		n += some
	}
	return n
}

// ended is how many streams have ended for each reason, most first.
func (v View) ended() string {
	closed := v.Snapshot.Totals.Closed
	reasons := slices.SortedFunc(maps.Keys(closed), func(a, b string) int {
		return cmp.Or(cmp.Compare(closed[b], closed[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, reason := range reasons {
		if closed[reason] > 0 {
			parts = append(parts, clean(reason)+" "+grouped(closed[reason]))
		}
	}
	return strings.Join(parts, "  ")
}

// names is how many streams each name has open, most first.
func (v View) names() string {
	names := slices.SortedFunc(slices.Values(v.Snapshot.Names), func(a, b Name) int {
		return cmp.Or(cmp.Compare(b.Open, a.Open), cmp.Compare(a.Name, b.Name))
	})
	parts := make([]string, len(names))
	for i, name := range names {
		parts[i] = clean(name.Name) + " " + grouped(name.Open)
	}
	return strings.Join(parts, "  ")
}

func (v View) matching(listed int) string {
	text := grouped(int64(v.Snapshot.Matching)) + " match"
	if v.Snapshot.Matching == 1 {
		text = "1 matches"
	}
	if listed < v.Snapshot.Matching {
		text += fmt.Sprintf(", the first %d shown", listed)
	}
	if v.Asked != "" {
		text += "  " + clean(v.Asked)
	}
	return text
}

// column is a column of the list.
type column struct {
	head   string
	from   int // the smallest width of the screen with which it is shown
	text   func(Stream) string
	number bool // right-aligned, and never cut
	most   int  // the largest share of the screen that it takes, in percent; 0: what it needs
}

var columns = []column{
	{head: "CLIENT", text: func(s Stream) string { return s.ClientIP }, most: 25},
	{head: "NAME", from: 100, text: func(s Stream) string { return s.Name }, most: 12},
	{head: "PROTO", from: 70, text: func(s Stream) string { return s.Proto }},
	{head: "STATE", from: 90, text: func(s Stream) string { return s.State }},
	{head: "AGE", text: func(s Stream) string { return span(s.DurationSeconds) }, number: true},
	{head: "IDLE", text: func(s Stream) string { return span(s.IdleSeconds) }, number: true},
	{head: "EVENTS", from: 50, text: func(s Stream) string { return grouped(s.Events) }, number: true},
	{head: "BYTES", from: 60, text: func(s Stream) string { return size(float64(s.Bytes)) }, number: true},
	{head: "BEATS", from: 76, text: func(s Stream) string { return grouped(s.Heartbeats) }, number: true},
	{head: "UPSTREAM", from: 130, text: func(s Stream) string { return s.Upstream }, most: 15},
	{head: "USER AGENT", from: 150, text: func(s Stream) string { return s.UserAgent }, most: 25},
	{head: "PATH", text: func(s Stream) string { return s.Path }},
}

// table is the list of streams, with the heads of its columns.
func (v View) table(width, rows int) []Line {
	var shown []column
	for _, c := range columns {
		if width+1 >= c.from {
			shown = append(shown, c)
		}
	}
	cells := make([][]string, rows+1)
	widths := make([]int, len(shown))
	for i := range cells {
		for j, c := range shown {
			text := c.head
			if i > 0 {
				text = cmp.Or(clean(c.text(v.Snapshot.Streams[i-1])), "-")
			}
			if c.most > 0 {
				text = fit(text, max(width*c.most/100, len(c.head)))
			}
			cells[i] = append(cells[i], text)
			widths[j] = max(widths[j], displayed(text))
		}
	}
	lines := make([]Line, len(cells))
	for i, row := range cells {
		for j, text := range row {
			switch {
			case shown[j].number:
				row[j] = strings.Repeat(" ", widths[j]-displayed(text)) + text
			case j < len(row)-1:
				row[j] = pad(text, widths[j])
			}
		}
		lines[i].Text = strings.Join(row, " ")
	}
	lines[0].Style = Reverse
	return lines
}
