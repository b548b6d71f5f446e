"""Prerequests: what an application has called before the handler of every request, as a guard or to prepare it.

They become part of the handler when routes are made, so that an application without them pays nothing. A chain of plain
functions stays plain: no coroutine is made for them, and one that is awaited takes the rest of the chain with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import CoroutineType
from typing import Any

from kore.http.request import Request

Function = Callable[..., Any]


def guarded(handler: Function, prerequests: Sequence[Function]) -> Function:
    """`handler` with `prerequests` before it: each is called with the request, once and in order.

    One that returns exactly False, awaited where it is a coroutine, ends the request: neither the others nor the
    handler are called, and it should have answered. So does one that raises; then the answer is 500 unless there was
    one. Source: kore-api.md 10.2 and section 4.
    """
    if not prerequests:
        return handler
    chain = tuple(prerequests)

    @wraps(handler, (), ())
    def handle(request: Request, *captures: str) -> Any:
        for number, function in enumerate(chain):
            try:
                result = function(request)
            except BaseException as error:  # noqa: BLE001 - as for a handler: the request fails, not the worker
                request._failed(error, "preprocess")
                return None
            if type(result) is CoroutineType:
                return go_on(request, captures, number, result)
            if result is False:
                return None
        return handler(request, *captures)

    async def go_on(request: Request, captures: tuple[str, ...], number: int, result: Any) -> None:
        """From the first prerequest that is awaited."""
        # What they raise is this coroutine's end, and so the request's, like that of any handler.
        if await result is False:
            return
        for function in chain[number + 1 :]:
            result = function(request)
            if type(result) is CoroutineType:
                result = await result
            if result is False:
                return
        result = handler(request, *captures)
        if type(result) is CoroutineType:
            await result

    return handle
