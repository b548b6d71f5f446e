"""Tells of a handler or callback that keeps the event loop from turning, where it is at that moment.

A thread looks at the loop's frames now and then; the loop itself does nothing for it. A turn is one call of
``Loop._run_once``, so the same frame seen twice is the same turn; a turn that waits for the kernel has the engine's
frame on top. A C function that keeps the interpreter's lock (a regular expression that backtracks) keeps this thread
waiting too, and is not seen.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from kore.reactor.loop import Loop
from kore.reactor.origin import library_file

if TYPE_CHECKING:
    from collections.abc import Iterator

SITES_TOLD_MAX = 1000
"""Each place is told of once; after so many the rest is silence: it is known by then that this application blocks."""

FRAMES_TOLD_MAX = 20

_ENGINES = ("kore.uring.", "kore.readiness.", "kore.bsd.")


class Watchdog:
    """Watches the loop that runs in the thread that makes this.

    `report` is called in a thread of its own with one line of text for each place that keeps a turn for longer than
    `seconds`; a turn is looked at twice in that time, so it is told of after one to one and a half times as long.
    """

    def __init__(self, seconds: float, report: Callable[[str], object]) -> None:
        self.seconds = seconds
        self.report = report
        self._watched = threading.get_ident()
        self._turn: FrameType | None = None
        self._since = 0.0
        self._told: set[CodeType] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more, and wait until nobody does."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self.seconds / 2):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        top = sys._current_frames().get(self._watched)
        turn = None if top is None or _waits(top) else _turn_of(top)
        if turn is None or turn is not self._turn:
            # Held until the next look, so that no later turn's frame can have its place; it keeps nothing else alive.
            self._turn = turn
            self._since = now
        elif now - self._since >= self.seconds and top is not None:
            self._tell(top, now - self._since)

    def _tell(self, top: FrameType, seconds: float) -> None:
        own = [frame for frame in _frames(top) if not _is_kore(frame)]
        if not own or len(self._told) >= SITES_TOLD_MAX:
            return
        # A library in front (a web framework mounted, a decorator) is the same for whatever it calls.
        first = next((f for f in reversed(own) if not library_file(f.f_code.co_filename)), own[-1]).f_code
        if first in self._told:
            return
        self._told.add(first)
        places = [f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno} {f.f_code.co_name}()" for f in own]
        if len(places) > FRAMES_TOLD_MAX:
            places[FRAMES_TOLD_MAX - 1 : -1] = [f"({len(places) - FRAMES_TOLD_MAX} more)"]
        self.report(
            f"{first.co_name}() has kept the event loop of this worker for {seconds * 1000:.0f} ms, and everybody else "
            f"waits: it is at {' < '.join(places)}; await, or use loop.run_in_executor()"
        )


def _frames(top: FrameType) -> Iterator[FrameType]:
    """The frames of the turn, newest first."""
    frame: FrameType | None = top
    while frame is not None and frame.f_code is not Loop._run_once.__code__:
        yield frame
        frame = frame.f_back


def _turn_of(top: FrameType) -> FrameType | None:
    frame: FrameType | None = top
    while frame is not None and frame.f_code is not Loop._run_once.__code__:
        frame = frame.f_back
    return frame


def _waits(top: FrameType) -> bool:
    return _module(top).startswith(_ENGINES)


def _is_kore(frame: FrameType) -> bool:
    return _module(frame).startswith("kore.")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
