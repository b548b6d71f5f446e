"""Sends the body of a response as the application produces it: from an iterable, or from an async generator.

Either is asked for the next item when the client has taken those before, within a bound, and closed when the client
leaves. The first item is asked for by `Request.response` itself, before the head, so that what fails at once is the
handler's exception and a 500.

An async generator runs in a coroutine of its own, which ends with the response and not with the handler. When its first
step waits for something, the head goes before it, as clients of events expect.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from kore.http.request import STREAMING, Request
from kore.http.response import LAST_CHUNK, chunk
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.connection import HttpConnection

ITEMS_MAX: Final = 64
"""Items of a streamed body produced in one turn of the loop: the other connections want theirs."""

STREAM_BYTES: Final = 65536
"""Bytes of a streamed body produced in one turn; no more before the client has taken them."""

LABEL: Final = "pyhttp_iterobj_next"  # what kore-api.md section 4 calls the place where their exceptions are caught


def as_bytes(item: Any) -> bytes:
    """An item of a streamed body. TypeError for one of another type than str and what is like bytes."""
    return item.encode("utf-8", "surrogateescape") if isinstance(item, str) else bytes(memoryview(item))


class Chunks(Iterator[bytes]):
    """The items of a streamed body as bytes, empty ones left out. TypeError for an item of another type."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._iterator = iter(items)

    def __next__(self) -> bytes:
        while True:
            item = as_bytes(next(self._iterator))
            if item:
                return item

    def close(self) -> None:
        """Close the application's generator: GeneratorExit at its yield."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            try:
                close()
            except BaseException as error:  # noqa: BLE001 - the application's generator
                report_exception(LABEL, error)


class Produced(ABC):
    """What a body that is sent as it is produced has in common: how it takes the connection over, sends, and ends."""

    def __init__(self, connection: HttpConnection, request: Request, status: int) -> None:
        self.connection = connection
        self.request = request
        self.status = status
        self.body_bytes = 0
        self.chunked = request._prepared.head.minor == 1

    def take_over(self) -> None:
        """The head has been written: from now on the connection asks this for more."""
        connection = self.connection
        self.request._state = STREAMING
        connection.request = self.request
        connection.ready = False
        connection.client_address()  # for the log: it cannot be asked for once the client is gone
        connection.pump = self

    @abstractmethod
    def later(self) -> None:
        """The client has taken what there was: go on in the next turn."""

    @abstractmethod
    def close(self) -> None:
        """The client is gone."""

    def write(self, data: bytes) -> None:
        """Send one item, which is not empty: an empty chunk would be the last (RFC 9112 7.1)."""
        self.body_bytes += len(data)
        self.connection.write(chunk(data) if self.chunked else data)

    def finish(self, error: BaseException | None) -> None:
        """The body is over, or breaks off: then there is no last chunk, and the client sees it (RFC 9112 8)."""
        connection = self.connection
        if error is not None:
            report_exception(LABEL, error)
            connection.close_after = True
        elif self.chunked:
            connection.write(LAST_CHUNK)
        connection.streamed(self.request)


class Pump(Produced):
    """Sends a streamed body: as much as one turn may have, then more when the client has taken it."""

    def __init__(self, connection: HttpConnection, request: Request, status: int, items: Iterable[Any]) -> None:
        super().__init__(connection, request, status)
        self.chunks = Chunks(items)
        self.first = b""

    def begin(self) -> None:
        """Take the first item. Raises what the iterable raises."""
        self.first = next(self.chunks, b"")

    def started(self) -> None:
        """The head has been written: the body follows."""
        self.take_over()
        if self.first:
            self.write(self.first)
        self.later()

    def discard(self) -> None:
        """Nobody wants the items."""
        self.chunks.close()

    def later(self) -> None:
        """Go on in the next turn."""
        self.connection.server.loop.call_soon(self.run)

    def run(self) -> None:
        """Produce one turn's worth."""
        connection = self.connection
        if connection.pump is not self or connection.stuck_at is not None:
            return  # the client is gone, or does not take what there is: drained() has us go on
        size = 0
        for _ in range(ITEMS_MAX):
            try:
                item = next(self.chunks)
            except StopIteration:
                self.finish(None)
                return
            except BaseException as error:  # noqa: BLE001 - the application's iterator
                self.finish(error)
                return
            if connection.pump is not self:
                return  # the iterator closed the connection
            self.write(item)
            size += len(item)
            if size >= STREAM_BYTES:
                break
        self.later()

    def close(self) -> None:
        """The client is gone."""
        self.chunks.close()


class AsyncBody(Produced):
    """Sends what an asynchronous iterable produces. Raises what ``aiter()`` raises, TypeError for what is none."""

    def __init__(self, connection: HttpConnection, request: Request, status: int, items: AsyncIterable[Any]) -> None:
        super().__init__(connection, request, status)
        self._items = aiter(items)
        self._held: bytes | None = b""  # what comes before the head has been written; then None
        self._task: Any = None  # once it waits
        self._room: Any = None  # the future it waits for when enough has been produced
        self._turn_items = self._turn_bytes = 0
        self._over = False

    # --- for respond() -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask for the first item. Raises what the iterable raises before it waits for something."""
        server = self.connection.server
        self._task = server.loop.begin(self._produce())
        if self._task is not None:
            self._task.on_end = self._ended
            server.active += 1  # a coroutine of the application's that waits, as a handler does

    def started(self) -> None:
        """The head has been written: the body follows."""
        self.take_over()
        held, self._held = self._held, None
        if held:
            self.write(held)
        self.later()

    def discard(self) -> None:
        """Nobody wants the items: let the iterable clean up. It has not been asked for any."""
        try:
            self.connection.server.loop.begin(self._close_items())
        except BaseException as error:  # noqa: BLE001 - the application's iterable
            report_exception(LABEL, error)

    # --- for the connection --------------------------------------------------------------------------------

    def later(self) -> None:
        """The client has taken what there was: go on in the next turn."""
        self.connection.server.loop.call_soon(self._go_on)

    def close(self) -> None:
        """The client is gone."""
        self._over = True
        if self._task is not None:
            self._task.kill()

    # --- producing -----------------------------------------------------------------------------------------

    async def _produce(self) -> None:
        """Take items and send them, to the end."""
        try:
            async for item in self._items:
                data = as_bytes(item)
                if not data:
                    continue
                if self._held is not None:
                    self._held = data
                    await self._wait()
                else:
                    self.write(data)
                    if self._enough():
                        await self._wait()
        finally:
            await self._close_items()

    async def _close_items(self) -> None:
        aclose = getattr(self._items, "aclose", None)
        if aclose is not None:
            await aclose()

    def write(self, data: bytes) -> None:
        """Send one item, and count it for this turn."""
        self._turn_items += 1
        self._turn_bytes += len(data)
        super().write(data)

    def _enough(self) -> bool:
        """Whether no more is to be produced now: for the client's sake, or for that of the other connections.

        What was written in earlier turns counts too, which costs a slow generator one turn in sixty-four items.
        """
        full = self._turn_items >= ITEMS_MAX or self._turn_bytes >= STREAM_BYTES
        return full or self.connection.stuck_at is not None

    async def _wait(self) -> None:
        """Until the next turn, or the client has taken what there is."""
        loop = self.connection.server.loop
        self._room = loop.create_future()
        if self._held is None and self.connection.stuck_at is None:
            self.later()
        try:
            await self._room
        finally:
            self._room = None

    def _go_on(self) -> None:
        """There may be room."""
        connection = self.connection
        if self._over or connection.pump is not self or connection.stuck_at is not None:
            return  # the client is gone, or does not take what there is: drained() has us go on
        self._turn_items = self._turn_bytes = 0
        if self._task is None:
            self.finish(None)  # there was no item
        elif self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _ended(self, error: BaseException | None) -> None:
        """The coroutine ended."""
        server = self.connection.server
        server.active -= 1
        if not self._over:
            self.finish(error)
        if server.draining:
            server.check_drained()

    def finish(self, error: BaseException | None) -> None:
        """As it says above; and nothing goes on any more."""
        self._over = True
        super().finish(error)
