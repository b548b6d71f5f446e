"""The examples about parameters and uploads do what their first lines say."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server_harness import ENGINES, Client, request
from tests.support import READY, ROOT, free_port, skip_unless, starter

FORM = "Content-Type: application/x-www-form-urlencoded"


@contextlib.contextmanager
def example(name: str, directory: Path, engine: str) -> Iterator[Client]:
    """The example on a free port instead of 8888, and a connection to it."""
    skip_unless(engine)
    text = (ROOT / "examples" / name).read_text()
    port = free_port()
    assert text.count('port="8888"') == 1
    (directory / name).write_text(text.replace('port="8888"', f'port="{port}"'))
    with starter(directory) as programs:
        programs.kore(name, environment={"KORE_IO": engine, "TMPDIR": str(directory)}).wait_for(READY)
        with Client(("127.0.0.1", port)) as client:
            yield client


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters(tmp_path, engine):
    with example("parameters.py", tmp_path, engine) as client:
        assert client.ask(request("/search?q=kore&page=2")).body == b'{"query": "kore", "page": 2}\n'
        assert client.ask(request("/search?q=kore&page=x")).body == b'{"query": "kore", "page": 1}\n'
        assert client.ask(request("/search?page=2")).status == 400
        found = client.ask(request("/signup", FORM, method="POST", body=b"user=alice&year=1999"))
        assert (found.status, found.body) == (201, b"welcome, alice, born in 1999\n")
        for body in (b"user=root&year=1999", b"user=alice&year=12", b"user=alice"):
            assert client.ask(request("/signup", FORM, method="POST", body=body)).status == 422
        assert client.ask(request("/key")).status == 403
        assert client.ask(request("/key", "X-Key: wrong")).status == 403
        assert client.ask(request("/key", "X-Key: open sesame")).body == b"what nobody else may see\n"
        found = client.ask(request("/members"))
        assert (found.status, found.fields["location"]) == (302, "/login")
        assert client.ask(request("/members", "Cookie: session=guess")).status == 302
        assert b"hunter2" in client.ask(request("/login")).body
        assert client.ask(request("/login", FORM, method="POST", body=b"password=guess")).status == 200
        found = client.ask(request("/login", FORM, method="POST", body=b"password=hunter2"))
        assert (found.status, found.fields["location"]) == (303, "/members")
        cookie = found.fields["set-cookie"].partition(";")[0]
        assert client.ask(request("/members", f"Cookie: {cookie}")).body == b"what nobody else may see\n"


def upload(title: str, filename: str, content: bytes) -> bytes:
    body = (
        f'--B\r\nContent-Disposition: form-data; name="title"\r\n\r\n{title}\r\n'
        f'--B\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + content + b"\r\n--B--\r\n"
    return request("/", "Content-Type: multipart/form-data; boundary=B", method="POST", body=body)


@pytest.mark.parametrize("engine", ENGINES)
def test_uploads(tmp_path, engine):
    with example("uploads.py", tmp_path, engine) as client:
        assert b'enctype="multipart/form-data"' in client.ask(request("/")).body
        for size in (0, 1000, 3 << 20):  # the last one goes to the disk
            content = bytes(size)
            found = client.ask(upload("<b>photo", "../a&b.png", content))
            assert found.status == 200
            page = found.body.decode()
            assert "<td>&lt;b&gt;photo" in page
            assert "<td>../a&amp;b.png" in page
            assert f"<td>{size:,} bytes" in page
            assert hashlib.sha256(content).hexdigest() in page
        assert client.ask(upload("", "x.png", b"x")).status == 422
        assert client.ask(upload("title", "", b"")).status == 422
        broken = request("/", "Content-Type: multipart/form-data; boundary=B", method="POST", body=b"--B\r\n")
        assert client.ask(broken).status == 400
        assert client.ask(request("/")).status == 200
        left = [path.name for path in (tmp_path / "kore-uploads").iterdir()]
        assert left == []
