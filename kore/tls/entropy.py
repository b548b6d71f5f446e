"""The option rand_file: random bytes that are kept from one start to the next, for machines that begin with few.

They are added to what the kernel gives, and replaced at once, so that no two starts have the same. The kernel's own
(getrandom(2)) are enough everywhere kore runs, so a file that can't be used is told of and stops nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from kore.tls.certificates import CertificateError
from kore.tls.keys import LOG_ERR, read_file
from kore.tls.private import library

SIZES: Final = (2048, 1024)
"""Of the reference, and of the platform it describes."""

MODE: Final = 0o400


def seed_from(path: str, log: Callable[[int, str], None]) -> bool:
    """Add the bytes of the file to OpenSSL's, and put new ones in their place; whether they were added."""
    try:
        data = read_file(path, max(SIZES))
    except (OSError, CertificateError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        log(LOG_ERR, f"rand_file {reason}; it is not used")
        return False
    if len(data) not in SIZES:
        allowed = " or ".join(map(str, SIZES))
        log(LOG_ERR, f"rand_file {path}: has {len(data)} bytes, not {allowed}; it is not used")
        return False
    library().RAND_add(data, len(data), 0.0)  # 0: whoever else may have read it has as much
    try:
        _replace(path, os.urandom(len(data)))
    except OSError as error:
        log(LOG_ERR, f"rand_file {path}: cannot be replaced by new bytes: {error.strerror}")
    return True


def _replace(path: str, data: bytes) -> None:
    """Atomically: there is always a whole one. Raises OSError."""
    temporary = f"{path}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
