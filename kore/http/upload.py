"""A file that came with a form: `kore.http_file`, a window on the stored body.

Nothing is copied: the object knows where in the body its bytes are, so an upload of gigabytes stays on the disk, where
the body is, until it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from kore.http.body import PassedBody, StoredBody

    Body: TypeAlias = bytes | StoredBody | PassedBody

READ_MAX: Final = 1024
"""Most bytes of one read() or body_read(): the reference's bound."""


def check_length(function: str, length: int) -> None:
    """Raise for what may not be read at once: RuntimeError above the reference's bound, ValueError below 0."""
    if length > READ_MAX:
        raise RuntimeError(f"{function}({length}): at most {READ_MAX} bytes at once")
    if length < 0:
        raise ValueError(f"{function}({length}): the length must not be negative")


def body_length(body: Body) -> int:
    """The bytes of a request's body, in memory or on disk."""
    return len(body) if isinstance(body, bytes) else body.length


def body_piece(body: Body, position: int, count: int) -> bytes:
    """At most `count` bytes of a request's body from `position` on. RuntimeError where it is no longer there."""
    if isinstance(body, bytes):
        return body[position : position + count]
    return body.read(position, count)


class UploadedFile:
    """A file of a multipart form (reference: file_lookup; kore-api.md 9.4). Readable as long as its request lives."""

    __slots__ = ("_body", "_content_type", "_filename", "_length", "_name", "_position", "_start")

    def __init__(
        self, body: Body, start: int, length: int, *, name: str, filename: str, content_type: str | None
    ) -> None:
        self._body = body
        self._start = start
        self._length = length
        self._position = 0
        self._name = name
        self._filename = filename
        self._content_type = content_type

    def __repr__(self) -> str:
        return f"<kore.http_file {self._name!r} {self._filename!r} {self._length} bytes>"

    @property
    def name(self) -> str:
        """The name of the form's field."""
        return self._name

    @property
    def filename(self) -> str:
        """What the client calls the file, as sent. Never use it as a path: it may be ``../../etc/passwd``."""
        return self._filename

    @property
    def content_type(self) -> str | None:
        """The media type the client claims for it; None when it claims none."""
        return self._content_type

    @property
    def length(self) -> int:
        """Its size in bytes."""
        return self._length

    def read(self, length: int, /) -> tuple[int, bytes]:
        """The next at most `length` bytes and how many they are; ``(0, b"")`` at the end.

        Raises RuntimeError for more than 1024 bytes at once (the reference's bound) and after the end of the request
        when the body was on disk; ValueError for a negative length.
        """
        check_length("read", length)
        data = body_piece(self._body, self._start + self._position, min(length, self._length - self._position))
        self._position += len(data)
        return len(data), data

    def rewind(self) -> bool:
        """Read from the beginning again. Returns True."""
        self._position = 0
        return True


UploadedFile.__name__ = UploadedFile.__qualname__ = "http_file"
UploadedFile.__module__ = "kore"
