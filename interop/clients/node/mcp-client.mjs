// node mcp-client.mjs name=url: an MCP client that asks for everything that is
// carried by event streams. It goes on when log messages say so: "call" has it
// call a tool again, "end" ends the session.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { LoggingMessageNotificationSchema } from '@modelcontextprotocol/sdk/types.js';

import { report, streams } from './report.mjs';

const [[name, url]] = streams(2);
const client = new Client({ name: 'interop', version: '1.0.0' });
const transport = new StreamableHTTPClientTransport(new URL(url));
let closing = false;
// Closing breaks off the GET stream where that has not ended yet.
transport.onerror = (e) => closing || report(name, 'error', { error: String(e) });
client.setNotificationHandler(LoggingMessageNotificationSchema, async ({ params }) => {
	report(name, 'event', { type: 'log', data: params.data });
	if (params.data === 'call') {
		await call(3, 500);
	}
	if (params.data === 'end') {
		await transport.terminateSession();
		closing = true;
		await client.close();
		report(name, 'end', { data: transport.sessionId ?? 'no session' });
	}
});

async function call(to, pause) {
	try {
		const result = await client.callTool({ name: 'count', arguments: { to, pause } }, undefined, {
			onprogress: ({ progress, total }) => report(name, 'event', { type: 'progress', data: `${progress} of ${total}` }),
		});
		report(name, 'event', { type: 'result', data: result.content[0].text });
	} catch (e) {
		report(name, 'error', { error: String(e) });
	}
}

await client.connect(transport);
report(name, 'open', { data: transport.sessionId ? 'session' : '' });
const { tools } = await client.listTools();
report(name, 'event', { type: 'tools', data: tools.map((tool) => tool.name).join() });
await call(2, 1300);
