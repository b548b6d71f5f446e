"""The PostgreSQL that some cases ask: started for a case on the generator's core, ended after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests.perf.servers import StartFailure
from tests.postgresql_server import PostgresServer, Unavailable


@contextlib.contextmanager
def database(core: int) -> Iterator[dict[str, str]]:
    """A server of its own, pinned to `core`; where it is, as environment variables for kore and for asyncpg."""
    before = os.sched_getaffinity(0)
    server = None
    try:
        os.sched_setaffinity(0, {core})  # its processes inherit it
        try:
            server = PostgresServer()
            server.start().set_up()
        except (Unavailable, AssertionError, OSError) as error:
            raise StartFailure(str(error)) from error
        finally:
            os.sched_setaffinity(0, before)
        yield {"RIG_DATABASE": server.tcp, "RIG_DATABASE_URI": server.uri}
    finally:
        if server is not None:
            server.remove()
