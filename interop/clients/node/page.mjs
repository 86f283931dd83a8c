import { chromium } from 'playwright-core';

import { report } from './report.mjs';

// openPage opens a page in headless Chromium, in which report can be called.
export async function openPage(url) {
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
	await page.goto(url);
	report('page', 'loaded', { data: browser.version() });
	return page;
}
