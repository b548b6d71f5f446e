"""Whose code it is: kore's, a library's or the application's; and where in it an exception was raised."""

from __future__ import annotations

import os
import sysconfig
from typing import Final

_FOLDERS: Final = ("stdlib", "platstdlib", "purelib", "platlib")
_LIBRARIES: Final = ("<frozen ", *{sysconfig.get_path(name) + os.sep for name in _FOLDERS})
_PACKAGES: Final = tuple(os.sep + name + os.sep for name in ("site-packages", "dist-packages"))
_OWN: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def kore_file(name: str) -> bool:
    """Whether a file is of kore."""
    return name.startswith(_OWN)


def library_file(name: str) -> bool:
    """Whether a file is of Python's own or of an installed package."""
    return name.startswith(_LIBRARIES) or any(folder in name for folder in _PACKAGES)


def place_of(exc: BaseException) -> str:
    """Where `exc` was raised, as ", at app.py:15 index"; "" when it has been nowhere.

    That is the innermost line of the application that it came through, else the innermost of all.
    """
    found, at = None, exc.__traceback__
    mine = False
    while at is not None:
        file = at.tb_frame.f_code.co_filename
        own = not (kore_file(file) or library_file(file))
        if own or not mine:
            found, mine = at, own
        at = at.tb_next
    if found is None:
        return ""
    code = found.tb_frame.f_code
    return f", at {os.path.basename(code.co_filename)}:{found.tb_lineno} {code.co_name}"
