"""The gate of a route: ``on_headers`` and authentication, asked when the head is there and before a body is read.

So nobody uploads a gigabyte to be told 403. A gate becomes part of its route when routes are made: for a request
without a body it is one more function before the handler, and a route without one never hears of it. A request with a
body waits before its gate, and what it sends meanwhile is held back (`Waiting`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol

from kore.http.cookies import find_cookie
from kore.http.redirects import escaped
from kore.http.request import OPEN, Request
from kore.reactor.trace import report_exception

if TYPE_CHECKING:
    from kore.http.input import Input

Gate = Callable[..., Any]
"""Called with a request and its captures: True, it may go on; False, it is over; or a coroutine that returns either."""

LOG_WARNING = 4


class Credentials(Protocol):
    """Who may use a route: `verify(req, value)` decides on the value of the cookie or header `name`."""

    @property
    def kind(self) -> str:
        """"cookie" or "header"."""

    @property
    def name(self) -> str:
        """Of the cookie, exactly; of the header, in any case."""

    @property
    def verify(self) -> Callable[..., Any]:
        """Exactly True passes."""

    @property
    def redirect(self) -> str | None:
        """Where a client without permission is sent; None: 403."""


def gate_of(auth: Credentials | None, on_headers: Callable[..., Any] | None) -> Gate | None:
    """The gate that asks `on_headers` first and then checks `auth`; None when there is neither."""
    if on_headers is None:
        return None if auth is None else _auth_step(auth)
    first = _headers_step(on_headers)
    if auth is None:
        return first
    second = _auth_step(auth)

    def gate(request: Request, *captures: str) -> Any:
        passed = first(request, *captures)
        if type(passed) is CoroutineType:
            return go_on(request, passed)
        return second(request) if passed else False

    async def go_on(request: Request, passed: Any) -> Any:
        if not await passed:
            return False
        allowed = second(request)
        return await allowed if type(allowed) is CoroutineType else allowed

    return gate


def _headers_step(function: Callable[..., Any]) -> Gate:
    """``on_headers(req, *captures)``: False, or an answer, ends the request (kore-api.md 8.6)."""

    def step(request: Request, *captures: str) -> Any:
        try:
            result = function(request, *captures)
        except BaseException as error:  # noqa: BLE001 - as for a handler: the request fails, not the worker
            request._failed(error, "python_runtime_http_request")
            return False
        if type(result) is CoroutineType:
            return awaited(request, result)
        return result is not False and request._state == OPEN

    async def awaited(request: Request, result: Any) -> bool:
        return await result is not False and request._state == OPEN

    return step


def _auth_step(auth: Credentials) -> Gate:
    """Authentication (kore-api.md 8.5): exactly True passes, everything else is answered with 302 or 403."""
    name, verify = auth.name, auth.verify
    redirect = None if auth.redirect is None else escaped(auth.redirect)
    find = find_cookie if auth.kind == "cookie" else Request.request_header

    def step(request: Request, *_captures: str) -> Any:
        value = find(request, name)
        if value is None:
            return refuse(request)
        try:
            result = verify(request, value)
        except BaseException as error:  # noqa: BLE001 - who cannot be verified is not let in
            report_exception("python_runtime_validator", error)
            return refuse(request)
        if type(result) is CoroutineType:
            return awaited(request, result)
        return judge(request, result)

    async def awaited(request: Request, result: Any) -> bool:
        # What it raises is this coroutine's end and one 500, as the table in kore-api.md section 4 has it.
        return judge(request, await result)

    def judge(request: Request, result: object) -> bool:
        if request._state != OPEN:
            return False  # it has answered itself
        if result is True:
            return True
        if result is not False:
            text = f"{request!r}: auth: verify returned {type(result).__name__}, which is neither True nor False"
            request._connection.server.log(LOG_WARNING, text)
        return refuse(request)

    def refuse(request: Request) -> bool:
        if redirect is None:
            request.response(403, None)
        else:
            request.response_header("location", redirect)
            request.response(302, None)
        return False

    return step


def gated(gate: Gate, handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler` behind `gate`, for requests that have no body to be read in between."""

    @wraps(handler, (), ())
    def handle(request: Request, *captures: str) -> Any:
        passed = gate(request, *captures)
        if type(passed) is CoroutineType:
            return go_on(request, captures, passed)
        return handler(request, *captures) if passed else None

    async def go_on(request: Request, captures: tuple[str, ...], passed: Any) -> None:
        if await passed:
            result = handler(request, *captures)
            if type(result) is CoroutineType:
                await result

    return handle


class Waiting:
    """The reading of a request, waiting for a coroutine of the application.

    `then(request, verdict)` is called when that has ended, with what it returned, or with False when it raised; not at
    all when the client has gone meanwhile.
    """

    __slots__ = ("connection", "request", "then", "verdict")

    def __init__(
        self, connection: Input, request: Request, then: Callable[[Request, object], object]
    ) -> None:
        self.connection = connection
        self.request = request
        self.then = then
        self.verdict: object = False

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run its first step; `then` is called here when that was all of it."""
        connection, server = self.connection, self.connection.server
        if server.active >= server.request_limit:
            coroutine.close()
            connection.respond(self.request, 503, None)
        else:
            try:
                task = server.loop.begin(self._run(coroutine))
            except BaseException as error:  # noqa: BLE001 - as for a handler
                connection.failed(self.request, error, "coroutine")
            else:
                if task is not None:
                    task.on_end = self._ended
                    server.active += 1
                    connection.wait_for(self.request, task)
                    return
        if connection.request is self.request:
            self.then(self.request, self.verdict)

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.verdict = await coroutine

    def _ended(self, error: BaseException | None) -> None:
        connection = self.connection
        connection.server.active -= 1
        if error is not None:
            connection.failed(self.request, error, "coroutine")
        if connection.request is self.request and not connection.gone:
            connection.task = None
            self.then(self.request, self.verdict)
        else:
            connection.over(self.request)
        if connection.server.draining:
            connection.server.check_drained()
