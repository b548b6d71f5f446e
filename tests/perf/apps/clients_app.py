"""What handlers of kore wait for in the rig; the argument is the port, the database, if any, in RIG_DATABASE."""

import os

import kore


class App:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.config.worker_max_connections = 16384
        kore.config.worker_rlimit_nofiles = 17408
        kore.config.socket_backlog = 4096
        kore.config.http_keepalive_time = 600
        kore.config.pgsql_conn_max = 10
        kore.server("rig", ip="127.0.0.1", port=args[1], tls=False)
        domain = kore.domain("*", attach="rig")
        domain.route("/", self.plain, methods=["get"])
        domain.route("/query", self.query, methods=["get"])
        domain.route("/proc", self.proc, methods=["get"])
        if "RIG_DATABASE" in os.environ:
            kore.dbsetup("rig", os.environ["RIG_DATABASE"])

    def plain(self, req):
        req.response(200, b"hello world")

    async def query(self, req):
        rows = await kore.dbquery("rig", "SELECT 1 AS one")
        assert rows == [{"one": "1"}]
        req.response(200, b"hello world")

    async def proc(self, req):
        status = await kore.proc("/bin/true").reap()
        assert status == 0
        req.response(200, b"hello world")


koreapp = App()
