"""Closing a coroutine in the middle of a wait, so that its clean-up may wait too.

``coroutine.close()`` raises GeneratorExit at the await and gives up on whatever awaits something in its clean-up: what
was to be released there stays taken. Libraries of asyncio do little else, a connection goes back to its pool by an
await; and it is CancelledError that they clean up for. So the frames are closed here one by one, from the innermost
out. Those of the application have GeneratorExit at their await, as close() would have it; where they wait for a library
that is cancelled first, as asyncio would do it. Most end at once; what waits is woken like any coroutine, and the next
frame has its turn when it has ended.
"""

from __future__ import annotations

import contextlib
import gc
from asyncio import CancelledError
from collections.abc import Iterator
from types import AsyncGeneratorType, CoroutineType
from typing import Any, Final

from kore.reactor import trace
from kore.reactor.origin import kore_file, library_file

DEPTH_MAX: Final = 1000
"""Frames looked at; what is deeper is closed with the last of them. Python's own bound on nested calls."""

_WRAPPER: Final = "coroutine_wrapper"  # of coroutine.__await__(): what is done to it is done to the coroutine
_OPAQUE: Final = frozenset({_WRAPPER, "async_generator_asend", "async_generator_athrow"})


class Unwinding:
    """What a task runs in the place of a coroutine that is being closed. It ends by raising GeneratorExit."""

    __slots__ = ("_frames", "library")

    def __init__(self, coro: Any) -> None:
        self._frames: list[Any] = []
        self.library = False  # the last frame is a library's, and all that it waits for are its own affair
        for frame in suspended(coro):
            self._frames.append(frame)
            if len(self._frames) > 1 and _of_library(frame):
                self.library = True
                break

    @property
    def cr_frame(self) -> Any:
        """The outermost frame that is left, for traces."""
        return getattr(self._frames[0], "cr_frame", None) if self._frames else None

    @property
    def cr_running(self) -> bool:
        """Whether one of the frames runs now."""
        return any(getattr(frame, "cr_running", False) or getattr(frame, "gi_running", False) for frame in self._frames)

    def begin(self) -> Any:
        """Begin to close: what the clean-up waits for first. Raises GeneratorExit when all has ended."""
        return self.throw(CancelledError() if self.library else GeneratorExit())

    def send(self, value: object) -> Any:
        """The clean-up's wait is over: what it waits for next."""
        return self._go_on(value, None)

    def throw(self, error: BaseException) -> Any:
        """The same, when the wait ended with `error`."""
        return self._go_on(None, error)

    def close(self) -> None:
        """Give up: nothing that is left may wait any more. Raises what close() of a coroutine does."""
        while self._frames:
            self._frames.pop().close()

    def _go_on(self, value: object, error: BaseException | None) -> Any:
        while self._frames:
            frame = self._frames[-1]
            try:
                return frame.send(value) if error is None else frame.throw(error)
            except (StopIteration, GeneratorExit, CancelledError) as end:
                end.__traceback__ = None  # it reaches back to this frame, and so to `error`: a cycle
            except BaseException as failure:  # noqa: BLE001 - as for close(): it is told, and the frames outside go on
                # A library may call a cancellation what it likes, and a task group groups it.
                if not self.library and not _says_closed(failure):
                    trace.report_exception("coroutine", failure)
            self._frames.pop()
            self.library = False
            error = GeneratorExit()
        raise GeneratorExit


def _says_closed(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup) and error.split((GeneratorExit, CancelledError))[1] is None


def suspended(coro: Any) -> Iterator[Any]:
    """What waits for each other, from `coro` to what waits for something else: coroutines, generators, async ones."""
    at = coro
    for _ in range(DEPTH_MAX):
        if type(at).__name__ != _WRAPPER:
            yield at
        at = _awaited(at)
        if at is None:
            return


def _awaited(at: Any) -> Any:
    """What `at` waits for, if that can be closed by itself."""
    inner = _behind(at)
    if isinstance(inner, CoroutineType):
        return inner
    if isinstance(inner, AsyncGeneratorType):
        return _closable(inner.ag_await)
    return _closable(getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None))


def _behind(at: Any) -> Any:
    """The coroutine or the generator that an opaque object stands for; only the collector is shown it."""
    if type(at).__name__ in _OPAQUE:
        for inner in gc.get_referents(at):
            if isinstance(inner, CoroutineType | AsyncGeneratorType):
                return inner
    return None


def _closable(inner: Any) -> Any:
    known = hasattr(inner, "cr_await") or hasattr(inner, "gi_yieldfrom") or type(inner).__name__ in _OPAQUE
    return inner if known else None


def _of_library(frame: Any) -> bool:
    """Whether a frame's code is neither the application's nor kore's; what has no code is compiled, and a library."""
    at = _behind(frame) or frame
    code = getattr(at, "cr_code", None) or getattr(at, "gi_code", None) or getattr(at, "ag_code", None)
    name = getattr(code, "co_filename", "")
    if kore_file(name) or name == contextlib.__file__:  # contextlib only calls the application's own
        return False
    return not name or library_file(name)
