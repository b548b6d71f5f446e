"""``kore.asgi``: an ASGI application, mounted under a domain or a prefix of it.

Like a route it is declared while the application is loaded, and finds its domain when everything has been declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kore.application import arguments, route_options
from kore.application.declared import application
from kore.application.domains import PyDomain
from kore.application.kinds import shown
from kore.application.route_options import Auth, RouteHooks
from kore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class DeclaredMount:
    """One mount as declared. Its domain may still be a name, or None for the only domain there will be."""

    app: Callable[..., Any]
    name: str
    """What logs call the application."""
    path: str
    """"" for the whole domain, else "/" and something that does not end in one."""
    auth: Auth | None
    hooks: RouteHooks | None
    domain: PyDomain | str | None


def asgi(app: Any, /, *, path: str = "/", domain: Any = None, auth: Any = None, hooks: Any = None) -> None:
    """Mount an ASGI 3 application (Starlette, FastAPI, Django ...): it answers what nothing else of the domain does.

    `app` is the application or where it is, ``"package.module:name"``. It gets the requests for `path` and everything
    below, as `root_path` says, of the domain called `domain` or of the only one; routes and maps of files come before
    it, and of several mounts the one with the longest path. Its lifespan runs in every worker: one whose startup fails
    does not serve. `auth` is asked before it, and `hooks` may have ``on_headers`` and ``on_free``, as for a route;
    prerequests are called with it too. Limits of kore's options hold for it.

    Raises TypeError, ConfigurationError (a ValueError) and what importing it raises for what can't be used,
    RuntimeError after the start.
    """
    application.check_open("asgi")
    name, found = _found(app)
    where = f"asgi {name}"
    path = arguments.text(f"{where}: path", path)
    if not path.startswith("/") or any(character in path for character in "%?#"):
        raise ConfigurationError(f"{where}: path {shown(path)}; allowed is a decoded path from its first '/' on")
    if domain is not None and not isinstance(domain, (str, PyDomain)):
        raise TypeError(f"{where}: domain is a domain or its name, not {type(domain).__name__}")
    declared_hooks = route_options.hooks_of(where, hooks)
    if declared_hooks is not None and declared_hooks.on_body_chunk is not None:
        raise ConfigurationError(f"{where}: hooks: on_body_chunk cannot be had, the application receives the body")
    declared_auth = route_options.auth_of(where, auth)
    application.mounts.append(DeclaredMount(found, name, path.rstrip("/"), declared_auth, declared_hooks, domain))


def _found(app: Any) -> tuple[str, Callable[..., Any]]:
    """The application and a name for it."""
    name = app if isinstance(app, str) else f"{type(app).__module__}.{type(app).__qualname__}"
    if isinstance(app, str):
        module, colon, attribute = app.partition(":")
        if not (module and colon and attribute):
            raise ConfigurationError(f"asgi: {shown(app)}; allowed is an application, or 'package.module:name'")
        app = import_module(module)
        for part in attribute.split("."):
            try:
                app = getattr(app, part)
            except AttributeError:
                raise ConfigurationError(f"asgi: {name!r}: there is no {part!r} in {shown(app)}") from None
    elif hasattr(app, "__name__"):
        name = f"{app.__module__}:{app.__name__}"
    if not callable(app) or isinstance(app, type):
        kind = "a class, not an instance of it" if isinstance(app, type) else type(app).__name__
        raise TypeError(f"asgi {name}: an ASGI 3 application is called with scope, receive and send; this is {kind}")
    return name, app
