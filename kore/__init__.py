"""The public names of kore, a map and nothing else: below each module stand the names that live in it.

A name is imported when it is first used, so that ``import kore`` takes some ten milliseconds where the event loop with
asyncio takes seventy; what an application uses of the server is loaded by then anyway. Constants are here at once.
Names that need parts which this version does not have are not here either.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kore.application.constants import (
    CONN_PROTO_HTTP,
    CONN_PROTO_UNKNOWN,
    CONN_PROTO_WEBSOCKET,
    CONN_STATE_ESTABLISHED,
    HTTP_METHOD_DELETE,
    HTTP_METHOD_GET,
    HTTP_METHOD_HEAD,
    HTTP_METHOD_OPTIONS,
    HTTP_METHOD_PATCH,
    HTTP_METHOD_POST,
    HTTP_METHOD_PUT,
    LOG_ERR,
    LOG_INFO,
    LOG_NOTICE,
    MODULE_LOAD,
    MODULE_UNLOAD,
    RESULT_ERROR,
    RESULT_OK,
    RESULT_RETRY,
    TIMER_ONESHOT,
    WEBSOCKET_BROADCAST_GLOBAL,
    WEBSOCKET_BROADCAST_LOCAL,
    WEBSOCKET_OP_BINARY,
    WEBSOCKET_OP_TEXT,
)
from kore.clients import curl_options as _curl_options
from kore.clients.curl_options import *  # noqa: F403 (279 numbers, CURLOPT_ all of them; its __all__ says which)
from kore.version import __version__

if TYPE_CHECKING:  # the same map once more, for type checkers and editors; a test compares the two
    from kore.application.databases import dbsetup
    from kore.application.declared import app, config, prerequest
    from kore.application.domains import PyDomain as pydomain  # noqa: N813 (the name is the reference's)
    from kore.application.domains import PyRoute as pyroute  # noqa: N813 (the name is the reference's)
    from kore.application.domains import domain, route
    from kore.application.mounts import asgi
    from kore.application.privileges import privsep
    from kore.application.servers import server
    from kore.application.transfers import curl, httpclient
    from kore.clients.curl import CurlHandle as pycurlhandle  # noqa: N813 (the name is the reference's)
    from kore.clients.httpclient import HttpClient as pyhttpclient  # noqa: N813 (the name is the reference's)
    from kore.clients.postgresql.listen import dblisten
    from kore.clients.postgresql.queries import dbquery
    from kore.clients.postgresql.transaction import dbtransaction
    from kore.http.request import Request as pyhttp_request  # noqa: N813 (the name is the reference's)
    from kore.http.upload import UploadedFile as pyhttp_file  # noqa: N813 (the name is the reference's)
    from kore.process.calls import (
        fatal,
        fatalx,
        log,
        sendobj,
        setname,
        shutdown,
        sigtrap,
        websocket_broadcast,
        worker,
    )
    from kore.reactor.locks import PyLock as pylock  # noqa: N813 (the name is the reference's)
    from kore.reactor.locks import lock
    from kore.reactor.processes import PyProc as pyproc  # noqa: N813 (the name is the reference's)
    from kore.reactor.processes import proc
    from kore.reactor.queues import PyQueue as pyqueue  # noqa: N813 (the name is the reference's)
    from kore.reactor.queues import queue
    from kore.reactor.tasks import coroname, corotrace, task_create, task_id, task_kill
    from kore.reactor.timers import PyTimer as pytimer  # noqa: N813 (the name is the reference's)
    from kore.reactor.timers import time, timer
    from kore.reactor.trace import tracer
    from kore.reactor.waits import gather, suspend
    from kore.reactor.wrapped import PySocket as pysocket  # noqa: N813 (the name is the reference's)
    from kore.reactor.wrapped import socket_wrap
    from kore.sandbox.seccomp import Seccomp as pyseccomp  # noqa: N813 (the name is the reference's)

_HOMES = {
    "kore.application.databases": ("dbsetup",),
    "kore.application.declared": ("app", "config", "prerequest"),
    "kore.application.domains": ("PyDomain as pydomain", "PyRoute as pyroute", "domain", "route"),
    "kore.application.mounts": ("asgi",),
    "kore.application.privileges": ("privsep",),
    "kore.application.servers": ("server",),
    "kore.application.transfers": ("curl", "httpclient"),
    "kore.clients.curl": ("CurlHandle as pycurlhandle",),
    "kore.clients.httpclient": ("HttpClient as pyhttpclient",),
    "kore.clients.postgresql.listen": ("dblisten",),
    "kore.clients.postgresql.queries": ("dbquery",),
    "kore.clients.postgresql.transaction": ("dbtransaction",),
    "kore.http.request": ("Request as pyhttp_request",),
    "kore.http.upload": ("UploadedFile as pyhttp_file",),
    "kore.process.calls": (
        "fatal", "fatalx", "log", "sendobj", "setname", "shutdown", "sigtrap", "websocket_broadcast", "worker",
    ),
    "kore.reactor.locks": ("PyLock as pylock", "lock"),
    "kore.reactor.processes": ("PyProc as pyproc", "proc"),
    "kore.reactor.queues": ("PyQueue as pyqueue", "queue"),
    "kore.reactor.tasks": ("coroname", "corotrace", "task_create", "task_id", "task_kill"),
    "kore.reactor.timers": ("PyTimer as pytimer", "time", "timer"),
    "kore.reactor.trace": ("tracer",),
    "kore.reactor.waits": ("gather", "suspend"),
    "kore.reactor.wrapped": ("PySocket as pysocket", "socket_wrap"),
    "kore.sandbox.seccomp": ("Seccomp as pyseccomp",),
}

__all__ = [
    "CONN_PROTO_HTTP",
    "CONN_PROTO_UNKNOWN",
    "CONN_PROTO_WEBSOCKET",
    "CONN_STATE_ESTABLISHED",
    "HTTP_METHOD_DELETE",
    "HTTP_METHOD_GET",
    "HTTP_METHOD_HEAD",
    "HTTP_METHOD_OPTIONS",
    "HTTP_METHOD_PATCH",
    "HTTP_METHOD_POST",
    "HTTP_METHOD_PUT",
    "LOG_ERR",
    "LOG_INFO",
    "LOG_NOTICE",
    "MODULE_LOAD",
    "MODULE_UNLOAD",
    "RESULT_ERROR",
    "RESULT_OK",
    "RESULT_RETRY",
    "TIMER_ONESHOT",
    "WEBSOCKET_BROADCAST_GLOBAL",
    "WEBSOCKET_BROADCAST_LOCAL",
    "WEBSOCKET_OP_BINARY",
    "WEBSOCKET_OP_TEXT",
    "__version__",
    "app",
    "asgi",
    "config",
    "coroname",
    "corotrace",
    "curl",
    "dblisten",
    "dbquery",
    "dbsetup",
    "dbtransaction",
    "domain",
    "fatal",
    "fatalx",
    "gather",
    "httpclient",
    "lock",
    "log",
    "prerequest",
    "privsep",
    "proc",
    "pycurlhandle",
    "pydomain",
    "pyhttp_file",
    "pyhttp_request",
    "pyhttpclient",
    "pylock",
    "pyproc",
    "pyqueue",
    "pyroute",
    "pyseccomp",
    "pysocket",
    "pytimer",
    "queue",
    "route",
    "sendobj",
    "server",
    "setname",
    "shutdown",
    "sigtrap",
    "socket_wrap",
    "suspend",
    "task_create",
    "task_id",
    "task_kill",
    "time",
    "timer",
    "tracer",
    "websocket_broadcast",
    "worker",
]
__all__ += _curl_options.__all__

# Public name to its module and its name there.
_MAP = {entry.split()[-1]: (home, entry.split()[0]) for home, entries in _HOMES.items() for entry in entries}


def __getattr__(name: str) -> object:
    """Import a public name at its first use; PEP 562. From then on it is an ordinary attribute."""
    try:
        home, there = _MAP[name]
    except KeyError:
        raise AttributeError(f"module 'kore' has no attribute {name!r}", name=name) from None
    value: object = getattr(import_module(home), there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
