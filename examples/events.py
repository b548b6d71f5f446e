"""Server-sent events on http://127.0.0.1:8888, started with `kore examples/events.py`.

Open the page, or try `curl http://127.0.0.1:8888/events` a few times. A response carries the events that the client has
not had yet and ends; the client asks again at once, saying which it had last, so that none is missed whatever breaks.
"""

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
        self.waiting = set()

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
        for queue in self.waiting:
            queue.push(self.last)

    def page(self, req):
        req.response_header("content-type", "text/html; charset=utf-8")
        req.response(200, PAGE)

    async def stream(self, req):
        had = req.request_header("last-event-id") or ""
        had = min(int(had), self.last) if had.isascii() and had.isdigit() else self.last
        if had == self.last:
            # Nothing new: wait until something happens. A client that leaves meanwhile ends this at its await.
            queue = kore.queue()
            self.waiting.add(queue)
            try:
                await queue.pop()
            finally:
                self.waiting.discard(queue)
        news = [f"id: {number}\ndata: {text}\n\n" for number, text in self.events if number > had]
        req.response_header("content-type", "text/event-stream")
        req.response_header("cache-control", "no-store")
        req.response(200, "retry: 0\n\n" + "".join(news))


koreapp = Events()
