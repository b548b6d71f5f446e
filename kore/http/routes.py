"""Routes: which handler a request belongs to, and what it is told when there is none.

A server has domains, chosen by the request's host; a domain has routes, tried in the order they were installed. The
first whose path and method both fit wins. Where paths fit and no method does, the answer is 405 and says what is
allowed (RFC 9110 15.5.6). Paths are compared as they were sent: a static one exactly, a pattern by searching. Redirects
come before the routes, and maps of files after them, for the methods they have. What no other wants goes to the
application mounted there, the longest prefix first; it decodes paths, so for it they are compared decoded.

Static paths are found in a table, patterns are tried one after the other, and the install order decides between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote

from kore.errors import ConfigurationError
from kore.http.ere import compile_pattern
from kore.http.head import HOST_BYTES_MAX, METHODS, Head
from kore.http.redirects import Redirect, redirected

if TYPE_CHECKING:
    from kore.http.body import Receiver

__all__ = [
    "ALL_METHODS", "CAPTURES_MAX", "FILE_METHODS", "Domain", "Files", "Resolution", "Route", "Router",
    "compile_pattern", "method_mask", "method_names",
]  # fmt: skip

CAPTURES_MAX: Final = 15  # the reference passes at most this many groups to a handler
ALL_METHODS: Final = sum(METHODS.values())
FILE_METHODS: Final = METHODS["GET"] | METHODS["HEAD"]


def method_mask(names: Iterable[str] | None) -> int:
    """The bits of `names` in any case; None: every method. "get" allows HEAD too (kore-api.md 8.3).

    Raises ConfigurationError for a name that is no method of `METHODS`.
    """
    if names is None:
        return ALL_METHODS
    mask = 0
    for name in names:
        bit = METHODS.get(name.upper())
        if bit is None:
            raise ConfigurationError(f"unknown method {name!r}: allowed are {', '.join(map(str.lower, METHODS))}")
        mask |= bit
    return mask | METHODS["HEAD"] if mask & METHODS["GET"] else mask


@lru_cache(maxsize=256)  # there are 128 sets
def method_names(mask: int) -> str:
    """A set of methods as `Allow` lists it: sorted, with commas."""
    return ", ".join(sorted(name for name, bit in METHODS.items() if mask & bit))


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One path and who answers it. `path` beginning with "/" is static; any other is a POSIX extended pattern."""

    path: str
    handler: Callable[..., Any]
    methods: int = ALL_METHODS
    """A set of bits of `METHODS`."""
    parameters: Any = None
    auth: Any = None
    hooks: Any = None
    domain: str = ""
    index: int = 0
    """Its number among all routes of the plan."""
    name: str = ""
    """What logs and reports call it."""
    gate: Callable[..., Any] | None = None
    """Asked before a body is read, with the request and the captures: whether the request may go on (see gate.py)."""
    receiver: Callable[[Any], Receiver] | None = None
    """Makes what takes the body of a request as it comes; the handler is then called before all of it is there."""


class Files(Protocol):
    """The maps of files of a domain."""

    def find(self, path: str) -> Any:
        """The map that a path belongs to, an object with its `url`; None when there is none."""


class Domain:
    """One name, or shell pattern of names, and its routes in install order.

    `redirects` are looked at before the routes. `files` are looked at after them; `file_routes` has the route that
    serves each of its maps, by URL. `mounts` come last: routes whose paths are prefixes, "" for everything. `log` is
    where its access log goes, as the server knows it.

    Raises ConfigurationError for two routes of the same text with a method in common, and for a malformed pattern.
    """

    __slots__ = ("pattern", "name", "routes", "redirects", "files", "file_routes", "mounts", "log", "allow", "_static",
                 "_patterns")  # fmt: skip

    def __init__(
        self,
        pattern: str,
        routes: Sequence[Route] = (),
        *,
        redirects: Sequence[Redirect] = (),
        files: Files | None = None,
        file_routes: Mapping[str, Route] | None = None,
        mounts: Iterable[Route] = (),
        log: Any = None,
    ) -> None:
        self.pattern = pattern
        self.redirects = tuple(redirects)
        self.files = files
        self.file_routes = file_routes or {}
        self.mounts = tuple(sorted(mounts, key=lambda mount: -len(mount.path)))
        self.log = log
        self.name = _normal(pattern)
        if not self.name or len(pattern.encode("utf-8", "surrogateescape")) > HOST_BYTES_MAX:
            raise ConfigurationError(f"domain {pattern!r}: a name has 1 to {HOST_BYTES_MAX} bytes")
        self.routes = tuple(routes)
        self._static: dict[str, list[tuple[int, Route]]] = {}
        self._patterns: list[tuple[int, Route, re.Pattern[str]]] = []
        taken: dict[str, int] = {}
        mask = ALL_METHODS if self.mounts else FILE_METHODS if self.file_routes else 0
        for order, route in enumerate(self.routes):
            twice = taken.get(route.path, 0) & route.methods
            if twice:
                raise ConfigurationError(f"domain {pattern!r}: route {route.path!r} twice for {method_names(twice)}")
            taken[route.path] = taken.get(route.path, 0) | route.methods
            mask |= route.methods
            if route.path.startswith("/"):
                self._static.setdefault(route.path, []).append((order, route))
                continue
            try:
                self._patterns.append((order, route, compile_pattern(route.path)))
            except ValueError as error:
                raise ConfigurationError(
                    f"domain {pattern!r}: route {route.path!r} is no POSIX extended regular expression: {error}"
                ) from None
        self.allow = method_names(mask)
        """What any route of the domain allows: the answer to ``OPTIONS *``."""

    def resolve(self, path: str, method: int) -> Resolution:
        """The route for a path and a method of `METHODS`; 405 with what is allowed, or 404."""
        found = None
        before = len(self.routes)
        allowed = 0
        known = False
        for order, route in self._static.get(path, ()):
            known = True
            if route.methods & method:
                found, before = route, order
                break
            allowed |= route.methods
        for order, route, pattern in self._patterns:
            if order > before:
                break
            match = pattern.search(path)
            if match is not None:
                if route.methods & method:
                    return Resolution(route, _captures(match), 200, "", self)
                known = True
                allowed |= route.methods
        if found is not None:
            return Resolution(found, (), 200, "", self)
        serves = None if self.files is None else self.files.find(path)
        if serves is not None:
            if method & FILE_METHODS:
                return Resolution(self.file_routes[serves.url], (), 200, "", self)
            known = True
            allowed |= FILE_METHODS
        if self.mounts:
            mount = self._mount(path)
            if mount is not None:
                return Resolution(mount, (), 200, "", self)
        if known:
            return Resolution(None, (), 405, method_names(allowed), self)
        return Resolution(None, (), 404, "", self)

    def _mount(self, path: str) -> Route | None:
        """The mount that `path` lies at or below. Decoded: /%61dmin is /admin to an application, and so to us."""
        decoded = unquote(path, errors="surrogateescape")
        for mount in self.mounts:
            if decoded.startswith(mount.path) and decoded[len(mount.path) :][:1] in ("", "/"):
                return mount
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Resolution:
    """What was found: a route with the groups of its pattern, or the status to answer without one.

    `allow` is the list for `Allow` with 405, and with the 200 without a route that answers ``OPTIONS *``.
    """

    route: Route | None
    captures: tuple[str, ...]
    status: int
    allow: str
    domain: Domain | None
    by_rule: bool = False
    """A redirect says so: the status, and with it perhaps a location."""
    location: str | None = None


class Router:
    """The domains of one server. Raises ConfigurationError when two have the same name."""

    __slots__ = ("domains", "_names", "_wildcards")

    def __init__(self, domains: Iterable[Domain] = ()) -> None:
        self.domains = tuple(domains)
        self._names: dict[str, Domain] = {}
        wildcards = []
        for domain in self.domains:
            if domain.name in self._names:
                raise ConfigurationError(f"domain {domain.pattern!r}: there is one of that name already")
            self._names[domain.name] = domain
            if any(sign in domain.name for sign in "*?["):
                wildcards.append(domain)
        # The longest says most; sorting keeps the order of declaration among equals, and "*" comes last by itself.
        wildcards.sort(key=lambda domain: -len(domain.name))
        self._wildcards = [
            (re.compile(translate(domain.name.replace("[^", "[!"))).match, domain) for domain in wildcards
        ]

    def find(self, hostname: str) -> Domain | None:
        """The domain for a `Head.hostname`: its exact name before the longest pattern before ``*``."""
        domain = self._names.get(hostname)
        if domain is not None:
            return domain
        for matches, domain in self._wildcards:
            if matches(hostname):
                return domain
        # An HTTP/1.0 client that names no host means the only one there is.
        return self.domains[0] if not hostname and len(self.domains) == 1 else None

    def log_of(self, head: Head | None) -> Any:
        """Where the access log of `head`'s domain goes; None: nowhere.

        What belongs to no domain (a name nobody serves, a head that is none) goes to the only one, or to ``*``.
        """
        domain = None if head is None else self.find(head.hostname)
        if domain is None:
            domain = self.domains[0] if len(self.domains) == 1 else self._names.get("*")
        return None if domain is None else domain.log

    def resolve(self, head: Head) -> Resolution:
        """Where the request of `head` goes."""
        domain = self.find(head.hostname)
        if domain is None:
            return Resolution(None, (), 404, "", None)
        if head.path == "*":
            # RFC 9110 9.3.7: about the server as such, no route of it.
            return Resolution(None, (), 200, domain.allow, domain)
        if domain.redirects:
            found = redirected(domain.redirects, head)
            if found is not None:
                return Resolution(None, (), found[0], "", domain, True, found[1])
        return domain.resolve(head.path, head.method)


def _captures(match: re.Match[str]) -> tuple[str, ...]:
    """The groups a handler is called with: no more after the first that took no part (kore-api.md 8.8)."""
    groups = match.groups()[:CAPTURES_MAX]
    return groups[: groups.index(None)] if None in groups else groups


def _normal(pattern: str) -> str:
    """A domain's name as `Head.hostname` has names: lower case, no final dot, IPv6 short and without brackets."""
    try:
        return IPv6Address(pattern.removeprefix("[").removesuffix("]")).compressed
    except AddressValueError:
        return pattern.lower().removesuffix(".")
