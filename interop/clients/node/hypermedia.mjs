// node hypermedia.mjs <page> <library>/<name>=url...: opens a page in headless
// Chromium, with an element in it for each stream that follows it by means of the
// library that the first part names, and prints what the page sees until it is
// ended.
import { openPage } from './page.mjs';
import { streams } from './report.mjs';

const page = await openPage(process.argv[2]);

// Datastar announces what an element's request meets, and each event of its own
// kind, on the document.
async function datastar() {
	await page.evaluate(() => {
		document.addEventListener('datastar-sse', ({ detail: { type, elId, argsRaw } }) => {
			if (type === 'datastar-merge-signals') report(elId, 'event', { type, data: argsRaw.signals });
			if (type === 'retrying') report(elId, 'error', { error: argsRaw.message });
			if (type === 'finished') report(elId, 'end');
		});
	});
	await page.addScriptTag({ path: 'node_modules/@starfederation/datastar/dist/datastar.js', type: 'module' });
	return ([id, url], options = '') =>
		page.evaluate(
			([id, action]) => {
				const element = document.createElement('div');
				element.id = id;
				element.dataset.onLoad = action;
				document.body.append(element);
			},
			[id, `@get('${url}'${options})`],
		);
}

async function htmx() {
	await page.addScriptTag({ path: 'node_modules/htmx.org/dist/htmx.js' });
	await page.addScriptTag({ path: 'node_modules/htmx.org/dist/ext/hx-sse.js' });
	await page.evaluate(() => {
		const on = (name, tell) => document.body.addEventListener(name, ({ target, detail }) => tell(target.id, detail));
		on('htmx:sse:after:message', (id, { message }) => report(id, 'event', { type: 'message', data: message.data, id: message.id }));
		on('htmx:sse:error', (id, { error }) => report(id, 'error', { error: String(error) }));
		on('htmx:sse:close', (id) => report(id, 'end'));
	});
	return ([id, url]) =>
		page.evaluate(
			([id, url]) => {
				const element = document.createElement('div');
				element.id = id;
				element.setAttribute('hx-sse:connect', url);
				document.body.append(element);
				htmx.process(element);
			},
			[id, url],
		);
}

const start = { datastar: await datastar(), htmx: await htmx() };
// The release of Datastar that npm has asks for event streams only, and 1.0 for
// what this says.
const accept = ", {headers: {accept: 'text/event-stream, text/html, application/json'}}";
start['datastar-1.0'] = (stream) => start.datastar(stream, accept);

for (const stream of streams(3)) await start[stream[0].split('/')[0]](stream);
