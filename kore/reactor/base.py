"""What the reactor builds on in `asyncio.BaseEventLoop`, the underscored names included, in one place.

asyncio offers BaseEventLoop to be built on, and these names have been the same from 3.11 to 3.14, but it does not
promise them; so they are listed, and a test looks for each of them in the Python it runs on.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from kore.driver import Driver


class Base(asyncio.BaseEventLoop):
    """BaseEventLoop, with the types of what is used of it."""

    _ready: deque[events.Handle]
    _debug: bool
    _closed: bool
    _stopping: bool
    _check_closed: Callable[[], None]
    _check_thread: Callable[[], None]
    _check_callback: Callable[[Any, str], None]
    _ensure_resolved: Callable[..., Awaitable[list[Any]]]
    _create_connection_transport: Callable[..., Awaitable[tuple[Any, Any]]]

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
