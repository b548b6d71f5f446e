"""The event loop: one driver, a queue of what is ready, a heap of timers, and the first step of every handler.

A turn waits for the kernel through `Driver.wait`, whose callbacks run the servers' handlers there and then, moves the
timers that are due to the ready queue, and runs what that queue held at that moment. It is a whole asyncio loop: the
parts of `asyncio.BaseEventLoop` that say what asyncio means (name resolution, executors, servers, asynchronous
generators) are used as they are, those that say how a loop runs are replaced here, because they are what costs time.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import base_events, events
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from kore.driver import Driver
from kore.reactor import tasks
from kore.reactor.connections import Connections
from kore.reactor.handles import Soon, Timer, TracedTimer, soon, traced_soon
from kore.reactor.sockets import Sockets
from kore.reactor.spare import ENDED, FirstSteps, already_told, first_steps
from kore.reactor.subprocesses import Subprocesses
from kore.reactor.tasks import Coroutine, OnEnd, Task, enter_task, leave_task, next_id, register_task

# A wait is never longer than this (seconds), so that no engine has to think about what its clock can hold.
_WAIT_MAX = 24 * 3600.0

# Cancelled timers are swept out of the heap when there are more than this many and they are over half of it: timeouts
# are mostly cancelled, and would otherwise stay until they are due.
_CANCELLED_MIN = 100


class Loop(Connections, Sockets, Subprocesses):
    """An asyncio event loop on a kore driver; it owns `driver` and closes it. One thread, one loop."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._ready = []  # a list, where asyncio has a deque: its front can be cut off at once (_run_once)
        self.set_debug(self._debug)  # what `_quicken` made appended to the deque
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_number = 0
        self._cancelled_timers = 0
        self.turn_time = 0.0
        """Seconds of the loop's clock at the last look at the timers; what repeating timers count from."""
        self._first_steps: FirstSteps | None = None
        self.trace_tasks(tasks.tracing)

    @property
    def driver(self) -> Driver:
        """The driver this loop runs on."""
        return self._driver

    # The turn.

    def run_forever(self) -> None:
        """Run until stop() is called."""
        previous = self._wake_on_signals()
        try:
            super().run_forever()
        finally:
            self._sleep_on_signals(previous)
            # What the last turn closed is closed for the others too, though no turn follows.
            self._driver.submit()

    def _run_once(self) -> None:
        # Called by asyncio's run_forever for every turn. Hot path: handles are run here and not by a method of theirs,
        # from a copy and not one by one from the queue, which took 0.1 us off each callback.
        ready = self._ready
        timers = self._timers
        timeout: float | None
        if ready or self._stopping:
            timeout = 0
        elif timers:
            timeout = self._until_next_timer()
        else:
            timeout = None
        first_steps = self._first_steps
        if first_steps is None:
            self._driver.wait(timeout)
        else:
            first_steps.enter()
            try:
                self._driver.wait(timeout)
            finally:
                first_steps.leave()
        if timers:
            self.turn_time = now = self.time()
            while timers and timers[0][0] <= now:
                timer = heapq.heappop(timers)[2]
                timer._scheduled = False
                if timer._cancelled:
                    self._cancelled_timers -= 1
                else:
                    ready.append(timer)
                del timer
        if self._debug:
            self._run_ready_slowly()
            return
        if not ready:
            return
        # Only what is here now: what these callbacks make ready has to let the kernel have its turn first. What other
        # threads and signals add after the copy stays: only what was copied goes.
        batch = ready.copy()
        del ready[:len(batch)]
        left = iter(batch)
        del batch
        for handle in left:
            try:
                handle._context.run(*handle._args)  # type: ignore[attr-defined]
            except (SystemExit, KeyboardInterrupt):
                ready[:0] = left
                raise
            except BaseException as exc:  # noqa: BLE001 - asyncio's rule: the exception handler hears of it
                self._report_handle(handle, exc)
        # The traceback of a coroutine that failed reaches back to this frame; it would hold the handle, as the copy
        # would, that holds the task that holds the traceback.
        del handle

    def _until_next_timer(self) -> float | None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)[2]._scheduled = False
            self._cancelled_timers -= 1
        if not timers:
            return None
        return min(max(0.0, timers[0][0] - self.time()), _WAIT_MAX)

    def _report_handle(self, handle: events.Handle, exc: BaseException) -> None:
        context = {"message": f"Exception in callback {handle!r}", "exception": exc, "handle": handle}
        if handle._source_traceback:  # type: ignore[attr-defined]
            context["source_traceback"] = handle._source_traceback  # type: ignore[attr-defined]
        self.call_exception_handler(context)

    def _run_ready_slowly(self) -> None:
        """Debug mode: run what is ready and warn of callbacks over slow_callback_duration (seconds)."""
        for _ in range(len(self._ready)):
            handle = self._ready.pop(0)
            if handle.cancelled():
                continue
            self._current_handle = handle
            started = self.time()
            try:
                handle._context.run(*handle._args)  # type: ignore[attr-defined]
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:  # noqa: BLE001 - as in _run_once
                self._report_handle(handle, exc)
            finally:
                self._current_handle = None
            taken = self.time() - started
            if taken >= self.slow_callback_duration:
                what = base_events._format_handle(handle)  # type: ignore[attr-defined]
                base_events.logger.warning("Executing %s took %.3f seconds", what, taken)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close the loop and its driver. Streams are closed without a word to their protocols. Idempotent."""
        if self.is_closed():
            return
        super().close()
        self._slow_down()
        self._timers.clear()
        self.trace_tasks(True)
        self._close_connections()
        self._driver.close()
        self._close_signals()

    # Callbacks.

    def set_debug(self, enabled: bool) -> None:
        """Debug mode: slower, and it complains of what is slow, never awaited or called in the wrong thread."""
        super().set_debug(enabled)
        if enabled:
            self._slow_down()
        else:
            self._quicken()

    def _quicken(self) -> None:
        # Of what waking a coroutine costs, 0.6 us, these save 0.1: a function of the instance that has the queue at
        # hand, and an answer that runs no Python for asyncio's futures, which ask for the debug mode when made.
        append = self._ready.append

        def call_soon(*call: Any, context: Context | None = None) -> events.Handle:
            handle: Soon = Soon()
            handle._args = call
            handle._context = copy_context() if context is None else context
            append(handle)
            return handle

        create_future = partial(asyncio.Future, loop=self)
        vars(self).update(call_soon=call_soon, get_debug=False.__bool__, create_future=create_future)

    def _slow_down(self) -> None:
        for name in ("call_soon", "get_debug", "create_future"):
            vars(self).pop(name, None)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> events.Handle:  # type: ignore[override]
        """Call `callback(*args)` in the next turn, after what was asked for before it."""
        # For debug mode and closed loops. Otherwise `_quicken` puts a quicker one in its place.
        self._check_closed()
        self._check_thread()
        self._check_callback(callback, "call_soon")
        handle = (traced_soon if self._debug else soon)((callback, *args), context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        """The same, from any thread or signal handler; ends the loop's wait."""
        self._check_closed()
        if self._debug:
            self._check_callback(callback, "call_soon_threadsafe")
        handle = (traced_soon if self._debug else soon)((callback, *args), context)
        self._ready.append(handle)
        self._driver.wake()
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        """Call `callback(*args)` after `delay` seconds."""
        if delay is None:
            raise TypeError("delay must not be None")
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        """Call `callback(*args)` when time() is `when`; those of one time in the order they were asked for."""
        if when is None:
            raise TypeError("when cannot be None")
        self._check_closed()
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "call_at")
        kind = TracedTimer if self._debug else Timer
        timer = kind(when, (callback, *args), self, copy_context() if context is None else context)
        # Tuples are compared in C; the number keeps the order of equal times and keeps handles from being compared.
        self._timer_number = number = self._timer_number + 1
        heapq.heappush(self._timers, (when, number, timer))
        return timer

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        # Called by Timer.cancel().
        if not handle._scheduled:  # type: ignore[attr-defined]
            return
        self._cancelled_timers += 1
        timers = self._timers
        if self._cancelled_timers > _CANCELLED_MIN and self._cancelled_timers * 2 > len(timers):
            for entry in timers:
                if entry[2]._cancelled:
                    entry[2]._scheduled = False
            timers[:] = [entry for entry in timers if entry[2]._scheduled]
            heapq.heapify(timers)
            self._cancelled_timers = 0

    def _write_to_self(self) -> None:
        # asyncio's executor machinery and run_forever's stop use this name.
        self._driver.wake()

    # Tasks.

    def start(self, coro: Coroutine, on_end: OnEnd | None = None) -> Task:
        """Run `coro` as a task: its first step comes after what is ready now. `on_end` hears of its end.

        Without `on_end` an exception it ends with goes to `report_exception`.
        """
        return self._start(coro, on_end, next_id())

    def _start(self, coro: Coroutine, on_end: OnEnd | None, number: int) -> Task:
        task = Task(self, coro, on_end, task_id=number)
        tasks.live[number] = task
        register_task(task)
        if tasks.tracing:
            tasks.trace_event(task, "created")
        self.call_soon(task._step, context=task._context)
        return task

    def adopt_pending(self) -> None:
        """Make this the loop of the process and start the tasks created before it was there, in their order."""
        tasks.process_loop = self
        pending, tasks.pending_tasks[:] = tasks.pending_tasks[:], []
        for number, coro in pending:
            self._start(coro, None, number)

    def begin(self, coro: Coroutine) -> Task | None:
        """Run the first step of `coro` right now, in a context and under an id of its own.

        None when it ended in that step; an exception it ended with is raised here. Else the task it has become, whose
        `on_end` the caller may set to hear of its end.
        """
        # The plain way, a task for each: while tasks are traced, outside of the driver's callbacks, and inside of
        # another task, which is not current for as long as this step takes. `trace_tasks` puts a quicker one before it.
        current = asyncio.current_task(self)
        if current is not None:
            leave_task(self, current)
        try:
            return self._begin(Task(self, coro, already_told, task_id=next_id()))
        finally:
            if current is not None:
                enter_task(self, current)

    def _begin(self, task: Task) -> Task | None:
        if tasks.tracing:
            tasks.trace_event(task, "created")
            tasks.trace_event(task, "running")
        enter_task(self, task)
        try:
            waited = task._context.run(next, task._coro.__await__(), ENDED)
        except BaseException as exc:
            leave_task(self, task)
            task._end(None, exc)
            raise
        leave_task(self, task)
        if waited is ENDED:
            task._end(None, None)
            return None
        task.on_end = None
        task._suspend_first(waited)
        return task

    def trace_tasks(self, traced: bool) -> None:
        """Begin the next coroutines so that their events are seen, or quickly."""
        self._first_steps = None if traced else first_steps(self)
        if self._first_steps is None:
            vars(self).pop("begin", None)
        else:
            vars(self)["begin"] = self._first_steps.begin
