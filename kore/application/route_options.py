"""What a route is declared with: its methods, its parameters, its authentication and its hooks, checked at the call.

The C platform looks at all of it when the server starts and then names neither the file nor the line. Checked here,
a mistake is an exception where it was made. What the C platform ignores, an unknown keyword for one, is refused: a
misspelled ``auth`` must not leave a route open. Kore-api.md 8.3 to 8.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from re import Pattern
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kore.application import arguments
from kore.application.kinds import shown
from kore.errors import ConfigurationError
from kore.http.ere import compile_pattern

if TYPE_CHECKING:
    from kore.application.domains import PyDomain

METHODS = ("get", "post", "put", "delete", "head", "options", "patch")

KEYWORDS = ("methods", "auth", "hooks", "qs", *METHODS)

IGNORED = ("key",)
"""The reference lists it among the keywords of a route by mistake (kore-api.md 20, row 11); it means nothing."""

HOOKS = ("on_headers", "on_body_chunk", "on_free")

AUTH_KEYS = ("type", "value", "verify", "redirect")

AUTH_TYPES = ("cookie", "header")


@dataclass(frozen=True, slots=True)
class Rule:
    """What the value of one parameter must be: found by `pattern`, or accepted by `check(req, value)`."""

    name: str
    pattern: Pattern[str] | None
    check: Callable[..., Any] | None


@dataclass(frozen=True, slots=True)
class Auth:
    """Who may use a route: `verify(req, value)` decides on the value of the cookie or header `name`."""

    kind: str
    """"cookie" or "header"."""
    name: str
    verify: Callable[..., Any]
    redirect: str | None
    """Where a client without permission is sent; None: 403."""


@dataclass(frozen=True, slots=True)
class RouteHooks:
    """Functions called while a request of the route is received and when it ends."""

    on_headers: Callable[..., Any] | None = None
    on_body_chunk: Callable[..., Any] | None = None
    on_free: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class DeclaredRoute:
    """One route as declared. Its domain may still be a name, or None for the only domain there will be."""

    path: str
    handler: Callable[..., Any]
    methods: tuple[str, ...] | None
    """Lower-case names, None: all of them."""
    parameters: Mapping[str, tuple[Rule, ...]]
    """By lower-case method, and "qs" for the query string whatever the method."""
    auth: Auth | None
    hooks: RouteHooks | None
    domain: PyDomain | str | None


def declare(path: Any, handler: Any, domain: PyDomain | str | None, keywords: Mapping[str, Any]) -> DeclaredRoute:
    """Check everything a route is given. Raises TypeError and ConfigurationError, both with the route's path."""
    path = arguments.text("route: the path", path)
    where = f"route {path!r}"
    if not callable(handler):
        raise TypeError(f"{where}: the handler is a function, not {type(handler).__name__}")
    if not path.startswith("/"):
        pattern("route", path)  # the router compiles it again; a mistake shall show here, where it was made
    parameters: dict[str, tuple[Rule, ...]] = {}
    for keyword, value in keywords.items():
        lowered = keyword.lower()
        if keyword in IGNORED:
            continue
        if keyword not in KEYWORDS and lowered not in METHODS:
            allowed = ", ".join((*KEYWORDS, "and domain for kore.route"))
            raise TypeError(f"{where}: unknown keyword {keyword!r}; allowed are {allowed}")
        if (lowered in METHODS or lowered == "qs") and value is not None:
            if lowered in parameters:
                raise ConfigurationError(f"{where}: {lowered} is given twice, in different case")
            parameters[lowered] = _rules(f"{where}: {keyword}", value)
    return DeclaredRoute(
        path,
        handler,
        _methods(where, keywords.get("methods")),
        MappingProxyType(parameters),
        auth_of(where, keywords.get("auth")),
        hooks_of(where, keywords.get("hooks")),
        domain,
    )


def _methods(where: str, given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple, set, frozenset)):
        raise TypeError(f"{where}: methods is a list of names, not {shown(given)}")
    names: list[str] = []
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{where}: methods holds {shown(name)}; allowed are names of methods")
        if name.lower() not in METHODS:
            message = f"{where}: unknown method {shown(name)}; allowed are {', '.join(METHODS)}"
            raise ConfigurationError(message)
        if name.lower() not in names:
            names.append(name.lower())
    return tuple(names)


def _rules(where: str, given: Any) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for name, rule in _dict(where, given).items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where}: the name of a parameter is a str that is not empty, not {shown(name)}")
        if isinstance(rule, str):
            rules.append(Rule(name, pattern(f"{where}: parameter {name!r}", rule), None))
        elif callable(rule):
            rules.append(Rule(name, None, rule))
        else:
            message = f"parameter {name!r} has the rule {shown(rule)}; allowed are a regex or a function"
            raise TypeError(f"{where}: {message}")
    return tuple(rules)


def auth_of(where: str, given: Any) -> Auth | None:
    """The authentication of a route or a file map, None when `given` is None. Raises TypeError, ConfigurationError."""
    if given is None:
        return None
    where = f"{where}: auth"
    keys = _dict(where, given)
    _known(where, keys, AUTH_KEYS)
    kind = keys.get("type")
    if kind not in AUTH_TYPES:
        raise ConfigurationError(f"{where}: type = {shown(kind)}; allowed are {' and '.join(AUTH_TYPES)}")
    verify = keys.get("verify")
    if not callable(verify):
        raise TypeError(f"{where}: verify is a function, not {type(verify).__name__}")
    try:
        name = arguments.text(f"{where}: value", keys.get("value"))
        redirect = keys.get("redirect")
        if redirect is not None:
            redirect = location(f"{where}: redirect", redirect)
    except ValueError as problem:
        raise ConfigurationError(str(problem)) from None
    return Auth(kind, name, verify, redirect)


def hooks_of(where: str, given: Any) -> RouteHooks | None:
    """The hooks of a route, None when `given` is None. Raises TypeError, ConfigurationError."""
    if given is None:
        return None
    where = f"{where}: hooks"
    keys = _dict(where, given)
    _known(where, keys, HOOKS)
    for name, function in keys.items():
        if function is not None and not callable(function):
            raise TypeError(f"{where}: {name} is a function, not {type(function).__name__}")
    return RouteHooks(**keys)


def pattern(where: str, text: str) -> Pattern[str]:
    """A POSIX extended regular expression, compiled. Raises ConfigurationError."""
    try:
        return compile_pattern(text)
    except ValueError as problem:
        raise ConfigurationError(f"{where}: {shown(text)} is no regular expression: {problem}") from None


def location(where: str, value: Any) -> str:
    """The target of a redirect: a text without control characters, which could add headers to a response."""
    target = arguments.text(where, value)
    if any(character < " " or character == "\x7f" for character in target):
        raise ConfigurationError(f"{where} has control characters in it")
    return target


def _dict(where: str, given: Any) -> dict[Any, Any]:
    if not isinstance(given, dict):
        raise TypeError(f"{where} is a dict, not {type(given).__name__}")
    return given


def _known(where: str, keys: Iterable[Any], allowed: tuple[str, ...]) -> None:
    for key in keys:
        if key not in allowed:
            raise ConfigurationError(f"{where}: unknown key {shown(key)}; allowed are {', '.join(allowed)}")
