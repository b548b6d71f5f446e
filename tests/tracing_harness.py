"""What the tests of tracing share: a server with a tracer, what it told, and handlers that run a piece of code."""

from __future__ import annotations

import functools
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support import children, http_get, skip_unless, starter, wait_until

TRACED = 'kore.config.seccomp_tracing = "yes"'


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    pytest.importorskip("pyseccomp")
    skip_unless(request.param)
    return request.param


@pytest.fixture
def start(tmp_path, engine):
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, io=engine, options=TRACED)


def handler(code: str, path: str = "/do", name: str = "do", kind: str = "def") -> str:
    """A route that runs `code` and answers with the value of `result`."""
    lines = "".join(f"    {line}\n" for line in code.strip().splitlines())
    return (
        "import asyncio, ctypes, errno, signal, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"@kore.route({path!r}, domain=home, methods=['get'])\n"
        f"{kind} {name}(req):\n{lines}    req.response(200, repr(result).encode())\n"
    )


def body(program, path: str = "/do") -> str:
    return http_get(program.address, path).partition(b"\r\n\r\n")[2].decode()


def told(program, text: str = "") -> list[str]:
    """What the tracer said, of what has `text` in it."""
    return [line for line in re.findall(r"proc=\[tracer\] log=\[(.*)\]$", program.out, re.M) if text in line]


def line_of(program, text: str) -> int:
    """The number of the first line of the application that has `text` in it."""
    lines = (program.directory / "app.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def tracer_of(program) -> int:
    """The pid of the tracer, once it is one."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in children(program.pid) if "[tracer]" in title(pid)]
        return len(found) == 1

    wait_until(there, "there is one tracer")
    return found[0]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    except OSError:
        return ""


def status(pid: int, field: str) -> str:
    return re.search(rf"^{field}:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def stop(program, number: int = signal.SIGTERM) -> str:
    program.signal(number)
    assert program.wait() == 0, program.out + program.err
    return program.out
