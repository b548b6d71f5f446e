"""Threads for what may wait for a disk: a slow disk shall slow down those who write to it, and nobody else.

Regular files have no readiness to wait for. So writing, removing and closing them are jobs here, whose ends are told on
the loop. The threads are few, made when first needed, and die with the process whatever they wait for.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

from kore.reactor.trace import report_exception

THREADS_MAX: Final = 2
"""One for a job that takes long, such as freeing the blocks of a large file, and one for the others meanwhile."""

Job = Callable[[], object]
Done = Callable[[OSError | None], object]


class Disk:
    """The threads of one worker. What waits in their queue is bounded by its users: one job for each body."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._queue: SimpleQueue[tuple[Job, Done]] = SimpleQueue()
        self._threads = 0
        self._jobs = 0  # queued or running

    def run(self, job: Job, done: Done) -> None:
        """Run `job` in a thread; then, on the loop, ``done(None)``, or with the OSError it raised."""
        self._jobs += 1
        if self._jobs > self._threads and self._threads < THREADS_MAX:
            self._start_thread()
        if self._threads:
            self._queue.put((job, done))
        else:  # there are no threads to be had: better here than not at all
            self._loop.call_soon(self._told, done, attempt(job))

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name="disk", daemon=True).start()
        except RuntimeError:
            return  # as many as this user may have
        self._threads += 1

    def _work(self) -> None:
        while True:
            job, done = self._queue.get()
            error = attempt(job)
            try:
                self._loop.call_soon_threadsafe(self._told, done, error)
            except RuntimeError:
                return  # the loop is closed: the worker ends

    def _told(self, done: Done, error: OSError | None) -> None:
        self._jobs -= 1
        done(error)


def attempt(job: Job) -> OSError | None:
    """Run a job; what it failed with. A defect of ours counts as an error of the disk, and is reported."""
    try:
        job()
    except OSError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the thread goes on
        report_exception("disk", error)
        return OSError(errno.EIO, f"{type(error).__name__}: {error}")
    return None
