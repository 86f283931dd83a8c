// What is asked for: the filters and the order, kept in the address

const columns = [
	{key: "path", label: "Path", wide: true, head: true},
	{key: "client_ip", label: "Client"},
	{key: "name", label: "Name"},
	{key: "proto", label: "Protocol"},
	{key: "state", label: "State"},
	{key: "duration_seconds", label: "Age", show: span, number: true},
	{key: "idle_seconds", label: "Silent for", show: span, number: true},
	{key: "events", label: "Events", show: whole.format, number: true},
	{key: "bytes", label: "Bytes", show: size, number: true},
	{key: "heartbeats", label: "Heartbeats", show: whole.format, number: true},
	{key: "upstream", label: "Upstream", wide: true, rare: true},
	{key: "user_agent", label: "User agent", wide: true},
];
const moreOrders = [
	{key: "opened_at", label: "Opened, newest first"},
	{key: "method", label: "Method"},
	{key: "host", label: "Host"},
	{key: "resumable", label: "Resumable first"},
	{key: "last_event_id", label: "Last event ID"},
	{key: "id", label: "ID"},
];
const filterKeys = ["name", "client_ip", "path"];
const firstOrder = "opened_at";

let asked = {sort: firstOrder};

function readAddress() {
	const given = new URLSearchParams(location.hash.slice(1));
	const wanted = {};
	for (const key of [...filterKeys, "sort"]) {
		if (given.get(key)) wanted[key] = given.get(key);
	}
	const orders = [...columns, ...moreOrders].flatMap(({key}) => [key, "-" + key]);
	if (!orders.includes(wanted.sort)) wanted.sort = firstOrder;
	return wanted;
}

function query(more) {
	return new URLSearchParams({...asked, ...more}).toString();
}

// ask asks for something else. A form that can't be read keeps what there is.
async function ask(wanted) {
	const filters = new URLSearchParams({limit: "0"});
	for (const key of filterKeys) {
		if (wanted[key]) filters.set(key, wanted[key]);
	}
	const problem = await refusal("streams?" + filters);
	say($("wrong"), problem);
	$("client_ip").setAttribute("aria-invalid", String(problem.startsWith("client_ip")));
	if (problem) {
		if (!source) connect();
		return;
	}
	asked = wanted;
	history.replaceState(null, "", "#" + query());
	showAsked();
	connect();
	lookForGaps();
}

// refusal says why a call is refused, if it is.
async function refusal(call) {
	try {
		const answer = await fetch(call);
		if (answer.ok) return "";
		const said = await answer.json();
		return said.error || answer.statusText;
	} catch {
		return ""; // of a server that does not answer the status tells
	}
}

function showAsked() {
	if (asked.name && ![...$("name").options].some((option) => option.value === asked.name)) {
		$("name").append(element("option", asked.name, {value: asked.name}));
	}
	for (const key of filterKeys) $(key).value = asked[key] || "";
	const reversed = asked.sort.startsWith("-");
	$("sort").value = reversed ? asked.sort.slice(1) : asked.sort;
	$("reversed").checked = reversed;
	for (const head of $("columns").children) {
		const column = columns.find((column) => column.key === head.dataset.key);
		if (!column || column.key !== $("sort").value) head.removeAttribute("aria-sort");
		else head.setAttribute("aria-sort", Boolean(column.number) === reversed ? "ascending" : "descending");
	}
	say($("scope"), asked.name ? "Figures and charts are of the streams named " + asked.name + "." : "");
}

function readForm() {
	const wanted = {sort: ($("reversed").checked ? "-" : "") + $("sort").value};
	for (const key of filterKeys) {
		const value = $(key).value.trim();
		if (value) wanted[key] = value;
	}
	return wanted;
}

// The connection: an EventSource comes back by itself after a reload of Caddy.
// One that gave up, since something else answered meanwhile, is replaced.

let source, again, heard = performance.now(), paused = false;

function connect() {
	clearTimeout(again);
	if (source) source.close();
	if (paused) return;
	const mine = source = new EventSource("watch?" + query({interval: interval + "ms"}));
	mine.addEventListener("snapshot", (event) => {
		heard = performance.now();
		state("live", "Live");
		show(JSON.parse(event.data));
	});
	mine.addEventListener("error", () => {
		state("lost", "Caddy does not answer; trying again");
		if (mine.readyState === EventSource.CLOSED) {
			again = setTimeout(async () => {
				const problem = await refusal("streams?limit=0");
				if (source !== mine || paused) return;
				if (problem) state("lost", problem + "; trying again");
				connect();
			}, 2 * interval);
		}
	});
}

function state(name, text) {
	$("status").dataset.state = name;
	say($("status"), text);
}

setInterval(() => {
	const silent = performance.now() - heard;
	if (!paused && $("status").dataset.state === "live" && silent > 5 * interval) state("lost", "Nothing has come for a while");
}, interval);
