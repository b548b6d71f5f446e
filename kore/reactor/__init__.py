"""The reactor: kore's event loop, its tasks, and what they may await. A whole asyncio loop on a kore driver.

The names below are all there is to know from outside; `Loop` is in loop.py, a coroutine's life in tasks.py.
"""

from __future__ import annotations

from kore.reactor.engine import new_driver, select_engine
from kore.reactor.locks import PyLock, lock
from kore.reactor.loop import Loop
from kore.reactor.policy import EventLoopPolicy, new_event_loop
from kore.reactor.queues import PyQueue, queue
from kore.reactor.tasks import Task, coroname, corotrace, discard_pending, task_create, task_id, task_kill
from kore.reactor.timers import TIMER_ONESHOT, PyTimer, time, timer
from kore.reactor.trace import report_exception, set_log, tracer
from kore.reactor.waits import gather, suspend

__all__ = [
    "TIMER_ONESHOT",
    "EventLoopPolicy",
    "Loop",
    "PyLock",
    "PyQueue",
    "PyTimer",
    "Task",
    "coroname",
    "corotrace",
    "discard_pending",
    "gather",
    "lock",
    "new_driver",
    "new_event_loop",
    "queue",
    "report_exception",
    "select_engine",
    "set_log",
    "suspend",
    "task_create",
    "task_id",
    "task_kill",
    "time",
    "timer",
    "tracer",
]
