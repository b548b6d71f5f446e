"""Every option of ``kore.config``: name, kind, range, default and meaning, in one table.

The fields of `Settings` are the table. Validation, defaults, the frozen record that the rest of the server reads, and
docs/options.md (documentation.py) all come from it, so that none can differ from another. The
names and ranges are those of kore-api.md section 6 and http.md section 16.1.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kore.application.kinds import Choice, Email, Integer, Kind, MediaType, Path, Port, Switch, Text, Url, shown
from kore.errors import ConfigurationError
from kore.version import __version__

UINT16_MAX = 0xFFFF
UINT32_MAX = 0xFFFFFFFF
INT64_MAX = 0x7FFF_FFFF_FFFF_FFFF

WORKERS_MAX = 255
"""Workers of one server, as in the reference. More processes than CPUs gain nothing, and nobody has as many."""

SERVER_VERSION_MAX = 53
"""Characters of ``http_server_version``: the reference keeps the whole header line below 64."""

REPEATED_MAX = 255
"""Values that one repeatable option collects: as many as there can be workers, and more than media types in use."""


NO_PROGRAMS = "none"
"""The value of ``sandbox_programs`` that allows no program."""


class UnknownOptionError(ConfigurationError, AttributeError):
    """There is no option of that name; the message names the closest one."""


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table."""

    name: str
    part: str
    """The part of the server that it belongs to: the heading it stands under in the documentation."""
    kind: Kind
    default: object
    default_text: str
    meaning: str
    repeatable: bool

    def parse(self, value: object) -> object:
        """The value of an assignment, or ConfigurationError with the option, the value and what is allowed."""
        try:
            return self.kind.parse(value)
        except ValueError as problem:
            message = f"kore.config.{self.name} = {shown(value)}: {problem}; allowed is {self.kind.allowed}"
            raise ConfigurationError(message) from None


def _option(
    part: str, kind: Kind, default: object, meaning: str, *, shown_default: str = "", repeatable: bool = False
) -> Any:  # as dataclasses.field() itself: the annotation beside it says the type
    metadata = {"part": part, "kind": kind, "meaning": meaning, "shown": shown_default, "repeatable": repeatable}
    return field(default=default, metadata=metadata)


_YES_NO = Switch()
_ONE_ZERO = Switch(("0", "1"))
_DEATH_POLICY = Choice({"restart": "restart", "terminate": "terminate"})
_TLS_VERSION = Choice({"1.2": "1.2", "1.3": "1.3", "both": "both"})
_DEPLOYMENT = Choice({"dev": "dev", "development": "dev", "docker": "docker", "production": "production"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options as they stand when the application is declared whole: a snapshot that nothing changes any more.

    None means "not set" where an option has no default of its own.
    """

    # Processes.
    workers: int | None = _option(
        "Processes", Integer(1, WORKERS_MAX), None,
        "Worker processes. Each serves requests on its own; one a CPU is what makes sense.",
        shown_default="the CPUs this process may use",
    )
    worker_max_connections: int = _option(
        "Processes", Integer(1, UINT32_MAX), 512,
        "Connections that one worker holds at the same time; above, it stops accepting until one is closed.",
    )
    worker_rlimit_nofiles: int = _option(
        "Processes", Integer(1, UINT32_MAX), 768,
        "File descriptors that one worker may open, besides those open when it starts.",
    )
    worker_accept_threshold: int = _option(
        "Processes", Integer(1, UINT32_MAX, based=True), 16,
        "Connections that one worker accepts in one turn of its loop. Hexadecimal and octal texts count as such.",
    )
    worker_death_policy: str = _option(
        "Processes", _DEATH_POLICY, "restart",
        "What follows when a worker dies abnormally: `restart` it, or `terminate` the whole server.",
    )
    worker_set_affinity: bool = _option(
        "Processes", _ONE_ZERO, True, "Whether each worker is bound to one CPU."
    )
    worker_no_accept: tuple[int, ...] = _option(
        "Processes", Integer(1, WORKERS_MAX), (),
        "The id of a worker that accepts no connections and only runs tasks.", repeatable=True,
    )
    deployment: str | None = _option(
        "Processes", _DEPLOYMENT, None,
        "`dev` (or `development`): in the foreground, without chroot, user switch and sandbox. `docker`: in the "
        "foreground, with all three. `production`: in the background, with all three. Root must then name a user.",
        shown_default="`dev`, unless started as root: then in the foreground, chroot where `root` and user switch "
        "where `runas` are set",
    )
    pidfile: str = _option("Processes", Path(), "kore.pid", "The file that holds the process id of the parent.")
    logfile: str | None = _option(
        "Processes", Path(), None, "The file that log lines are appended to.",
        shown_default="standard output; syslog in the background",
    )
    file: str | None = _option("Processes", Path(), None, "A configuration file to read as well.")
    task_threads: int = _option("Processes", Integer(0, WORKERS_MAX), 2, "Threads of one worker for blocking work.")

    # Listening.
    socket_backlog: int = _option(
        "Listening", Integer(0, UINT32_MAX), 5000,
        "Connections that wait in the kernel for a worker to accept them, for each server. The kernel caps it "
        "(net.core.somaxconn).",
    )

    # HTTP.
    http_header_max: int = _option(
        "HTTP", Integer(1, UINT16_MAX, "bytes"), 4096,
        "The largest request head, from the request line to the empty line; larger ones are answered with 431.",
    )
    http_header_timeout: int = _option(
        "HTTP", Integer(1, UINT16_MAX, "seconds"), 10,
        "The time in which a request head must have arrived whole; after it the answer is 408.",
    )
    http_body_max: int = _option(
        "HTTP", Integer(0, INT64_MAX, "bytes"), 1024000,
        "The largest request body; larger ones are answered with 413. 0: no request may have a body.",
    )
    http_body_timeout: int = _option(
        "HTTP", Integer(1, UINT16_MAX, "seconds"), 60,
        "How long a request body may take without progress: in each such time it must have ended, or 1 KiB of it have "
        "come for each second. After it the answer is 408. The disk has as long to take a piece of it; after that the "
        "answer is 500.",
    )
    http_write_timeout: int = _option(
        "HTTP", Integer(1, UINT16_MAX, "seconds"), 60,
        "In each such time a client must take 1 KiB per second of what waits for it, or all; else it is disconnected.",
    )
    http_body_disk_offload: int = _option(
        "HTTP", Integer(0, INT64_MAX, "bytes"), 0,
        "Bodies larger than this are kept in a file until their request ends. 0: never.",
    )
    http_body_disk_path: str = _option(
        "HTTP", Path(), "tmp_files",
        "The directory of those files, relative to the root of the workers. It is made with mode 0700 when it is not "
        "there; files that dead workers left in it are removed at the start.",
    )
    http_keepalive_time: int = _option(
        "HTTP", Integer(0, UINT16_MAX, "seconds"), 20,
        "How long a connection without a request stays open. 0: every connection is closed after its first response.",
    )
    http_request_ms: int = _option(
        "HTTP", Integer(0, UINT32_MAX, "milliseconds"), 10,
        "The time a handler is meant to take at a stretch. What keeps the event loop for ten times as long is told of "
        "in the log, once for each place, with the lines it is at; nobody is interrupted. 0: not watched.",
    )
    http_request_limit: int = _option(
        "HTTP", Integer(0, UINT32_MAX), 1000,
        "Requests that one worker works on at the same time; further ones are answered with 503.",
    )
    http_server_version: str = _option(
        "HTTP", Text(SERVER_VERSION_MAX), f"kore ({__version__})", "The `server` header of every response.",
        shown_default="`kore (<version>)`",
    )
    http_pretty_error: bool = _option(
        "HTTP", _YES_NO, False, "Whether error responses without a body of their own get a small HTML page."
    )
    http_hsts_enable: int = _option(
        "HTTP", Integer(0, INT64_MAX, "seconds"), 31536000,
        "The `max-age` of the `strict-transport-security` header on TLS. 0: no such header, as by default where a "
        "certificate comes from the local authority.",
    )

    # Files.
    filemap_ext: str | None = _option(
        "Files", Text(what="an extension with its dot"), None,
        "Appended to the path of a request when there is no such file.", shown_default="none",
    )
    filemap_index: str = _option("Files", Text(what="a file name"), "index.html", "The file served for a directory.")
    http_media_type: tuple[tuple[str, tuple[str, ...]], ...] = _option(
        "Files", MediaType(), (), "A media type for file extensions; it wins over the built-in ones.",
        shown_default="gif png jpeg jpg zip pdf json js htm txt css html are known", repeatable=True,
    )

    # Privileges.
    sandbox: bool | None = _option(
        "Privileges", _YES_NO, None,
        "Linux: whether workers give up, for good, what they do not need to serve. The environment variable "
        "KORE_SANDBOX overrules it.",
        shown_default="`yes`, except where the deployment is `dev`",
    )
    sandbox_read: tuple[str, ...] = _option(
        "Privileges", Path(), (),
        "A file or directory that workers in the sandbox may read besides the application, what it serves and what "
        "Python needs; relative to their root.",
        repeatable=True,
    )
    sandbox_write: tuple[str, ...] = _option(
        "Privileges", Path(), (),
        "A file or directory that workers in the sandbox may write to besides `http_body_disk_path`; relative to their "
        "root.",
        repeatable=True,
    )
    sandbox_connect: tuple[int | str, ...] = _option(
        "Privileges", Port(), (),
        "A TCP port that workers in the sandbox may connect to besides those of the declared databases; `any` allows "
        "all, and sockets that have a path.",
        repeatable=True,
    )
    root: str | None = _option(
        "Privileges", Path(), None,
        "The directory that workers live in, by chroot or chdir. What they open later must be below it: relative paths "
        "count from it, absolute ones below it are understood.",
        shown_default="the current directory",
    )
    runas: str | None = _option(
        "Privileges", Text(what="a user name"), None,
        "The user that workers run as, with its primary group alone. Only root can switch; `-r` goes without.",
        shown_default="the current user, which `docker` and `production` refuse when it is root",
    )
    keymgr_root: str | None = _option(
        "Privileges", Path(), None, "The same as `root`, for the key manager.", shown_default="that of the workers"
    )
    keymgr_runas: str | None = _option(
        "Privileges", Text(what="a user name"), None, "The same as `runas`, for the key manager.",
        shown_default="that of the workers",
    )
    acme_root: str | None = _option(
        "Privileges", Path(), None, "The same as `root`, for the ACME process.", shown_default="that of the workers"
    )
    acme_runas: str | None = _option(
        "Privileges", Text(what="a user name"), None, "The same as `runas`, for the ACME process.",
        shown_default="that of the workers",
    )
    sandbox_programs: tuple[str, ...] = _option(
        "Privileges", Path(), (),
        "A program, or a directory of programs, that `kore.proc` may start in the sandbox; no other file is run, not "
        "by these either. `none`: no program at all, and no process is kept for starting them.",
        shown_default="any", repeatable=True,
    )
    seccomp_tracing: bool = _option(
        "Privileges", _YES_NO, False, "Linux: whether forbidden system calls are logged instead of refused."
    )
    pledge: tuple[str, ...] = _option(
        "Privileges", Text(what="promises"), (),
        "OpenBSD: further pledge(2) promises of the workers, beside `stdio rpath inet` and what the options need: "
        "`proc exec` for `kore.proc`, `prot_exec` for compiled modules that a handler is the first to import.",
        repeatable=True,
    )

    # TLS.
    tls_version: str = _option("TLS", _TLS_VERSION, "both", "The versions of TLS that are spoken.")
    tls_cipher: str | None = _option(
        "TLS", Text(length_max=4096, what="an OpenSSL cipher list"), None,
        "The ciphers of TLS 1.2; those of 1.3 are all good, and always on. Ciphers without ephemeral keys, without "
        "encryption or without a certificate are left out of any list.",
        shown_default="AEAD ciphers with ephemeral keys",
    )
    tls_dhparam: str | None = _option(
        "TLS", Path(), None,
        "A PEM file with Diffie-Hellman parameters of 2048 bits or more, relative to the root of the workers, for "
        "clients of TLS 1.2 that know no elliptic curves.",
        shown_default="none: such clients are refused",
    )
    rand_file: str | None = _option(
        "TLS", Path(), None,
        "A file of 2048 random bytes (1024 do), relative to the root of the key manager, that are mixed into its "
        "random numbers at the start, and replaced. The kernel's own are enough.",
        shown_default="none",
    )

    # ACME.
    acme_email: str | None = _option(
        "ACME", Email(), None, "The address that the ACME account is registered with.", shown_default="none",
    )
    acme_provider: str = _option(
        "ACME", Url(), "https://acme-v02.api.letsencrypt.org/directory", "The directory of the ACME provider.",
    )
    acme_eab_kid: str | None = _option(
        "ACME", Text(what="a key id"), None,
        "The id of the key that binds the account to one at the provider, where the provider asks for that.",
        shown_default="none",
    )
    acme_eab_key: str | None = _option(
        "ACME", Path(), None,
        "The file with that key as the provider gives it (base64url), relative to the root of the key manager, which "
        "is the only process that reads it.",
        shown_default="none",
    )
    acme_ca_bundle: str | None = _option(
        "ACME", Path(), None,
        "A PEM file of the authorities that the provider's own certificate may come from, relative to the root of the "
        "ACME process.",
        shown_default="the system's",
    )
    acme_volatile: bool = _option(
        "ACME", _YES_NO, False,
        "Whether account and certificates may be kept on storage that a restart empties. Providers limit how many they "
        "give: a server that asks anew at each start is soon without.",
    )

    # WebSocket.
    websocket_maxframe: int = _option(
        "WebSocket", Integer(0, INT64_MAX, "bytes"), 16384,
        "The largest payload of one frame; a larger one closes the connection with 1009. 0: the default.",
    )
    websocket_max_message: int = _option(
        "WebSocket", Integer(0, INT64_MAX, "bytes"), 1024 * 1024,
        "The largest message, put together from its frames and inflated; a larger one closes the connection with 1009. "
        "0: the default.",
    )
    websocket_timeout: int = _option(
        "WebSocket", Integer(0, INT64_MAX, "seconds"), 120, "How long a silent connection stays open. 0: for ever."
    )
    websocket_deflate: bool = _option(
        "WebSocket", _YES_NO, True, "Whether messages are compressed for clients that offer it (RFC 7692).",
    )

    # Clients.
    pgsql_conn_max: int = _option(
        "Clients", Integer(0, UINT16_MAX), 2,
        "PostgreSQL connections that one worker keeps to one database. 0: no limit.",
    )
    pgsql_queue_limit: int = _option(
        "Clients", Integer(0, UINT32_MAX), 1000, "Queries of one worker that wait for a connection."
    )
    curl_timeout: int = _option(
        "Clients", Integer(0, UINT16_MAX, "seconds"), 60, "The time that a transfer may take. 0: no limit."
    )
    curl_recv_max: int = _option(
        "Clients", Integer(0, INT64_MAX, "bytes"), 2 * 1024 * 1024, "The largest body that a transfer receives."
    )


def _table() -> Mapping[str, Option]:
    rows: dict[str, Option] = {}
    for entry in dataclasses.fields(Settings):
        data = entry.metadata
        kind: Kind = data["kind"]
        default_text = data["shown"]
        if not default_text:
            default_text = "none" if entry.default in (None, ()) else f"`{kind.show(entry.default)}`"
        rows[entry.name] = Option(
            entry.name, data["part"], kind, entry.default, default_text, data["meaning"], data["repeatable"]
        )
    return MappingProxyType(rows)


OPTIONS: Mapping[str, Option] = _table()
"""The table: name to option, in the order of the documentation."""


def option_named(name: str) -> Option:
    """The option called `name`; UnknownOptionError with the closest name when there is none."""
    option = OPTIONS.get(name)
    if option is not None:
        return option
    close = difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else "; docs/options.md lists those there are"
    raise UnknownOptionError(f"kore.config.{shown(name)[1:-1]}: there is no such option{hint}")


def check_together(settings: Settings) -> None:
    """Refuse options that are right alone and wrong together; raises ConfigurationError."""
    seen: dict[str, str] = {}
    for media_type, extensions in settings.http_media_type:
        for extension in extensions:
            other = seen.setdefault(extension, media_type)
            if other != media_type:
                message = f"extension {extension!r} is given to both {other} and {media_type}; allowed is one type each"
                raise ConfigurationError(f"kore.config.http_media_type: {message}")
    if NO_PROGRAMS in settings.sandbox_programs and len(settings.sandbox_programs) > 1:
        others = ", ".join(path for path in settings.sandbox_programs if path != NO_PROGRAMS)
        raise ConfigurationError(
            f"kore.config.sandbox_programs: none, and {others or 'none again'}; allowed is none alone, or programs")
    if (settings.acme_eab_kid is None) != (settings.acme_eab_key is None):
        pair = ("acme_eab_kid", "acme_eab_key")
        given, lacking = pair if settings.acme_eab_kid else reversed(pair)
        raise ConfigurationError(f"kore.config.{given}: is of no use without {lacking}; allowed are both, or none")
    if settings.workers is not None:
        idle = set(settings.worker_no_accept)
        for worker in sorted(idle):
            if worker > settings.workers:
                allowed = f"allowed is the id of a worker, 1 to {settings.workers}"
                raise ConfigurationError(f"kore.config.worker_no_accept = {worker}: no such worker; {allowed}")
        if len(idle) == settings.workers:
            raise ConfigurationError("kore.config.worker_no_accept: names every worker; at least one must accept")
