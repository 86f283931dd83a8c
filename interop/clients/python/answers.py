"""answers.py <client> name=url...: asks for one streamed answer at each URL with
one SDK, and prints its text or the error."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks nobody outside

MESSAGES = [{"role": "user", "content": "Hello"}]


def report(stream, kind, **fields):
    print(json.dumps({"stream": stream, "kind": kind, **fields}), flush=True)


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def openai(url):
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    return text_of(client.chat.completions.create(model="stand-in", messages=MESSAGES, stream=True))


def azure(url):
    from openai import AzureOpenAI

    client = AzureOpenAI(base_url=url, api_key="none", api_version="1", max_retries=0)
    return text_of(client.chat.completions.create(model="stand-in", messages=MESSAGES, stream=True))


def langchain(url):
    from langchain_openai import ChatOpenAI

    client = ChatOpenAI(model="stand-in", base_url=url, api_key="none", max_retries=0)
    return "".join(chunk.text for chunk in client.stream("Hello"))


def groq(url):
    from groq import Groq

    # It adds a path of its own to the base.
    client = Groq(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
    return text_of(client.chat.completions.create(model="stand-in", messages=MESSAGES, stream=True))


def litellm(url):
    import litellm

    return text_of(litellm.completion(
        model="hosted_vllm/stand-in", messages=MESSAGES, stream=True, api_base=url, api_key="none", num_retries=0))


def google(url):
    from google import genai

    client = genai.Client(api_key="none", http_options={"base_url": url})
    return "".join(
        chunk.text or "" for chunk in client.models.generate_content_stream(model="stand-in", contents="Hello"))


clients = {"openai": openai, "azure": azure, "langchain": langchain, "groq": groq, "litellm": litellm, "google": google}
for argument in sys.argv[2:]:
    stream, _, url = argument.partition("=")
    try:
        report(stream, "event", type="text", data=clients[sys.argv[1]](url))
    except Exception as e:
        report(stream, "error", error=f"{type(e).__name__}: {e}")
    report(stream, "end")
