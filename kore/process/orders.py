"""What the parent is told before it begins, and what a worker is given at its fork."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kore.application.servers import Listener
from kore.process.channel import Channel
from kore.process.reopening import AccessLog
from kore.process.services import Row
from kore.process.tracer import Brief

if TYPE_CHECKING:
    from kore.process.parent import Parent


@dataclass(frozen=True, slots=True)
class Orders:
    """What the parent is to do; everything it must know of the application and of the floors above."""

    workers: int
    run_worker: Callable[[WorkerPlace], int]
    """Called in the fresh worker; what it returns is the exit code."""
    restart: bool = True
    """worker_death_policy: replace a worker that died, or stop the server with exit code 1."""
    drain_seconds: float = 10.0
    filtered: bool = False
    """Whether a worker puts a filter on and sends its listener; from others nobody takes one."""
    piped: bool = False
    """Whether what a worker writes to its standard streams comes here and is logged; else it has the parent's."""
    services: Callable[[Parent], Iterable[Row]] = lambda _: ()
    """The children that serve no clients, in the order of their start."""
    tracing: Brief | None = None
    """What a tracer must know, when there is to be one."""
    name: str = "kore"
    """The first word of their titles."""
    ignore_interrupt: bool = False
    """In the background there is no terminal whose Ctrl-C could be meant."""
    trapped: frozenset[int] = frozenset()
    """Further signals to pass on to the workers (kore.sigtrap)."""
    private_fds: Callable[[], Iterable[int]] = tuple
    """The fds, apart from the parent's own, that no worker may keep: pidfile, logfile."""
    release_served: Callable[[], object] = lambda: None
    """Called in a fresh service: closes what only who serves clients needs."""
    on_ready: Callable[[list[int]], None] = lambda _: None
    """Called once with the pids when every worker serves."""
    route_name: Callable[[int], str | None] = lambda _: None
    """The name of the route with an index, for the report of a death."""
    access_logs: tuple[AccessLog, ...] = ()
    """What is opened again on SIGHUP, besides the log."""
    listeners: Sequence[Listener] = ()
    """Those that a worker could stop, and that are looked after."""
    backlog: int = 0
    """That of the listeners."""


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """What a worker is given at its fork."""

    worker: int
    channel: Channel
    messages: Channel
    """The channel of what workers send to workers."""
    workers: int
    """How many there are; their ids are 1 to that."""
    board: memoryview
    stacks: int | None
    """Where stacks are written for the tracer, when there is one."""
    parent: int
    """The parent's pid, noted before the fork: getppid() says something else once it is dead."""
    early_signals: list[int]
    """Signals that arrived before the worker had handlers of its own, in order; its handler appends to it."""
