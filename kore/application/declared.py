"""What an application has declared so far, in one object: servers, domains, routes, options and the rest.

``kore.server``, ``kore.domain`` and their kin are functions of a module and have no object to put things into, so
there is one `application` a process. They add to it while the application is loaded; `freeze` (plan.py) turns it
into a Plan once, and from then on every further declaration is an error instead of a silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kore.application import config as config_module
from kore.application.config import Config

if TYPE_CHECKING:
    from kore.application.domains import PyDomain
    from kore.application.loading import Loaded
    from kore.application.mounts import DeclaredMount
    from kore.application.privileges import Privileges
    from kore.application.route_options import DeclaredRoute
    from kore.application.servers import Listener


class Application:
    """The declarations of one application, in the order they were made."""

    __slots__ = (
        "config", "domains", "frozen", "held", "listeners", "listens", "loaded", "mounts", "prerequests", "privileges",
        "routes", "signals", "title",
    )

    def __init__(self) -> None:
        self.config = Config()
        self._clear()

    def _clear(self) -> None:
        self.frozen = False
        self.listens = True
        """Whether declared servers get their addresses: a command that only looks at an application needs none."""
        self.held: Any = None
        """What kore.app() holds."""
        self.loaded: Loaded | None = None
        self.listeners: dict[str, Listener] = {}
        self.domains: list[PyDomain] = []
        self.routes: list[DeclaredRoute] = []
        """Routes in the order they were declared, with or without a domain of their own."""
        self.mounts: list[DeclaredMount] = []
        self.prerequests: list[Callable[..., Any]] = []
        self.privileges: dict[str, Privileges] = {}
        self.signals: list[int] = []
        self.title: str | None = None

    def check_open(self, what: str) -> None:
        """Raise RuntimeError when the server has started: what is declared now could not take effect any more."""
        if self.frozen:
            raise RuntimeError(f"{what}: must be called before the server starts")

    def name(self, name: str) -> None:
        """Set the name in the process titles (kore.setname). Raises TypeError, ValueError."""
        if not isinstance(name, str):
            raise TypeError(f"setname: the name is a str, not {type(name).__name__}")
        if not name or "\0" in name:
            raise ValueError("setname: the name is empty or has a NUL in it")
        self.title = name

    def trap(self, signum: int) -> None:
        """Add a signal that every worker traps for its signal hook (kore.sigtrap before the start)."""
        if signum not in self.signals:
            self.signals.append(signum)

    def reset(self) -> None:
        """Forget everything and close the listeners and log files: what tests do between two applications."""
        for listener in self.listeners.values():
            listener.close()
        for domain in self.domains:
            if domain.accesslog_file is not None:
                domain.accesslog_file.close()
        config_module.reset(self.config)
        self._clear()


application = Application()
"""The application of this process."""

config = application.config
"""``kore.config``: its options."""


def app(*held: Any) -> Any:
    """Hold one object for the application: store the argument and return True, or return what was stored (or None).

    It is a holder and nothing else; the hooks are looked up in the global ``koreapp``. Source: kore-api.md 7.1.
    """
    if len(held) == 1:
        application.held = held[0]
        return True
    return application.held


def prerequest(function: Callable[..., Any], /) -> Callable[..., Any]:
    """Call `function(req)` before the handler of every request, in the order of declaration. A decorator.

    Raises TypeError when it is not callable, RuntimeError after the start. Source: kore-api.md 7.7 and 10.2.
    """
    if not callable(function):
        raise TypeError(f"prerequest: {type(function).__name__} is not callable")
    application.check_open("prerequest")
    application.prerequests.append(function)
    return function
