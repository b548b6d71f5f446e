"""The types of the public objects: their shown names, and that only their factories make them.

The reference shows ``kore.lock`` as the type of what ``kore.lock()`` returns, and calling an exported type object
(``kore.pylock()``) is a TypeError. Both are said once here.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def public(name: str) -> Any:
    """A class decorator: show the class as ``kore.<name>`` and refuse to make one by calling it."""

    def refuse(_cls: type, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError(f"cannot create 'kore.{name}' instances")

    def mark(cls: type[T]) -> type[T]:
        cls.__module__ = "kore"
        cls.__name__ = cls.__qualname__ = name
        setattr(cls, "__new__", refuse)
        return cls

    return mark


def made(cls: type[T]) -> T:
    """A bare instance of a `public` class, for its factory to fill in."""
    return object.__new__(cls)
