"""Static files on http://127.0.0.1:8888, started with `kore examples/files.py`: a site, and a handler in front of it.

Try `curl -i http://127.0.0.1:8888/`, then the same with `-H 'If-None-Match: ...'` and the etag you got, or
`-H 'Range: bytes=0-20'`. Put a style.css.gz beside style.css and ask with `--compressed`.
"""

import os

import kore

HERE = os.path.dirname(os.path.abspath(__file__))


class Files:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.config.filemap_ext = ".html"
        kore.config.http_media_type = "text/x-notes notes"

        kore.server("files", ip="127.0.0.1", port="8888", tls=False)

        domain = kore.domain("*", attach="files")
        # Handlers come before files, wherever the files are mapped.
        domain.route("/status", self.status, methods=["get"])
        domain.filemaps({"/": os.path.join(HERE, "webroot")})

    def status(self, req):
        req.response(200, b"all is well\n")


koreapp = Files()
