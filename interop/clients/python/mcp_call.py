"""mcp_call.py name=url: an MCP client that calls a tool whose answer leaves it."""

import asyncio
import json
import sys

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client


def report(stream, kind, **fields):
    print(json.dumps({"stream": stream, "kind": kind, **fields}), flush=True)


async def call(stream, url):
    async with streamable_http_client(url) as (read, write, *_), ClientSession(read, write) as session:
        await session.initialize()
        result = await session.call_tool("leave", {})
        report(stream, "event", type="result", data=result.content[0].text)
        report(stream, "end")


stream, _, url = sys.argv[1].partition("=")
try:
    asyncio.run(call(stream, url))
except Exception as e:
    report(stream, "error", error=f"{type(e).__name__}: {e}")
    report(stream, "end")
