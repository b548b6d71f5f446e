"""A stack of Python as faulthandler writes it, read: which line of the application makes the system call.

The innermost frame is mostly one of the standard library's or of kore's; what somebody looks for is the innermost line
that is theirs. What was written may be cut anywhere, and comes from a process that nobody trusts: it is text to show.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

DUMP_BYTES_MAX: Final = 1 << 16
"""Of one stack; it is written from the innermost frame outwards, so what is cut off matters least."""

TEXT_CHARACTERS_MAX: Final = 256
"""Of a file's name and of a function's."""

_FRAME: Final = re.compile(r'  File "(.+)", line (\d{1,9}) in (.+)')
_LIBRARIES: Final = ("stdlib", "platstdlib", "purelib", "platlib")
_KORE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True, slots=True)
class Place:
    """A line of Python: the file as the interpreter knows it, the number, the name of the function."""

    file: str
    line: int
    function: str


def places_of(dump: bytes) -> list[Place]:
    """The frames, innermost first; what is no whole line of a frame is left out."""
    whole = dump[:DUMP_BYTES_MAX].rpartition(b"\n")[0].decode("ascii", "backslashreplace")
    found = []
    for line in whole.split("\n"):
        match = _FRAME.fullmatch(line)
        if match is not None:
            file, number, function = match.groups()
            found.append(Place(file[:TEXT_CHARACTERS_MAX], int(number), function[:TEXT_CHARACTERS_MAX]))
    return found


class Ownership:
    """Which files are the application's: those below no library's folder, or below its own, if that lies deeper."""

    def __init__(self, application: str) -> None:
        """`application` is its folder, absolute."""
        others = {*filter(None, map(sysconfig.get_path, _LIBRARIES)), _KORE}
        folders = {*(os.path.abspath(folder) for folder in others), *(os.path.realpath(folder) for folder in others)}
        self._folders = dict.fromkeys(folders, False)
        self._folders |= dict.fromkeys((application, os.path.realpath(application)), True)

    def owns(self, file: str) -> bool:
        """Whether `file` is a file of the application's."""
        if file.startswith("<"):
            return False  # <frozen importlib._bootstrap>, <string>
        folder = file
        while (above := os.path.dirname(folder)) != folder:
            folder = above
            if folder in self._folders:
                return self._folders[folder]
        return True

    def platforms(self, file: str) -> str | None:
        """The name of a file of kore's own, such as ``kore/reactor/loop.py``; None for others."""
        inside = file.removeprefix(_KORE + os.sep)
        return os.path.join(os.path.basename(_KORE), inside) if inside != file and not self.owns(file) else None

    def innermost(self, places: Iterable[Place]) -> Place | None:
        """The innermost place in the application."""
        return next((place for place in places if self.owns(place.file)), None)
