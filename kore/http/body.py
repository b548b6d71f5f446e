"""Where the body of a request goes: into memory, into a file, to the application piece by piece, or nowhere.

A body is in memory up to ``http_body_disk_offload`` bytes, and never anywhere before it has come: a length that a
client announces reserves nothing. Above that it is a file of the worker's own until the request ends, so gigabytes
need no more memory than a few pieces. Files are written and removed by threads (disk.py), one piece at a time while the
next one comes in; when that is there too, no more is read: a slow disk makes its clients wait, and neither the memory
grow nor the loop stand.

A large form is taken apart while it comes, so that no turn of the loop has all of it to look at.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, Protocol

from kore.errors import ConfigurationError

if TYPE_CHECKING:
    from kore.http.disk import Disk
    from kore.http.multipart import ComingForm
    from kore.http.request import Request

WRITE_BYTES = 65536
"""Bytes of a body gathered for one write(2): a client's pieces may be a byte each."""

FORM_BYTES = 262144
"""A form with more bytes than this, or on disk, is read while it comes; taking apart so many takes a millisecond."""

READ_BYTES = 262144
"""Bytes of a stored body read at once for its digest."""

CREATE_TRIES_MAX = 8
"""Names tried for a file. Each has 64 random bits, or was taken by a sweep just after it was made: two are plenty."""

SWEEP_MAX = 10000
"""Entries of the directory looked at when a worker starts, which must not take long; the next worker goes on."""

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

PREFIX = "http_body."

_own_name = re.compile(r"http_body\.[0-9a-f]{16}").fullmatch

_FILE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


BEHIND: Final = object()
"""What a receiver says when the disk has not taken what it was given: it will tell when it has."""

Told = Callable[["OSError | None"], object]


class Receiver(Protocol):
    """Takes the pieces of one body."""

    count: int
    """Bytes so far."""
    streams: bool
    """The handler runs while the body comes, and says when it wants more of it (`Input.pull`)."""

    def write(self, piece: bytes) -> object:
        """Take a piece: True, go on; BEHIND, wait; anything else, stop; or a coroutine that returns True or not."""

    def end(self) -> Any:
        """All has come: what `Request._body` shall be, or BEHIND; then it is asked again once it has told."""

    def discard(self) -> None:
        """No more comes: forget it."""


class BodyStore:
    """The directory of one worker's body files: ``http_body_disk_path``, for bodies of more than `offload` bytes.

    Made by the worker, as the user and in the root it has by then. Raises ConfigurationError when the directory cannot
    be made or written to.
    """

    def __init__(self, path: str, offload: int, disk: Disk) -> None:
        self.path = path
        self.offload = offload
        self.disk = disk
        self.bodies: set[StoredBody] = set()  # whose files are there
        try:
            os.makedirs(path, DIRECTORY_MODE, exist_ok=True)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as problem:
            raise self._unusable(f"{problem.strerror} (errno {problem.errno})") from None
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            self.close()
            raise self._unusable(f"user {os.geteuid()} may not write there")
        self._sweep()

    def _unusable(self, why: str) -> ConfigurationError:
        where = os.path.abspath(self.path)
        return ConfigurationError(f"kore.config.http_body_disk_path = {self.path!r}: cannot use {where}: {why}")

    def _sweep(self) -> None:
        """Remove what dead workers left. The living hold a lock on each of their files, flock(2)."""
        with os.scandir(self.fd) as entries:
            for number, entry in enumerate(entries):
                if number >= SWEEP_MAX:
                    break
                if _own_name(entry.name):
                    self._remove_unless_locked(entry.name)

    def _remove_unless_locked(self, name: str) -> None:
        try:
            # O_NONBLOCK: somebody may have made a fifo of that name.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:
            return  # gone meanwhile, or not ours to read
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=self.fd)
        except OSError:
            pass  # it is in use
        finally:
            os.close(fd)

    def create(self) -> StoredBody:
        """A new, empty file. Raises OSError. For a thread, like the two of `StoredBody` that say so."""
        for _ in range(CREATE_TRIES_MAX):
            name = PREFIX + secrets.token_hex(8)
            try:
                fd = os.open(name, _FILE_FLAGS, FILE_MODE, dir_fd=self.fd)
            except FileExistsError:
                continue
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                body = StoredBody(self, name, fd)
                self.bodies.add(body)
                return body
            os.close(fd)  # a worker that started just now has swept it away before it was locked
        raise FileExistsError(f"no free name in {self.path} after {CREATE_TRIES_MAX} tries")

    def close(self) -> None:
        """Called at the worker's end: remove what files are left. Threads may still be at them, so none is closed."""
        for body in list(self.bodies):
            body.remove()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class StoredBody:
    """A body in a file. The file is removed when the request ends, unless the application has moved it away."""

    __slots__ = ("_fd", "_name", "_store", "length", "path")

    def __init__(self, store: BodyStore, name: str, fd: int) -> None:
        self._store = store
        self._name = name
        self._fd = fd
        self.length = 0
        self.path: str | None = str(PurePath(store.path) / name)

    def append(self, data: bytes | bytearray) -> None:
        """Write at the end. For a thread. Raises OSError, ENOSPC for one."""
        view = memoryview(data)
        while view:
            written = os.write(self._fd, view)
            self.length += written
            view = view[written:]

    def read(self, position: int, count: int) -> bytes:
        """At most `count` bytes from `position`; fewer only at the end. Raises RuntimeError once the request ended."""
        pieces = []
        while count > 0:
            piece = os.pread(self.fileno(), count, position)
            if not piece:
                break
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def fileno(self) -> int:
        """The descriptor it is open at. Raises RuntimeError once the request ended."""
        if self._fd < 0:
            raise RuntimeError("the request has ended, and its body with it")
        return self._fd

    def digest(self) -> bytes:
        """The SHA-256 of all of it, 32 bytes; read for this, as few applications ask."""
        digest = hashlib.sha256()
        position = 0
        while piece := self.read(position, READ_BYTES):
            digest.update(piece)
            position += len(piece)
        return digest.digest()

    def close(self) -> None:
        """The request has ended: have the file removed. Called once or more, but not while it is being written to."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._store.disk.run(partial(self._end, fd), _nothing)

    def _end(self, fd: int) -> None:
        self.remove()
        os.close(fd)  # the blocks are freed by this, which takes long for a large file

    def remove(self) -> None:
        """Remove the file. For a thread."""
        try:
            os.unlink(self._name, dir_fd=self._store.fd)
        except OSError:
            pass  # the application has moved it away, or the whole directory
        self._store.bodies.discard(self)


def _nothing(_: object) -> None:
    """Nobody waits for it."""


class PassedBody:
    """A body that ``on_body_chunk`` has had piece by piece: its length and its digest are left."""

    __slots__ = ("_digest", "length", "path")

    def __init__(self, length: int, digest: bytes) -> None:
        self.length = length
        self.path: str | None = None
        self._digest = digest

    def read(self, position: int, count: int) -> bytes:  # noqa: ARG002 - the face of StoredBody
        """Always raises RuntimeError."""
        raise RuntimeError("the body went to on_body_chunk and is not stored")

    def digest(self) -> bytes:
        """The SHA-256 of all of it, 32 bytes."""
        return self._digest

    def close(self) -> None:
        """Nothing to be done."""


class Kept:
    """Takes a body of a known length, which is small, into memory."""

    __slots__ = ("_data", "count")
    streams = False

    def __init__(self) -> None:
        self._data = bytearray()
        self.count = 0

    def write(self, piece: bytes) -> object:
        """Take a piece; True."""
        self.count += len(piece)
        self._data += piece
        return True

    def end(self) -> bytes:
        """The body."""
        return bytes(self._data)

    def discard(self) -> None:
        """Nothing to be done."""


class Stored:
    """Takes a body into memory, and above the bound of `store` into a file of it.

    `told(error)` is called on the loop when the disk has taken what it was behind with, and when it has failed.
    """

    __slots__ = ("_busy", "_data", "_file", "_given_up", "_looked", "_request", "_store", "_told", "_waiting", "count",
                 "form")  # fmt: skip
    streams = False

    def __init__(self, store: BodyStore | None, request: Request, told: Told) -> None:
        self._store = store
        self._request = request
        self._told = told
        self._data = bytearray()
        self._file: StoredBody | None = None  # the thread's while it is busy
        self._busy = False  # a thread writes
        self._waiting = False  # BEHIND was said
        self._given_up = False
        self._looked = False  # whether it is a form
        self.form: ComingForm | None = None
        """What a form that is read while it comes has in it."""
        self.count = 0

    def write(self, piece: bytes) -> object:
        """Take a piece; True, or BEHIND."""
        self.count += len(piece)
        data = self._data
        data += piece
        if self.form is not None:
            self.form.feed(piece)
        store = self._store
        if store is not None and self.count > store.offload:
            if len(data) >= WRITE_BYTES:
                self._look()
                if self._busy:
                    self._waiting = True
                    return BEHIND
                self._flush(store)
        elif self.count > FORM_BYTES:
            self._look()
        return True

    def _look(self) -> None:
        """See whether it is a form, as long as all of it is at hand."""
        if not self._looked:
            self._looked = True
            from kore.http.multipart import coming_form

            self.form = coming_form(self._request.request_header("content-type"), self._data)

    def _flush(self, store: BodyStore) -> None:
        data, self._data = self._data, bytearray()
        self._busy = True
        store.disk.run(partial(self._append, store, data), self._flushed)

    def _append(self, store: BodyStore, data: bytearray) -> None:
        if self._file is None:
            self._file = store.create()
        self._file.append(data)

    def _flushed(self, error: OSError | None) -> None:
        self._busy = False
        if self._given_up:
            self._remove()
            return
        waiting, self._waiting = self._waiting, False
        if error is None and self._store is not None and len(self._data) >= WRITE_BYTES:
            self._flush(self._store)
        if waiting or error is not None:
            self._told(error)

    def end(self) -> object:
        """The body, or BEHIND."""
        store = self._store
        if store is None or self.count <= store.offload:
            return bytes(self._data)
        if self._data and not self._busy:
            self._flush(store)
        if self._busy:
            self._waiting = True
            return BEHIND
        return self._file

    def discard(self) -> None:
        """Forget it, and have the file removed."""
        self._given_up = True
        self._data = bytearray()
        if not self._busy:
            self._remove()

    def _remove(self) -> None:
        if self._file is not None:
            self._file.close()


class Passed:
    """Gives a body to ``on_body_chunk(req, piece)``, which returns exactly True as long as it wants more."""

    __slots__ = ("_function", "_hash", "_request", "count")
    streams = False

    def __init__(self, request: Request, function: Callable[..., Any]) -> None:
        self._request = request
        self._function = function
        self._hash = hashlib.sha256()
        self.count = 0

    def write(self, piece: bytes) -> object:
        """What the application says to the piece; what it raises is raised."""
        self.count += len(piece)
        self._hash.update(piece)
        return self._function(self._request, piece)

    def end(self) -> PassedBody:
        """The body, as far as it is left."""
        return PassedBody(self.count, self._hash.digest())

    def discard(self) -> None:
        """Nothing to be done."""


class Dropped:
    """Takes what is left of a body that nobody wants, so that the next request can be read."""

    __slots__ = ("count",)
    streams = False

    def __init__(self) -> None:
        self.count = 0

    def write(self, piece: bytes) -> object:
        """Count it; True."""
        self.count += len(piece)
        return True

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def discard(self) -> None:
        """Nothing to be done."""
