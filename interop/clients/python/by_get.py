"""by_get.py <sdk>/<name>=url...: reads the answer at each URL, all at once, with the
SDK that the first part names, which asks for it by GET, and prints what it sees."""

import json
import sys
import threading

import httpx
import replicate
from langgraph_sdk import get_sync_client


def report(stream, kind, **fields):
    # One write, as threads share the output.
    sys.stdout.write(json.dumps({"stream": stream, "kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def read_langgraph(stream, url):
    client = get_sync_client(url=url, api_key="none")
    for event in client.runs.join_stream("thread", "run"):
        if event.event == "values":
            report(stream, "event", type=event.event, data=json.dumps(event.data), id=event.id)


def read_replicate(stream, url):
    client = replicate.Client(api_token="none", base_url=url, timeout=httpx.Timeout(300))
    for event in client.stream("owner/model:version", input={}):
        if event.event == event.EventType.OUTPUT:
            report(stream, "event", type="output", data=str(event.data), id=event.id)


SDKS = {"langgraph": read_langgraph, "replicate": read_replicate}


def run(stream, url):
    try:
        SDKS[stream.partition("/")[0]](stream, url)
    except Exception as e:
        report(stream, "error", error=f"{type(e).__name__}: {e}")
    report(stream, "end")


for argument in sys.argv[1:]:
    stream, _, url = argument.partition("=")
    threading.Thread(target=run, args=(stream, url)).start()
