"""``kore.server``: a named listening socket, bound where it is declared.

Binding happens in the call and not later, so that an address in use is an error in the line that names it, before
anything is forked or sent to the background. The parent owns the sockets and keeps them open for life: a worker that
dies loses no connection of the listen queue. Nothing is accepted here.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any

from kore.application import arguments
from kore.application.declared import application
from kore.errors import StartError
from kore.readiness.syscalls import has_abstract_sockets

PORT_MAX = 65535

UNIX_PATH_MAX = 107
"""Bytes of a UNIX socket path: sun_path holds 108 with its NUL, unix(7)."""

BACKLOG_MAX = 0x7FFFFFFF
"""listen(2) takes an int; the kernel caps it far below."""

DEFAULT_NAME = "default"

_ADVICE = {
    errno.EADDRINUSE: "another program listens there: stop it or choose another address",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE, and a socket file needs a writable directory",
    errno.EADDRNOTAVAIL: "no interface of this machine has that address",
    errno.EAFNOSUPPORT: "this machine does not speak that family of addresses",
    errno.ENOENT: "the directory of the socket file does not exist: create it",
    errno.ENOTDIR: "a part of the path is no directory",
    errno.EROFS: "the file system is read-only: choose another directory",
}


class ListenError(StartError, RuntimeError):
    """A server can't be declared or can't listen; the message says where, why and what to do."""


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file that a UNIX socket made; device and inode tell it from one that another server made since."""

    path: str
    device: int
    inode: int

    def unlink(self) -> None:
        """Remove the file if it is still this one. Called by the parent at its end; what fails is left behind."""
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)
        except OSError:
            pass  # gone already, or its directory is: there is nobody left to tell


@dataclass(frozen=True, slots=True)
class Listener:
    """One declared server: its name, its listening socket, and what the log calls it."""

    name: str
    sock: socket.socket
    tls: bool
    url: str
    """As in "serving http on ...": http://127.0.0.1:8888, or unix:/run/app.sock."""
    socket_file: SocketFile | None = None

    def close(self) -> None:
        """Close the socket and remove its file. The parent calls it, last of all."""
        self.sock.close()
        if self.socket_file is not None:
            self.socket_file.unlink()


def server(name: str = DEFAULT_NAME, *, ip: Any = None, port: Any = None, path: Any = None, tls: Any = True) -> None:
    """Declare a server and listen: on `ip` and `port`, or on the UNIX socket `path`; exactly one of the two.

    `name` is what domains attach to. `ip` is an IPv4 or IPv6 address or a name for one, `port` a number or its text
    (0: any free port). A `path` that starts with "@" is abstract, unix(7); otherwise a socket file that exists is
    replaced, and the file is removed at the end. `tls` is True unless said otherwise.

    Raises RuntimeError when the name is taken, the address is missing or wrong, or listening fails, and after the
    start; TypeError for arguments of the wrong type. Source: reference, "server"; kore-api.md 7.4.
    """
    application.check_open("server")
    name = arguments.text("server: the name", name)
    secure = arguments.boolean(f"server {name!r}: tls", tls)
    if name in application.listeners:
        raise ListenError(f"server {name!r}: there is one of that name already; choose another name")
    if (ip is None) == (path is None):
        raise ListenError(f"server {name!r}: give either ip and port, or path")
    backlog = min(application.config.socket_backlog, BACKLOG_MAX)
    if not application.listens:
        listener = Listener(name, socket.socket(), secure, "nowhere")
    elif path is not None:
        listener = _listen_unix(name, arguments.path(f"server {name!r}: path", path), secure, backlog)
    else:
        listener = _listen_ip(name, ip, port, secure, backlog)
    # Only now: after a failure the name is free for another try.
    application.listeners[name] = listener


def set_backlog(listener: Listener, backlog: int) -> None:
    """Give a listening socket another backlog: the option may be assigned after the server is declared."""
    if application.listens:
        listener.sock.listen(min(backlog, BACKLOG_MAX))


def _listen_ip(name: str, ip: Any, port: Any, tls: bool, backlog: int) -> Listener:
    try:
        host = arguments.text(f"server {name!r}: ip", ip)
        number = arguments.integer(f"server {name!r}: port", port, 0, PORT_MAX)
    except ValueError as problem:
        raise ListenError(str(problem)) from None
    except TypeError as problem:
        # A port that is missing or no number is a RuntimeError in the reference; an address that is no text is not.
        if not isinstance(ip, str):
            raise
        raise ListenError(str(problem)) from None
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as problem:
        advice = "give an address, or a name that resolves to one"
        raise ListenError(f"server {name!r}: cannot resolve ip {host!r}: {_words(problem)}; {advice}") from None
    family, _, protocol, _, address = found[0]
    sock = _bound(name, f"{_bracketed(host)}:{number}", family, protocol, address, backlog)
    bound = sock.getsockname()
    url = f"{'https' if tls else 'http'}://{_bracketed(bound[0])}:{bound[1]}"
    return Listener(name, sock, tls, url)


def _listen_unix(name: str, path: str, tls: bool, backlog: int) -> Listener:
    abstract = path.startswith("@")
    # Absolute, because a package's directory becomes the current one before the file is removed at the end.
    if abstract and not has_abstract_sockets():
        raise ListenError(f"server {name!r}: path {path!r}: only Linux has abstract sockets; give the path of a file")
    address = "\0" + path[1:] if abstract else os.path.abspath(path)
    shown = f"unix:{path if abstract else address}"
    if len(os.fsencode(address)) > UNIX_PATH_MAX:
        raise ListenError(f"server {name!r}: path {path!r} is too long; at most {UNIX_PATH_MAX} bytes are allowed")
    if abstract:
        return Listener(name, _bound(name, shown, socket.AF_UNIX, 0, address, backlog), tls, shown)
    try:
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            os.unlink(address)
        else:
            advice = "it is no socket: remove it, or choose another path"
            raise ListenError(f"server {name!r}: cannot listen on {shown}: the file exists; {advice}")
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise _failure(name, shown, problem) from None
    sock = _bound(name, shown, socket.AF_UNIX, 0, address, backlog)
    made = os.lstat(address)
    return Listener(name, sock, tls, shown, SocketFile(address, made.st_dev, made.st_ino))


def _bound(name: str, shown: str, family: int, protocol: int, address: Any, backlog: int) -> socket.socket:
    """A socket that listens on `address`, non-blocking and closed on exec. Raises ListenError."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    except OSError as problem:
        raise _failure(name, shown, problem) from None
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it, tcp(7): one system call a connection saved.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as problem:
        sock.close()
        raise _failure(name, shown, problem) from None
    return sock


def _failure(name: str, shown: str, problem: OSError) -> ListenError:
    advice = _ADVICE.get(problem.errno or 0, "choose another address")
    message = f"server {name!r}: cannot listen on {shown}: {_words(problem)} (errno {problem.errno}); {advice}"
    return ListenError(message)


def _words(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
