// node answers.mjs <client>/<name>=url...: asks for a streamed answer at each URL,
// all at once, with the SDK that the first part names, and prints its text or the
// error.
import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';

import { report, streams } from './report.mjs';

const chat = { model: 'stand-in', messages: [{ role: 'user', content: 'Hello' }], stream: true };

const clients = {
	openai: async (baseURL) => {
		const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
		let text = '';
		for await (const chunk of await client.chat.completions.create(chat)) {
			text += chunk.choices[0].delta.content ?? '';
		}
		return text;
	},

	anthropic: async (baseURL) => {
		const client = new Anthropic({ baseURL, apiKey: 'none', maxRetries: 0 });
		let text = '';
		for await (const event of await client.messages.create({ ...chat, max_tokens: 100 })) {
			if (event.type === 'content_block_delta') text += event.delta.text;
		}
		return text;
	},
};

for (const [stream, url] of streams(2)) {
	clients[stream.split('/')[0]](url)
		.then((data) => report(stream, 'event', { type: 'text', data }))
		.catch((e) => report(stream, 'error', { error: `${e.constructor.name}: ${e.message}` }))
		.then(() => report(stream, 'end'));
}
