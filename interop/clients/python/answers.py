"""answers.py <client>/<name>=url...: asks for a streamed answer at each URL, all
at once, with the SDK that the first part names, and prints its text or the error.
One process for all, as importing these SDKs takes longer than the answers."""

import asyncio
import json
import os
import sys
import threading

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks nobody outside

import litellm
from anthropic import Anthropic
from google import genai
from groq import AsyncGroq, Groq
from langchain_openai import ChatOpenAI
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

litellm.suppress_debug_info = True

CHAT = {"model": "stand-in", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


def report(stream, kind, **fields):
    # One write, as threads share the output.
    sys.stdout.write(json.dumps({"stream": stream, "kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def chat(client):
    return text_of(client.chat.completions.create(**CHAT))


def chat_async(client):
    async def ask():
        async with client:
            return text_of([chunk async for chunk in await client.chat.completions.create(**CHAT)])

    return asyncio.run(ask())


def ask_openai(url):
    return chat(OpenAI(base_url=url, api_key="none", max_retries=0))


def ask_openai_async(url):
    return chat_async(AsyncOpenAI(base_url=url, api_key="none", max_retries=0))


def ask_azure(url):
    return chat(AzureOpenAI(base_url=url, api_key="none", api_version="1", max_retries=0))


def ask_azure_async(url):
    return chat_async(AsyncAzureOpenAI(base_url=url, api_key="none", api_version="1", max_retries=0))


def ask_langchain(url):
    client = ChatOpenAI(model="stand-in", base_url=url, api_key="none", max_retries=0)
    return "".join(chunk.text for chunk in client.stream("Hello"))


# Groq's SDK adds a path of its own to the base.
def ask_groq(url):
    return chat(Groq(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0))


def ask_groq_async(url):
    return chat_async(AsyncGroq(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0))


def ask_litellm(url, provider="hosted_vllm"):
    chat = {**CHAT, "model": provider + "/stand-in"}
    return text_of(litellm.completion(**chat, api_base=url, api_key="none", num_retries=0, max_retries=0))


def ask_litellm_openai(url):
    return ask_litellm(url, "openai")


def ask_google(url):
    client = genai.Client(api_key="none", http_options={"base_url": url})
    chunks = client.models.generate_content_stream(model="stand-in", contents="Hello")
    return "".join(chunk.text or "" for chunk in chunks)


def ask_anthropic(url):
    client = Anthropic(base_url=url, api_key="none", max_retries=0)
    events = client.messages.create(**CHAT, max_tokens=100)
    return "".join(event.delta.text for event in events if event.type == "content_block_delta")


CLIENTS = {
    "anthropic": ask_anthropic,
    "openai": ask_openai,
    "openai-async": ask_openai_async,
    "azure": ask_azure,
    "azure-async": ask_azure_async,
    "langchain": ask_langchain,
    "groq": ask_groq,
    "groq-async": ask_groq_async,
    "litellm": ask_litellm,
    "litellm-openai": ask_litellm_openai,
    "google": ask_google,
}


def run(stream, url):
    try:
        report(stream, "event", type="text", data=CLIENTS[stream.partition("/")[0]](url))
    except Exception as e:
        report(stream, "error", error=f"{type(e).__name__}: {e}")
    report(stream, "end")


threads = []
for argument in sys.argv[1:]:
    stream, _, url = argument.partition("=")
    threads.append(threading.Thread(target=run, args=(stream, url)))
for thread in threads:
    thread.start()
# asyncio starts threads of its own, which it can't once this one has ended.
for thread in threads:
    thread.join()
