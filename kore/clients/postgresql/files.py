"""The two files that complete a connection string: the service file, and the file of passwords.

Both are read when the string is declared. A worker may be in another directory and be another user by the time it
connects, and must not need to read the passwords of the user who started the server.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from kore.errors import ConfigurationError
from kore.reactor import trace

_PASSWORD_LINE = re.compile(r"((?:[^\\:]|\\.)*):" * 4 + r"(.*)")
"""host:port:database:user:password, a backslash before any colon or backslash."""


def _home(env: Mapping[str, str]) -> Path | None:
    home = env.get("HOME")
    return Path(home) if home else None


def service_options(service: str, path: str | None, env: Mapping[str, str]) -> dict[str, str]:
    """The options under ``[service]`` in `path`, else in ~/.pg_service.conf, else in $PGSYSCONFDIR/pg_service.conf.

    Raises ConfigurationError where it is not found.
    """
    places = [Path(path)] if path else []
    home = _home(env)
    if not path and home is not None:
        places.append(home / ".pg_service.conf")
    if env.get("PGSYSCONFDIR"):
        places.append(Path(env["PGSYSCONFDIR"], "pg_service.conf"))
    for place in places:
        try:
            text = place.read_text()
        except FileNotFoundError:
            if path and place == places[0]:
                raise ConfigurationError(f"service file {place}: there is no such file") from None
            continue
        except OSError as error:
            raise ConfigurationError(f"service file {place}: {error.strerror}") from None
        found = _section(text, service, place)
        if found is not None:
            return found
    raise ConfigurationError(f"service {service!r} is in none of: {', '.join(map(str, places)) or 'no file'}")


def _section(text: str, service: str, place: Path) -> dict[str, str] | None:
    options: dict[str, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if options is not None:
                break
            if line == f"[{service}]":
                options = {}
        elif options is not None:
            name, equals, value = line.partition("=")
            if not equals:
                raise ConfigurationError(f"service file {place}, line {number}: missing '='")
            options[name.strip()] = value.strip()
    return options


def password_for(path: str | None, env: Mapping[str, str], wanted: tuple[str, int, str, str]) -> str | None:
    """The password of the first line whose host, port, database and user fit `wanted`; `path`: not ~/.pgpass.

    A file that others may read is not used, as libpq does it, and the log says so.
    """
    home = _home(env)
    place = Path(path) if path else home / ".pgpass" if home is not None else None
    if place is None:
        return None
    try:
        mode = place.stat().st_mode
        if not stat.S_ISREG(mode):
            return None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            trace.log(trace.LOG_NOTICE, f"password file {place} is not used: others may read it; chmod 600")
            return None
        lines = place.read_text().splitlines()
    except OSError:
        return None  # as libpq: it is for those who have it
    host, port, database, user = wanted
    # libpq looks a server that is reached through a socket up as "localhost", in other places by its directory.
    keys = ({"*", host, "localhost"} if host.startswith("/") else {"*", host}, {"*", str(port)}, {"*", database})
    for line in lines:
        fields = _PASSWORD_LINE.fullmatch(line)
        if fields is None or line.startswith("#"):
            continue
        found = [re.sub(r"\\(.)", r"\1", field) for field in fields.groups()]
        if all(field in key for field, key in zip(found, (*keys, {"*", user}), strict=False)):
            return found[4]
    return None
