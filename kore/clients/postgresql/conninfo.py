"""Connection strings as libpq documents them: keywords or a URI, completed by a service file and the PG* environment.

Every option of libpq is in one table. An option is honoured, or only some of its values are: those that ask for nothing
more than is done anyway. All others are refused by name when the string is declared, since a server that quietly
leaves out what was asked for (a client certificate, a required way to authenticate) is worse than none.
Source: PostgreSQL's manual, "Connection Strings", "Parameter Key Words", "Environment Variables", "The Password File".
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlencode

from kore.clients.postgresql.files import password_for, service_options
from kore.errors import ConfigurationError

CONNECT_SECONDS = 30.0
"""How long connecting to one host may take where connect_timeout sets no limit; libpq would wait for ever."""

CONNECT_SECONDS_MIN = 2.0  # libpq takes a connect_timeout of 1 for 2

_ON = frozenset({"1", "on", "yes", "true"})
_OFF = frozenset({"0", "off", "no", "false"})
_SSL_MODES = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})
_TLS_VERSIONS = frozenset({"TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"})
_UTF8 = frozenset({"auto", "UTF8", "UTF-8", "utf8", "utf-8", "UNICODE", "unicode"})
_NEVER: frozenset[str] = frozenset()

# Each option of libpq with its environment variable and the values it may have (None: any).
_OPTIONS: dict[str, tuple[str | None, frozenset[str] | None]] = {
    "host": ("PGHOST", None),
    "hostaddr": ("PGHOSTADDR", None),
    "port": ("PGPORT", None),
    "dbname": ("PGDATABASE", None),
    "user": ("PGUSER", None),
    "password": ("PGPASSWORD", None),
    "passfile": ("PGPASSFILE", None),
    "service": ("PGSERVICE", None),
    "servicefile": ("PGSERVICEFILE", None),
    "connect_timeout": ("PGCONNECT_TIMEOUT", None),
    "application_name": ("PGAPPNAME", None),
    "fallback_application_name": (None, None),
    "options": ("PGOPTIONS", None),
    "client_encoding": ("PGCLIENTENCODING", _UTF8),  # results are str: what encoding carries them shows nowhere
    "target_session_attrs": (
        "PGTARGETSESSIONATTRS",
        frozenset({"any", "read-write", "read-only", "primary", "standby", "prefer-standby"}),
    ),
    "load_balance_hosts": ("PGLOADBALANCEHOSTS", frozenset({"disable", "random"})),
    "keepalives": (None, _ON | _OFF),
    "keepalives_idle": (None, None),
    "keepalives_interval": (None, None),
    "keepalives_count": (None, None),
    "tcp_user_timeout": (None, None),
    "sslmode": ("PGSSLMODE", _SSL_MODES),
    "sslnegotiation": ("PGSSLNEGOTIATION", frozenset({"postgres", "direct"})),
    "sslrootcert": ("PGSSLROOTCERT", None),
    "sslcrl": ("PGSSLCRL", None),
    "sslcert": ("PGSSLCERT", None),
    "sslkey": ("PGSSLKEY", None),
    "sslpassword": (None, None),
    "ssl_min_protocol_version": ("PGSSLMINPROTOCOLVERSION", _TLS_VERSIONS),
    "ssl_max_protocol_version": ("PGSSLMAXPROTOCOLVERSION", _TLS_VERSIONS),
    "krbsrvname": ("PGKRBSRVNAME", None),
    "gsslib": ("PGGSSLIB", frozenset({"gssapi"})),
    "sslcompression": ("PGSSLCOMPRESSION", _OFF),
    "sslcertmode": ("PGSSLCERTMODE", frozenset({"allow"})),
    "sslcrldir": ("PGSSLCRLDIR", _NEVER),
    "sslsni": ("PGSSLSNI", _ON),
    "sslkeylogfile": (None, _NEVER),
    "requirepeer": ("PGREQUIREPEER", _NEVER),
    "require_auth": ("PGREQUIREAUTH", _NEVER),
    "channel_binding": ("PGCHANNELBINDING", frozenset({"disable", "prefer"})),
    "gssencmode": ("PGGSSENCMODE", frozenset({"disable", "prefer"})),
    "gssdelegation": ("PGGSSDELEGATION", _OFF),
    "replication": (None, _OFF),
    "min_protocol_version": ("PGMINPROTOCOLVERSION", frozenset({"3.0"})),
    "max_protocol_version": ("PGMAXPROTOCOLVERSION", frozenset({"3.0", "3.2", "latest"})),
    "scram_client_key": (None, _NEVER),
    "scram_server_key": (None, _NEVER),
    "oauth_issuer": (None, _NEVER),
    "oauth_client_id": (None, _NEVER),
    "oauth_client_secret": (None, _NEVER),
    "oauth_scope": (None, _NEVER),
}

# Settings of a session that libpq takes from the environment.
_SESSION_ENVIRONMENT = {"PGDATESTYLE": "datestyle", "PGTZ": "timezone", "PGGEQO": "geqo"}

_TLS_OPTIONS = (
    "sslmode", "sslnegotiation", "sslrootcert", "sslcrl", "sslcert", "sslkey", "sslpassword",
    "ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib",
)  # fmt: skip

# Where PostgreSQL puts its socket when it is not told: Debian's place, and that of its own build.
_SOCKET_DIRECTORIES = ("/var/run/postgresql", "/tmp")  # noqa: S108 (the name is PostgreSQL's)


@dataclass(frozen=True, slots=True)
class Host:
    """One server to try, in the order of the string."""

    host: str
    """What to connect to: a name, an address, or a directory with a socket in it."""
    port: int
    password: str | None


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A connection string, understood."""

    hosts: tuple[Host, ...]
    user: str
    database: str
    tls: str
    """A URI without a host that holds the options for TLS and GSS."""
    connect_seconds: float
    server_settings: Mapping[str, str]
    target_session_attrs: str
    shuffle: bool
    """Whether the hosts are tried in random order."""
    keepalive: Mapping[str, int]
    """keepalives, keepalives_idle, keepalives_interval, keepalives_count, tcp_user_timeout, as far as given."""

    def __repr__(self) -> str:
        # Passwords must not get into logs by way of a traceback.
        places = ",".join(f"{host.host}:{host.port}" for host in self.hosts)
        return f"<ConnectionInfo {self.user}@{places}/{self.database}>"


def parse(text: str, environment: Mapping[str, str] | None = None) -> ConnectionInfo:
    """What the connection string `text` says. Raises ConfigurationError, which names the option."""
    env = os.environ if environment is None else environment
    given = _uri(text) if re.match(r"postgres(?:ql)?://", text) else _keywords(text)
    for name, value in given.items():
        _check(name, value)
    service = given.get("service") or env.get("PGSERVICE")
    if service:
        for name, value in service_options(service, given.get("servicefile") or env.get("PGSERVICEFILE"), env).items():
            if name in ("service", "servicefile"):
                raise ConfigurationError(f"service {service!r}: a service cannot name another one")
            _check(name, value)
            if not given.get(name):
                given[name] = value
    for name, (variable, _allowed) in _OPTIONS.items():
        if variable is not None and not given.get(name) and env.get(variable):
            _check(name, env[variable], f" (from {variable})")
            given[name] = env[variable]
    return _build({name: value for name, value in given.items() if value}, env)


def _check(name: str, value: str, origin: str = "") -> None:
    if name not in _OPTIONS:
        raise ConfigurationError(f"connection string: there is no option {name!r}")
    allowed = _OPTIONS[name][1]
    if not value or allowed is None or value in allowed:
        return
    if not allowed:
        raise ConfigurationError(f"connection string: {name}{origin} is not offered; leave it out")
    raise ConfigurationError(
        f"connection string: {name}={value!r}{origin} is not offered; it can be {', '.join(sorted(allowed))}"
    )


def _build(given: dict[str, str], env: Mapping[str, str]) -> ConnectionInfo:
    user = given.get("user") or _user_name()
    database = given.get("dbname") or user
    settings = {
        "application_name": given.get("application_name") or given.get("fallback_application_name") or "kore"
    }
    if "options" in given:
        settings["options"] = given["options"]
    settings |= {setting: env[variable] for variable, setting in _SESSION_ENVIRONMENT.items() if env.get(variable)}
    if given.get("sslrootcert") == "system":
        raise ConfigurationError("connection string: sslrootcert='system' is not offered; name the file")
    seconds = _number(given, "connect_timeout")
    return ConnectionInfo(
        hosts=_hosts(given, env, user, database),
        user=user,
        database=database,
        tls="postgresql://?" + urlencode({name: given[name] for name in _TLS_OPTIONS if name in given}),
        connect_seconds=max(CONNECT_SECONDS_MIN, seconds) if seconds is not None and seconds > 0 else CONNECT_SECONDS,
        server_settings=settings,
        target_session_attrs=given.get("target_session_attrs", "any"),
        shuffle=given.get("load_balance_hosts") == "random",
        keepalive=_keepalive(given),
    )


def _keepalive(given: dict[str, str]) -> dict[str, int]:
    found = {}
    for name in ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"):
        number = _number(given, name)
        if number:
            found[name] = number
    return found | {"keepalives": int(given.get("keepalives", "1") in _ON)}


def _number(given: dict[str, str], name: str) -> int | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"connection string: {name} is a number, not {text!r}") from None


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ConfigurationError("connection string: no user, and this process's has no name; add user=") from None


def _hosts(given: dict[str, str], env: Mapping[str, str], user: str, database: str) -> tuple[Host, ...]:
    names = given["host"].split(",") if "host" in given else []
    addresses = given["hostaddr"].split(",") if "hostaddr" in given else []
    if addresses and names and len(addresses) != len(names):
        raise ConfigurationError(f"connection string: {len(names)} hosts, but {len(addresses)} values for hostaddr")
    if addresses and names and given.get("sslmode") == "verify-full":
        raise ConfigurationError("connection string: host with hostaddr is not offered for sslmode=verify-full")
    count = max(len(names), len(addresses), 1)
    ports = given.get("port", "").split(",")
    if len(ports) not in (1, count):
        raise ConfigurationError(f"connection string: {count} hosts, but {len(ports)} values for port")
    hosts = []
    for index in range(count):
        name = names[index] if names else ""
        address = addresses[index] if addresses else ""
        port = _port(ports[index] if len(ports) > 1 else ports[0])
        for target in [address or name] if address or name else _socket_directories(port):
            if target.startswith("@"):
                raise ConfigurationError(f"connection string: abstract sockets are not offered: host={target!r}")
            if "password" in given:
                password: str | None = given["password"]
            else:
                password = password_for(given.get("passfile"), env, (name or target, port, database, user))
            hosts.append(Host(target, port, password))
    return tuple(hosts)


def _socket_directories(port: int) -> list[str]:
    there = [path for path in _SOCKET_DIRECTORIES if Path(path, f".s.PGSQL.{port}").exists()]
    return there or [_SOCKET_DIRECTORIES[0]]


def _port(text: str) -> int:
    if not text:
        return 5432
    if not re.fullmatch(r"\s*[0-9]{1,5}\s*", text) or not 1 <= int(text) <= 65535:
        raise ConfigurationError(f"connection string: port is a number from 1 to 65535, not {text!r}")
    return int(text)


_KEYWORD = re.compile(
    r"\s*([^\s=]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?=\s|$)", re.DOTALL
)


def _keywords(text: str) -> dict[str, str]:
    """``keyword = value`` pairs: a value with spaces in single quotes, a backslash before quote or backslash."""
    given: dict[str, str] = {}
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _KEYWORD.match(text, position)
        if match is None:
            rest = text[position:].split("=", maxsplit=1)[0].strip()  # not the value: it may be a password
            raise ConfigurationError(f"connection string: missing '=' or closing quote at {rest!r}")
        name, quoted, plain = match.groups()
        given[name] = re.sub(r"\\(.)", r"\1", quoted or plain or "", flags=re.DOTALL)
        position = match.end()
    return given


_URI = re.compile(r"postgres(?:ql)?://(?:([^@/?:]*)(?::([^@/]*))?@)?([^/?]*)(?:/([^?]*))?(?:\?(.*))?", re.DOTALL)
_URI_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::(.*))?")


def _uri(text: str) -> dict[str, str]:
    match = _URI.fullmatch(text)
    if match is None:
        raise ConfigurationError("connection string: not a URI of the form postgresql://user:password@host:port/dbname")
    user, password, places, database, query = match.groups()
    given = {}
    for name, value in (("user", user), ("password", password), ("dbname", database)):
        if value:
            given[name] = _decode(value, name)
    hosts, ports = [], []
    for place in places.split(",") if places else []:
        found = _URI_HOST.fullmatch(place)
        if found is None:
            raise ConfigurationError(f"connection string: {place!r} is no host")
        hosts.append(_decode(found[1].strip("[]") if found[1].startswith("[") else found[1], "host"))
        ports.append(_decode(found[2] or "", "port"))
    if any(hosts):
        given["host"] = ",".join(hosts)
    if any(ports):
        given["port"] = ports[0] if len(set(ports)) == 1 else ",".join(ports)
    for pair in query.split("&") if query else []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigurationError(f"connection string: missing '=' after {name!r} in the URI")
        name = _decode(name, "an option's name")
        value = _decode(value, name)
        if name == "ssl" and value == "true":  # JDBC's way of saying it, which libpq takes
            name, value = "sslmode", "require"
        given[name] = value
    return given


def _decode(text: str, name: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", text):
        raise ConfigurationError(f"connection string: {name} has a '%' without two hexadecimal digits, or %00")
    return unquote(text)
