// Everything is shown as text nodes: nothing from a stream becomes markup.

const maxLogEntries = 300;
const longSilence = 10_000; // an idle timer of this length is what some CDNs have
const meterFull = 20_000; // the upstream's own silence
const reconnectAfter = 3_000; // what EventSource does by default

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
	#cut = false; // this silence is counted among the long ones
	#total = { heartbeats: 0, events: 0, bytes: 0, cuts: 0 };
	#lastEventID = "";

	constructor(root, title, onHeaders) {
		root.append(document.getElementById("reader").content.cloneNode(true));
		const heading = root.querySelector("h3");
		heading.id = root.getAttribute("aria-labelledby");
		heading.textContent = title;
		root.querySelector(".log").setAttribute("aria-label", `Bytes, ${title}`);
		this.#url = new URL(root.dataset.path, location.href);
		root.querySelector(".path").textContent = this.#url.pathname;
		this.#onHeaders = onHeaders;
		this.#panel = new Panel(root, {
			toggle: () => (this.#running ? this.stop("stopped") : this.start()),
			reconnect: () => {
				if (this.#running) this.stop("connection dropped");
				this.start();
			},
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

	// run reads one response after the other, as an EventSource would.
	async #run(signal) {
		while (!signal.aborted) {
			let why;
			try {
				await this.#read(signal);
				why = "the upstream ended the stream";
			} catch (error) {
				why = `the stream broke off: ${error.message}`;
			}
			if (signal.aborted) return;
			this.#open = false;
			this.#panel.silence(0);
			this.#panel.state("waiting", `again in ${seconds(reconnectAfter)}`);
			this.#panel.note(why);
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
		this.#cut = false;
		this.#open = true;
		this.#panel.state("open", "open");
		this.#panel.note(this.#lastEventID ? `opened behind event ${this.#lastEventID}` : "opened");
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
		if (ms > longSilence && !this.#cut) {
			this.#cut = true;
			this.#panel.figure("cuts", ++this.#total.cuts);
		}
		if (ms > this.#longest) {
			this.#longest = ms;
			this.#panel.figure("longest", seconds(ms));
		}
	}

	#came(text, gap, lines) {
		this.#silent(gap);
		this.#cut = false;
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

// Source shows what an EventSource makes of a stream.
class Source {
	#panel;
	#source = null;
	#client = Math.random().toString(36).slice(2);
	#total = { messages: 0, ticks: 0, reconnects: 0 };
	#lastEvent = 0;
	#lost = 0;

	constructor(root) {
		this.#panel = new Panel(root, {
			toggle: () => (this.#source ? this.stop("stopped") : this.start()),
			drop: () => this.#drop(),
			clear: () => this.#panel.clear(),
		});
	}

	get running() {
		return this.#source !== null;
	}

	start() {
		const source = (this.#source = new EventSource(`events?client=${this.#client}`));
		this.#lost = 0;
		this.#panel.state("waiting", "connecting");
		this.#panel.button("toggle", { text: "Stop" });
		this.#panel.button("drop", { enabled: false });
		source.addEventListener("open", () => this.#opened());
		source.addEventListener("message", (event) => this.#event("messages", event));
		source.addEventListener("tick", (event) => this.#event("ticks", event));
		source.addEventListener("error", () => {
			if (source === this.#source) this.#failed(source);
		});
	}

	stop(why) {
		this.#source?.close();
		this.#source = null;
		this.#panel.state("closed", why);
		this.#panel.note(why);
		this.#panel.button("toggle", { text: "Start" });
		this.#panel.button("drop", { enabled: false });
	}

	#opened() {
		const now = performance.now();
		this.#lastEvent = now;
		this.#panel.state("open", "open");
		this.#panel.button("drop", { enabled: true });
		if (!this.#lost) {
			this.#panel.note("open");
			return;
		}
		this.#panel.note(`open again after ${seconds(now - this.#lost)}`);
		this.#panel.figure("reconnects", ++this.#total.reconnects);
		this.#panel.figure("took", seconds(now - this.#lost));
		this.#lost = 0;
	}

	#event(kind, event) {
		const now = performance.now();
		this.#panel.figure(kind, ++this.#total[kind]);
		this.#panel.figure("last", event.lastEventId);
		this.#panel.add(now - this.#lastEvent, `${event.type} ${event.lastEventId}  ${event.data.replaceAll("\n", " ")}`);
		this.#lastEvent = now;
	}

	#failed(source) {
		if (source.readyState === EventSource.CLOSED) {
			this.stop("given up by the browser");
			return;
		}
		// Every failed attempt is told; the first is the loss.
		if (!this.#lost) {
			this.#lost = performance.now();
			this.#panel.note("connection lost; the browser comes back by itself");
		}
		this.#panel.state("waiting", "reconnecting");
		this.#panel.button("drop", { enabled: false });
	}

	// drop has the upstream end this stream: closing an EventSource from here
	// would be final.
	async #drop() {
		try {
			const response = await fetch(`drop?client=${this.#client}`, { method: "POST" });
			if (!response.ok) throw new Error(await response.text());
		} catch (error) {
			this.#panel.note(`could not drop the connection: ${error.message}`);
		}
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
			for (const headers of [sse, plain]) {
				const value = headers?.get(name);
				row.append(value == null ? element("td", "absent", headers ? "–" : "…") : element("td", "", value));
			}
			// The date differs by chance.
			row.classList.toggle("differs", !!sse && !!plain && name !== "date" && sse.get(name) !== plain.get(name));
			return row;
		}));
	}
}

const headers = new Headers(document.getElementById("headers"));
const titles = { sse: "With sse", plain: "Without sse" };
const streams = [...document.querySelectorAll("[data-reader]")].map((root) => {
	const side = root.dataset.reader;
	return new Reader(root, titles[side], (received) => headers.show(side, received));
});
streams.push(new Source(document.getElementById("source")));

document.getElementById("curl").textContent = `curl -N ${new URL("events", location.href)}`;

for (const stream of streams) stream.start();

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
