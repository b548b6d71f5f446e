"""What the sandbox refuses, said so that the option is found that allows it: one line of the log for each thing.

An application that opens a file outside, connects elsewhere or starts a program gets the errno of the kernel, as it
would for a dozen other reasons: "Permission denied" leads nobody to an option. So exceptions that nobody caught are
looked at once more, where there is a sandbox, and those that it is the likely reason of are explained. It is a guess,
made from the errno, the name of the file and the names of the functions on the way, and never changes what happens.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Final

from kore.process.log import LOG_NOTICE
from kore.sandbox.confinement import Confinement

LINES_MAX: Final = 32
"""So many different hints in the life of a worker: who makes up names of files must not fill the log."""

CHAIN_MAX: Final = 16
"""Exceptions that one was raised from, or that are in its group."""

FRAMES: Final = 8
"""The last functions on the way to where it was raised."""

TRACING: Final = "kore.config.seccomp_tracing = 'yes' names the call and the line of koreapp.seccomp that allows it"

_CONNECT_FAILED = re.compile(r"\('[^']*', (\d+)")  # asyncio: Connect call failed ('127.0.0.1', 80)
_PORT = re.compile(r" to \S+?(?::| port )(\d+)")  # kore.httpclient, kore.socket_wrap
_SQLITE = ("unable to open", "readonly database", "permission denied", "I/O error")
_PROGRAMS = ("fork", "subprocess", "popen", "multiprocessing")
_LISTENING = ("bind", "listen", "create_server", "start_server")
_CHANGING = ("mkdir", "makedirs", "remove", "unlink", "rmdir", "rmtree", "rename", "replace", "move")
_CONNECTING = ("connect", "socket")


class Hints:
    """The hints of one worker. `look` at every exception that was not caught."""

    def __init__(self, confinement: Confinement, log: Callable[[int, str], object]) -> None:
        self._mine = confinement
        self._log = log
        self._told: set[str] = set()

    def look(self, exc: BaseException) -> None:
        """Explain `exc`, or one it was raised from, if the sandbox is a likely reason. Never raises."""
        try:
            for each in _chain(exc):
                hint = self.hint(each)
                if hint is not None and hint not in self._told and len(self._told) < LINES_MAX:
                    self._told.add(hint)
                    self._log(LOG_NOTICE, f"sandbox: {hint}")
        except Exception:  # noqa: BLE001 (attributes of an exception are the application's; a hint is not worth an error)
            return

    def hint(self, exc: BaseException) -> str | None:
        """One line on `exc`: what was refused, and the option that allows it; None where it is not for the sandbox."""
        if isinstance(exc, ImportError):
            if "failed to map segment" not in str(exc):
                return None
            return f"{exc.name} is compiled and cannot be loaded any more: import it where the application begins"
        if isinstance(exc, socket.gaierror):
            return None if self._mine.names else self._connect("host names are not looked up", None)
        if not isinstance(exc, OSError):
            return self._library(exc)
        if "kore." in str(exc.strerror):  # it says already what to do
            return None
        if exc.errno == errno.ENOENT and "temporary directory" in str(exc.strerror):
            return self._write("/tmp")  # noqa: S108 (the place that Python looked at)
        if exc.errno not in (errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EXDEV):
            return None
        way = f"{_way(exc)} {exc.strerror}".lower()
        if "spawn" in way:
            return None  # a program of kore.proc, which has other rights
        if isinstance(exc.filename, (str, bytes)):
            return self._file(exc, way)
        return self._call(exc, way)

    def _library(self, exc: BaseException) -> str | None:
        """What libraries made of an errno, which their words alone tell of."""
        text = str(exc)
        if type(exc).__module__ == "sqlite3" and any(words in text for words in _SQLITE):
            return "SQLite writes beside its file; kore.config.sandbox_write = the directory of that file allows it"
        if "(libcurl error 7)" in text or ("connect()" in text and "(EACCES)" in text):
            port = _PORT.search(text)
            return self._connect("the connection is not allowed", int(port[1]) if port else None)
        if "(libcurl error 6)" in text and not self._mine.names:
            return self._connect("host names are not looked up", None)
        return None

    def _file(self, exc: OSError, way: str) -> str | None:
        """An error with the name of a file. Landlock says EACCES; what the filter leaves out altogether is ENOSYS."""
        path = _real(exc.filename)
        if exc.errno == errno.EPERM:
            return None  # the right of a user
        if exc.errno == errno.EXDEV:
            target = _real(exc.filename2 or exc.filename)
            return None if self._below(target, self._mine.write) else self._write(os.path.dirname(target))
        if exc.errno == errno.ENOSYS:
            changes = any(word in way for word in _CHANGING) and not self._below(path, self._mine.write)
            return self._write(os.path.dirname(path)) if changes else _not_listed()
        if os.path.exists(path):
            if not self._below(path, (*self._mine.read, *self._mine.write)):
                if not os.access(path, os.R_OK):
                    return None  # it is the user who may not
                return f"{path} may not be read; kore.config.sandbox_read = {path!r} allows it (or sandbox_write)"
            if not self._below(path, self._mine.write) and os.access(path, os.W_OK):
                return self._write(path)
            return None
        above = os.path.dirname(path)
        return self._write(above) if not self._below(path, self._mine.write) and os.access(above, os.W_OK) else None

    def _call(self, exc: OSError, way: str) -> str | None:
        """An error without a name: the functions on the way tell what was tried."""
        if exc.errno == errno.EPERM and any(word in way for word in _PROGRAMS):
            return "a worker makes no processes; kore.proc and asyncio.create_subprocess_exec start programs beside it"
        if any(word in way for word in _LISTENING):
            return "a worker listens nowhere; declare what is to be served with kore.server()"
        if exc.errno == errno.EACCES and any(word in way for word in _CONNECTING):
            port = _CONNECT_FAILED.search(str(exc.strerror))
            return self._connect("the connection is not allowed", int(port[1]) if port else None)
        return _not_listed() if exc.errno in (errno.ENOSYS, errno.EPERM) else None

    def _connect(self, what: str, port: int | None) -> str | None:
        allowed = self._mine.connect_ports
        if allowed is None or port in allowed:
            return None
        if port is None:
            return f"{what}; kore.config.sandbox_connect = 5432, or what port it is, or 'any', allows it"
        return f"{what}; kore.config.sandbox_connect = {port} allows it"

    def _write(self, path: str) -> str:
        return f"{path} may not be written to; kore.config.sandbox_write = {path!r} allows it"

    def _below(self, path: str, places: tuple[str, ...]) -> bool:
        return any(path == place or path.startswith(place.rstrip("/") + "/") for place in map(os.path.realpath, places))


def _not_listed() -> str:
    return f"a system call of it is not on the list of the sandbox; {TRACING}"


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """`exc`, what it was raised from or in place of, and the parts of groups."""
    pending, seen = [exc], set[int]()
    while pending and len(seen) < CHAIN_MAX:
        each = pending.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        further = (each.__cause__, each.__context__, *(each.exceptions if isinstance(each, BaseExceptionGroup) else ()))
        pending += [other for other in further if other is not None]


def _way(exc: BaseException) -> str:
    """The files, functions and lines that led to where `exc` was raised."""
    frames = traceback.extract_tb(exc.__traceback__)[-FRAMES:]
    return " ".join(f"{os.path.basename(each.filename)} {each.name} {each.line}" for each in frames)


def _real(path: str | bytes) -> str:
    return os.path.realpath(os.fsdecode(path))
