"use strict";

// What upstreams and clients have sent is only ever put into the page as text.

const interval = 1000;
const memory = 5 * 60 * 1000; // what the charts and the last ends go back
const gapsEvery = 5000;
const gapsShown = 5;

const $ = (id) => document.getElementById(id);

function element(name, text, attributes) {
	const made = document.createElement(name);
	if (text !== undefined) made.textContent = text;
	for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
	return made;
}

// say changes a text only if it is another one: a screen reader would read it
// again.
function say(where, text) {
	if (where.textContent !== text) where.textContent = text;
}

// Numbers for people

const whole = new Intl.NumberFormat("en");

function rate(n) {
	return n !== 0 && Math.abs(n) < 10 ? n.toFixed(1) : whole.format(Math.round(n));
}

function size(bytes) {
	for (const unit of ["B", "KiB", "MiB", "GiB"]) {
		if (bytes < 1024) return (unit === "B" ? whole.format(Math.round(bytes)) : bytes.toFixed(bytes < 10 ? 1 : 0)) + " " + unit;
		bytes /= 1024;
	}
	return bytes.toFixed(1) + " TiB";
}

function span(seconds) {
	if (seconds < 10) return seconds.toFixed(1) + " s";
	if (seconds < 60) return Math.floor(seconds) + " s";
	const two = (n) => String(Math.floor(n)).padStart(2, "0");
	if (seconds < 3600) return Math.floor(seconds / 60) + ":" + two(seconds % 60);
	if (seconds < 86400) return Math.floor(seconds / 3600) + ":" + two(seconds / 60 % 60) + ":" + two(seconds % 60);
	return Math.floor(seconds / 86400) + " d " + Math.floor(seconds / 3600 % 24) + " h";
}
