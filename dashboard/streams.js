// The list

const rows = new Map(); // by id

function makeRow(stream) {
	const row = element("tr", undefined, {role: "row"});
	const cells = columns.map((column) => {
		const cell = column.head ? element("th", "", {scope: "row", role: "rowheader"}) : element("td", "", {role: "cell", "data-label": column.label});
		if (column.number) cell.classList.add("number");
		if (column.wide) cell.classList.add("wide");
		if (column.rare) cell.classList.add("rare");
		row.append(cell);
		return column.head ? cell.appendChild(element("button", "", {type: "button", class: "text"})) : cell;
	});
	const act = row.appendChild(element("td", undefined, {role: "cell", class: "act"}));
	const button = act.appendChild(element("button", "End…", {type: "button"}));
	const made = {row, cells, button, stream};
	row.querySelector("button.text").addEventListener("click", () => openDetails(made.stream, $("close")));
	button.addEventListener("click", () => openDetails(made.stream, $("end")));
	return made;
}

function fillRow(made, stream) {
	made.stream = stream;
	made.row.classList.remove("over");
	columns.forEach((column, i) => {
		const value = stream[column.key];
		const text = (column.show ? column.show(value) : value) || "–";
		if (made.cells[i].textContent === text) return;
		made.cells[i].textContent = text;
		if (!column.number) made.cells[i].title = text;
	});
	made.button.setAttribute("aria-label", `End the stream of ${stream.client_ip} at ${stream.path}`);
}

// The rows of a list that somebody points at, or is in with the keyboard, stay
// where they are: nobody is to end a stream that has just taken another's place.
let pointedAt = false;
const holds = () => rows.size > 0 && (pointedAt || dialog.open || $("streams").contains(document.activeElement));

function showStreams({streams, matching}) {
	const body = $("streams"), held = holds();
	const current = new Set(streams.map((stream) => stream.id));
	for (const [id, made] of rows) {
		if (current.has(id)) continue;
		if (held) {
			made.row.classList.add("over");
		} else {
			made.row.remove();
			rows.delete(id);
		}
	}
	let place = body.firstChild;
	for (const stream of streams) {
		let made = rows.get(stream.id);
		if (!made) {
			if (held) continue;
			rows.set(stream.id, made = makeRow(stream));
		}
		fillRow(made, stream);
		if (held) continue;
		if (made.row === place) place = place.nextSibling;
		else body.insertBefore(made.row, place);
	}
	let text = matching === 0 ? "None matches." : whole.format(matching) + (matching === 1 ? " matches" : " match");
	if (matching === 0 && snapshot.totals.open === 0) text = "None is open.";
	if (matching > streams.length) text += `, the first ${streams.length} are shown`;
	$("list").hidden = rows.size === 0;
	say($("shown"), held ? text + ". The list holds still while the pointer or the focus is in it." : text);
}

// Gaps: a watch of its own, sorted by silence, of which one snapshot is enough.

async function lookForGaps() {
	if (paused || document.hidden) return;
	const enough = new AbortController(), wanted = asked;
	const late = setTimeout(() => enough.abort(), gapsEvery);
	try {
		const answer = await fetch("watch?" + query({sort: "idle_seconds", interval: "1m"}), {signal: enough.signal});
		if (!answer.ok) return;
		const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
		let text = "", found;
		while (!(found = /^data: (.*)\n/m.exec(text))) {
			const {value, done} = await reader.read();
			if (done) return;
			text += value;
		}
		if (wanted === asked) showGaps(JSON.parse(found[1]).streams.slice(0, gapsShown));
	} catch {
		// The status tells whether Caddy answers.
	} finally {
		clearTimeout(late);
		enough.abort();
	}
}

let gaps = [];

function showGaps(streams) {
	gaps = streams;
	const body = $("gaps");
	while (body.children.length > streams.length) body.lastChild.remove();
	streams.forEach((stream, i) => {
		let row = body.children[i];
		if (!row) {
			row = body.appendChild(element("tr"));
			const button = element("button", "", {type: "button", class: "text"});
			button.addEventListener("click", () => openDetails(gaps[i], $("close")));
			row.append(element("th", "", {scope: "row"}), element("td"));
			row.lastChild.append(button);
		}
		say(row.firstChild, span(stream.idle_seconds));
		say(row.lastChild.firstChild, `${stream.client_ip} ${stream.path}`);
	});
	showEmpty("gaps", streams.length === 0);
}

setInterval(lookForGaps, gapsEvery);

// One stream

const dialog = $("details");
let chosen;

function openDetails(stream, first) {
	chosen = stream;
	$("fields").replaceChildren();
	say($("outcome"), "");
	$("end").disabled = false;
	showDetails();
	dialog.showModal();
	first.focus();
}

function showDetails() {
	const latest = snapshot.streams.find((stream) => stream.id === chosen.id) || gaps.find((stream) => stream.id === chosen.id);
	chosen = latest || chosen;
	const fields = $("fields");
	Object.entries(chosen).forEach(([key, value], i) => {
		if (!fields.children[2 * i]) fields.append(element("dt", key.replaceAll("_", " ")), element("dd"));
		const formats = {duration_seconds: span, idle_seconds: span, events: whole.format, bytes: whole.format, heartbeats: whole.format};
		say(fields.children[2 * i + 1], formats[key] ? formats[key](value) : String(value) || "–");
	});
}

$("end").addEventListener("click", async () => {
	const id = chosen.id;
	$("end").disabled = true;
	say($("outcome"), "Ending it");
	let text;
	try {
		const answer = await fetch("streams/" + encodeURIComponent(id), {method: "DELETE"});
		const said = await answer.json();
		if (!answer.ok) text = said.error || answer.statusText;
		else text = said.ending ? "It ends." : "It is ending already.";
	} catch {
		text = "Caddy does not answer.";
		if (chosen.id === id) $("end").disabled = false;
	}
	if (chosen.id === id) say($("outcome"), text);
});
$("close").addEventListener("click", () => dialog.close());
