// node by-get.mjs <sdk>/<name>=url...: reads the answer at each URL, all at once,
// with the SDK that the first part names, which asks for it by GET, and prints what
// it sees.
import { Client as LangGraph } from '@langchain/langgraph-sdk';
import Replicate from 'replicate';

import { report, streams } from './report.mjs';

const sdks = {
	langgraph: async (stream, apiUrl) => {
		const client = new LangGraph({ apiUrl, apiKey: 'none' });
		for await (const e of client.runs.joinStream('thread', 'run')) {
			if (e.event === 'values') report(stream, 'event', { type: e.event, data: JSON.stringify(e.data), id: e.id });
		}
	},

	replicate: async (stream, baseUrl) => {
		const client = new Replicate({ auth: 'none', baseUrl });
		for await (const e of client.stream('owner/model:version', { input: {} })) {
			if (e.event === 'output') report(stream, 'event', { type: e.event, data: e.data, id: e.id });
		}
	},
};

for (const [stream, url] of streams(2)) {
	sdks[stream.split('/')[0]](stream, url)
		.catch((e) => report(stream, 'error', { error: String(e) }))
		.then(() => report(stream, 'end'));
}
