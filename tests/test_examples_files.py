"""The example of static files, started as its first line says and asked for everything it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http_server_harness import Client, request
from tests.support import READY, ROOT, free_port, starter


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The example, on a free port instead of its own."""
    directory = tmp_path_factory.mktemp("example")
    port = free_port()
    source = (ROOT / "examples" / "files.py").read_text()
    changed = source.replace('"8888"', f'"{port}"').replace("os.path.abspath(__file__)", repr(str(ROOT / "examples/x")))
    assert changed.count(str(port)) == 1
    Path(directory, "files.py").write_text(changed)
    with starter(directory) as programs:
        programs.kore("files.py").wait_for(READY)
        yield "127.0.0.1", port


@pytest.mark.parametrize(("path", "status", "text"), [
    ("/", 200, b"<h1>Files</h1>"), ("/style.css", 200, b"font-family"), ("/about", 200, b"about.html"),
    ("/docs", 302, b""), ("/docs/", 200, b"index file"), ("/status", 200, b"all is well"), ("/nothing", 404, b""),
])  # fmt: skip
def test_what_it_serves(address, path: str, status: int, text: bytes) -> None:
    """Each address the page links to."""
    with Client(address) as client:
        answer = client.ask(request(path))
        assert answer.status == status
        assert text in answer.body


def test_what_its_text_says(address) -> None:
    """The etag gives 304, a range a part."""
    with Client(address) as client:
        first = client.ask(request("/"))
        assert first.fields["content-type"] == "text/html; charset=utf-8"
        assert client.ask(request("/", f"If-None-Match: {first.fields['etag']}")).status == 304
        answer = client.ask(request("/", "Range: bytes=0-20"))
        assert (answer.status, answer.body) == (206, first.body[:21])
