"""The pidfile: the parent's pid for scripts, and a lock that says whether that pid still means anything.

A pid in a file outlives its process; the flock(2) on the file does not. The file is opened without following a
symbolic link, because it is often written by root into a directory others can write to.
"""

from __future__ import annotations

import errno
import fcntl
import os

from kore.errors import StartError


class HeldError(StartError):
    """A running process holds the pidfile's lock."""


class Pidfile:
    """An own, locked pidfile. The parent calls remove() at its end; workers close `fd`."""

    def __init__(self, path: str) -> None:
        """Create, lock and write the file. Raises HeldError; StartError when it cannot be made."""
        self.path = os.path.abspath(path)
        self._owner = os.getpid()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            try:
                self.fd = os.open(self.path, flags, 0o644)
            except OSError as error:
                what = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
                raise StartError(f"pidfile {self.path}: {what}") from error
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(self.fd, 32).decode("ascii", "replace").strip()
                os.close(self.fd)
                raise HeldError(f"pidfile {self.path}: pid {holder or 'unknown'} is running with it") from None
            if self._is_current():
                break
            os.close(self.fd)  # its last owner removed it between our open and our lock
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, b"%d\n" % self._owner, 0)

    def _is_current(self) -> bool:
        """Whether the path still names the file that is locked."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        here = os.fstat(self.fd)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def remove(self) -> None:
        """Unlink the file if it is still ours, and release the lock. In a forked child: nothing."""
        if os.getpid() != self._owner:
            return
        try:
            if self._is_current():
                os.unlink(self.path)
        except OSError:
            pass  # the directory may have become read-only; the lock ends with the fd all the same
        os.close(self.fd)
