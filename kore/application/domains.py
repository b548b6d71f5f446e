"""``kore.domain`` and ``kore.route``: which host names a server answers for, and what answers.

Declarations only: they are put into routers when the application is declared whole (plan.py). That is why a route
may be declared before its domain, and why the order of servers, domains and options matters only where a name is
looked up. Kore-api.md section 8 has the rules, and says which of the C platform's are mistakes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Any, TypeVar

from kore.application import arguments, privileges, route_options
from kore.application.declared import application
from kore.application.kinds import shown
from kore.application.route_options import Auth, DeclaredRoute
from kore.application.servers import DEFAULT_NAME, Listener
from kore.errors import ConfigurationError
from kore.http.accesslog import FORMATS
from kore.http.redirects import Redirect
from kore.reactor.names import made, public

if TYPE_CHECKING:
    from kore.application.mounts import DeclaredMount

Handler = TypeVar("Handler", bound=Callable[..., Any])

NAME_MAX = 253
"""Characters of a host name, RFC 1035 2.3.4."""

VERIFY_DEPTH_MAX = 100
"""Longest chain of certificates: OpenSSL's own bound."""

PAIRS_MAX = 2
"""Certificates of one domain: one for each kind of key."""

_HOST_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_HOST_NAME = re.compile(rf"(?:{_HOST_LABEL}\.)*(?![0-9]+\Z){_HOST_LABEL}", re.ASCII | re.IGNORECASE)
"""Letters, digits and hyphens, and no address: the last label is no number (RFC 1123 2.1)."""

REDIRECT_STATUSES = range(300, 600)
"""Statuses of a redirect: 3xx, and the errors that the reference's `return` answers with."""

ACCESSLOG_MODE = 0o644


@dataclass(frozen=True, slots=True)
class DomainTls:
    """The certificates of a domain on a TLS server, and what it asks of its clients.

    Certificates, keys and revocations count from the root of the key manager, `client_verify` from that of the workers.
    """

    cert: tuple[str, ...]
    """Files of certificates, each with its chain: one, or two with keys of different kinds; none: see `local`."""
    key: tuple[str, ...]
    """The files of their private keys, in the same order."""
    acme: bool
    """Certificates come from the ACME provider; `cert` and `key` are where they are kept."""
    client_verify: str | None
    verify_depth: int
    crl: str | None
    local: bool = False
    """Nothing was given: in development the certificate comes from the local authority."""
    authorities: tuple[bytes, ...] = ()
    """DER: what is in `client_verify`, read by the parent when it starts."""


class MissingCertificateError(ConfigurationError, RuntimeError):
    """A domain of a TLS server has no certificate, outside development."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"domain {name!r}: its server speaks TLS; give cert and key, or acme=True (deployment dev needs none)")


@dataclass(frozen=True, slots=True)
class Filemap:
    """Files below `directory` (relative to the root of the workers) are served below `url`."""

    url: str
    directory: str
    auth: Auth | None


@public("domain")
class PyDomain:
    """A domain of a server; made by kore.domain(). Source: reference, "domain"; kore-api.md 8.1."""

    __slots__ = ("_accesslog", "_accesslog_format", "filemap_list", "listener", "name", "redirect_list", "tls")

    name: str
    listener: Listener
    tls: DomainTls | None
    filemap_list: list[Filemap]
    redirect_list: list[Redirect]
    _accesslog: FileIO | None
    _accesslog_format: str

    def route(self, path: str, callback: Callable[..., Any], /, **keywords: Any) -> None:
        """Let `callback(req, *captures)` answer requests for `path`.

        A path that starts with "/" is that text exactly; any other is a POSIX extended regular expression that is
        searched for, and its groups become arguments. Keywords: `methods`, `auth`, `hooks`, `qs`, and one dict of
        parameters for each method. Raises TypeError and ConfigurationError (a ValueError) for what can't be used,
        RuntimeError after the start. Source: reference, "domain.route"; kore-api.md 8.2 and 8.3.
        """
        application.check_open("domain.route")
        application.routes.append(route_options.declare(path, callback, self, keywords))

    def filemaps(self, maps: dict[str, Any], /) -> None:
        """Serve files: `maps` is a dict of URL (from "/" to "/") to directory, or to a tuple (directory, auth dict).

        Directories are relative to the root of the workers and must exist. Raises RuntimeError for what can't be
        used. Source: reference, "domain.filemaps"; kore-api.md 8.9.
        """
        application.check_open("domain.filemaps")
        if not isinstance(maps, dict):
            raise RuntimeError(f"filemaps: the maps are a dict, not {type(maps).__name__}")
        # All or nothing: one bad entry leaves the others out too.
        self.filemap_list += [_filemap(url, where) for url, where in maps.items()]

    def redirect(self, regex: str, status: int, target: str, /) -> None:
        """Answer requests whose path is found by `regex` with `status` and `target` as their location.

        It is looked at before the routes, for every method. In `target`, $qs is the query string, empty without one,
        and $1 to $15 are the groups. A status from 400 on is answered without a location. Raises TypeError,
        ConfigurationError (a ValueError) and, after the start, RuntimeError. Source: kore-api.md 8.10.
        """
        application.check_open("domain.redirect")
        where = f"redirect {shown(regex)}"
        pattern = route_options.pattern(where, arguments.text("redirect: the regex", regex))
        number = arguments.integer(f"{where}: the status", status, REDIRECT_STATUSES[0], REDIRECT_STATUSES[-1])
        self.redirect_list.append(Redirect(pattern, number, route_options.location(f"{where}: the target", target)))

    @property
    def accesslog(self) -> str:
        """The path of the access log: write-only, once; the file is opened for appending at the assignment.

        Raises AttributeError when read, TypeError for what is no path, RuntimeError when it is set already or can't be
        opened, or after the start. Source: kore-api.md 8.11.
        """
        raise AttributeError("accesslog can be assigned to, not read")

    @accesslog.setter
    def accesslog(self, path: str) -> None:
        application.check_open("domain.accesslog")
        path = arguments.path(f"domain {self.name!r}: accesslog", path)
        if self._accesslog is not None:
            raise RuntimeError(f"domain {self.name!r}: accesslog is {self._accesslog.name!r} already")
        try:
            self._accesslog = FileIO(path, "ab", opener=_open_log)
        except OSError as problem:
            reason = f"{problem.strerror} (errno {problem.errno})"
            raise RuntimeError(f"domain {self.name!r}: cannot open accesslog {path!r}: {reason}") from None

    @property
    def accesslog_file(self) -> FileIO | None:
        """The open access log, for the workers to write to."""
        return self._accesslog

    @property
    def accesslog_format(self) -> str:
        """What a line of the access log looks like: "kore" (the default), "combined" or "json".

        Raises TypeError and ConfigurationError for anything else, RuntimeError after the start.
        """
        return self._accesslog_format

    @accesslog_format.setter
    def accesslog_format(self, name: str) -> None:
        application.check_open("domain.accesslog_format")
        where = f"domain {self.name!r}: accesslog_format"
        name = arguments.text(where, name)
        if name not in FORMATS:
            raise ConfigurationError(f"{where} = {shown(name)}; allowed are {', '.join(FORMATS)}")
        self._accesslog_format = name

    def __repr__(self) -> str:
        return f"<kore.domain {self.name!r} on {self.listener.url}>"


@public("route")
class PyRoute:
    """What kore.route() remembers until it is given the handler."""

    __slots__ = ("_domain", "_keywords", "_path")

    _path: str
    _domain: PyDomain | str | None
    _keywords: dict[str, Any]

    def inner(self, handler: Handler, /) -> Handler:
        """Register `handler` and return it unchanged: the decorator itself. Raises as kore.domain's route."""
        application.check_open("route")
        application.routes.append(route_options.declare(self._path, handler, self._domain, self._keywords))
        return handler


def domain(
    host: str,
    /,
    *,
    attach: Any = DEFAULT_NAME,
    cert: Any = None,
    key: Any = None,
    acme: Any = False,
    client_verify: Any = None,
    verify_depth: Any = 1,
    crl: Any = None,
) -> PyDomain:
    """Declare a domain on the server called `attach`, and return it for its routes.

    `host` is a name or a shell pattern (``*.example.com``, ``*``), compared without regard to case. Without a usable
    `attach` the domain belongs to the only server there is. On a TLS server it needs `cert` and `key`, the paths of PEM
    files, or two of each in tuples (RSA and ECDSA), or `acme`; in development it may go without any. `client_verify` is
    a file of certificate authorities that clients must have a certificate from, at most `verify_depth` steps away,
    minus the revoked ones of `crl`. On other servers all of these are ignored.

    Raises RuntimeError when the server does not exist, the name is on it already, certificates are missing, and after
    the start; TypeError and ValueError for arguments that can't be used. Source: reference, "domain"; kore-api.md 8.1.
    """
    application.check_open("domain")
    name = arguments.text("domain: the name", host)
    if len(name) > NAME_MAX or any(character <= " " or character == "\x7f" for character in name):
        raise ConfigurationError(f"domain {shown(name)}: allowed is a name of at most {NAME_MAX} characters, no spaces")
    listener = _attached(name, attach)
    for other in application.domains:
        if other.listener is listener and same_name(other.name, name):
            raise RuntimeError(f"domain {name!r}: server {listener.name!r} has it already as {other.name!r}")
    made_domain = made(PyDomain)
    made_domain.name = name
    made_domain.listener = listener
    made_domain.tls = None
    if listener.tls:
        made_domain.tls = _tls(name, cert, key, acme, client_verify, verify_depth, crl)
    made_domain.filemap_list = []
    made_domain.redirect_list = []
    made_domain._accesslog = None
    made_domain._accesslog_format = FORMATS[0]
    application.domains.append(made_domain)
    return made_domain


def route(path: str, /, *, domain: Any = None, **keywords: Any) -> Callable[[Handler], Handler]:
    """A decorator: let the function answer requests for `path`, of the domain called `domain` or of the only one.

    The other keywords are those of a domain's route. The domain is looked for when the application is declared whole,
    so it may be declared later; a name that several servers have stands for all of them. Raises as a domain's route.
    Source: kore-api.md 7.6 and 8.2.
    """
    application.check_open("route")
    path = arguments.text("route: the path", path)
    if domain is not None and not isinstance(domain, (str, PyDomain)):
        raise TypeError(f"route {path!r}: domain is the name of a domain, not {type(domain).__name__}")
    pending = made(PyRoute)
    pending._path, pending._domain, pending._keywords = path, domain, keywords
    return pending.inner


def _open_log(path: str, flags: int) -> int:
    # O_NOCTTY: a terminal given as a log must not become the controlling one, open(2). O_NONBLOCK: nobody may ever
    # read from a fifo given as one; regular files don't care.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, ACCESSLOG_MODE)


def same_name(one: str, other: str) -> bool:
    """Whether two host names or patterns are the same text: case and a dot at the end do not count, RFC 1034 3.1."""
    return _plain(one) == _plain(other)


def domains_of(declared: DeclaredRoute | DeclaredMount) -> list[PyDomain]:
    """The domains a route or a mount belongs to. Raises ConfigurationError when that is not clear."""
    wanted = declared.domain
    if isinstance(wanted, PyDomain):
        return [wanted]
    names = ", ".join(dict.fromkeys(repr(known.name) for known in application.domains)) or "none"
    if wanted is not None:
        found = [known for known in application.domains if same_name(known.name, wanted)]
        if not found:
            message = f"{_called(declared)}: there is no domain {wanted!r}; declared are: {names}"
            raise ConfigurationError(message)
        return found
    if len(application.domains) != 1:
        advice = "call kore.domain()" if not application.domains else f"say which by domain=...; declared are: {names}"
        message = f"belongs to the only domain, but there are {len(application.domains)}; {advice}"
        raise ConfigurationError(f"{_called(declared)}: {message}")
    return application.domains


def _called(declared: DeclaredRoute | DeclaredMount) -> str:
    if isinstance(declared, DeclaredRoute):
        return f"route {declared.path!r}"
    return f"asgi {declared.name}"


def _attached(name: str, attach: Any) -> Listener:
    wanted = attach if isinstance(attach, str) else DEFAULT_NAME
    found = application.listeners.get(wanted)
    if found is not None:
        return found
    if not application.listeners:
        raise RuntimeError(f"domain {name!r}: there is no server to attach it to; call kore.server() first")
    if wanted == DEFAULT_NAME and len(application.listeners) == 1:
        # An application written for the C platform may name its server by position, which that platform ignored.
        return next(iter(application.listeners.values()))
    servers = ", ".join(repr(server) for server in application.listeners)
    raise RuntimeError(f"domain {name!r}: there is no server {wanted!r}; declared are: {servers}")


def _tls(
    name: str, cert: Any, key: Any, acme: Any, client_verify: Any, verify_depth: Any, crl: Any
) -> DomainTls:
    where = f"domain {name!r}"
    automatic = arguments.boolean(f"{where}: acme", acme)
    local = False
    if automatic:
        # Names of files are made of it: whatever else it is, it must be a host name.
        if len(name) > NAME_MAX or not _HOST_NAME.fullmatch(name):
            raise RuntimeError(f"{where}: ACME gives certificates for names only, not for patterns or addresses")
        cert, key = f"certificates/{name}/fullchain.pem", f"certificates/{name}/key.pem"
    elif cert is None and key is None and application.config.deployment in (None, "dev"):
        local = True  # whether this is development is known when all is declared: plan.py
    elif cert is None or key is None:
        raise MissingCertificateError(name)
    certs = () if local else arguments.paths(f"{where}: cert", cert, PAIRS_MAX)
    keys = () if local else arguments.paths(f"{where}: key", key, PAIRS_MAX)
    if len(certs) != len(keys):
        raise ConfigurationError(f"{where}: {len(certs)} cert and {len(keys)} key; allowed is one key for each cert")
    return DomainTls(
        certs,
        keys,
        automatic,
        None if client_verify is None else arguments.path(f"{where}: client_verify", client_verify),
        arguments.integer(f"{where}: verify_depth", verify_depth, 0, VERIFY_DEPTH_MAX),
        None if crl is None else arguments.path(f"{where}: crl", crl),
        local,
    )


def _filemap(url: Any, where: Any) -> Filemap:
    if not isinstance(url, str):
        raise RuntimeError(f"filemaps: the URL is a str, not {type(url).__name__}")
    if not (url.startswith("/") and url.endswith("/")) or "\0" in url:
        raise RuntimeError(f"filemaps: the URL {url!r} must start and end with '/'")
    auth: Auth | None = None
    directory = where
    if isinstance(where, tuple):
        if len(where) != 2 or not isinstance(where[1], dict):
            raise RuntimeError(f"filemaps: {url!r} has {shown(where)}; allowed is a path, or a path and an auth dict")
        directory = where[0]
        try:
            auth = route_options.auth_of(f"filemaps: {url!r}", where[1])
        except (TypeError, ValueError) as problem:
            raise RuntimeError(str(problem)) from None
    try:
        directory = arguments.path(f"filemaps: the directory of {url!r}", directory)
    except (TypeError, ValueError) as problem:
        raise RuntimeError(str(problem)) from None
    # Relative to where the workers will be, as far as that is known by now; an absolute path stays what it is.
    if not os.path.exists(os.path.join(privileges.worker_root(), directory)):
        raise RuntimeError(f"filemaps: {directory!r}, the directory of {url!r}, does not exist")
    return Filemap(url, directory, auth)


def _plain(name: str) -> str:
    lowered = name.lower()
    return lowered[:-1] if lowered.endswith(".") and len(lowered) > 1 else lowered
