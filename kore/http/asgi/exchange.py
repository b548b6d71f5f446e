"""What all exchanges with an ASGI application have in common: its waits, and that it may outlive its client.

An application of another framework is not killed when its client leaves, as kore's own handlers are: ASGI has it told
by a message and by what `send` raises, and it may have tasks of its own to end in order. Until it ends it counts as a
running handler, whose number is limited.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from kore.reactor import trace

if TYPE_CHECKING:
    from kore.http.asgi.mount import Mount
    from kore.http.connection import HttpConnection
    from kore.http.request import Request

Message = dict[str, Any]

TURN_BYTES: Final = 65536
"""Bytes an application may send before the loop turns: only then it shows whether the client takes them."""

CAUSES_MAX: Final = 32
"""How far the causes of an exception are followed."""

FRAMES_MAX: Final = 24
"""Frames of a traceback that are logged, the innermost ones: frameworks nest deeply."""

LOG_ERR: Final = 3


class ClientGoneError(OSError):
    """What `send` raises when the client has left (ASGI, "Disconnected Client"). The server does not report it."""


class Turn:
    """Awaited, it lets the loop turn once."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class Exchange:
    """One request or one WebSocket, between its connection and an application."""

    # Class attributes are the defaults, as with Request: an instance stores only what differs.
    running = False  # the application has been called and has not ended
    gone = False  # the client has left, or nothing is sent to it any more
    task: Any = None  # the application's, once it has been suspended
    unflushed = 0  # bytes sent since the loop turned

    def __init__(self, mount: Mount, request: Request) -> None:
        self.mount = mount
        self.request = request
        self.connection: HttpConnection = request._connection
        self.waiters: list[Any] = []

    def suspended(self, task: Any) -> None:
        """Told by the connection: the application waits for something."""
        self.task = task
        self.mount.suspended.add(self)

    def left(self) -> None:
        """Told by the connection: the client has left. May be told more than once."""
        self.gone = True
        self.wake()

    async def call(self, scope: Message, receive: Any, send: Any) -> None:
        """Run the application to its end. Raises what it raises, but for what is only its client's leaving."""
        self.running = True
        try:
            await self.mount.app(scope, receive, send)
        except BaseException as error:
            if not (self.gone and self._excused(error)):
                _log_traceback(error)
                raise
        finally:
            self.running = False
            self.mount.suspended.discard(self)

    def _excused(self, error: BaseException) -> bool:
        """Whether `error` only says that the client has left, or that this worker ends."""
        # Frameworks turn the message of a disconnect into an exception that nobody need catch. There is no class that
        # they share, but a way to call it: ClientDisconnect, WebSocketDisconnect, RequestAborted.
        name = type(error).__name__
        return "Disconnect" in name or name == "RequestAborted" or self.mount.cancelled or _caused_by_leaving(error)

    def wake(self) -> None:
        """Something has changed: whoever waits looks again."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, pull: Callable[[], object] | None = None) -> None:
        """Wait until something has changed, perhaps by what `pull` does."""
        waiter = self.connection.server.loop.create_future()
        self.waiters.append(waiter)
        try:
            if pull is not None:
                pull()
            await waiter
        finally:
            self.waiters.remove(waiter)


def _log_traceback(error: BaseException) -> None:
    """What an application's developer looks for first. Who has set a tracer gets it there."""
    if trace._tracer is None and not isinstance(error, GeneratorExit):
        for text in traceback.format_exception(error, limit=-FRAMES_MAX):
            for line in text.splitlines():
                trace.log(LOG_ERR, line)


def _caused_by_leaving(error: BaseException | None, depth: int = CAUSES_MAX) -> bool:
    """Whether `error`, or what it came from, is the one `send` raised."""
    while error is not None and depth:
        if isinstance(error, ClientGoneError):
            return True
        if isinstance(error, BaseExceptionGroup):
            return all(_caused_by_leaving(inner, depth - 1) for inner in error.exceptions)
        error = error.__cause__ or error.__context__
        depth -= 1
    return False


def header_pairs(headers: Any) -> list[tuple[str, str]]:
    """An application's header fields as text; not looked into yet. Raises TypeError for what are no pairs of bytes."""
    pairs = []
    for name, value in headers:
        if not isinstance(name, bytes) or not isinstance(value, bytes):
            raise TypeError(f"ASGI header {name!r}: {value!r}: name and value are bytes")
        pairs.append((name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")))
    return pairs
