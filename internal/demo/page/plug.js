// Two EventSources that count along, and a button that cuts both off.

const cells = 50; // numbers that a panel shows

const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

// Clock knows when each number was due: the upstream counts at a steady pace, and
// what came first, by either way, came on time.
class Clock {
	#step;
	#zero = Infinity;

	constructor(step) {
		this.#step = step;
	}

	came(n, now) {
		this.#zero = Math.min(this.#zero, now - n * this.#step);
	}

	// due is the number that should have come by now.
	due(now) {
		return Math.floor((now - this.#zero) / this.#step - 0.6);
	}

	late(n, now) {
		return now - this.#zero - n * this.#step > 2 * this.#step;
	}
}

// Counter is the panel of one EventSource.
class Counter {
	#root;
	#url;
	#clock;
	#source = null;
	#cells;
	#first; // the number that it began with
	#last = 0; // and the last one that came
	#late = new Set();
	#missed = new Set();
	#figures = { missing: 0, late: 0, opened: 0 };

	constructor(root, title, clock) {
		this.#root = root;
		this.#clock = clock;
		root.append(document.getElementById("counter").content.cloneNode(true));
		const heading = root.querySelector("h3");
		heading.id = root.getAttribute("aria-labelledby");
		heading.append(...title);
		this.#cells = Array.from({ length: cells }, () => document.createElement("li"));
		root.querySelector(".cells").append(...this.#cells);
		this.#url = new URL(root.dataset.path, location.href);
		this.#url.searchParams.set("client", Math.random().toString(36).slice(2));
	}

	get running() {
		return this.#source !== null;
	}

	get last() {
		return this.#last;
	}

	get missing() {
		return this.#figures.missing;
	}

	start() {
		this.#first = undefined; // what it has missed while it was stopped is no loss
		this.#state("lost", "connecting");
		this.#source = new EventSource(this.#url);
		this.#source.addEventListener("open", () => {
			this.#count("opened", 1);
			this.#state("open", "open");
		});
		this.#source.addEventListener("error", () => this.#state("lost", "cut off: the browser comes back"));
		this.#source.addEventListener("message", (event) => this.#number(JSON.parse(event.data), performance.now()));
	}

	stop() {
		this.#source?.close();
		this.#source = null;
		this.#state("closed", "stopped");
	}

	#state(state, text) {
		const e = this.#root.querySelector(".state");
		e.dataset.state = state;
		e.textContent = text;
	}

	#show(name, value) {
		this.#root.querySelector(`[data-figure="${name}"]`).textContent = value;
	}

	#count(name, more) {
		this.#show(name, (this.#figures[name] += more));
	}

	#number({ n, asked }, now) {
		this.#show("asked", asked);
		this.#clock.came(n, now);
		this.#first ??= this.#last = n;
		for (let missed = this.#last + 1; missed < n; missed++) this.#missed.add(missed);
		this.#count("missing", Math.max(n - this.#last - 1, 0));
		this.#root.classList.toggle("lossy", this.missing > 0);
		if (this.#clock.late(n, now)) {
			this.#late.add(n);
			this.#count("late", 1);
		}
		this.#last = n;
	}

	// draw shows the last numbers, each at a place of its own.
	draw(now) {
		const due = Math.max(this.#clock.due(now), this.#last);
		for (const set of [this.#late, this.#missed]) {
			for (const n of set) if (n <= due - cells) set.delete(n);
		}
		this.#cells.forEach((cell, place) => {
			const n = due - ((((due - place) % cells) + cells) % cells);
			let kind = "none";
			if (this.#first !== undefined && n >= this.#first) {
				kind = n > this.#last ? "due" : this.#missed.has(n) ? "missing" : this.#late.has(n) ? "late" : "came";
			}
			const text = kind === "none" ? "" : String(n);
			if (cell.className !== kind) cell.className = kind;
			if (cell.textContent !== text) cell.textContent = text;
		});
	}
}

// Plug is the section with both panels and the button.
export class Plug {
	#clock;
	#counters;
	#button = document.getElementById("pull");
	#status = document.getElementById("pulled");
	#idle;
	#out; // how long the plug stays out

	constructor(titles, { step, out }) {
		this.#clock = new Clock(step);
		this.#counters = [...document.querySelectorAll("[data-counter]")].map((root) => new Counter(root, titles[root.dataset.counter], this.#clock));
		this.#idle = this.#status.textContent;
		this.#out = out;
		this.#button.addEventListener("click", () => this.#pull());
		setInterval(() => {
			if (!this.running) return;
			for (const counter of this.#counters) counter.draw(performance.now());
		}, 100);
	}

	get running() {
		return this.#counters.some((counter) => counter.running);
	}

	start() {
		for (const counter of this.#counters) counter.start();
		this.#button.disabled = false;
		this.#status.textContent = this.#idle;
	}

	stop(why) {
		for (const counter of this.#counters) counter.stop();
		this.#button.disabled = true;
		this.#status.textContent = why;
	}

	async #pull() {
		this.#button.disabled = true;
		const before = this.#counters.map((counter) => counter.missing);
		await fetch("pull", { method: "POST" });
		const back = performance.now() + this.#out;
		const tick = setInterval(() => {
			if (!this.running) {
				clearInterval(tick);
				return;
			}
			const left = back - performance.now();
			if (left > 0) {
				this.#status.textContent = `The plug is out for another ${seconds(left)}.`;
			} else if (this.#counters.some((counter) => counter.last <= this.#clock.due(back))) {
				this.#status.textContent = "The plug is in again: the EventSources come back by themselves.";
			} else {
				clearInterval(tick);
				this.#button.disabled = false;
				const [plain, resumed] = this.#counters.map((counter, i) => counter.missing - before[i]);
				this.#status.textContent = `Both are back. Missing: ${plain} without resume, ${resumed} with it.`;
			}
		}, 100);
	}
}
