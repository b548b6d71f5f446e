"""The application kore runs in the rig; the arguments are the port, and with TLS the files of certificate and key.

With KORE_SANDBOX=yes it is what serves in production: as root with a root directory and another user. Without root
there is neither to be had, so the rest of the sandbox is measured.
"""

import os

from bodies import BODIES

import kore


class App:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        if os.environ.get("KORE_SANDBOX") == "yes" and os.geteuid() == 0:
            kore.config.deployment = "docker"  # production in the foreground
            kore.config.root = os.getcwd()
            kore.config.runas = "nobody"
        # As many connections as the idle case asks for, held as long as it lasts; the peers are told the same.
        kore.config.worker_max_connections = 16384
        kore.config.worker_rlimit_nofiles = 17408
        kore.config.socket_backlog = 4096
        kore.config.http_keepalive_time = 600
        kore.config.http_body_max = 1 << 31
        kore.config.http_body_disk_offload = 65536
        pair = {"cert": args[2], "key": args[3]} if len(args) > 2 else {}
        kore.server("rig", ip="127.0.0.1", port=args[1], tls=bool(pair))
        domain = kore.domain("*", attach="rig", **pair)
        domain.route("/", self.plain, methods=["get"])
        domain.route("/async", self.later, methods=["get"])
        domain.route("/1k", self.small, methods=["get"])
        domain.route("/64k", self.large, methods=["get"])
        domain.route("/1m", self.huge, methods=["get"])
        domain.route("/ws", self.open, methods=["get"])
        domain.route("/upload", self.upload, methods=["post"])
        domain.filemaps({"/files/": "files"})

    def plain(self, req):
        req.response(200, b"hello world")

    async def later(self, req):
        req.response(200, b"hello world")

    def small(self, req):
        req.response(200, BODIES["/1k"])

    def large(self, req):
        req.response(200, BODIES["/64k"])

    def huge(self, req):
        req.response(200, BODIES["/1m"])

    def open(self, req):
        req.websocket_handshake(None, self.message, None)

    def message(self, connection, op, data):
        connection.websocket_send(op, data)

    def upload(self, req):
        length = os.stat(req.body_path).st_size
        req.response(200, str(length).encode())


koreapp = App()
