// Figures

let snapshot;
const passed = []; // what has gone by, with times

function show(latest) {
	snapshot = latest;
	const {totals, deltas, seconds} = latest;
	const ended = (closed) => Object.values(closed).reduce((sum, n) => sum + n, 0);
	const now = Date.parse(latest.at);
	passed.push({
		at: now, seconds, open: totals.open, closed: deltas.closed, name: asked.name,
		events: deltas.events / seconds, bytes: deltas.bytes / seconds, // not a number in the first snapshot
	});
	while (passed[0].at < now - memory || passed[0].name !== asked.name) passed.shift();
	const figures = {
		open: [totals.open, deltas.open], opened: [totals.opened, deltas.opened], ended: [ended(totals.closed), ended(deltas.closed)],
		events: [totals.events, deltas.events], bytes: [totals.bytes, deltas.bytes, size], heartbeats: [totals.heartbeats, deltas.heartbeats],
	};
	for (const [id, [total, delta, format]] of Object.entries(figures)) {
		say($(id), (format || whole.format)(total));
		const perSecond = (format || rate)(seconds ? delta / seconds : 0);
		say($(id + "-rate"), id === "open" ? change(delta) : perSecond + "/s");
	}
	document.title = whole.format(totals.open) + " open · Streams";
	charts.forEach((chart) => chart.draw(now));
	showReasons(totals.closed);
	showNames(latest.names);
	showStreams(latest);
	if (dialog.open) showDetails();
}

function change(delta) {
	return delta === 0 ? "no change" : (delta > 0 ? "+" : "−") + whole.format(Math.abs(delta));
}

// showEmpty shows, in place of a table without rows, the note that says so.
function showEmpty(id, empty) {
	$(id).closest("table").hidden = empty;
	$("no-" + id).hidden = !empty;
}

// table keeps the rows of a small table as they should be.
function table(body, rows) {
	while (body.children.length > rows.length) body.lastChild.remove();
	rows.forEach((cells, i) => {
		let row = body.children[i];
		if (!row) {
			row = body.appendChild(element("tr"));
			cells.forEach((cell, j) => row.append(j === 0 ? element("th", "", {scope: "row"}) : element("td", "", {class: "number"})));
		}
		cells.forEach((text, j) => say(row.children[j], text));
	});
}

function showReasons(closed) {
	const lately = {};
	for (const sample of passed) {
		for (const [reason, n] of Object.entries(sample.closed)) lately[reason] = (lately[reason] || 0) + n;
	}
	const rows = Object.entries(closed).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
	table($("reasons"), rows.map(([reason, n]) => [reason, whole.format(n), whole.format(lately[reason] || 0)]));
	showEmpty("reasons", rows.length === 0);
}

function showNames(names) {
	table($("names"), names.map((n) => [n.name, whole.format(n.open), whole.format(n.opened), whole.format(n.events), size(n.bytes)]));
	showEmpty("names", names.length === 0);
	const choice = $("name"), known = new Set([...choice.options].map((option) => option.value));
	for (const {name} of names) {
		if (!known.has(name)) choice.append(element("option", name, {value: name}));
	}
}

// Charts

class Chart {
	constructor(figure, key, format) {
		this.key = key;
		this.format = format;
		this.figure = figure;
		this.now = figure.querySelector("figcaption").appendChild(element("span"));
		const svg = (name, attributes) => {
			const made = document.createElementNS("http://www.w3.org/2000/svg", name);
			for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
			return made;
		};
		this.picture = figure.appendChild(svg("svg", {viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img"}));
		this.title = figure.querySelector("figcaption").firstChild.textContent;
		this.picture.append(svg("path", {class: "axis", d: "M0 100H300M0 50H300M0 0H300"}));
		this.area = this.picture.appendChild(svg("path", {class: "area"}));
		this.line = this.picture.appendChild(svg("path", {class: "line"}));
		const times = figure.appendChild(element("div", undefined, {class: "times", "aria-hidden": "true"}));
		times.append(element("span", "5 min ago"), element("span", "now"));
	}

	draw(now) {
		const samples = passed.filter((sample) => Number.isFinite(sample[this.key]));
		const top = Math.max(1, ...samples.map((sample) => sample[this.key]));
		let line = "", area = "", before;
		const close = () => { if (before) area += `L${before.x} 100Z`; };
		for (const sample of samples) {
			const x = (300 * (1 - (now - sample.at) / memory)).toFixed(1);
			const y = (100 - 100 * sample[this.key] / top).toFixed(1);
			const follows = before && sample.at - before.at < 3 * interval;
			if (!follows) {
				close();
				area += `M${x} 100`;
			}
			line += (follows ? "L" : "M") + x + " " + y;
			area += `L${x} ${y}`;
			before = {x, at: sample.at};
		}
		close();
		this.line.setAttribute("d", line);
		this.area.setAttribute("d", area);
		const latest = samples.length ? this.format(samples[samples.length - 1][this.key]) : "–";
		say(this.now, `${latest} · highest ${samples.length ? this.format(top === 1 ? Math.max(...samples.map((s) => s[this.key])) : top) : "–"}`);
		this.picture.setAttribute("aria-label", `${this.title} over the last five minutes: ${this.now.textContent}`);
	}
}

const charts = [
	new Chart($("chart-open"), "open", whole.format),
	new Chart($("chart-events"), "events", rate),
	new Chart($("chart-bytes"), "bytes", size),
];
