// node mcp-server.mjs <port>: an MCP server with sessions and resumable
// streams, much as the SDK's own examples have it. POST /notify?text=… outside of MCP
// has it send a log message to every session, POST /go-on ends calls that have left.
import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';

import { createMcpExpressApp } from '@modelcontextprotocol/sdk/server/express.js';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import { isInitializeRequest } from '@modelcontextprotocol/sdk/types.js';
import { z } from 'zod';

const sessions = new Map();
const goOns = []; // of calls that have left

// Not the SDK's example store: that takes the stream's name for what is in front
// of an event id's first "_", and so can't resume the stream "_GET_stream".
class EventStore {
	events = [];

	async storeEvent(stream, message) {
		return String(this.events.push({ stream, message }));
	}

	async getStreamIdForEventId(id) {
		return this.events[id - 1]?.stream;
	}

	async replayEventsAfter(last, { send }) {
		const { stream } = this.events[last - 1];
		for (let id = Number(last) + 1; id <= this.events.length; id++) {
			const event = this.events[id - 1];
			if (event.stream === stream) await send(String(id), event.message);
		}
		return stream;
	}
}

function newServer() {
	const server = new McpServer({ name: 'interop', version: '1.0.0' }, { capabilities: { logging: {} } });
	server.registerTool(
		'count',
		{ description: 'Counts, with a silence before each step', inputSchema: { to: z.number(), pause: z.number() } },
		async ({ to, pause }, { _meta, sendNotification }) => {
			for (let progress = 1; progress <= to; progress++) {
				await sleep(pause);
				await sendNotification({
					method: 'notifications/progress',
					params: { progressToken: _meta.progressToken, progress, total: to },
				});
			}
			return { content: [{ type: 'text', text: `counted to ${to}` }] };
		},
	);
	server.registerTool(
		'leave',
		{ description: 'Has its client come back by GET for the result, which is there once it is told to go on' },
		async ({ closeSSEStream }) => {
			const goOn = new Promise((resolve) => goOns.push(resolve));
			closeSSEStream();
			await goOn;
			return { content: [{ type: 'text', text: 'went on' }] };
		},
	);
	return server;
}

const app = createMcpExpressApp();

app.all('/mcp', async (req, res) => {
	const id = req.headers['mcp-session-id'];
	let session = sessions.get(id);
	if (!session && !id && req.method === 'POST' && isInitializeRequest(req.body)) {
		const server = newServer();
		const transport = new StreamableHTTPServerTransport({
			sessionIdGenerator: randomUUID,
			eventStore: new EventStore(),
			retryInterval: 200,
			onsessioninitialized: (id) => sessions.set(id, session),
		});
		session = { server, transport };
		transport.onclose = () => sessions.delete(transport.sessionId);
		await server.connect(transport);
	}
	if (!session) {
		res.status(404).json({ jsonrpc: '2.0', error: { code: -32001, message: 'Session not found' }, id: null });
		return;
	}
	await session.transport.handleRequest(req, res, req.body);
});

app.post('/notify', async (req, res) => {
	for (const { server } of sessions.values()) {
		await server.server.sendLoggingMessage({ level: 'info', data: req.query.text });
	}
	res.json({ sessions: sessions.size });
});

app.post('/go-on', (req, res) => {
	res.json({ calls: goOns.length });
	for (const goOn of goOns) goOn();
});

app.listen(Number(process.argv[2]), '127.0.0.1', () => console.log('listening'));
