// node clients.mjs <client> name=url...: follows the streams with one client
// library, until it is ended or, where the library does not come back, to the
// streams' ends.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

import { EventSource } from 'eventsource';
import { EventSourceParserStream } from 'eventsource-parser/stream';
import { Agent, EventSource as UndiciEventSource } from 'undici';

import { report, streams } from './report.mjs';

const names = ['message', 'named', 'half', 'ping', 'lost'];

function follow(stream, source) {
	source.addEventListener('open', () => report(stream, 'open'));
	source.addEventListener('error', (e) => report(stream, 'error', { state: source.readyState, error: e.message }));
	source.addEventListener('sse', (e) => report(stream, 'place', { data: e.data, id: e.lastEventId }));
	for (const name of names) {
		source.addEventListener(name, (e) => report(stream, 'event', { type: e.type, data: e.data, id: e.lastEventId }));
	}
}

// fetch-event-source is made for browsers and wants window and document.
function fetchEventSource() {
	globalThis.window ??= globalThis;
	globalThis.document ??= { hidden: false, addEventListener() {}, removeEventListener() {} };
	return createRequire(import.meta.url)('@microsoft/fetch-event-source').fetchEventSource;
}

const clients = {
	eventsource: (stream, url) => follow(stream, new EventSource(url)),

	undici: (stream, url) => follow(stream, new UndiciEventSource(url)),

	'undici-h2': (stream, url) => {
		const dispatcher = new Agent({ allowH2: true, connect: { ca: readFileSync(process.env.ROOT_CA) } });
		follow(stream, new UndiciEventSource(url, { node: { dispatcher } }));
	},

	'fetch-event-source': (stream, url) => {
		fetchEventSource()(url, {
			onopen: async () => report(stream, 'open'),
			onmessage: (m) => report(stream, 'event', { type: m.event || 'message', data: m.data, id: m.id }),
			// It comes back after a clean end only if this throws, as its README says.
			onclose: () => {
				throw new Error('the stream ended');
			},
			onerror: (e) => {
				report(stream, 'error', { error: e.message });
			},
		});
	},

	// As fetch-event-source comes without the application's help.
	'fetch-event-source-plain': (stream, url) => {
		fetchEventSource()(url, {
			onmessage: (m) => report(stream, 'event', { type: m.event || 'message', data: m.data, id: m.id }),
		}).then(() => report(stream, 'end'));
	},

	'eventsource-parser': async (stream, url) => {
		const response = await fetch(url, { headers: { accept: 'text/event-stream' } });
		report(stream, 'open');
		const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
		for await (const e of events) {
			report(stream, 'event', { type: e.event ?? 'message', data: e.data, id: e.id ?? '' });
		}
		report(stream, 'end');
	},

	// What many pages for LLM APIs have of their own: blocks between blank
	// lines, kept if they begin with "data:".
	'hand-written': async (stream, url) => {
		const response = await fetch(`${url}/chat/completions`, {
			method: 'POST',
			headers: { 'content-type': 'application/json' },
			body: JSON.stringify({ model: 'stand-in', stream: true, messages: [{ role: 'user', content: 'Hello' }] }),
		});
		let buffer = '';
		for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
			const blocks = (buffer + text).split('\n\n');
			buffer = blocks.pop();
			for (const block of blocks) {
				if (!block.startsWith('data: ') || block === 'data: [DONE]') continue;
				const chunk = JSON.parse(block.slice(6));
				report(stream, 'event', { type: 'chunk', data: chunk.choices[0].delta.content ?? '' });
			}
		}
		report(stream, 'end');
	},
};

// undici's timer for coming back does not keep a process alive.
setInterval(() => {}, 1 << 30);

const client = clients[process.argv[2]];
for (const [stream, url] of streams(3)) {
	client(stream, url)?.catch?.((e) => {
		report(stream, 'error', { error: String(e) });
		report(stream, 'end');
	});
}
