// Everything is shown as text nodes: nothing from a stream becomes markup.

import { Plug } from "./plug.js";

const maxLogEntries = 300;
const longSilence = 10_000; // an idle timer of this length is what some CDNs have
const meterFull = 20_000; // the upstream's own silence
const reconnectAfter = 3_000; // what EventSource does by default
const stripLength = 60_000; // what a strip shows

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const clock = () => new Date().toLocaleTimeString("en-GB") + "." + Math.floor(Date.now() / 100) % 10;

function element(tag, className, text) {
	const e = document.createElement(tag);
	if (className) e.className = className;
	if (text !== undefined) e.textContent = text;
	return e;
}

// Panel is the part of the page that shows one stream.
class Panel {
	#root;
	#log;

	constructor(root, actions) {
		this.#root = root;
		this.#log = root.querySelector(".log");
		root.addEventListener("click", (event) => actions[event.target.dataset?.action]?.());
	}

	state(state, text) {
		const e = this.#root.querySelector(".state");
		e.dataset.state = state;
		if (e.textContent !== text) e.textContent = text;
	}

	figure(name, value) {
		this.#root.querySelector(`[data-figure="${name}"]`).textContent = value;
	}

	button(action, { text, enabled = true }) {
		const e = this.#root.querySelector(`[data-action="${action}"]`);
		if (text) e.textContent = text;
		e.disabled = !enabled;
	}

	silence(ms) {
		this.figure("silence", (ms / 1000).toFixed(1));
		this.#root.querySelector(".silence").classList.toggle("long", ms > longSilence);
		this.#root.querySelector(".bar").style.transform = `scaleX(${Math.min(ms / meterFull, 1)})`;
	}

	// add appends what came, with the time since the last byte or event.
	add(gap, ...content) {
		const log = this.#log;
		const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
		const entry = element("li");
		const gapCell = element("span", "gap", gap === undefined ? "" : `+${seconds(gap)}`);
		gapCell.classList.toggle("long", gap > longSilence);
		const text = element("div", "text");
		text.append(...content);
		entry.append(element("time", "", clock()), gapCell, text);
		log.append(entry);
		while (log.childElementCount > maxLogEntries) log.firstElementChild.remove();
		if (follow) log.scrollTop = log.scrollHeight;
	}

	note(text) {
		this.add(undefined, element("span", "note", text));
	}

	clear() {
		this.#log.replaceChildren();
	}
}

// Reader shows the bytes of a stream as they come.
class Reader {
	#url;
	#panel;
	#onHeaders;
	#running = null; // the AbortController of the current run
	#lastByte = 0;
	#open = false;
	#longest = 0;
	#total = { heartbeats: 0, events: 0, bytes: 0 };
	#client = newName();
	#lastEventID = "";

	constructor(root, title, onHeaders) {
		root.append(document.getElementById("reader").content.cloneNode(true));
		const heading = root.querySelector("h3");
		heading.id = root.getAttribute("aria-labelledby");
		heading.textContent = title;
		root.querySelector(".log").setAttribute("aria-label", `Bytes, ${title}`);
		this.#url = new URL(`${root.dataset.path}?client=${this.#client}`, location.href);
		root.querySelector(".path").textContent = this.#url.pathname;
		this.#onHeaders = onHeaders;
		this.#panel = new Panel(root, {
			toggle: () => (this.#running ? this.stop("stopped") : this.start()),
			clear: () => this.#panel.clear(),
		});
		setInterval(() => this.#open && this.#silent(performance.now() - this.#lastByte), 100);
	}

	get running() {
		return this.#running !== null;
	}

	start() {
		const running = (this.#running = new AbortController());
		this.#panel.button("toggle", { text: "Stop" });
		this.#run(running.signal);
	}

	stop(why) {
		this.#running?.abort();
		this.#running = null;
		this.#open = false;
		this.#panel.silence(0);
		this.#panel.state("closed", why);
		this.#panel.note(why);
		this.#panel.button("toggle", { text: "Start" });
	}

	// run reads one response after the other, and an error does not stop it.
	async #run(signal) {
		while (!signal.aborted) {
			let clean = false;
			try {
				await this.#read(signal);
				clean = true;
			} catch {
				// What broke off is asked for below: fetch does not tell.
			}
			if (signal.aborted) return;
			this.#open = false;
			this.#panel.silence(0);
			this.#panel.state("waiting", `again in ${seconds(reconnectAfter)}`);
			this.#panel.note((await ending(this.#client)) ?? (clean ? "ended cleanly" : "broke off"));
			await pause(reconnectAfter, signal);
		}
	}

	async #read(signal) {
		this.#panel.state("waiting", "connecting");
		const headers = { Accept: "text/event-stream" };
		if (this.#lastEventID) headers["Last-Event-ID"] = this.#lastEventID;
		const response = await fetch(this.#url, { headers, signal, cache: "no-store" });
		this.#onHeaders(response.headers);
		if (!response.ok) {
			await response.body?.cancel();
			throw new Error(`status ${response.status}`);
		}
		if (signal.aborted) return;

		const opened = performance.now();
		this.#lastByte = opened;
		this.#open = true;
		this.#panel.state("open", "open");
		this.#panel.note(this.#lastEventID ? `opened after event ${this.#lastEventID}` : "opened");
		const lines = new Lines();
		const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
		for (let first = true; ; first = false) {
			const { done, value } = await reader.read();
			if (done || signal.aborted) return;
			const now = performance.now();
			if (first) this.#panel.figure("first", seconds(now - opened));
			this.#came(value, now - this.#lastByte, lines);
			this.#lastByte = now;
		}
	}

	#silent(ms) {
		this.#panel.silence(ms);
		if (ms > this.#longest) {
			this.#longest = ms;
			this.#panel.figure("longest", seconds(ms));
		}
	}

	#came(text, gap, lines) {
		this.#silent(gap);
		const total = this.#total;
		const seen = lines.read(text);
		total.bytes += new TextEncoder().encode(text).length;
		total.events += seen.events;
		total.heartbeats += seen.comments;
		if (seen.lastEventID !== undefined) this.#lastEventID = seen.lastEventID;
		for (const [name, value] of Object.entries(total)) this.#panel.figure(name, value);
		this.#panel.add(gap, ...text.split(/(?<=\n)/).map(lineElement));
	}
}

// lineElement shows a line with its end, so that blank lines are seen.
function lineElement(line) {
	const complete = line.endsWith("\n");
	const e = element("span", line.startsWith(":") ? "heartbeat" : "", complete ? line.slice(0, -1) : line);
	if (complete) {
		const end = element("span", "end", "↵");
		end.ariaHidden = "true";
		e.append(end);
	}
	return e;
}

// Lines counts what goes by. It knows as much of the format as this upstream
// needs: its lines end with LF, and it sends no comments of its own.
class Lines {
	#rest = "";
	#id;
	#data = false;

	read(text) {
		const seen = { events: 0, comments: 0, lastEventID: undefined };
		const lines = (this.#rest + text).split("\n");
		this.#rest = lines.pop();
		for (const line of lines) {
			if (line.startsWith(":")) {
				seen.comments++;
			} else if (line.startsWith("id:")) {
				this.#id = line.slice(3).trim();
			} else if (line.startsWith("data:")) {
				this.#data = true;
			} else if (line === "") {
				if (this.#data) seen.events++;
				this.#data = false;
				seen.lastEventID = this.#id;
			}
		}
		return seen;
	}
}

function pause(ms, signal) {
	return new Promise((resolve) => {
		const timer = setTimeout(resolve, ms);
		signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
	});
}

// newName names a client of this page, so that it can ask how its stream ended.
function newName() {
	return Math.random().toString(36).slice(2);
}

// ending says how the last stream of a client ended, as the load balancer saw it:
// the browser knows more than it tells.
async function ending(client) {
	try {
		const response = await fetch(`ending?client=${client}`);
		if (!response.ok) return undefined;
		const { status, bytes, clean, why } = await response.json();
		if (status !== 200) return `answered ${status}`;
		if (why) return why;
		return clean ? `ended cleanly after ${bytes} bytes` : "broke off";
	} catch {
		return undefined;
	}
}

// due tells when each event came first, to either EventSource: the other one may
// get it late.
const due = new Map();

// Source shows what an EventSource makes of a stream.
class Source {
	#url;
	#client = newName();
	#panel;
	#strip;
	#root;
	#source = null;
	#state = "lost";
	#spans = []; // {from, to, state}; the last one goes on
	#events = []; // when they came
	#lastEventID = "";
	#pending; // a timer: the answer may be a stream
	#away = 0;
	#losses = 0;
	#late = 0;

	constructor(root, title) {
		this.#root = root;
		root.append(document.getElementById("source").content.cloneNode(true));
		const heading = root.querySelector("h3");
		heading.id = root.getAttribute("aria-labelledby");
		heading.append(...title);
		root.querySelector(".log").setAttribute("aria-label", `Events, ${heading.textContent}`);
		this.#strip = root.querySelector(".strip");
		this.#url = new URL(root.dataset.path, location.href);
		this.#panel = new Panel(root, { open: () => this.start() });
		let before = performance.now();
		setInterval(() => {
			const now = performance.now();
			if (this.#state !== "open" && this.#losses > 0) this.#away += now - before;
			before = now;
			this.#panel.figure("away", seconds(this.#away));
			this.#draw(now);
		}, 200);
	}

	get running() {
		return this.#source !== null;
	}

	start() {
		this.#root.querySelector("[data-action=open]").hidden = true;
		this.#url.searchParams.set("client", this.#client);
		const source = (this.#source = new EventSource(this.#url));
		this.#enter("lost", "connecting");
		source.addEventListener("open", () => this.#answered(source));
		for (const type of ["message", "tick"]) source.addEventListener(type, (event) => this.#event(event));
		source.addEventListener("error", () => {
			if (source === this.#source) this.#failed(source);
		});
	}

	stop(why) {
		this.#source?.close();
		this.#source = null;
		this.#enter("dead", why);
		this.#panel.note(why);
	}

	#enter(state, text) {
		const now = performance.now();
		const last = this.#spans.at(-1);
		if (last) last.to = now;
		if (last?.state !== state) this.#spans.push({ from: now, to: now, state });
		this.#state = state;
		this.#panel.state(state, text);
	}

	// An answer may open and end at once, to tell the browser when to come back:
	// that is no stream yet.
	#answered(source) {
		this.#pending = setTimeout(() => source === this.#source && this.#open(), 400);
	}

	#open() {
		clearTimeout(this.#pending);
		if (this.#state === "open") return;
		this.#enter("open", "open");
		this.#panel.note(this.#lastEventID ? `open, after event ${this.#lastEventID}` : "open");
	}

	#event(event) {
		const now = performance.now();
		this.#open();
		this.#lastEventID = event.lastEventId;
		this.#events.push(now);
		this.#panel.figure("last", event.lastEventId);
		if (!due.has(event.lastEventId)) due.set(event.lastEventId, now);
		const late = now - due.get(event.lastEventId);
		if (late >= 1000) this.#panel.figure("late", ++this.#late);
		this.#panel.add(late >= 1000 ? late : undefined, `${event.type} ${event.lastEventId}  ${event.data.replaceAll("\n", " ")}`);
	}

	async #failed(source) {
		clearTimeout(this.#pending);
		const closed = source.readyState === EventSource.CLOSED;
		const wasOpen = this.#state === "open";
		if (wasOpen) this.#panel.figure("losses", ++this.#losses);
		this.#enter(closed ? "dead" : "lost", closed ? "given up by the browser" : "the browser comes back");
		const how = await ending(this.#client);
		if (closed) {
			this.#source = null;
			this.#panel.note(`${how ?? "an error"}: EventSource never tries again`);
			this.#root.querySelector("[data-action=open]").hidden = false;
		} else {
			this.#panel.note(wasOpen ? (how ?? "lost") : "the upstream is away: told to come back");
		}
	}

	// draw shows the last minute, from left to right.
	#draw(now) {
		const from = now - stripLength;
		const at = (time) => `${(Math.max(time - from, 0) / stripLength) * 100}%`;
		this.#spans = this.#spans.filter((span, i, all) => i === all.length - 1 || span.to > from);
		this.#events = this.#events.filter((time) => time > from);
		this.#strip.replaceChildren(
			...this.#spans.map((span, i, all) => {
				const e = element("i", `span ${span.state}`);
				e.style.left = at(span.from);
				e.style.right = `calc(100% - ${at(i === all.length - 1 ? now : span.to)})`;
				return e;
			}),
			...this.#events.map((time) => {
				const e = element("i", "event");
				e.style.left = at(time);
				return e;
			}),
		);
	}
}

// Headers puts the headers of both ways next to each other.
class Headers {
	#body;
	#sides = { sse: null, plain: null };

	constructor(table) {
		this.#body = table.tBodies[0];
	}

	show(side, headers) {
		this.#sides[side] = headers;
		const { sse, plain } = this.#sides;
		const names = new Set([...(sse?.keys() ?? []), ...(plain?.keys() ?? [])]);
		this.#body.replaceChildren(...[...names].sort().map((name) => {
			const row = element("tr");
			const field = element("th", "", name);
			field.scope = "row";
			row.append(field);
			for (const headers of [plain, sse]) {
				const value = headers?.get(name);
				row.append(value == null ? element("td", "absent", headers ? "–" : "…") : element("td", "", value));
			}
			// The date differs by chance.
			row.classList.toggle("differs", !!sse && !!plain && name !== "date" && sse.get(name) !== plain.get(name));
			return row;
		}));
	}
}

const code = (text) => element("code", "", text);
const titles = { plain: [code("reverse_proxy"), " alone"], sse: ["With ", code("sse")] };
const headers = new Headers(document.getElementById("headers"));
const streams = [...document.querySelectorAll("[data-source]")].map((root) => new Source(root, titles[root.dataset.source]));
const readers = [...document.querySelectorAll("[data-reader]")].map((root) => {
	const side = root.dataset.reader;
	return new Reader(root, { plain: "Without sse", sse: "With sse" }[side], (received) => headers.show(side, received));
});
for (const stream of streams) stream.start();

document.getElementById("curl").textContent = `curl -N ${new URL("events", location.href)}`;

const about = await fetch("about").then((response) => response.json());
document.getElementById("list").textContent = about.list;
document.getElementById("close").textContent = about.close;

// With the readers there would be no connection left for the buttons.
const plug = new Plug({ plain: [code("sse")], resume: [code("sse"), " with ", code("resume 1m")] }, about);
const bytes = document.getElementById("bytes");
bytes.addEventListener("toggle", () => {
	if (bytes.open) {
		plug.stop("The numbers stop while the bytes below are shown. Close them to go on.");
		for (const reader of readers) reader.start();
	} else {
		for (const reader of readers) if (reader.running) reader.stop("stopped");
		plug.start();
	}
});
streams.push(plug, ...readers);
plug.start();

const restart = document.getElementById("restart");
const restarting = document.getElementById("restarting");
restart.addEventListener("click", async () => {
	restart.disabled = true;
	const idle = restarting.textContent;
	await fetch("restart", { method: "POST" });
	const back = performance.now() + about.away;
	const tick = setInterval(() => {
		const left = back - performance.now();
		if (left > 0) {
			restarting.textContent = `The upstream is away for another ${seconds(left)}.`;
			return;
		}
		clearInterval(tick);
		restart.disabled = false;
		restarting.textContent = "The upstream is back.";
		setTimeout(() => { if (!restart.disabled) restarting.textContent = idle; }, 8000);
	}, 100);
});

// A page that is left keeps its connections while the browser keeps it for the
// back button; they count towards the six of the host.
let left = [];
addEventListener("pagehide", () => {
	left = streams.filter((stream) => stream.running);
	for (const stream of left) stream.stop("the page was left");
});
addEventListener("pageshow", (event) => {
	if (event.persisted) for (const stream of left) stream.start();
});
