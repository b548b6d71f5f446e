"""The life of an application in one worker (ASGI, "Lifespan"): started before the worker serves, ended after it has.

An application that knows nothing of this raises before it has asked for the first message, and serves all the same. One
that has asked and then fails does not serve: that it is told in one line is what the worker ends with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from kore.errors import StartError
from kore.http.asgi.exchange import Message
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.asgi.mount import Mount

STARTUP_SECONDS_MAX: Final = 50.0
"""Less than the parent waits for its workers, so that the application is named and not the worker."""

LOG_ERR: Final = 3

VERSIONS = {"version": "3.0", "spec_version": "2.0"}


class Lifespan:
    """One application, wherever and however often it is mounted."""

    def __init__(self, mounts: list[Mount], loop: Any, log: Callable[[int, str], object]) -> None:
        self.mounts = mounts
        self.name = mounts[0].name
        self.loop = loop
        self.log = log
        self.state: dict[str, Any] = {}
        self.asked = False  # the application takes part
        self.started = False
        self.stopping = False
        self.error: BaseException | None = None  # it has ended with
        self.failure: str | None = None  # it has said
        self.messages: asyncio.Queue[str] = asyncio.Queue(2)  # startup and shutdown
        self.answered: Any = None
        self.task: Any = None

    async def startup(self) -> None:
        """Let the application start. Raises StartError with the reason why it does not."""
        self.task = self.loop.create_task(self._run())
        await self._ask("startup", STARTUP_SECONDS_MAX)
        if self.failure is not None:
            raise StartError(f"ASGI application {self.name}: startup failed: {self.failure}")
        if self.asked and self.error is not None:
            report_exception("lifespan", self.error)
            raise StartError(f"ASGI application {self.name}: startup failed: {self.error!r}")
        self.started = True
        for mount in self.mounts:
            mount.state = self.state

    async def shutdown(self) -> None:
        """Let it end. Takes as long as it takes: who calls has a time for all of the end."""
        if self.task is None or self.task.done():
            return
        if not self.started:
            self.task.cancel()
            return
        self.stopping = True
        await self._ask("shutdown", None)
        if self.failure is not None:
            self.log(LOG_ERR, f"ASGI application {self.name}: shutdown failed: {self.failure}")
        elif self.error is not None:
            report_exception("lifespan", self.error)

    async def _ask(self, event: str, seconds: float | None) -> None:
        """Send the application an event, and wait for its answer or its end."""
        self.answered = self.loop.create_future()
        self.messages.put_nowait(f"lifespan.{event}")
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait((self.answered, self.task), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StartError(f"ASGI application {self.name}: {event} took more than {seconds} s") from None

    async def _run(self) -> None:
        scope: Message = {"type": "lifespan", "asgi": VERSIONS, "state": self.state}
        try:
            await self.mounts[0].app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - what it means depends on when it comes
            self.error = error
            if self.started and self.asked and not self.stopping:
                report_exception("lifespan", error)  # nobody waits for it now

    async def _receive(self) -> Message:
        self.asked = True
        return {"type": await self.messages.get()}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        _, _, outcome = kind.rpartition(".")
        if not kind.startswith("lifespan.") or outcome not in ("complete", "failed"):
            raise ValueError(f"{kind!r} is no message of a lifespan")
        if outcome == "failed":
            self.failure = str(message.get("message") or "it gave no reason")
        if not self.answered.done():
            self.answered.set_result(None)


class Lifespans:
    """Those of all applications of a worker."""

    def __init__(self, mounts: Iterable[Mount], loop: Any, log: Callable[[int, str], object]) -> None:
        by_application: dict[int, list[Mount]] = {}
        for mount in mounts:
            by_application.setdefault(id(mount.given), []).append(mount)
        self.mounts = [mount for group in by_application.values() for mount in group]
        self.all = [Lifespan(group, loop, log) for group in by_application.values()]

    async def startup(self) -> None:
        """Start them one after the other. Raises StartError."""
        for lifespan in self.all:
            await lifespan.startup()

    async def shutdown(self) -> None:
        """End them in the opposite order."""
        for lifespan in reversed(self.all):
            await lifespan.shutdown()

    def cancel(self) -> list[Any]:
        """The worker ends and waits no longer: cancel the requests that still run. Their tasks."""
        return [task for mount in self.mounts for task in mount.cancel()]
