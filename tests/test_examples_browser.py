"""The chat's page in real browsers: two headless Chromiums, each served by another worker, read each other.

Chromium is driven by its own DevTools protocol over a WebSocket; a picture of each page is taken at the end. Set
KORE_TEST_PICTURES to a directory to keep them.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.http_server_harness import ENGINES
from tests.test_examples_forms import example

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_SECONDS = 30
WAIT_SECONDS = 20
TRIES_MAX = 40  # connections until both workers have had one
PNG = b"\x89PNG\r\n\x1a\n"


class Page:
    """One tab, by its DevTools WebSocket."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=WAIT_SECONDS))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"not in time: {expression}; the page has {self.value(TEXT)!r}"
            time.sleep(0.02)  # a page is asked until it says so: it has no other way to tell
        return found

    def picture(self, name: str) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        folder = os.environ.get("KORE_TEST_PICTURES")
        if folder:
            Path(folder, name).write_bytes(data)
        return data


# A page that is being loaded has neither yet.
TEXT = "(document.body?.innerText ?? '')"
STATE = "(document.getElementById('state')?.textContent ?? '')"


@contextmanager
def browser(directory: Path, url: str) -> Iterator[Page]:
    """A Chromium of its own that shows `url`."""
    directory.mkdir()
    assert CHROMIUM is not None
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
        f"--user-data-dir={directory}", "--window-size=700,500", url,
    ]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen([CHROMIUM, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        there = directory / "DevToolsActivePort"
        deadline = time.monotonic() + START_SECONDS
        while not (there.exists() and "\n" in there.read_text()):
            assert process.poll() is None, (directory / "output").read_text()[-500:]
            assert time.monotonic() < deadline, "Chromium did not start in time"
            time.sleep(0.05)
        port = int(there.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_SECONDS) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=1 << 26, compression=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def say(page: Page, name: str, text: str) -> None:
    """Type as a visitor does, and press the button."""
    fill = "(id, text) => { const field = document.getElementById(id); field.focus(); field.value = text; }"
    page.value(f"({fill})('name', {json.dumps(name)})")
    page.value(f"({fill})('text', {json.dumps(text)})")
    page.value("document.getElementById('send').click()")


@pytest.mark.parametrize("engine", ENGINES)
def test_chat_in_two_browsers(tmp_path: Path, engine: str) -> None:
    """Each sees its own message at once and the other's once, whichever worker serves it; text stays text."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with example("chat.py", tmp_path, engine) as http:
        url = "http://127.0.0.1:%d/" % http.sock.getpeername()[1]
        with browser(tmp_path / "one", url) as first, browser(tmp_path / "two", url) as second:
            worker = first.wait_for(f"/^worker [12]$/.test({STATE}) && {STATE}")
            for _ in range(TRIES_MAX):
                if second.wait_for(f"/^worker [12]$/.test({STATE}) && {STATE}") != worker:
                    break
                # A fresh document, that this one's state is not taken for its: then its worker is asked for again.
                second.value("document.getElementById('state').textContent = ''")
                second.call("Page.reload")
            assert second.value(STATE) != worker, "both pages are served by one worker"
            say(first, "Ann", "hello <b>there</b>")
            second.wait_for(f"{TEXT}.includes('hello <b>there</b>')")
            assert "hello <b>there</b>" in first.value(TEXT)
            say(second, "Bob", "and hello to you: ü ☃")
            first.wait_for(f"{TEXT}.includes('and hello to you: ü ☃')")
            for page in (first, second):
                for words in ("hello <b>there</b>", "and hello to you: ü ☃"):
                    assert page.value(TEXT).count(words) == 1
            assert first.picture(f"chat-{engine}-1.png").startswith(PNG)
            assert second.picture(f"chat-{engine}-2.png").startswith(PNG)
