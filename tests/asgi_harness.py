"""What the tests of ASGI share: servers that mount an application given as text, on each engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.http_server_harness import Server
from tests.support import READY, Starter, free_port, pids_of, skip_unless, starter

ASGI_APP = """
import asyncio
import kore

kore.config.deployment = "dev"
kore.config.workers = {workers}
{options}
kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
home = kore.domain("*", attach="plain")

def said(text):
    kore.log(kore.LOG_INFO, text)

{text}
"""
"""An application with a domain `home`, and `said` to log what tests wait for."""


def start(programs: Starter, engine: str, text: str, options: str = "", *, wait: bool = True) -> Server:
    """A server with one worker; with `wait` it serves when this returns."""
    port = free_port()
    source = ASGI_APP.format(workers=1, options=options, port=port, text=text)
    (programs.directory / "app.py").write_text(source)
    program = programs.kore("app.py", environment={"KORE_IO": engine})
    program.address = ("127.0.0.1", port)
    if wait:
        program.wait_for(READY)
    return Server(program, program.address, pids_of(program)[0] if wait else 0)


@contextlib.contextmanager
def mounting(directory: Path, engine: str, text: str, options: str = "") -> Iterator[Server]:
    """A server on `engine` whose application is `text`; skips where there is no such engine."""
    skip_unless(engine)
    with starter(directory) as programs:
        yield start(programs, engine, text, options)
