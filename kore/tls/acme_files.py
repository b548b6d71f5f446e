"""What ACME keeps on disk: files that are there whole or not at all, for nobody else to read, where they last.

All of it lies below the key manager's root: `account-key.pem`, `account.json`, and for each domain
`certificates/NAME/` with `key.pem`, `fullchain.pem` and `acme.json`. A file is replaced by writing another beside it,
having it on the disk, and renaming it: who reads meanwhile, or after a loss of power, finds the old one or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
from typing import Final

ACCOUNT_KEY: Final = "account-key.pem"
ACCOUNT: Final = "account.json"
CERTIFICATES: Final = "certificates"
KEY: Final = "key.pem"
CHAIN: Final = "fullchain.pem"
STANDING: Final = "acme.json"

FILE_BYTES_MAX: Final = 256 * 1024

VOLATILE: Final = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x794C7630: "overlay"}
"""File systems, by their magic number (statfs(2)), that are empty again after a restart, of machine or container."""


def folder(name: str) -> str:
    """Where the files of a domain lie, below the key manager's root."""
    return os.path.join(CERTIFICATES, name)


def read(path: str) -> bytes | None:
    """The content of a file; None when there is none. Raises OSError; ValueError: it is no file, or far too long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if found.st_size > FILE_BYTES_MAX:
            raise ValueError(f"{path} has {found.st_size} bytes; allowed are {FILE_BYTES_MAX}")
        return file.read(FILE_BYTES_MAX)


def write(path: str, content: bytes) -> None:
    """Put a file in place, whole or not at all, for its owner alone (0600). Raises OSError."""
    beside = f"{path}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside)  # of a process that died while it wrote
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    directory = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # or the name may be lost with the power
    finally:
        os.close(directory)


def make_folder(path: str) -> None:
    """Have a directory for its owner alone (0700). Raises OSError."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def set_aside(path: str) -> str:
    """Rename a file that cannot be used, so that nothing is destroyed; its new name. Raises OSError."""
    os.rename(path, f"{path}.damaged")
    return f"{path}.damaged"


def volatile(path: str) -> str | None:
    """The kind of file system that `path` is on, when what is written there does not last. Raises OSError."""
    if not sys.platform.startswith("linux"):
        return None
    result = (ctypes.c_long * 64)()  # struct statfs has 120 bytes at most; its first word is the magic number
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), result) != 0:
        raise OSError(ctypes.get_errno(), f"statfs {path}")
    return VOLATILE.get(result[0] & 0xFFFFFFFF)
