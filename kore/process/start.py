"""From the path of an application to a server that runs, and to its exit code: the straight line of a parent's life.

Load, freeze, check, choose the engine, open the log, go into the background, lock the pidfile, run the workers; then
all of it backwards. Whatever cannot work is found out before the first fork where that is possible at all, and is one
line on standard error that says what to do.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kore import reactor
from kore.application.declared import application
from kore.application.loading import formatted, load, location_of
from kore.application.plan import Plan, freeze
from kore.application.privileges import Deployment
from kore.bsd import pledge
from kore.errors import ConfigurationError, EngineError, StartError
from kore.process import affinity, ahead, confining, locking, role, securing, title, worker
from kore.process.daemon import Daemon, daemonise
from kore.process.descriptors import close_inherited, inherited
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE, FileSink, Log, SyslogSink, standard_output
from kore.process.parent import EXIT_FATAL, Orders, Parent
from kore.process.pidfile import HeldError, Pidfile
from kore.process.reopening import access_logs
from kore.process.services import Row
from kore.process.sites import Sites
from kore.process.tracer import Brief
from kore.process.tracing import free_signal
from kore.sandbox import confinement, privileges
from kore.version import __version__

if TYPE_CHECKING:
    from kore.process.acme import AcmeOrders
    from kore.process.keymgr import KeyOrders

DRAIN_SECONDS = 10.0
DRAIN_SECONDS_DEV = 1.0
"""For requests that still run when the server is told to stop; who develops does not want to wait."""

DEFAULT_PIDFILE = "kore.pid"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. None leaves it to the application's settings, which it otherwise overrules."""

    background: bool | None = None
    chroot: bool | None = None
    switch_user: bool | None = None
    quiet: bool = False
    check: bool = False
    trace: bool = False
    """Trace, whatever the application's settings say."""
    learn: bool = False
    """Write the seccomp hook that the application needs to standard output at the end."""
    output: str | None = None
    acme: str | None = None
    """Do what this command of ``kore acme`` says, status or test, and serve nothing."""
    provider: str | None = None
    """The directory that ``kore acme test`` asks instead."""
    """And to this file."""


def start(path: str, arguments: Sequence[str], options: Options) -> int:
    """Serve the application at `path` until it is stopped; the exit code. Nothing is raised but SystemExit."""
    strays = inherited()
    log = Log(standard_output())
    role.take(role.Role(log))
    reactor.set_log(role.role.log)
    server = None
    try:
        application.listens = options.acme != "status"
        plan = _plan(path, arguments)
        if options.trace:
            plan = replace(plan, settings=replace(plan.settings, seccomp_tracing=True))
        if options.output is not None:
            _check_output(options.output)
        server = _Start(plan, options, log, strays)
        return server.run()
    except StartError as error:
        return complain(str(error))
    finally:
        application.reset()
        log.close()
        if options.learn and server is not None and server.sites is not None:
            _write_hook(server.sites, options.output)


def _check_output(path: str) -> None:
    """Raises StartError for a file that what is learned could not be written to: better now than at the end."""
    try:
        open(path, "a").close()
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror}") from error


def _write_hook(sites: Sites, path: str | None) -> None:
    """Write what was learned after the last line of the log, and to `path`."""
    text = sites.hook()
    try:
        print(f"\n{text}", end="", flush=True)
    except OSError:
        pass  # nobody reads it
    if path is None:
        return
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        complain(f"--output {path}: {error.strerror}")


def complain(text: str) -> int:
    """One line on standard error, and the exit code that goes with it."""
    sys.stdout.flush()
    print(f"kore: {text}", file=sys.stderr, flush=True)
    return EXIT_FATAL


def _plan(path: str, arguments: Sequence[str]) -> Plan:
    """Load and freeze. Raises StartError with the one line; a traceback, if it helps, is on standard error by then."""
    try:
        load(path, arguments)
        return freeze()
    except (StartError, ConfigurationError) as error:
        # Refused by kore, in words made for this: where in the application is all that is missing.
        where = location_of(error)
        raise StartError(f"{where}: {error}" if where else str(error)) from error
    except Exception as error:
        sys.stderr.write(formatted(error))
        where = location_of(error) or path
        raise StartError(f"{where}: the application cannot be loaded: {type(error).__name__}: {error}") from error


class _Start:
    """One start: what was decided on the way, and what has to be undone at the end."""

    def __init__(self, plan: Plan, options: Options, log: Log, strays: Mapping[int, tuple[int, int]]) -> None:
        self.plan = plan
        self.options = options
        self.log = log
        self.deployment = _overruled(plan.deployment, options)
        self.workers = plan.settings.workers or affinity.default_workers()
        self.name = plan.title or "kore"
        self.engine = ""
        self.fallback: str | None = None
        self.daemon: Daemon | None = None
        self.pidfile: Pidfile | None = None
        self.strays = strays
        self.confinement = confinement.Confinement(process="worker", on=False)
        self.keys: KeyOrders | None = None
        """What the key manager is told, when there is one."""
        self.acme: AcmeOrders | None = None
        """What the ACME process is told, when a domain gets its certificates from an authority."""
        self.sites: Sites | None = None
        """What tracing found."""
        self.stack_signal = free_signal(plan.signals) if plan.settings.seccomp_tracing else None

    def run(self) -> int:
        """Check everything, then serve. Raises StartError."""
        if not (self.plan.listeners or self.plan.tasks or self.plan.hooks.workerstart):
            raise StartError("nothing to do: the application declares no server and creates no task")
        self._check_privileges()
        if self.options.acme is not None:
            return self._acme(self.options.acme)
        try:
            self.engine, self.fallback = self._select_engine()
        except EngineError as error:
            raise StartError(f"KORE_IO={os.environ.get('KORE_IO')}: {error}") from error
        except ConfigurationError as error:
            raise StartError(str(error)) from error
        if self.options.check:
            return self._show()
        self._open_log()
        if not self.deployment.foreground:
            self.daemon = daemonise()
        try:
            return self._serve()
        except StartError as error:
            self.log.parent(LOG_ERR, str(error))
            if self.daemon is None:
                raise
            self.daemon.failed(EXIT_FATAL, f"kore: {error}")
            return EXIT_FATAL

    def _select_engine(self) -> tuple[str, str | None]:
        """The engine that the workers can have. Raises EngineError, ConfigurationError, StartError."""
        engine, fallback = reactor.select_engine()
        if engine != "uring":
            return engine, fallback
        refused = ahead.try_as_worker(self.confinement, lambda: reactor.new_driver("uring").close())
        if refused is None:
            return engine, fallback
        if os.environ.get("KORE_IO"):
            raise StartError(f"KORE_IO={os.environ['KORE_IO']}: not for the workers: {refused}")
        return "epoll", f"io_uring is not available to the workers, using epoll: {refused}"

    def _check_privileges(self) -> None:
        """Root that was asked to give its rights away must be able to, or not start: silence would be a lie."""
        self.confinement = confining.confine(self.plan, self.deployment)
        confinement.prepare(self.confinement)
        self.plan = securing.secured(self.plan, self.confinement.rights)
        if securing.speaks_tls(self.plan):
            from kore.process import keeping

            self.keys = keeping.orders_of(self.plan, self.deployment, self.confinement)
            if self.keys.acme is not None:
                from kore.process import issuing

                self.acme = issuing.orders_of(self.plan, self.deployment, self.confinement)

    def _acme(self, command: str) -> int:
        """The commands of ``kore acme``. Raises StartError."""
        if self.acme is None or self.keys is None or self.keys.acme is None:
            raise StartError("no domain of the application has acme=True")
        from kore.process import acme_command

        root = self.keys.confinement.rights.root or os.getcwd()
        if command == "status":
            return acme_command.status(self.acme, root)
        return acme_command.test(self.acme, self.keys.acme, self.plan, root, self.options.provider)

    def _show(self) -> int:
        """What check prints: everything that would be served, and every option with where it comes from."""
        from kore.process.showing import effective

        io = "KORE_IO" if os.environ.get("KORE_IO") else self.fallback or "the best there is"
        confined = "KORE_SANDBOX" if os.environ.get("KORE_SANDBOX") else "the deployment"
        decided = {
            "engine": (self.engine, io),
            "workers live in": (_home(self.confinement), "root, runas and the deployment"),
        }
        if self.keys is not None:
            decided["key manager lives in"] = (_home(self.keys.confinement), "keymgr_root, keymgr_runas, as above")
        if self.plan.settings.sandbox is None or os.environ.get("KORE_SANDBOX"):
            decided["sandbox"] = ("yes" if self.confinement.on else "no", confined)
        if securing.spares_browsers(self.plan):
            decided["http_hsts_enable"] = ("0", "the local authority")
        if self.plan.settings.workers is None:
            decided["workers"] = (str(self.workers), "CPUs that this process may use")
        served = securing.examine(self.plan, self.deployment)
        print(effective(self.plan, self.deployment, decided, self._notices(), served), flush=True)
        return 0

    def _notices(self) -> list[str]:
        found = [*confining.notices(self.confinement, self.deployment, self.engine), *self.plan.notices]
        if self.keys is not None:
            from kore.process import keeping

            found += keeping.notices(self.keys, self.confinement)
        if self.acme is not None:
            from kore.process import issuing

            found += issuing.notices(self.acme)
        if self.plan.settings.pledge and not pledge.available():
            found.append("kore.config.pledge: only OpenBSD has pledge(2); nothing is promised here")
        return found

    def _open_log(self) -> None:
        logfile = self.plan.settings.logfile
        if logfile is not None:
            self.log.sink = FileSink(logfile)
        elif not self.deployment.foreground:
            self.log.sink = SyslogSink()

    def _serve(self) -> int:
        """With the log open and the background reached: lock, announce, run, and undo it all."""
        self._lock()
        try:
            if self.daemon is not None and self.plan.hooks.daemonized is not None:
                self._hook(self.plan.hooks.daemonized)
            self._announce()
            title.set_title(self.name, "[parent]")
            self._confine()
            # What is here now lives as long as the server: collected once, then shared with every worker untouched.
            gc.collect()
            gc.freeze()
            parent = Parent(self._orders(), self.log)
            if parent.tracing is not None:
                self.sites = parent.tracing.sites
            code = parent.run()
            if self.daemon is not None:
                self.daemon.failed(code, "kore: the server did not start; its log says why")
            if self.plan.hooks.cleanup is not None:
                self._hook(self.plan.hooks.cleanup)
            self._say("goodbye")
            return code
        finally:
            if self.pidfile is not None:
                self.pidfile.remove()
            self.plan.close()

    def _confine(self) -> None:
        """What the workers cannot do for themselves, and then what the parent gives up itself. Raises StartError."""
        mine = self.confinement
        ahead.load_ahead(mine)
        ahead.make_offload(mine)
        children = [mine]
        if self.keys is not None:
            from kore.process import worker_tls as _worker_tls  # noqa: F401 (workers may live where it cannot be loaded)

            locking.allow()
            children.append(self.keys.confinement)
        if self.acme is not None:
            children.append(self.acme.confinement)
        if mine.on:
            privileges.restrain_parent(confining.kept_by_parent(*children))

    def _hook(self, hook: Callable[[], object]) -> None:
        """Call a hook of the parent; what it raises is reported and stops nothing."""
        try:
            hook()
        except Exception as error:  # noqa: BLE001 (the matrix of section 4: log, continue)
            reactor.report_exception("python_runtime_execute", error)

    def _lock(self) -> None:
        """The pidfile. One that nobody asked for is no reason not to start; one that was asked for is."""
        path = self.plan.settings.pidfile
        try:
            self.pidfile = Pidfile(path)
        except HeldError as error:
            if path != DEFAULT_PIDFILE:
                raise
            self.log.parent(LOG_NOTICE, f"{error}; this server runs without a pidfile")
        except StartError as error:
            if path != DEFAULT_PIDFILE:
                raise
            self.log.parent(LOG_NOTICE, f"no pidfile: {error}")

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            self.log.parent(LOG_INFO, text)

    def _announce(self) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        self._say(f"kore {__version__}, engine {self.engine}, Python {python}, pid {os.getpid()}")
        if self.fallback is not None:
            self.log.parent(LOG_NOTICE, self.fallback)
        for notice in self._notices():
            self.log.parent(LOG_NOTICE, notice)
        for listener in self.plan.listeners:
            self._say(f"serving {'https' if listener.tls else 'http'} on {listener.url}")

    def _orders(self) -> Orders:
        settings = self.plan.settings
        foreground = self.deployment.foreground
        drain = DRAIN_SECONDS_DEV if self.deployment.name == "dev" else DRAIN_SECONDS
        orders = worker.WorkerOrders(
            plan=self.plan,
            engine=self.engine,
            name=self.name,
            confinement=self.confinement,
            strays=self.strays,
            watch_imports=self.deployment.name == "dev",
            cpus=tuple(affinity.allowed_cpus()) if settings.worker_set_affinity else (),
            drain_seconds=drain,
            foreground=foreground,
            stack_signal=self.stack_signal,
        )
        names = {
            route.index: route.name
            for router in self.plan.routers.values()
            for domain in router.domains
            for route in (*domain.routes, *domain.file_routes.values(), *domain.mounts)
        }
        return Orders(
            workers=self.workers,
            run_worker=lambda place: worker.run(orders, place),
            restart=settings.worker_death_policy == "restart",
            drain_seconds=drain,
            filtered=self.confinement.on or self.confinement.tracing,
            services=self._services,
            tracing=self._brief(),
            name=self.name,
            ignore_interrupt=not foreground,
            trapped=frozenset(self.plan.signals),
            private_fds=self._private_fds,
            release_served=self._release_served,
            on_ready=self._ready,
            route_name=names.get,
            access_logs=access_logs(self.plan.domains),
        )

    def _services(self, parent: Parent) -> Iterator[Row]:
        """The table of services, in the order of their start."""
        if self.keys is not None:
            from kore.process import keymgr

            yield keymgr.row_of(self.keys, parent)
        if self.acme is not None:
            from kore.process import acme

            yield acme.row_of(self.acme)

    def _brief(self) -> Brief | None:
        if self.stack_signal is None or application.loaded is None:
            return None
        return Brief(self.stack_signal, os.path.dirname(application.loaded.path))

    def _release_served(self) -> None:
        """In a service: close the listeners and the access logs, and what whoever started the server left open."""
        close_inherited(self.strays)
        for listener in self.plan.listeners:
            listener.sock.close()
        for domain in self.plan.domains:
            if domain.accesslog is not None:
                domain.accesslog.close()

    def _private_fds(self) -> list[int]:
        fds = list(self.log.sink.fds())
        if self.pidfile is not None:
            fds.append(self.pidfile.fd)
        if self.daemon is not None:
            fds.extend(self.daemon.fds())
        return fds

    def _ready(self, pids: list[int]) -> None:
        count = len(pids)
        self._say(f"ready: {count} worker{'s' if count > 1 else ''}, pid {' '.join(map(str, pids))}")
        if self.daemon is not None:
            self.daemon.ready()


def _home(given: confinement.Confinement) -> str:
    """Where processes live and who they are, for people."""
    rights = given.rights
    home = f"{rights.root or os.getcwd()} by {'chroot' if rights.chroot else 'chdir'}"
    return home if rights.identity is None else f"{home} as user {rights.identity.name}"


def _overruled(deployment: Deployment, options: Options) -> Deployment:
    """Command line before configuration before default."""
    return replace(
        deployment,
        foreground=deployment.foreground if options.background is None else not options.background,
        chroot=deployment.chroot if options.chroot is None else options.chroot,
        switch_user=deployment.switch_user if options.switch_user is None else options.switch_user,
    )
