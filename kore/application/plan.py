"""The Plan: everything that was declared, in one frozen record that the processes work from.

`freeze` makes it once, in the parent and before any fork. What can only be seen when the declaration is whole is
checked here: which domain a route belongs to, whether routes collide, whether options go together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kore.application import config as options
from kore.application import privileges
from kore.application.declared import Application
from kore.application.declared import application as the_application
from kore.application.domains import DomainTls, Filemap, MissingCertificateError, PyDomain, domains_of
from kore.application.loading import Hooks, hooks_of
from kore.application.privileges import Deployment, Privileges
from kore.application.route_options import Auth, DeclaredRoute
from kore.application.servers import Listener, set_backlog
from kore.application.settings import Settings
from kore.errors import ConfigurationError
from kore.http.accesslog import LogTarget
from kore.http.gate import gate_of
from kore.http.parameters import await_rules, has_async_rules
from kore.http.prerequests import guarded
from kore.http.redirects import Redirect
from kore.http.routes import FILE_METHODS, Domain, Route, Router, method_mask
from kore.reactor import tasks

if TYPE_CHECKING:
    from kore.application.mounts import DeclaredMount
    from kore.http.asgi.mount import Mount


@dataclass(frozen=True, slots=True)
class PlannedDomain:
    """What a domain has besides its routes."""

    name: str
    server: str
    tls: DomainTls | None
    filemaps: tuple[Filemap, ...]
    redirects: tuple[Redirect, ...]
    accesslog: FileIO | None
    """Open for appending since it was declared; every worker writes to it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An application, declared whole."""

    settings: Settings
    listeners: tuple[Listener, ...]
    routers: Mapping[str, Router]
    """By the name of the listener."""
    domains: tuple[PlannedDomain, ...]
    mounts: tuple[Mount, ...]
    """ASGI applications, each where it is mounted."""
    prerequests: tuple[Callable[..., Any], ...]
    hooks: Hooks
    privileges: Mapping[str, Privileges]
    """For "worker", "keymgr" and "acme", with what the latter two inherit."""
    deployment: Deployment
    tasks: int
    """Tasks created so far: each runs once in every worker."""
    title: str | None
    """The name for process titles, from kore.setname()."""
    signals: tuple[int, ...]
    """Signals trapped before the start, from kore.sigtrap(): every worker traps them."""
    notices: tuple[str, ...]
    """Lines for the log at start: what was declared and has no effect."""
    dh_parameters: bytes = b""
    """What is in `tls_dhparam`, PEM, read by the parent when it starts."""

    def close(self) -> None:
        """Close the listeners, remove socket files, close access logs. The parent calls it at its end."""
        for listener in self.listeners:
            listener.close()
        for domain in self.domains:
            if domain.accesslog is not None:
                domain.accesslog.close()


def freeze(*, application: Application = the_application, euid: int | None = None) -> Plan:
    """End the declarations and make the Plan. Raises ConfigurationError for what can't be used together.

    `euid` is the user that the deployment is judged by, that of this process unless given.
    """
    application.check_open("freeze")
    settings = options.snapshot(application.config)
    if settings.file is not None:
        message = "configuration files are not read by this version; set the options in the application"
        raise ConfigurationError(f"kore.config.file = {settings.file!r}: {message}")
    for listener in application.listeners.values():
        set_backlog(listener, settings.socket_backlog)
    mounts: list[Mount] = []
    routers = _routers(application, mounts)
    resolved = privileges.resolve(application.privileges, settings)
    deployment = privileges.deployment(settings, resolved["worker"], os.geteuid() if euid is None else euid)
    for domain in application.domains:
        if domain.tls is not None and domain.tls.local and deployment.name != "dev":
            raise MissingCertificateError(domain.name)
    plan = Plan(
        settings=settings,
        listeners=tuple(application.listeners.values()),
        routers=MappingProxyType(routers),
        domains=tuple(_planned(domain) for domain in application.domains),
        mounts=tuple(mounts),
        prerequests=tuple(application.prerequests),
        hooks=Hooks() if application.loaded is None else hooks_of(application.loaded.module),
        privileges=MappingProxyType(resolved),
        deployment=deployment,
        tasks=len(tasks.pending_tasks),
        title=application.title,
        signals=tuple(application.signals),
        notices=tuple(_notices(application)),
    )
    options.freeze(application.config)
    application.frozen = True
    return plan


def _notices(application: Application) -> Iterator[str]:
    """What was declared and has no effect."""
    for listener in application.listeners.values():
        if listener.tls and not any(domain.listener is listener for domain in application.domains):
            yield f"server {listener.name}: speaks TLS and has no domain, so no certificate: nobody can connect to it"
    for domain in application.domains:
        if domain.tls is not None and domain.tls.crl is not None and domain.tls.client_verify is None:
            yield f"domain {domain.name}: crl is of no use without client_verify: no certificate is asked for"


def _routers(application: Application, mounts: list[Mount]) -> dict[str, Router]:
    """A router for every listener, its domains and their routes in the order of their declaration.

    What is mounted is added to `mounts`.
    """
    installed: dict[PyDomain, list[Route]] = {domain: [] for domain in application.domains}
    index = 0
    for declared in application.routes:
        for domain in domains_of(declared):
            installed[domain].append(_route(declared, domain, index, application.prerequests))
            index += 1
    mounted: dict[PyDomain, list[Route]] = {domain: [] for domain in application.domains}
    for mount in application.mounts:
        for domain in domains_of(mount):
            if any(other.path == mount.path for other in mounted[domain]):
                raise ConfigurationError(f"asgi {mount.name}: {mount.path or '/'!r} of {domain.name!r} is taken")
            mounted[domain].append(_mount(mount, domain, index, application.prerequests, mounts))
            index += 1
    served: dict[PyDomain, Domain] = {}
    shared = None
    for domain in application.domains:
        log = domain.accesslog_file
        files = None
        file_routes: dict[str, Route] = {}
        if domain.filemap_list:
            from kore.http.filemaps import FileMap, FileMaps, Shared, serve

            shared = shared or Shared()
            maps = [FileMap(one.url, one.directory, one.auth) for one in domain.filemap_list]
            files = FileMaps(maps, shared=shared)
            for one in maps:
                file_routes[one.url] = _file_route(one.url, one.auth, partial(serve, file_map=one), domain, index)
                index += 1
        served[domain] = Domain(
            domain.name,
            installed[domain],
            redirects=domain.redirect_list,
            files=files,
            file_routes=file_routes,
            mounts=mounted[domain],
            log=None if log is None else LogTarget(log, domain.accesslog_format),
        )
    return {
        name: Router(made for domain, made in served.items() if domain.listener is listener)
        for name, listener in application.listeners.items()
    }


def _route(
    declared: DeclaredRoute, domain: PyDomain, index: int, prerequests: Sequence[Callable[..., Any]]
) -> Route:
    route = Route(
        declared.path,
        guarded(declared.handler, prerequests),
        method_mask(declared.methods),
        parameters=declared.parameters,
        auth=declared.auth,
        hooks=declared.hooks,
        domain=domain.name,
        index=index,
        name=f"{domain.name} {declared.path}",
        gate=gate_of(declared.auth, None if declared.hooks is None else declared.hooks.on_headers),
    )
    if has_async_rules(route):
        # As if it were the first prerequest: what the handler takes has been judged by then.
        route = replace(route, handler=guarded(route.handler, [await_rules]))
    return route


def _file_route(url: str, auth: Auth | None, handler: Callable[..., Any], domain: PyDomain, index: int) -> Route:
    """What serves one map of files: no prerequests, which are for the application's own handlers (kore-api.md 10.2)."""
    return Route(
        url,
        handler,
        FILE_METHODS,
        auth=auth,
        domain=domain.name,
        index=index,
        name=f"{domain.name} {url} (files)",
        gate=gate_of(auth, None),
    )


def _mount(
    declared: DeclaredMount,
    domain: PyDomain,
    index: int,
    prerequests: Sequence[Callable[..., Any]],
    mounts: list[Mount],
) -> Route:
    from kore.http.asgi.mount import Mount

    mount = Mount(declared.app, declared.name, declared.path)
    mounts.append(mount)
    return Route(
        declared.path,
        guarded(mount.handle, prerequests),
        auth=declared.auth,
        hooks=declared.hooks,
        domain=domain.name,
        index=index,
        name=f"{domain.name} {declared.path}/ (asgi {declared.name})",
        gate=gate_of(declared.auth, None if declared.hooks is None else declared.hooks.on_headers),
        receiver=mount.receiver,
    )


def _planned(domain: PyDomain) -> PlannedDomain:
    return PlannedDomain(
        domain.name,
        domain.listener.name,
        domain.tls,
        tuple(domain.filemap_list),
        tuple(domain.redirect_list),
        domain.accesslog_file,
    )
