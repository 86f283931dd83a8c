// node demo.mjs <url>: opens the demo's page in headless Chromium, pulls the plug,
// and prints what each way says of it.
import { openPage } from './page.mjs';
import { report } from './report.mjs';

const page = await openPage(process.argv[2]);
const came = (way) => page.waitForFunction((way) => document.querySelectorAll(`[data-counter=${way}] .came`).length >= 4, way);
await Promise.all([came('plain'), came('resume')]);
await page.click('#pull');
await page.waitForFunction(() => document.getElementById('pulled').textContent.startsWith('Both are back'), undefined, { timeout: 60_000 });
for (const way of ['plain', 'resume']) {
	const figure = (name) => page.textContent(`[data-counter=${way}] [data-figure=${name}]`);
	for (const name of ['missing', 'late', 'opened', 'asked']) report(way, 'event', { type: name, data: await figure(name) });
}
await page.click('#bytes summary');
await page.waitForFunction(() => document.querySelectorAll('[data-reader] .log li').length >= 4);
report('page', 'event', { type: 'button', data: String(await page.isDisabled('#pull')) });
await page.click('#bytes summary');
await page.waitForFunction(() => [...document.querySelectorAll('[data-counter] .state')].every((state) => state.textContent === 'open'));
report('page', 'event', { type: 'width', data: String(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth)) });
report('page', 'end');
await page.context().browser().close();
