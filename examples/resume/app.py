"""An upstream without ids and without a replay: it counts from 1 for each request."""

import http.server
import itertools
import time


class Count(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("asked:", self.path, flush=True)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for n in itertools.count(1):
                self.wfile.write(f"data: {n}\n\n".encode())
                time.sleep(1)
        except OSError:
            print("left:", self.path, flush=True)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Count).serve_forever()
