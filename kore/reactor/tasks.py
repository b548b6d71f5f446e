"""A coroutine being run: kore's Task, and the public functions that create, name and kill tasks.

A Task is an asyncio future with the whole public face of `asyncio.Task`, so current_task(), timeouts, task groups,
cancellation and anyio work in it. It is not `asyncio.Task` because a server needs three things that one cannot do:
to run its first step at once, to be closed in the middle of a wait by ``GeneratorExit`` while the caller looks on, and
to be one recycled object for the many handlers that never wait (`kore.reactor.loop.Loop.begin`).
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import types
import weakref
from asyncio import events
from asyncio import tasks as asyncio_tasks
from collections import abc
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from kore.reactor import trace
from kore.reactor.unwinding import Unwinding

if TYPE_CHECKING:
    from kore.reactor.locks import PyLock
    from kore.reactor.loop import Loop

# asyncio documents these for loops and tasks that are not its own.
enter_task: Callable[[Any, Any], None] = asyncio_tasks._enter_task
leave_task: Callable[[Any, Any], None] = asyncio_tasks._leave_task
register_task: Callable[[Any], None] = asyncio_tasks._register_task

Coroutine = abc.Coroutine[Any, Any, Any]
OnEnd = Callable[[BaseException | None], object]
"""Hears once of the end of a task: None, or the exception it ended with (GeneratorExit when it was killed)."""

CLEANUP_SECONDS_MAX = 10.0
"""What a killed coroutine is given for a clean-up that waits."""

_NOTHING: Any = object()

_TASK_ID_MASK = 2**64 - 1  # the reference's ids are unsigned 64-bit numbers that wrap

next_id: Callable[[], int] = itertools.count().__next__
"""One counter per process; every coroutine that is begun or created takes a number, from 0 on."""

live: dict[int, Task] = {}
"""Every task that waits for something, by id. This is the reference that keeps it alive."""

_foreign: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Ids of asyncio's own tasks, given when somebody asks."""

pending_tasks: list[tuple[int, Coroutine]] = []
"""Tasks created before a loop runs: in the parent, to be run once in every worker."""

process_loop: Loop | None = None
"""The loop this worker is about to run; task_create and timer work on it before it runs."""


class Task(asyncio.Future[Any]):
    """One coroutine, run a step at a time on a `Loop`. Made by `Loop.start` and `Loop.begin` only.

    Its result is the coroutine's. `kill` ends it at once; `cancel` is asyncio's.
    """

    __slots__ = (
        "_acquiring",
        "_begun",
        "_context",
        "_coro",
        "_coroname",
        "_fut_waiter",
        "_id",
        "_kept",
        "_locks",
        "_must_cancel",
        "_name",
        "_num_cancels_requested",
        "on_end",
    )

    def __init__(self, loop: Loop, coro: Coroutine | None, on_end: OnEnd | None = None, *, task_id: int = -1) -> None:
        super().__init__(loop=loop)
        self._coro: Any = coro
        self._context: Context = copy_context()
        self._id = task_id
        self.on_end = on_end
        self._fut_waiter: Any = None
        self._must_cancel = False
        self._num_cancels_requested = 0
        self._name: str | None = None
        self._coroname: str | None = None
        self._locks: set[PyLock] | None = None
        self._acquiring: weakref.ref[Any] | None = None
        # Of a spare task (kore.reactor.spare): what tells its coroutine and context; itself, once somebody spoke to it.
        self._begun: Any = None
        self._kept: Any = None

    def __repr__(self) -> str:
        state = "finished" if self.done() else "pending"
        return f"<kore.Task {state} name={self.get_name()!r} coro={self._coro!r} wait_for={self._fut_waiter!r}>"

    # The face of asyncio.Task.

    def get_coro(self) -> Any:
        """The coroutine this task runs."""
        return self._coro

    def get_context(self) -> Context:
        """The context its steps run in."""
        return self._context

    def get_name(self) -> str:
        """The name given by `set_name`, else one made of the id."""
        self._keep()
        return f"kore-{self._id}" if self._name is None else self._name

    def set_name(self, value: object) -> None:
        """Name the task for asyncio's eyes; kore.coroname names it for traces."""
        self._name = str(value)

    def set_result(self, result: object, /) -> NoReturn:  # noqa: ARG002
        """Always raises: a task's result is its coroutine's."""
        raise RuntimeError("Task does not support set_result operation")

    def set_exception(self, exception: object, /) -> NoReturn:  # noqa: ARG002
        """Always raises: a task's exception is its coroutine's."""
        raise RuntimeError("Task does not support set_exception operation")

    def cancel(self, msg: Any | None = None) -> bool:
        """Throw CancelledError into the coroutine soon; False when it has ended. As asyncio.Task.cancel."""
        self._log_traceback = False
        if self.done():
            return False
        self._num_cancels_requested += 1
        if self._fut_waiter is not None and self._fut_waiter.cancel(msg=msg):
            return True
        self._must_cancel = True
        self._cancel_message = msg
        return True

    def cancelling(self) -> int:
        """How many cancel() calls were not taken back by uncancel()."""
        return self._num_cancels_requested

    def uncancel(self) -> int:
        """Take one cancel() back; how many are left."""
        if self._num_cancels_requested > 0:
            self._num_cancels_requested -= 1
            if self._num_cancels_requested == 0 and sys.version_info >= (3, 13):
                self._must_cancel = False
        return self._num_cancels_requested

    def get_stack(self, *, limit: int | None = None) -> list[types.FrameType]:
        """The suspended coroutine's frames, oldest first, at most the newest `limit`."""
        frames: list[types.FrameType] = []
        at = self._coro
        while at is not None:
            frame = getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None) or getattr(at, "ag_frame", None)
            if frame is None:
                break
            frames.append(frame)
            at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
        return frames if limit is None else frames[-limit:]

    def print_stack(self, *, limit: int | None = None, file: TextIO | None = None) -> None:
        """Print what `get_stack` gives."""
        out = sys.stderr if file is None else file
        print(f"Stack for {self!r} (most recent call last):", file=out)
        for frame in self.get_stack(limit=limit):
            print(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}', file=out)

    # Running.

    def _keep(self) -> None:
        """Be this coroutine's task only. A task that is no spare one always is."""

    def _step(self, exc: BaseException | None = None) -> None:
        """Run the coroutine to its next wait, or its end. Called by the loop, in the task's context."""
        if self.done():
            return  # killed after it was woken
        coro = self._coro
        loop = self._loop
        if self._must_cancel:
            if not isinstance(exc, asyncio.CancelledError):
                exc = self._make_cancelled_error()  # type: ignore[attr-defined]
            self._must_cancel = False
        self._fut_waiter = None
        enter_task(loop, self)
        try:
            waited = coro.send(None) if exc is None else coro.throw(exc)
        except StopIteration as stop:
            leave_task(loop, self)
            self._end(stop.value, None)
        except BaseException as error:  # noqa: BLE001 - whatever a coroutine ends with is its result
            leave_task(loop, self)
            self._end(None, error)
            del self, exc  # the traceback holds this frame: no cycle of task, exception and frame
        else:
            leave_task(loop, self)
            self._wait_for(waited)

    def _wait_for(self, waited: Any) -> None:
        """The coroutine yielded `waited`: be woken when it is done."""
        blocking = getattr(waited, "_asyncio_future_blocking", None)
        if blocking and waited is not self and waited.get_loop() is self._loop:
            waited._asyncio_future_blocking = False
            waited.add_done_callback(self._wakeup, context=self._context)
            self._fut_waiter = waited
            if self._must_cancel and waited.cancel(msg=self._cancel_message):
                self._must_cancel = False
        elif waited is None:
            self._loop.call_soon(self._step, context=self._context)
        else:
            if blocking is None:
                text = f"Task got bad yield: {waited!r}"
            elif not blocking:
                text = f"yield was used instead of yield from in {self!r} with {waited!r}"
            elif waited is self:
                text = f"Task cannot await on itself: {self!r}"
            else:
                text = f"{self!r} got Future {waited!r} attached to a different loop"
            self._loop.call_soon(self._step, RuntimeError(text), context=self._context)

    def _wakeup(self, future: Any) -> None:
        try:
            future.result()
        except BaseException as exc:  # noqa: BLE001 - it belongs to the coroutine
            self._step(exc)
        else:
            self._step()

    def _suspend_first(self, waited: Any) -> None:
        """The first step of a begun coroutine ended in a wait: from now on this is a task like others."""
        live[self._id] = self
        register_task(self)
        self._wait_for(waited)

    def _end(self, value: object, error: BaseException | None) -> None:
        """The coroutine is over, with `value` or by `error`: free what it held and tell who wants to know."""
        live.pop(self._id, None)
        if self._locks:
            for lock in list(self._locks):
                lock._owner_ended(self)
        if error is None:
            super().set_result(value)
        elif isinstance(error, asyncio.CancelledError):
            super().cancel(msg=self._cancel_message)
        else:
            super().set_exception(error)
            self._log_traceback = False  # reported below, or by on_end
        on_end = self.on_end
        if on_end is not None:
            self.on_end = None
            try:
                on_end(error)
            except BaseException as exc:  # noqa: BLE001 - the loop goes on
                trace.report_exception("coroutine", exc)
        elif error is not None and not isinstance(error, asyncio.CancelledError | GeneratorExit):
            trace.report_exception("coroutine", error)

    def kill(self, event: str = "deleted") -> None:
        """Close the coroutine now: GeneratorExit at its await, its clean-up run, its pending wait cancelled.

        `event` is what traces call it: ``killed`` by task_kill(), ``deleted`` when it only has nobody left to run for.
        A clean-up that waits for something goes on as this task, for CLEANUP_SECONDS_MAX; killed again it is given up.
        Raises RuntimeError when it is the one running. A task that has ended is left alone.
        """
        if self.done():
            return
        loop = self._loop
        current = asyncio.current_task(loop)
        if current is cast("Any", self) or self._coro.cr_running:
            raise RuntimeError("a coroutine cannot kill itself")
        waiter = self._fut_waiter
        if waiter is not None:
            self._fut_waiter = None
            waiter.remove_done_callback(self._wakeup)
            waiter.add_done_callback(_heard)
            waiter.cancel()
        if tracing:
            trace_event(self, event)
        outside = events._get_running_loop() is None
        if outside:
            # The clean-up asks who runs (a lock being released does), also when its loop has stopped.
            events._set_running_loop(loop)
        if current is not None:
            leave_task(loop, current)
        enter_task(loop, self)
        try:
            waited = self._close()
        finally:
            leave_task(loop, self)
            if current is not None:
                enter_task(loop, current)
            if outside:
                events._set_running_loop(None)
        if waited is _NOTHING:
            self._end(None, GeneratorExit())
        else:
            self._must_cancel = False
            self._wait_for(waited)
            timer = loop.call_later(CLEANUP_SECONDS_MAX, self.kill)
            self.add_done_callback(lambda _: timer.cancel())

    def _close(self) -> Any:
        """Close the coroutine: what its clean-up waits for, _NOTHING when it is over. The second time it may not."""
        coro = self._coro
        try:
            if isinstance(coro, Unwinding):
                self._context.run(coro.close)
            else:
                self._coro = unwinding = Unwinding(coro)
                if unwinding.library:
                    self._num_cancels_requested += 1  # it may ask whether it was its own doing: anyio swallows that
                return self._context.run(unwinding.begin)
        except GeneratorExit:
            pass
        except BaseException as exc:  # noqa: BLE001 - it belongs to nobody: the coroutine is gone, the killer not at fault
            if isinstance(exc, RuntimeError) and "ignored GeneratorExit" in str(exc):
                trace.report_unraisable(exc)
            else:
                trace.report_exception("coroutine", exc)
        return _NOTHING


def _heard(future: Any) -> None:
    """Nobody is left whom it would concern how this ended."""
    if not future.cancelled():
        future.exception()


_plain_step = Task._step
_plain_wakeup = Task._wakeup
_plain_end = Task._end
_plain_suspend_first = Task._suspend_first
tracing = False
"""Whether kore.corotrace is on. Read outside the hot path only: while it is on, `Loop.begin` is the plain one."""


def trace_event(task: Task, event: str, coro: Any = None) -> None:
    """Log what happens to `task` in the reference's form: ``coro <who> <event> <function> @ [file:line]``."""
    frame = getattr(task._coro if coro is None else coro, "cr_frame", None)
    who = task._id if task._coroname is None else f"'{task._coroname}'"
    if frame is None:
        where = "<unknown> @ [unknown:-1]"
    else:
        where = f"<{frame.f_code.co_name}> @ [{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}]"
    trace.log(trace.LOG_NOTICE, f"coro {who} {event} {where}")


def _traced_step(task: Task, exc: BaseException | None = None) -> None:
    if not task.done():
        trace_event(task, "running")
    _plain_step(task, exc)
    if not task.done():
        trace_event(task, "suspended")


def _traced_wakeup(task: Task, future: Any) -> None:
    if not task.done():
        trace_event(task, "wokeup")
    _plain_wakeup(task, future)


def _traced_suspend_first(task: Task, waited: Any) -> None:
    trace_event(task, "suspended")
    _plain_suspend_first(task, waited)


def _traced_end(task: Task, value: object, error: BaseException | None) -> None:
    if not isinstance(error, GeneratorExit):
        trace_event(task, "deleted")
    _plain_end(task, value, error)


def corotrace(flag: int) -> None:
    """Log every event of every coroutine of this process (`flag` 1 to 255, True), or stop doing so (0, False).

    Raises TypeError for what is no integer, OverflowError beyond a byte (reference: kore.corotrace). It costs nothing
    while it is off: the steps that log take the place of those that do not.
    """
    global tracing
    number = flag.__index__() if hasattr(flag, "__index__") else None
    if number is None:
        raise TypeError(f"corotrace() wants an integer, not {type(flag).__name__}")
    if not 0 <= number <= 255:
        raise OverflowError(f"corotrace() wants 0 to 255, not {number}")
    tracing = bool(number)
    for name, traced, plain in (
        ("_step", _traced_step, _plain_step),
        ("_wakeup", _traced_wakeup, _plain_wakeup),
        ("_end", _traced_end, _plain_end),
        ("_suspend_first", _traced_suspend_first, _plain_suspend_first),
    ):
        setattr(Task, name, traced if tracing else plain)
    loop = running_loop()
    if loop is not None and hasattr(loop, "trace_tasks"):
        loop.trace_tasks(tracing)
        task: Any = asyncio.current_task(loop)
        if isinstance(task, Task):
            task._keep()


def running_loop() -> Any:
    """The loop that runs in this thread, else the one this process is about to run, else None."""
    return events._get_running_loop() or process_loop


def current_task(what: str) -> Any:
    """The task (kore's or asyncio's) that runs now. Raises RuntimeError, naming `what`, outside of coroutines."""
    loop = events._get_running_loop()
    task: Any = None if loop is None else asyncio.current_task(loop)
    if task is None or (isinstance(task, Task) and task._coro is None):
        raise RuntimeError(f"{what} needs a running coroutine")
    return task


def task_create(coroutine: Coroutine) -> int:
    """Run `coroutine` as a task of its own and give its id; its first step comes later in this turn or in the next.

    In the parent, where no loop runs, it is kept and run once in every worker. Raises TypeError for anything but a
    coroutine object, RuntimeError on a loop that is not kore's (reference: kore.task_create).
    """
    if type(coroutine) is not types.CoroutineType:
        raise TypeError(f"task_create() wants a coroutine, not {type(coroutine).__name__}")
    loop = running_loop()
    if loop is None:
        number = next_id()
        pending_tasks.append((number, coroutine))
        return number
    start = getattr(loop, "start", None)
    if start is None:
        raise RuntimeError("task_create() needs kore's event loop")
    task: Task = start(coroutine)
    return task._id


def task_kill(taskid: int) -> bool:
    """Close the coroutine with this id now; whether there was one (reference: kore.task_kill).

    Raises RuntimeError for the current coroutine, TypeError for what is no int. asyncio's own tasks are cancelled.
    """
    if not isinstance(taskid, int):
        raise TypeError(f"task_kill() wants an int, not {type(taskid).__name__}")
    number = taskid & _TASK_ID_MASK
    loop = events._get_running_loop()
    current = asyncio.current_task(loop) if loop is not None else None
    if current is not None and _id_of(current) == number:
        raise RuntimeError("a coroutine cannot kill itself")
    task = live.get(number)
    if task is not None:
        task.kill("killed")
        return True
    for waiting in pending_tasks:
        if waiting[0] == number:
            pending_tasks.remove(waiting)
            waiting[1].close()
            return True
    for foreign, known in list(_foreign.items()):
        if known == number:
            return bool(foreign.cancel())
    return False


def _id_of(task: Any) -> int | None:
    return task._id if isinstance(task, Task) else _foreign.get(task)


def task_id() -> int:
    """The id of the current coroutine. Raises RuntimeError outside of one (reference: kore.task_id)."""
    task = current_task("task_id()")
    if isinstance(task, Task):
        task._keep()
        return task._id
    number = _foreign.get(task)
    if number is None:
        number = _foreign[task] = next_id()
    return number


def coroname(*name: str) -> None:
    """Name the current coroutine in traces. Raises RuntimeError outside of one, TypeError for what is no str."""
    task = current_task("coroname()")
    if len(name) != 1 or not isinstance(name[0], str):
        raise TypeError("coroname() takes exactly one str")
    if isinstance(task, Task):
        task._coroname = name[0]
    else:
        task.set_name(name[0])


def discard_pending() -> None:
    """Close the tasks created before a loop ran, unrun: for the parent, once it has forked its last worker."""
    while pending_tasks:
        pending_tasks.pop()[1].close()
