// What people do

for (const column of columns) {
	const head = element("th", undefined, {scope: "col", role: "columnheader", "data-key": column.key});
	if (column.number) head.classList.add("number");
	if (column.rare) head.classList.add("rare");
	const button = head.appendChild(element("button", column.label, {type: "button"}));
	button.addEventListener("click", () => ask({...asked, sort: asked.sort === column.key ? "-" + column.key : column.key}));
	$("columns").append(head);
}
$("columns").append(element("th", undefined, {role: "columnheader", scope: "col", "aria-label": "Actions"}));
for (const {key, label} of [...moreOrders.slice(0, 1), ...columns, ...moreOrders.slice(1)]) {
	$("sort").append(element("option", label, {value: key}));
}

$("filters").addEventListener("submit", (event) => {
	event.preventDefault();
	ask(readForm());
});
$("filters").addEventListener("reset", (event) => {
	event.preventDefault();
	ask({sort: firstOrder});
});
for (const id of ["name", "sort", "reversed"]) $(id).addEventListener("change", () => ask(readForm()));

$("pause").addEventListener("click", () => {
	paused = !paused;
	$("pause").setAttribute("aria-pressed", String(paused));
	say($("pause"), paused ? "Go on" : "Pause");
	state("waiting", paused ? "Paused" : "Connecting");
	connect();
});
$("list").addEventListener("pointerover", (event) => { pointedAt = event.pointerType === "mouse" && event.target.closest("tbody") !== null; });
$("list").addEventListener("pointerleave", () => { pointedAt = false; });
window.addEventListener("hashchange", () => ask(readAddress()));

showAsked();
ask(readAddress());
