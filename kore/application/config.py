"""``kore.config``: the object whose attributes are the options.

An assignment is checked at once, so that the traceback points at the line that is wrong; nothing is done with the
value before the application is declared whole, so that the order of assignments does not matter. Kore-api.md
section 6 has the rules; where the C platform ends the process, this raises.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kore.application.settings import OPTIONS, REPEATED_MAX, Settings, check_together, option_named
from kore.errors import ConfigurationError


class Config:
    """The options of the application that is being declared.

    Reading gives the current value, which is the default until another is assigned. Raises UnknownOptionError (an
    AttributeError and a ValueError) for a name that does not exist, ConfigurationError (a ValueError) for a value
    that is not allowed, and RuntimeError for any assignment after the start.
    """

    __slots__ = ("_frozen", "_origins", "_values")
    _frozen: bool
    _origins: dict[str, str]
    _values: dict[str, Any]

    def __init__(self) -> None:
        object.__setattr__(self, "_values", {})
        object.__setattr__(self, "_origins", {})
        object.__setattr__(self, "_frozen", False)

    def __setattr__(self, name: str, value: object) -> None:
        if self._frozen:
            raise RuntimeError(f"kore.config.{name}: options can't be changed after the start")
        option = option_named(name)
        frame = sys._getframe(1)
        where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if not option.repeatable:
            self._values[name] = option.parse(value)
            self._origins[name] = where
            return
        # A repeatable option collects: one value an assignment, as in the reference, or a list of them.
        items = value if isinstance(value, (list, tuple)) else (value,)
        together = (*self._values.get(name, ()), *(option.parse(item) for item in items))
        if len(together) > REPEATED_MAX:
            raise ConfigurationError(f"kore.config.{name}: more than {REPEATED_MAX} values; allowed are fewer")
        self._values[name] = together
        before = self._origins.get(name)
        self._origins[name] = f"{before}, {where}" if before and where not in before else where

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # What copy, pickle and inspect look for has nothing to do with options.
            raise AttributeError(name)
        option = option_named(name)
        return self._values.get(name, option.default)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"kore.config.{name}: options can't be deleted; assign another value")

    def __dir__(self) -> list[str]:
        return list(OPTIONS)

    def __repr__(self) -> str:
        changed = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"<kore.config {changed or 'as by default'}>"


Config.__module__ = "kore"
Config.__name__ = Config.__qualname__ = "config"


def assigned(config: Config) -> frozenset[str]:
    """The names of the options that were assigned to: a default is not a wish."""
    return frozenset(config._values)


def origin(config: Config, name: str) -> str | None:
    """Where the option was assigned, as "app.py:12"; None where the default stands."""
    return config._origins.get(name)


def snapshot(config: Config) -> Settings:
    """The options as one frozen record; ConfigurationError when some do not go together."""
    settings = Settings(**config._values)
    check_together(settings)
    return settings


def freeze(config: Config) -> None:
    """From now on every assignment raises RuntimeError."""
    object.__setattr__(config, "_frozen", True)


def reset(config: Config) -> None:
    """Forget every assignment, frozen or not: what tests do between two applications."""
    config._values.clear()
    config._origins.clear()
    object.__setattr__(config, "_frozen", False)
