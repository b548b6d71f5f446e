"""What the tests of static files share: a tree of files with everything that can be wrong in one, and its server."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.http_server_harness import Server, serving

LARGE_BYTES = 5_000_011
"""Of a file that is spliced: many times a pipe, and no multiple of anything."""

TEXT = """
home.filemaps({"/files/": "www", "/files/deep/er/": "deeper", "/%C3%A4 b/": "odd"})
"""

SECRET = b"secret"


def content(size: int) -> bytes:
    """Bytes of which each piece says where it belongs."""
    return b"".join(b"%015d\n" % number for number in range(size // 16 + 1))[:size]


LARGE = content(LARGE_BYTES)


def write(path: Path, data: bytes, age_s: int = 100) -> Path:
    """A file whose last change lies so many seconds back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    when = int(path.stat().st_mtime) - age_s
    os.utime(path, (when, when))
    return path


def tree(base: Path) -> None:
    """The directories `www`, `deeper` and `odd`, and beside them what must never be served."""
    www = base / "www"
    write(www / "a.txt", b"hello a")
    write(www / "empty.txt", b"")
    write(www / "page.html", b"<p>page</p>")
    write(www / "noextension", b"?")
    write(www / "sub" / "index.html", b"index of sub")
    write(www / "sub" / "x.css", b"css")
    write(www / "bare" / "x.txt", b"no index here")
    write(www / "dir.html" / "x", b"a directory with an extension")
    write(www / "large.bin", LARGE)
    write(www / "mid.js", content(60_000))
    write(www / "a b+c%d.txt", b"odd name")
    write(www / "\u00e4\u20ac.txt", b"unicode name")
    write(www / ("n" * 255), b"longest name")
    write(base / "deeper" / "a.txt", b"deeper a")
    write(base / "odd" / "a.txt", b"odd a")
    for name in ("secret.txt", "www-secret/secret.txt", "wwwx", "outside/index.html"):
        write(base / name, SECRET)
    for name, target in (
        ("link-in", "a.txt"), ("link-in-dir", "sub"), ("sub/link-up", "../a.txt"), ("link-out", "../secret.txt"),
        ("link-out-dir", "../outside"), ("link-abs", str(base / "secret.txt")), ("link-abs-in", str(www / "a.txt")),
        ("loop", "loop"), ("ring1", "ring2"), ("ring2", "ring1"), ("dangling", "nowhere"),
        ("link-proc", "/proc/self/environ"), ("link-null", "/dev/null"),
    ):  # fmt: skip
        (www / name).symlink_to(target)
    (www / "around").symlink_to(".")
    os.mkfifo(www / "fifo")
    with socket.socket(socket.AF_UNIX) as sock, contextlib.chdir(www):
        sock.bind("socket")


@contextlib.contextmanager
def file_server(directory: Path, engine: str, text: str = TEXT, options: str = "") -> Iterator[Server]:
    """A server of that tree, with one worker."""
    tree(directory)
    with serving(directory, engine, text, options) as made:
        yield made
