"""A first application: three routes on http://127.0.0.1:8888, started with `kore examples/hello.py`.

Try `curl http://127.0.0.1:8888/`, and the paths /later and /hello/World.
"""

import kore


class Hello:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("hello", ip="127.0.0.1", port="8888", tls=False)

        domain = kore.domain("*", attach="hello")
        domain.route("/", self.index, methods=["get"])
        domain.route("/later", self.later, methods=["get"])
        domain.route("^/hello/([A-Za-z]+)$", self.greet, methods=["get"])

    def index(self, req):
        req.response(200, b"hello from kore\n")

    async def later(self, req):
        # While this coroutine sleeps its worker goes on serving everybody else.
        await kore.suspend(500)
        req.response(200, b"half a second later\n")

    def greet(self, req, name):
        # What the parentheses in the route captured comes in as an argument.
        req.response(200, f"hello, {name}\n".encode())


koreapp = Hello()
