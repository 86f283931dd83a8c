"""Streams of Django, under /django, and Starlette, as ASGI; with a port as argument
Django's as WSGI. Each is of five events, half a second apart, and says when each was
made; /endless goes on."""

import asyncio
import itertools
import json
import sys
import time
from wsgiref.simple_server import make_server

from django.conf import settings

settings.configure(SECRET_KEY="none", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])

from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import StreamingHttpResponse
from django.urls import path
from django.views.decorators.gzip import gzip_page
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route

PAUSE = 0.5


def event(n):
    return f"id: {n}\ndata: {json.dumps({'n': n, 'time': time.time()})}\n\n"


def plain(numbers=range(1, 6)):
    for n in numbers:
        yield event(n)
        time.sleep(PAUSE)


async def asynchronous(numbers=range(1, 6)):
    for n in numbers:
        yield event(n)
        await asyncio.sleep(PAUSE)


async def silent():
    await asyncio.sleep(3600)
    yield event(1)


def respond(events):
    return StreamingHttpResponse(events, content_type="text/event-stream")


def plain_view(request):
    return respond(plain())


async def async_view(request):
    return respond(asynchronous())


urlpatterns = [
    path("django/plain", plain_view),
    path("django/async", async_view),
    path("django/plain-gzip", gzip_page(plain_view)),
    path("django/async-gzip", gzip_page(async_view)),
]
django = get_asgi_application()


def starlette_view(events):
    async def view(request):
        return StreamingResponse(events(), media_type="text/event-stream")

    return view


starlette = Starlette(
    routes=[
        Route("/events", starlette_view(asynchronous)),
        Route("/endless", starlette_view(lambda: asynchronous(itertools.count(1)))),
        Route("/silent", starlette_view(silent)),
    ],
    middleware=[Middleware(GZipMiddleware, minimum_size=1)],
)


async def app(scope, receive, send):
    to_django = scope["type"] == "http" and scope["path"].startswith("/django/")
    await (django if to_django else starlette)(scope, receive, send)


if __name__ == "__main__":
    make_server("127.0.0.1", int(sys.argv[1]), get_wsgi_application()).serve_forever()
