// node browser.mjs <page> name=url...: opens a page in headless Chromium, an
// EventSource for each stream in it, and prints what they see until it is
// ended.
import { chromium } from 'playwright-core';

import { report, streams } from './report.mjs';

const browser = await chromium.launch({
	executablePath: process.env.CHROMIUM,
	// The rest of the arguments keep it from asking for hosts of its own.
	args: ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
// The certificate comes from Caddy's internal CA, which Chromium does not know.
const context = await browser.newContext({ ignoreHTTPSErrors: true });
const page = await context.newPage();
page.on('pageerror', (e) => report('page', 'failure', { error: String(e) }));
page.on('crash', () => report('page', 'failure', { error: 'crashed' }));
await page.exposeFunction('report', report);
await page.goto(process.argv[2]);
report('page', 'loaded', { data: browser.version() });
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
