"""python clients.py <client> name=url...: follows the streams with one client
library to their ends and prints what it sees."""

import asyncio
import json
import os
import sys
import threading

import httpx
import httpx_sse
import openai


def report(stream, kind, **fields):
    # One write, as threads share the output.
    sys.stdout.write(json.dumps({"stream": stream, "kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def follow_httpx(stream, url):
    """Comes back once, by hand, as httpx-sse leaves that to its caller."""
    http2 = url.startswith("https:")
    last_id = None
    with httpx.Client(http2=http2, verify=os.environ["ROOT_CA"] if http2 else True, timeout=300) as client:
        for _ in range(2):
            headers = {"Last-Event-ID": last_id} if last_id else {}
            with httpx_sse.connect_sse(client, "GET", url, headers=headers) as source:
                report(stream, "open", data=source.response.http_version)
                for event in source.iter_sse():
                    last_id = event.id or last_id
                    report(stream, "event", type=event.event, data=event.data, id=event.id)
                    if event.data.startswith("back after"):
                        return


def follow_lines(stream, url):
    """As scripts do without a library for event streams."""
    with httpx.stream("GET", url, headers={"Accept": "text/event-stream"}, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: "):
                report(stream, "event", type="message", data=line.removeprefix("data: "))


def follow_session(stream, url):
    """An answer of OpenAI's API that is asked for by GET."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for event in client.beta.agents.sessions.events.stream("session"):
        report(stream, "event", type="message", data=event.to_json(indent=None))


def ask(client):
    messages = [{"role": "user", "content": "Hello"}]
    return client.chat.completions.create(model="stand-in", messages=messages, stream=True)


def report_chunk(stream, chunk):
    if chunk.choices:
        report(stream, "event", type="chunk", data=chunk.choices[0].delta.content or "")
    else:
        report(stream, "event", type="no choices", data=chunk.model_dump_json(exclude_unset=True))


def chat(stream, url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for chunk in ask(client):
        report_chunk(stream, chunk)


def chat_async(stream, url):
    async def run():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            async for chunk in await ask(client):
                report_chunk(stream, chunk)

    asyncio.run(run())


def responses(stream, url):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for event in client.responses.create(model="stand-in", input="Hello", stream=True):
        # What is no event of the API has no type.
        kind = getattr(event, "type", None) or "no type"
        if kind == "response.output_text.delta":
            data = event.delta
        elif kind == "response.completed":
            data = event.response.output_text
        else:
            data = ""
        report(stream, "event", type=kind, data=data)


def run(client, stream, url):
    try:
        client(stream, url)
    except Exception as e:
        report(stream, "error", error=f"{type(e).__name__}: {e}")
    report(stream, "end")


clients = {
    "httpx": follow_lines,
    "httpx-sse": follow_httpx,
    "session": follow_session,
    "chat": chat,
    "chat-async": chat_async,
    "responses": responses,
}
threads = []
for argument in sys.argv[2:]:
    stream, _, url = argument.partition("=")
    threads.append(threading.Thread(target=run, args=(clients[sys.argv[1]], stream, url)))
for thread in threads:
    thread.start()
# asyncio starts threads of its own, which it can't once this one has ended.
for thread in threads:
    thread.join()
