"""Socket addresses as the reference writes them: numeric, checked at the call, ``@`` for abstract unix names.

Nothing is ever resolved: a name where an address should be is a mistake to be told at once, not a request to the
network that makes everyone wait.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from kore.readiness.syscalls import has_abstract_sockets

_PATH_BYTES_MAX = 107
"""struct sockaddr_un has 108, the last of which is the NUL."""


def _port(port: int | str, lowest: int) -> int:
    if isinstance(port, str):
        if not (port.isascii() and port.isdigit() and len(port) <= 5):
            raise ValueError(f"port must be a number, not {port!r}")
        port = int(port)
    elif not hasattr(port, "__index__"):
        raise TypeError(f"port must be an int or a str of digits, not {type(port).__name__}")
    port = port.__index__()
    if not lowest <= port <= 65535:
        raise RuntimeError(f"port must be {lowest} to 65535, not {port}")
    return port


def _text(what: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{what} must not contain a NUL")
    return value


def internet(family: int, host: str, port: int | str, lowest_port: int = 0) -> tuple[Any, ...]:
    """The address of `host` and `port` as the socket module has it.

    Raises ValueError for what is no numeric address of the family, RuntimeError for a port out of range.
    """
    host = _text("address", host)
    number = _port(port, lowest_port)
    bare, _, zone = host.partition("%") if family == socket.AF_INET6 else (host, "", "")
    try:
        socket.inet_pton(family, bare)
        scope = 0 if not zone else int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
    except OSError:
        kind = "IPv6" if family == socket.AF_INET6 else "IPv4"
        raise ValueError(f"address must be a numeric {kind} address (names are not resolved), not {host!r}") from None
    return (host, number) if family == socket.AF_INET else (bare, number, 0, scope)


def unix(path: str) -> str:
    """The address of the unix socket `path`, abstract with a leading ``@``.

    Raises RuntimeError when it is too long, or abstract elsewhere than on Linux, ValueError when it is empty.
    """
    path = _text("path", path)
    if not path:
        raise ValueError("path must not be empty")
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise RuntimeError(f"path must be at most {_PATH_BYTES_MAX} bytes long, not {len(os.fsencode(path))}: {path!r}")
    if path.startswith("@") and not has_abstract_sockets():
        raise RuntimeError(f"path {path!r}: only Linux has abstract sockets; give the path of a file")
    return "\0" + path[1:] if path.startswith("@") else path


def shown(family: int, address: Any) -> tuple[Any, ...]:
    """A sender's address as the reference has it: (ip, port), or for unix sockets (path,) with None for unnamed."""
    if family != socket.AF_UNIX:
        return tuple(address[:2]) if address else (None, None)
    if not address:
        return (None,)
    path = os.fsdecode(address)
    return ("@" + path[1:] if path.startswith("\0") else path,)
