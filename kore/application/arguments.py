"""Checks of arguments that several declarations share, so that the same mistake gets the same words.

The C platform treats a keyword of the wrong type as not given, which is how ``tls=0`` left TLS on. Here everything
that has one sensible reading is taken (kore-api.md 1.3), and everything else is a TypeError or ValueError.
"""

from __future__ import annotations

import os
from typing import Any


def text(where: str, value: Any) -> str:
    """A str that is not empty and has no NUL; `where` names the argument. Raises TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{where} is a str, not {type(value).__name__}")
    if not value or "\0" in value:
        raise ValueError(f"{where} is empty or has a NUL in it")
    return str(value)


def path(where: str, value: Any) -> str:
    """The same for a path, which may be an os.PathLike."""
    return text(where, os.fspath(value) if isinstance(value, os.PathLike) else value)


def paths(where: str, value: Any, most: int) -> tuple[str, ...]:
    """A path, or a tuple or list of up to `most`. Raises TypeError, ValueError."""
    if not isinstance(value, (tuple, list)):
        return (path(where, value),)
    if not 1 <= len(value) <= most:
        raise ValueError(f"{where} is a path, or a tuple of up to {most}, not of {len(value)}")
    return tuple(path(where, one) for one in value)


def boolean(where: str, value: Any) -> bool:
    """A bool, or a number or word that means one. Raises TypeError when it means none."""
    if isinstance(value, (bool, int)):
        return bool(value)
    word = value.lower() if isinstance(value, str) else None
    if word in ("yes", "true", "on", "1"):
        return True
    if word in ("no", "false", "off", "0"):
        return False
    raise TypeError(f"{where} is True or False, not {value!r}")


def integer(where: str, value: Any, low: int, high: int) -> int:
    """An int or its decimal text, from `low` to `high`. Raises TypeError, ValueError."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(high))
    if isinstance(value, bool) or not (isinstance(value, int) or digits):
        raise TypeError(f"{where} is an integer from {low} to {high}, not {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{where} is an integer from {low} to {high}, not {value!r}")
    return number
