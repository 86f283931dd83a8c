// node browser.mjs <page> name=url...: opens a page in headless Chromium, an
// EventSource for each stream in it, and prints what they see until it is
// ended.
import { openPage } from './page.mjs';
import { streams } from './report.mjs';

const page = await openPage(process.argv[2]);
await page.evaluate((streams) => {
	window.sources = streams.map(([stream, url]) => {
		const source = new EventSource(url);
		source.onopen = () => report(stream, 'open');
		source.onerror = () => report(stream, 'error', { state: source.readyState });
		source.addEventListener('sse', (e) => report(stream, 'place', { data: e.data, id: e.lastEventId }));
		for (const name of ['message', 'named', 'half', 'ping', 'lost', 'info', 'warning', 'alert', 'broadcast']) {
			source.addEventListener(name, (e) => report(stream, 'event', { type: e.type, data: e.data, id: e.lastEventId }));
		}
		return source;
	});
}, streams(3));
