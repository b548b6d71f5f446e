"""What the reactor builds on in asyncio's loop and transports, the underscored names included, in one place.

asyncio offers BaseEventLoop to be built on, and these names have been the same from 3.11 to 3.14, but it does not
promise them; so they are listed, and a test looks for each of them in the Python it runs on.
"""

from __future__ import annotations

import asyncio
from asyncio import events, transports
from collections.abc import Awaitable, Callable
from typing import Any

from kore.driver import Driver


class Base(asyncio.BaseEventLoop):
    """BaseEventLoop, with the types of what is used of it."""

    _ready: list[events.Handle]
    _debug: bool
    _closed: bool
    _stopping: bool
    _check_closed: Callable[[], None]
    _check_thread: Callable[[], None]
    _check_callback: Callable[[Any, str], None]
    _ensure_resolved: Callable[..., Awaitable[list[Any]]]
    _create_connection_transport: Callable[..., Awaitable[tuple[Any, Any]]]
    _check_sendfile_params: Callable[[Any, Any, int, int | None], None]
    _current_handle: events.Handle | None

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self._transports: dict[int, Any] = {}
        """The streams of the asyncio face, by fd."""


class FlowControl(transports._FlowControlMixin):
    """asyncio's flow control for writing transports, with the types of what is used of it."""

    _loop: Any
    _protocol_paused: bool
    _high_water: int
    _maybe_pause_protocol: Callable[[], None]
    _maybe_resume_protocol: Callable[[], None]

    def __init__(self, extra: dict[str, Any] | None, loop: Any) -> None:
        super().__init__(extra, loop)
