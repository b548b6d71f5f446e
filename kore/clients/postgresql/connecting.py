"""Connecting: asyncpg, one host after the other, each within its time.

asyncpg gives all hosts one limit together, so that the first that never answers would take the others' chance; libpq
gives each its own. So asyncpg is asked for one host at a time.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from importlib import import_module
from typing import Any

from kore.clients.postgresql.conninfo import ConnectionInfo, Host
from kore.clients.postgresql.errors import DatabaseError, from_exception

CANCEL_SECONDS_MAX = 5.0
"""How long the cancellation of a query may take, from the request to the server's answer; then its connection ends."""

# asyncpg looks for passwords by itself when it is given none. They have been looked for (conninfo.py): no such file.
_NO_PASSWORD_FILE = f"{os.devnull}/none"


def driver() -> Any:
    """asyncpg, imported now. Raises RuntimeError that says what to install."""
    try:
        return import_module("asyncpg")
    except ImportError as error:
        raise RuntimeError(f"PostgreSQL needs the package asyncpg: pip install asyncpg ({error})") from None


def failures() -> tuple[type[Exception], ...]:
    """What asyncpg and the system raise when a server cannot be reached, refuses, or says no to a query."""
    asyncpg = driver()
    return (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)


async def connect(info: ConnectionInfo, connection_class: type[Any] | None = None) -> Any:
    """A connection of asyncpg's to the first host that takes us. Raises DatabaseError with each host's reason."""
    hosts = list(info.hosts)
    if info.shuffle:
        random.shuffle(hosts)
    attempts = [(host, info.target_session_attrs) for host in hosts]
    if info.target_session_attrs == "prefer-standby":
        attempts = [(host, wanted) for wanted in ("standby", "any") for host in hosts]
    reasons: list[str] = []
    sqlstate: str | None = None
    for host, wanted in attempts:
        try:
            connection = await _connect(info, host, wanted, connection_class)
        except TimeoutError:
            reason = f"no answer within {info.connect_seconds:g} s"
        except Exception as error:  # noqa: BLE001 (whatever it was, the next host has its chance, and who waits hears of it)
            found = from_exception(error)
            reason, sqlstate = str(found), found.sqlstate or sqlstate
        else:
            return connection
        text = f"{host.host}:{host.port}: {reason}"
        if text not in reasons:
            reasons.append(text)
    raise DatabaseError(f"no connection to {'; '.join(reasons)}", sqlstate)


async def _connect(info: ConnectionInfo, host: Host, wanted: str, connection_class: type[Any] | None) -> Any:
    asyncpg = driver()
    async with asyncio.timeout(info.connect_seconds):
        connection = await asyncpg.connect(
            dsn=info.tls,
            host=[host.host],
            port=[host.port],
            user=info.user,
            password=host.password,
            passfile=_NO_PASSWORD_FILE,
            database=info.database,
            timeout=None,
            server_settings=dict(info.server_settings),
            target_session_attrs=wanted,
            connection_class=connection_class or asyncpg.Connection,
        )
    try:
        _keep_alive(info, connection._transport.get_extra_info("socket"))
    except Exception:
        connection.terminate()
        raise
    return connection


def _keep_alive(info: ConnectionInfo, sock: Any) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = (
        ("keepalives_idle", "TCP_KEEPIDLE"),
        ("keepalives_interval", "TCP_KEEPINTVL"),
        ("keepalives_count", "TCP_KEEPCNT"),
        ("tcp_user_timeout", "TCP_USER_TIMEOUT"),
    )
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, info.keepalive["keepalives"])
    for name, option in options:
        # As in libpq, an option that the system has not is ignored.
        if name in info.keepalive and hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), info.keepalive[name])


async def request_cancel(connection: Any) -> None:
    """Ask the server, on a connection of its own, to cancel what `connection` runs. Raises what `failures` lists.

    When this ends the server has passed the request on, so that it cannot hit what is asked next.
    """
    protocol = connection._protocol
    if protocol is None:  # asyncpg has given the connection up
        return
    try:
        await import_module("asyncpg.connect_utils")._cancel(
            loop=asyncio.get_running_loop(),
            addr=connection._addr,
            params=connection._params,
            backend_pid=protocol.backend_pid,
            backend_secret=protocol.backend_secret,
        )
    except ConnectionResetError:
        return  # some servers end the connection so, once they have read the request
