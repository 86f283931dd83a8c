import json
import queue
import time

from flask import Flask, Response, jsonify, request

app = Flask(__name__)

connected = {"events": [], "notifications": [], "broadcast": []}


def format_sse(data, event=None, id=None):
    msg = f"data: {json.dumps(data)}\n\n"
    if event is not None:
        msg = f"event: {event}\n{msg}"
    if id is not None:
        msg = f"id: {id}\n{msg}"
    return msg


@app.route("/events")
def events():
    """A numbered event each second, on from the one that the client had last."""
    last = int(request.headers.get("Last-Event-ID", 0))

    def stream():
        me = object()
        connected["events"].append(me)
        try:
            n = last
            while True:
                n += 1
                yield format_sse({"n": n, "time": time.time()}, id=n)
                time.sleep(1)
        finally:
            connected["events"].remove(me)

    return Response(stream(), mimetype="text/event-stream")


@app.route("/notifications")
def notifications():
    """Named events: the unread notifications, then a reminder every half minute."""

    def stream():
        me = object()
        connected["notifications"].append(me)
        try:
            for kind in ["info", "warning", "alert"]:
                yield format_sse({"text": f"an unread {kind}", "time": time.time()}, event=kind)
            while True:
                time.sleep(30)
                yield format_sse({"text": "three are unread", "time": time.time()}, event="reminder")
        finally:
            connected["notifications"].remove(me)

    return Response(stream(), mimetype="text/event-stream")


@app.route("/broadcast")
def broadcast():
    """What anybody posts to /publish, by a queue for each client."""

    def stream():
        messages = queue.Queue(maxsize=100)
        connected["broadcast"].append(messages)
        try:
            while True:
                yield format_sse(messages.get(), event="broadcast")
        finally:
            connected["broadcast"].remove(messages)

    return Response(stream(), mimetype="text/event-stream")


@app.route("/publish", methods=["POST"])
def publish():
    message = {"text": request.get_json()["text"], "time": time.time()}
    queues = list(connected["broadcast"])
    for messages in queues:
        try:
            messages.put_nowait(message)
        except queue.Full:
            pass
    return jsonify(sent=len(queues))


@app.route("/clients")
def clients():
    return jsonify({path: len(them) for path, them in connected.items()})
