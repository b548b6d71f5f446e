"""OpenBSD's pledge(2) and unveil(2): what each kind of process promises, and the two calls by which it does.

A promise broken later ends the process with SIGABRT; there is no error to handle, so each role promises what it needs
and no more. Execution promises are left alone: what a worker may start, by a `pledge` option, runs as it would.

The roles are the process notes' (section 19). What kore itself does beyond them is added only where it is configured:
a worker is handed access logs that were opened again and a new key manager's end of a pair (recvfd), and keeps large
bodies in files (wpath cpath).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import Any

from kore.errors import StartError

WORKER = "stdio rpath inet"
TRANSFERS = "dns"
HANDED_FILES = "recvfd"
BODIES_IN_FILES = "wpath cpath"
KEYMGR = "stdio rpath recvfd"  # its end of a pair with each worker
KEYMGR_ACME = "wpath cpath"
ACME = "stdio inet dns rpath recvfd"  # a new key manager's end of a pair comes along
ACME_FILES = "/etc/ssl/"
"""Where the CAs are that an ACME provider's certificate is checked with: all that this process can see."""

PRELOADED = ("asyncpg", "encodings.idna", "pycurl", "ssl", "unicodedata", "zlib")
"""Loaded before the promises, where installed: a shared object loaded later would need prot_exec."""


def available() -> bool:
    """Whether this system is the one that has the calls."""
    return sys.platform.startswith("openbsd")


def pledge_worker(
    *, transfers: bool, handed_files: bool, bodies_in_files: bool, further: Iterable[str] = (), libc: Any = None,
) -> None:
    """Have this process promise what a worker needs, and `further`: the `pledge` options. StartError: refused.

    `transfers`: pycurl is there; `handed_files`: the parent may hand over open ones, for access logs and with TLS;
    `bodies_in_files`: see http_body_disk_offload. `libc` is the C library, as ctypes has it.
    """
    needed = ((transfers, TRANSFERS), (handed_files, HANDED_FILES), (bodies_in_files, BODIES_IN_FILES))
    promise(" ".join([WORKER, *(word for needs, word in needed if needs), *further]), libc)


def pledge_keymgr(*, acme: bool, libc: Any = None) -> None:
    """The key manager's promises, once it has loaded the keys; with ACME it writes new ones. StartError: refused."""
    promise(f"{KEYMGR} {KEYMGR_ACME}" if acme else KEYMGR, libc)


def pledge_acme(*, libc: Any = None) -> None:
    """The ACME process sees the CAs and nothing else, then promises. StartError: refused.

    In this order: without the promise "unveil", nothing can be unveiled any more.
    """
    unveil(ACME_FILES, "r", libc)
    promise(ACME, libc)


def preload() -> bool:
    """Load what is installed of PRELOADED; whether transfers can be made, which is pycurl."""
    for name in PRELOADED:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return "pycurl" in sys.modules


def promise(promises: str, libc: Any = None) -> None:
    """pledge(2), the execution promises untouched. StartError: refused."""
    _call("pledge", (promises, None), libc)


def unveil(path: str, permissions: str, libc: Any = None) -> None:
    """unveil(2): of all files, only what is below `path` can be seen from now on. StartError: refused."""
    _call("unveil", (path, permissions), libc)


def _call(name: str, texts: tuple[str | None, ...], libc: Any) -> None:
    shown = f"{name}({', '.join('NULL' if text is None else repr(text) for text in texts)})"
    call = getattr(ctypes.CDLL(None, use_errno=True) if libc is None else libc, name, None)
    if call is None:
        raise StartError(f"{shown}: this system's C library has no {name}(2)")
    call.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    call.restype = ctypes.c_int
    if call(*(None if text is None else os.fsencode(text) for text in texts)) != 0:
        number = ctypes.get_errno()
        raise StartError(f"{shown} is refused: {os.strerror(number)} (errno {number})")
