"""What a confined process cannot load any more, loaded before: codecs, the library, sources, time zones, extensions.

Behind a chroot there is no standard library to import from, and Python imports late: a codec when a text names it, a
module when a traceback is printed, kore's own parts when they are first used. Behind the system call filter no shared
object can be mapped to be executed, so extension modules fail even where their files can be read. All of it is done
in the parent, before the first fork, so the workers share the memory and one that is started again has it too.

It cannot be complete: what an application imports in a handler nobody knows beforehand. `watch_imports` tells of that
while it is developed.
"""

from __future__ import annotations

import encodings
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any, Final

SOURCE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Source text kept for tracebacks: more than the largest applications have, and the workers share it."""

WATCHED_MAX: Final = 1000
"""Modules that `watch_imports` tells of in one process: then whoever reads the log has seen enough."""

LIBRARY: Final = """
    _colorize _markupbase _opcode _pydatetime _pydecimal _strptime _sysconfigdata
    argparse ast asyncio base64 bisect calendar cmath codeop collections.abc colorsys concurrent.futures.process
    concurrent.futures.thread configparser contextvars copy csv ctypes.util dataclasses datetime decimal difflib dis
    email.generator email.header email.headerregistry email.iterators email.message email.mime.application
    email.mime.audio email.mime.base email.mime.image email.mime.message email.mime.multipart email.mime.nonmultipart
    email.mime.text email.parser email.policy email.utils filecmp fileinput fnmatch fractions ftplib getopt getpass
    gettext glob graphlib gzip hashlib heapq hmac html html.entities html.parser http.client http.cookiejar http.cookies
    http.server imaplib importlib.abc importlib.metadata importlib.resources importlib.util inspect io ipaddress json
    keyword linecache locale logging.config logging.handlers lzma mimetypes mmap multiprocessing.connection
    multiprocessing.dummy multiprocessing.managers multiprocessing.pool multiprocessing.queues
    multiprocessing.shared_memory multiprocessing.synchronize netrc numbers opcode operator optparse pathlib pickle
    pickletools pkgutil platform plistlib poplib pprint pstats queue quopri random reprlib resource sched secrets
    selectors shlex shutil signal smtplib socketserver sqlite3 ssl statistics string stringprep subprocess sysconfig
    tarfile tempfile textwrap threading timeit token tokenize tomllib traceback tracemalloc types typing unicodedata
    urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid warnings wave weakref
    wsgiref.handlers wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.parsers.expat xml.sax
    xml.sax.saxutils xmlrpc.client zipfile zipimport zoneinfo
"""
"""Modules of the standard library that code imports where it needs them. What a Python does not have is left out; what
needs a terminal, a screen or a compiler is not here."""

_NO_EXTENSIONS: Final = (
    "_crypt", "_ctypes_test", "_curses", "_dbm", "_gdbm", "_test", "_tkinter", "_xx", "audioop", "nis", "ossaudiodev",
    "readline", "spwd", "xx",
)  # fmt: skip
"""Beginnings of extension modules that are about terminals, displays and devices, that only CPython's tests load, or
that are leaving the library."""

_NO_ENCODINGS: Final = ("mbcs", "oem", "cp65001")  # of Windows

_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})

_zones: list[Any] = []
"""Holds the time zones: ZoneInfo's own cache keeps only what somebody else does."""


def extensions() -> None:
    """Load the standard library's extension modules: after the filter none can be mapped. Raises nothing."""
    folder = sysconfig.get_config_var("DESTSHARED")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for entry in sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else ():
        if entry.endswith(suffixes) and not entry.startswith(_NO_EXTENSIONS):
            _load(entry.partition(".")[0])


def library() -> None:
    """Load the standard library as far as it is imported late: codecs, and what `LIBRARY` lists. Raises nothing."""
    package("encodings", leave_out=_NO_ENCODINGS)
    for name in LIBRARY.split():
        _load(name)


def package(name: str, *, leave_out: Iterable[str] = ()) -> None:
    """Load the package `name` with all its modules, but for those whose name below it is in `leave_out`.

    A module that cannot be loaded, for it needs what is not installed, is left out.
    """
    loaded = _load(name)
    skipped = {f"{name}.{module}" for module in leave_out}
    pending = [] if loaded is None else [loaded]
    while pending:
        parent = pending.pop()
        for module in pkgutil.iter_modules(getattr(parent, "__path__", ())):
            full = f"{parent.__name__}.{module.name}"
            if full in skipped:
                continue
            child = _load(full)
            if child is not None and module.ispkg:
                pending.append(child)


def modules(names: Iterable[str]) -> None:
    """Load the modules of these names that are there."""
    for name in names:
        _load(name)


def time_zones() -> None:
    """Read every time zone, and pin the local one. Raises nothing.

    mktime(3) looks at /etc/localtime again unless TZ is set to what it was (tzset(3)), and where it finds none it goes
    on in UTC.
    """
    import time
    import zoneinfo

    if "TZ" not in os.environ and os.path.exists("/etc/localtime"):
        os.environ["TZ"] = ":/etc/localtime"
        time.tzset()
    for key in sorted(zoneinfo.available_timezones()):
        try:
            _zones.append(zoneinfo.ZoneInfo(key))
        except (OSError, ValueError):
            continue  # a broken file is no reason not to start; whoever asks for that zone is told


def sources(folders: Iterable[str]) -> None:
    """Read the source of every loaded module below one of `folders`: a traceback shows lines, not only numbers.

    Packages that are installed below them, in a virtual environment, are left out: there may be a lot of them.
    """
    below = [os.path.join(os.path.abspath(folder), "") for folder in folders]
    left = SOURCE_BYTES_MAX
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not any(_is_own(path, folder) for folder in below):
            continue
        lines = linecache.getlines(path, module.__dict__)
        left -= sum(map(len, lines))
        if left < 0:
            return
        if lines:
            # Without a time of change it is kept: checkcache() would look for the file, and forget it (linecache.py).
            linecache.cache[path] = (len(lines), None, lines, path)


def _is_own(path: str, folder: str) -> bool:
    return path.startswith(folder) and not _INSTALLED.intersection(path[len(folder) :].split("/"))


def mentions(folder: str, words: Iterable[str]) -> bool:
    """Whether one of the modules loaded from below `folder` has one of `words` in its text. After `sources`."""
    below = os.path.join(os.path.abspath(folder), "")
    wanted = tuple(words)
    return any(
        os.path.abspath(path).startswith(below) and any(word in line for line in entry[2] for word in wanted)
        for path, entry in linecache.cache.items()
        if len(entry) == 4
    )


def watch_imports(tell: Callable[[str], object], *, own: str) -> None:
    """From now on have every module that is imported told of, once, with the file and line that imported it.

    What code below the folder `own` imports is not told of. It costs nothing but at an import: the import system asks
    a finder only for modules that are not loaded.
    """
    sys.meta_path.insert(0, _Watch(tell, os.path.join(own, "")))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing, and tells what was looked for."""

    def __init__(self, tell: Callable[[str], object], own: str) -> None:
        self._tell = tell
        self._own = own
        self._told: set[str] = set()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:  # noqa: ARG002 (the import system's signature)
        """Tell of `fullname`; the next finder looks for it."""
        if fullname in self._told or len(self._told) >= WATCHED_MAX:
            return
        frame = _importer(sys._getframe(1))
        if frame is None or frame.f_code.co_filename.startswith(self._own):
            return
        self._told.add(fullname)
        ahead = " (in a chroot it is loaded before)" if _is_ahead(fullname) else ""
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        self._tell(f"{where} imports {fullname} after the start{ahead}")


def _importer(frame: FrameType | None) -> FrameType | None:
    """The frame of the code that imports: not that of the import system, nor of the search for a codec."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith("<frozen importlib") and filename not in (importlib.__file__, encodings.__file__):
            return frame
        frame = frame.f_back
    return None


def _is_ahead(name: str) -> bool:
    """Whether `library` has loaded it, or a package that it is in: what that leaves out is rare."""
    listed = {"encodings", *LIBRARY.split()}
    parts = name.split(".")
    return any(".".join(parts[:count]) in listed for count in range(1, len(parts) + 1))


def _load(name: str) -> ModuleType | None:
    """The module `name`; None when there is none, or when it does not work here."""
    try:
        return sys.modules.get(name) or import_module(name)
    except Exception:  # noqa: BLE001 (a module that nobody has asked for yet may fail as it likes: it is not needed to start)
        return None
