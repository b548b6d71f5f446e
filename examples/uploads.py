"""Uploads: a page with a form on http://127.0.0.1:8888, started with `kore examples/uploads.py`.

Files of up to 1 GiB are taken; what is larger than 1 MiB stays on the disk from the moment it comes, so that the
worker's memory does not grow. Try it in a browser, or `curl -F title=photo -F file=@photo.jpg http://127.0.0.1:8888/`.
"""

import hashlib
import html
import tempfile

import kore


class Uploads:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.config.http_body_max = 1 << 30
        kore.config.http_body_timeout = 600
        kore.config.http_body_disk_offload = 1 << 20
        kore.config.http_body_disk_path = tempfile.gettempdir() + "/kore-uploads"

        kore.server("default", ip="127.0.0.1", port="8888", tls=False)
        domain = kore.domain("*", attach="default")
        domain.route("/", self.form, methods=["get"])
        domain.route("/", self.upload, methods=["post"], post={"title": "^.{1,80}$"})

    def form(self, req):
        self.page(req, 200, "")

    async def upload(self, req):
        req.populate_multi()  # a form that is malformed or cut off is answered with 400
        title = req.argument("title")
        file = req.file_lookup("file")
        if title is None or file is None:
            self.page(req, 422, "<p class=error>A title and a file, please.</p>")
            return

        digest = hashlib.sha256()
        count = 0
        length, data = file.read(1024)
        while length:
            digest.update(data)
            count += 1
            if count % 1024 == 0:
                await kore.suspend(0)  # every megabyte, let the others have their turn
            length, data = file.read(1024)

        # Everything of this came from the client: as text it is harmless, as HTML or as a path it is not.
        about = {
            "Title": title,
            "Name": file.filename,
            "Type": file.content_type or "not said",
            "Size": f"{file.length:,} bytes",
            "SHA-256": digest.hexdigest(),
        }
        rows = "".join(f"<tr><th>{name}<td>{html.escape(value)}" for name, value in about.items())
        self.page(req, 200, f"<table>{rows}</table>")

    def page(self, req, status, content):
        req.response_header("content-type", "text/html; charset=utf-8")
        req.response(status, PAGE % content)


PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Uploads</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem; }
label { display: block; margin: 1rem 0; }
th { text-align: left; padding-right: 1.5rem; vertical-align: top; }
td { overflow-wrap: anywhere; }
.error { color: #b00020; }
</style>
<h1>Uploads</h1>
<form method="post" enctype="multipart/form-data">
<label>Title <input name="title" maxlength="80" required></label>
<label>File <input type="file" name="file" required></label>
<button>Upload</button>
</form>
%s
"""

koreapp = Uploads()
