"""A site as one would run it: `sudo .venv/bin/kore examples/production.py`, then http://127.0.0.1:8888.

The parent stays root, in the background, and keeps the log and the pid file. The worker lives in /srv/kore-example as
nobody: it can read what is there, write below notes/, and nothing else; connect to nobody; start no program. Try
`curl http://127.0.0.1:8888/`, `curl -d 'text=hello' http://127.0.0.1:8888/notes`, `curl http://127.0.0.1:8888/who`.
To stop it: `sudo kill $(cat /run/kore-example.pid)`. docs/sandbox.md says what each line is for.
"""

import os
import shutil

import kore

ROOT = "/srv/kore-example"
USER = "nobody"


class Production:
    def configure(self, args):
        self.prepare()
        kore.config.deployment = "production"  # "docker" is the same in the foreground
        kore.config.workers = 2
        kore.config.root = ROOT
        kore.config.runas = USER
        kore.config.logfile = "/var/log/kore-example.log"
        kore.config.pidfile = "/run/kore-example.pid"
        kore.config.sandbox_write = "notes"  # from the root, as all paths of a worker
        kore.config.sandbox_programs = "none"
        # An application with a database declares it by kore.dbsetup, and one that makes transfers or other
        # connections names their ports: kore.config.sandbox_connect = "443"

        kore.server("site", ip="127.0.0.1", port="8888", tls=False)
        domain = kore.domain("*", attach="site")
        domain.route("/notes", self.notes, methods=["get"])
        domain.route("/notes", self.add, methods=["post"], post={"text": "^.{1,200}$"})
        domain.route("/who", self.who, methods=["get"])
        domain.filemaps({"/": "public"})

    def prepare(self):
        """Done by root, before there are workers: the folders, and one of them is the workers' own."""
        os.makedirs(f"{ROOT}/public", exist_ok=True)
        with open(f"{ROOT}/public/index.html", "w") as page:
            page.write("<!doctype html><title>kore</title><p>In production.\n")
        os.makedirs(f"{ROOT}/notes", mode=0o700, exist_ok=True)
        shutil.chown(f"{ROOT}/notes", USER)

    def notes(self, req):
        try:
            with open("/notes/all", "rb") as file:
                req.response(200, file.read())
        except FileNotFoundError:
            req.response(200, b"")

    def add(self, req):
        req.populate_post()
        text = req.argument("text")
        if text is None:
            req.response(422, b"text: 1 to 200 characters\n")
            return
        with open("/notes/all", "a") as file:
            file.write(f"{text}\n")
        req.response(201, b"noted\n")

    def who(self, req):
        req.response(200, f"user {os.getuid()}, in a root that holds {sorted(os.listdir('/'))}\n".encode())


koreapp = Production()
