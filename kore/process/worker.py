"""A worker, from its fork to its exit: settle in, build the loop and the server, say ready, serve, drain, end.

The order is that of kore-api.md 2.4. Everything the application wrote is called while the loop runs, so that a hook
may create tasks, timers and connections like a handler. A worker ends for one of three reasons: the parent says
so, the parent is gone, or the application has it end; the first drains, the others do not wait for anybody.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from kore import reactor
from kore.application.declared import application
from kore.application.plan import Plan
from kore.application.settings import NO_PROGRAMS, Settings
from kore.bsd import pledge
from kore.driver import Driver
from kore.errors import EngineError, SandboxError, StartError
from kore.http.server import HttpServer
from kore.http.settings import HttpSettings
from kore.process import affinity, filtering, prctl, reopening, role, title
from kore.process.channel import ChannelError, Kind
from kore.process.descriptors import close_inherited, limit_descriptors
from kore.process.hints import Hints
from kore.process.log import LOG_ERR, LOG_NOTICE
from kore.process.orders import WorkerPlace
from kore.process.post import Post
from kore.reactor import spawning, tasks, trace
from kore.reactor.processes import kill_running
from kore.reactor.watchdog import Watchdog
from kore.sandbox import confinement
from kore.sandbox.confinement import Confinement

if TYPE_CHECKING:
    from kore.http.asgi.lifespan import Lifespans
    from kore.process.worker_tls import WorkerTls

GC_THRESHOLDS = (20_000, 20, 50)
"""Allocations between collections: what a request makes dies by its reference count, so collecting finds little."""

TELL_DROPPED_SECONDS = 0.25
"""How soon a full channel is tried again, for the number of lines it lost."""

BLOCKED_FACTOR = 10
"""Of http_request_ms: what one handler or callback may take of the loop's time before it is told of."""

OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""Where kore is: what it imports itself is nobody's concern."""

CANCEL_SECONDS_MAX = 1.0
"""For tasks that were cancelled at the end to clean up after themselves; then they are left."""


@dataclass(frozen=True, slots=True)
class WorkerOrders:
    """What every worker does alike, decided by the parent before the first fork."""

    plan: Plan
    engine: str
    name: str
    """The first word of the title."""
    confinement: Confinement
    """What the worker may, and where it lives."""
    strays: Mapping[int, tuple[int, int]]
    """Descriptors of whoever started the server, which are no worker's business."""
    watch_imports: bool
    """Whether modules that are imported after the start are told of."""
    cpus: tuple[int, ...]
    """The CPUs to be shared out; empty: no affinity."""
    drain_seconds: float
    foreground: bool
    stack_signal: int | None
    """The signal by which a tracer asks a thread for its stack; None: there is no tracer."""


def run(orders: WorkerOrders, place: WorkerPlace) -> int:
    """Be a worker; the exit code. Called in the forked process and nowhere else."""
    prctl.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != place.parent:
        return 0  # it died between the fork and the call above, which therefore never hears of it
    title.set_title(orders.name, role.role.label)
    # As Python has it from the start: a client that is gone is an error of one write(2), whatever the application did.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _settle(orders, place)
    reactor.set_log(role.role.log)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        tls = _tls(orders)
    except StartError as error:
        role.role.fatalx(f"TLS cannot be served: {error}")
    try:
        loop = _confined(orders, place)
    except EngineError as error:
        role.role.log(LOG_ERR, f"no {orders.engine} engine: {error}")
        return 1
    except SandboxError as error:
        role.role.fatalx(f"worker {place.worker} cannot be confined: {error}")
    if orders.confinement.on:
        trace.set_explain(Hints(orders.confinement, role.role.log).look)
    asyncio.set_event_loop(loop)
    try:
        _promise(orders.plan)
    except StartError as error:
        role.role.log(LOG_ERR, str(error))
        loop.close()
        return 1
    worker = Worker(orders, place, loop, tls)
    loop.call_soon(worker.start)
    try:
        loop.run_forever()
    finally:
        worker.close()
    return worker.exit_code


def _tls(orders: WorkerOrders) -> WorkerTls | None:
    """What TLS needs, before the sandbox closes; None where no server speaks it. Raises StartError."""
    if not any(listener.tls for listener in orders.plan.listeners):
        return None
    from kore.process.worker_tls import WorkerTls

    return WorkerTls(orders.plan, role.role.log)


def _settle(orders: WorkerOrders, place: WorkerPlace) -> None:
    """Descriptors, CPU, how many descriptors more."""
    if orders.confinement.on:
        close_inherited(orders.strays)
    settings = orders.plan.settings
    if orders.cpus:
        cpu = affinity.cpu_of_worker(place.worker, list(orders.cpus))
        if failure := affinity.pin(cpu):
            role.role.log(LOG_NOTICE, f"not pinned to CPU {cpu}: {failure}")
    notice = limit_descriptors(settings.worker_rlimit_nofiles, settings.worker_max_connections)
    if notice:
        role.role.log(LOG_NOTICE, notice)


def _confined(orders: WorkerOrders, place: WorkerPlace) -> reactor.Loop:
    """Give up everything that serving does not need; the loop. Raises EngineError, SandboxError."""
    mine = orders.confinement
    rights = replace(mine.rights, parent=place.parent)
    proc = _open_proc(mine)
    return confinement.enter(
        replace(mine, rights=rights),
        spawner=lambda: _start_spawner(orders, proc),
        engine=lambda: reactor.Loop(new_driver(orders.engine, mine)),
        close_filter=lambda: _close_filter(orders, place),
    )


def _open_proc(mine: Confinement) -> int | None:
    """A descriptor of /proc for the spawner, which may live where there is none; None where there is no spawner."""
    if not (mine.on or mine.tracing):
        return None
    try:
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def new_driver(engine: str, mine: Confinement) -> Driver:
    """The engine of a worker that may what `mine` says. Raises EngineError."""
    return reactor.new_driver(engine, connects=mine.connects or not mine.on, bounded=mine.on)


def _start_spawner(orders: WorkerOrders, proc: int | None) -> None:
    """Have the programs of this worker started by a process of their own; closes `proc`. Raises SandboxError."""
    try:
        _start_spawner_with(orders, proc)
    finally:
        if proc is not None:
            os.close(proc)


def _start_spawner_with(orders: WorkerOrders, proc: int | None) -> None:
    programs = orders.plan.settings.sandbox_programs
    if programs == (NO_PROGRAMS,):
        spawning.refuse("kore.config.sandbox_programs is none; name the program there to allow it")
        return
    from kore.sandbox import program_policy
    from kore.sandbox.spawner import Terms, start_spawner

    mine = orders.confinement
    label = role.role.label.replace("wrk", "proc")
    spawner = start_spawner(Terms(
        programs=programs,
        write=tuple(path for path in ("/dev/null", *mine.write) if os.path.exists(path)),
        connect_ports=mine.connect_ports,
        proc=proc,
        prepare=partial(title.set_title, orders.name, label),
        install_filter=partial(
            program_policy.put_on, connect=mine.connects, paths=mine.paths, listed=bool(programs)),
    ))
    for line in spawner.told:
        role.role.log(LOG_NOTICE, f"programs started by kore.proc: {line}")
    spawning.use(spawner)


def _close_filter(orders: WorkerOrders, place: WorkerPlace) -> None:
    """Ask the application's seccomp hook and put the filter on; deadly calls are the parent's to answer."""
    mine = orders.confinement
    if orders.stack_signal is not None:
        filtering.write_stacks(place, orders.stack_signal)
    features = filtering.features_of(mine, orders.plan, orders.engine)
    filtering.put_on(orders.plan.hooks, features, place.channel.send_listener, tracing=mine.tracing)


def _promise(plan: Plan) -> None:
    """OpenBSD: from here on a worker can do what it promised and no more. Raises StartError."""
    if pledge.available():
        pledge.pledge_worker(
            transfers=pledge.preload(),
            handed_files=any(domain.accesslog is not None or domain.tls is not None for domain in plan.domains),
            bodies_in_files=plan.settings.http_body_disk_offload > 0,
            further=plan.settings.pledge,
        )


def http_settings(settings: Settings) -> HttpSettings:
    """The options the HTTP floor knows, out of all of them: they have the same names."""
    return HttpSettings(**{field.name: getattr(settings, field.name) for field in fields(HttpSettings)})


def _served(orders: WorkerOrders) -> HttpSettings:
    """The same, with the path of bodies as it is from within the root."""
    found = http_settings(orders.plan.settings)
    mine = orders.confinement
    if mine.rights.chroot and mine.offload is not None and os.path.isabs(found.http_body_disk_path):
        return replace(found, http_body_disk_path=mine.offload)
    return found


class Worker:
    """The life of one worker on its loop. `start` is the loop's first callback; `close` comes after its last."""

    def __init__(
        self, orders: WorkerOrders, place: WorkerPlace, loop: reactor.Loop, tls: WorkerTls | None = None
    ) -> None:
        self.orders = orders
        self.place = place
        self.loop = loop
        self.hooks = orders.plan.hooks
        self.exit_code = 0
        self._stopping = False
        self._finished = False
        self.server = HttpServer(loop, _served(orders), log=role.role.log, board=place.board)
        if application.loaded is not None:
            # Where "function" and "object.method" are looked up that a request names its callbacks by.
            module = application.loaded.module
            self.server.resolve_name = lambda name: attrgetter(name)(module)
        self.post = Post(place.messages)
        self.watchdog: Watchdog | None = None
        self.lifespans: Lifespans | None = None
        self.tls = tls

    def start(self) -> None:
        """Hear the parent and the signals, let the application start, then accept."""
        self.loop.add_reader(self.place.channel.fileno(), self._hear)
        self.post.open(self.loop, self.hooks.onmsg, self._broadcast)
        mine = role.role
        if isinstance(mine, role.WorkerRole):
            mine.on_dropped = self._dropped
            mine.on_trap = self._trap
            mine.workers = self.place.workers
            mine.post = self.post
            mine.server = self.server
            mine.tls = self.tls
        self._take_signals()
        tasks.process_loop = self.loop
        if not self._hook("python_runtime_execute", self.hooks.workerstart):
            self.exit_code = 1
            self._finish()
            return
        self.loop.adopt_pending()
        if self.tls is None:
            self._start_served()
        else:
            # Clients that came before would be turned away.
            self.tls.open(self.loop, self._start_served)

    def _start_served(self) -> None:
        if not self.orders.plan.mounts:
            self._serve()
            return
        from kore.http.asgi.lifespan import Lifespans

        self.lifespans = Lifespans(self.orders.plan.mounts, self.loop, role.role.log)
        self.loop.start(self._start_mounted())

    async def _start_mounted(self) -> None:
        """Let the applications start that are mounted; serve if they all do."""
        assert self.lifespans is not None
        try:
            await self.lifespans.startup()
        except StartError as error:
            role.role.log(LOG_ERR, str(error))
            self.exit_code = 1
            self._finish()
        else:
            self._serve()

    def _serve(self) -> None:
        if not self._stopping:
            self._accept()
            self.place.channel.send_last(Kind.READY)
            blocked_ms_max = self.orders.plan.settings.http_request_ms * BLOCKED_FACTOR
            if blocked_ms_max:
                self.watchdog = Watchdog(blocked_ms_max / 1000, partial(role.role.log, LOG_NOTICE))
            if self.orders.watch_imports:
                from kore.sandbox.preload import watch_imports

                watch_imports(partial(role.role.log, LOG_NOTICE), own=OWN_FOLDER)

    def _accept(self) -> None:
        plan = self.orders.plan
        if self.place.worker in plan.settings.worker_no_accept:
            return
        for listener in plan.listeners:
            if listener.tls and self.tls is not None:
                self.tls.listen(self.server, listener)
                continue
            self.server.listen(listener.sock, plan.routers[listener.name], listener.name)

    # The parent's words.

    def _hear(self) -> None:
        try:
            while (message := self.place.channel.receive_fd()) is not None:
                kind, body, fd = message
                if kind is Kind.STOP:
                    self._stop_signal(body[0])
                elif kind is Kind.ABORT:
                    self._abort()
                elif kind is Kind.REOPEN and fd is not None:
                    self._reopen(body, fd)
                elif kind is Kind.KEYS and fd is not None and self.tls is not None:
                    self.tls.connect(fd)
        except (EOFError, ChannelError):
            # The parent is dead: nobody would replace this worker, read its log, or ever tell it to stop.
            self.loop.remove_reader(self.place.channel.fileno())
            self._abort()

    def _reopen(self, body: bytes, fd: int) -> None:
        """The parent opened an access log again: write to the new file from now on."""
        logs = [domain.accesslog for domain in self.orders.plan.domains if domain.accesslog is not None]
        try:
            reopening.replace(body, fd, [log.fileno() for log in logs])
        except OSError as error:
            role.role.log(LOG_ERR, f"an access log stays the old one: {error.strerror}")

    def _broadcast(self, body: bytes) -> None:
        """Another worker sends a WebSocket message to all clients."""
        from kore.http.websocket import broadcast

        try:
            broadcast.local(self.server, None, body[0], body[1:])
        except Exception as error:  # noqa: BLE001 (what one worker sends must not end another)
            reactor.report_exception("websocket_broadcast", error)

    def _dropped(self) -> None:
        """The channel is full. Perhaps on another thread: a thread of the executor may log too."""
        self.loop.call_soon_threadsafe(self._tell_dropped_later)

    def _tell_dropped_later(self) -> None:
        self.loop.call_later(TELL_DROPPED_SECONDS, self._tell_dropped)

    def _tell_dropped(self) -> None:
        mine = role.role
        if isinstance(mine, role.WorkerRole):
            mine.tell_dropped()
            if mine.dropped:
                self._tell_dropped_later()

    # Signals.

    def _take_signals(self) -> None:
        stopping = {int(signal.SIGTERM), int(signal.SIGQUIT)}
        if self.orders.foreground:
            stopping.add(int(signal.SIGINT))
        for number in stopping:
            self.loop.add_signal_handler(number, self._stop_signal, number)
        passed = {int(signal.SIGHUP), int(signal.SIGUSR1), *self.orders.plan.signals}
        if self.hooks.signal is not None:
            passed.add(int(signal.SIGCHLD))
        for number in passed - stopping:
            self._trap(number)
        # Those that came before there was a loop to hand them to.
        for number in self.place.early_signals:
            if number in stopping:
                self.loop.call_soon(self._stop_signal, number)
            else:
                self.loop.call_soon(self._signal_hook, number)

    def _trap(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            return  # trapped from the start, or in the background nobody's to send
        self.loop.add_signal_handler(number, self._signal_hook, number)

    def _signal_hook(self, number: int) -> None:
        self._hook("koreapp.signal", self.hooks.signal, number)

    def _stop_signal(self, number: int) -> None:
        """A stop, by the parent's message or sent here directly: a terminal and a service manager do both at once."""
        if self._stopping:
            return
        self._stopping = True
        self._signal_hook(number)
        self.server.stop_accepting()
        self.loop.call_later(self.orders.drain_seconds, self._abort)
        self.server.drain(self._drained)

    # The end.

    def _drained(self) -> None:
        """Nothing runs any more: what was started last ends first."""
        if self.lifespans is None:
            self._finish()
        else:
            self.loop.start(self._stop_mounted(self.lifespans))

    async def _stop_mounted(self, lifespans: Lifespans) -> None:
        try:
            await lifespans.shutdown()
        finally:
            self._finish()

    def _abort(self) -> None:
        """End without waiting for what still runs."""
        self._stopping = True
        if not self._finished:
            self.server.stop_accepting()
            self._finish()

    def _finish(self) -> None:
        """Nothing runs any more, or may any more: the stop hook while the loop still runs, then the end of it."""
        if self._finished:
            return
        self._finished = True
        self._hook("python_runtime_execute", self.hooks.workerstop)
        self.server.abort()
        self.loop.stop()

    def close(self) -> None:
        """After the loop: close what coroutines are left, so that their finally blocks run, and release the engine."""
        mine = role.role
        if self.watchdog is not None:
            self.watchdog.stop()
        try:
            cancelled = [] if self.lifespans is None else self.lifespans.cancel()
            if cancelled:
                self.loop.run_until_complete(asyncio.wait(cancelled, timeout=CANCEL_SECONDS_MAX))
            for task in list(tasks.live.values()):
                _guarded(task.kill)
            dying: list[Any] = list(tasks.live.values())  # their clean-up waits for something
            left = [task for task in asyncio.all_tasks(self.loop) if not task.done() and task not in dying]
            for other in left:
                other.cancel()
            if left or dying:
                self.loop.run_until_complete(asyncio.wait([*left, *dying], timeout=CANCEL_SECONDS_MAX))
            for task in list(tasks.live.values()):
                _guarded(task.kill)
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            kill_running()
            self.post.close()
            if self.tls is not None:
                self.tls.close()
            self.loop.close()
            spawning.close()
            if isinstance(mine, role.WorkerRole):
                mine.on_dropped = role.nothing  # there is no loop any more to try again on
                mine.last_words()

    def _hook(self, label: str, hook: Callable[..., Any] | None, *arguments: object) -> bool:
        """Call a hook of the application; False when it raised, which is reported under `label`."""
        if hook is None:
            return True
        try:
            result = hook(*arguments)
        except Exception as error:  # noqa: BLE001 (whatever the application raises is reported, and its kind decides nothing)
            reactor.report_exception(label, error)
            return False
        if asyncio.iscoroutine(result):
            result.close()
            role.role.log(LOG_ERR, f"{label}: an async hook is not awaited; use kore.task_create in a plain one")
        return True


def _guarded(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 (a coroutine that fails while it is closed must not keep the others open)
        reactor.report_exception("coroutine", error)
