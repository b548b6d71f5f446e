"""Server-sent events on http://127.0.0.1:8888, started with `kore examples/events.py`.

Open the page, or try `curl -N http://127.0.0.1:8888/events`. The response is an async generator: it sends each event as
it happens, waits for the next, and is closed when the client leaves. A client whose connection broke connects again by
itself and says which event it had last, so that none of the last hundred is missed.
"""

import asyncio
from collections import deque

import kore

KEPT_MAX = 100

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>kore events</title></head>
<body>
<h1>Seconds of this server</h1>
<p id="number">...</p>
<script>
  const events = new EventSource("/events");
  events.onmessage = event => { document.getElementById("number").textContent = event.data; };
</script>
</body>
</html>
"""


class Events:
    def __init__(self) -> None:
        self.last = 0
        self.events = deque(maxlen=KEPT_MAX)
        self.clients = set()

    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("events", ip="127.0.0.1", port="8888", tls=False)

        domain = kore.domain("*", attach="events")
        domain.route("/", self.page, methods=["get"])
        domain.route("/events", self.stream, methods=["get"])

    def workerstart(self):
        self.ticking = kore.timer(self.tick, 1000, 0)

    def tick(self):
        self.happened(f"{self.last + 1} s")

    def happened(self, text):
        self.last += 1
        self.events.append((self.last, text))
        for news in self.clients:
            news.set()

    def page(self, req):
        req.response_header("content-type", "text/html; charset=utf-8")
        req.response(200, PAGE)

    def stream(self, req):
        had = req.request_header("last-event-id") or ""
        had = min(int(had), self.last) if had.isascii() and had.isdigit() else self.last
        req.response_header("content-type", "text/event-stream")
        req.response_header("cache-control", "no-store")
        req.response(200, self.happenings(had))

    async def happenings(self, had):
        news = asyncio.Event()
        self.clients.add(news)
        try:
            yield "retry: 1000\n\n"
            while True:
                news.clear()
                for number, text in list(self.events):
                    if number > had:
                        yield f"id: {number}\ndata: {text}\n\n"
                        had = number
                await news.wait()
        finally:
            self.clients.discard(news)


koreapp = Events()
