import itertools
import json
import time

from flask import Flask, Response

app = Flask(__name__)


@app.route("/prices")
def prices():
    """The same for everybody: a price each second."""

    def stream():
        for n in itertools.count(1):
            yield f"data: {json.dumps({'n': n, 'price': 100 + n % 7})}\n\n"
            time.sleep(1)

    return Response(stream(), mimetype="text/event-stream")


@app.route("/")
def page():
    """An ordinary request, which needs a worker too."""
    return "<script>new EventSource('/prices').onmessage = e => document.body.append(e.data, ' ')</script>"
