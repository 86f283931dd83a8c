// node mcp-call.mjs name=url: an MCP client that calls a tool whose answer leaves it.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';

import { report, streams } from './report.mjs';

const [[name, url]] = streams(2);
const client = new Client({ name: 'interop', version: '1.0.0' });
try {
	await client.connect(new StreamableHTTPClientTransport(new URL(url)));
	const result = await client.callTool({ name: 'leave', arguments: {} });
	report(name, 'event', { type: 'result', data: result.content[0].text });
} catch (e) {
	report(name, 'error', { error: String(e) });
}
report(name, 'end');
await client.close();
