"""From what was declared to what a worker may: who it will be, where it will live, what it may open and connect to.

All of it is decided, and as far as possible tried, in the parent before the first fork: a user that does not exist, a
root that is not there or a right that is missing is one line and no server, instead of workers that die. The sandbox
below (kore.sandbox) knows nothing of applications, so they are translated here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from kore.application.declared import application
from kore.application.kinds import ANY_PORT, Switch
from kore.application.plan import Plan
from kore.application.privileges import Deployment
from kore.errors import StartError
from kore.sandbox import privileges
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Rights

VARIABLE: Final = "KORE_SANDBOX"

SYSTEM_FILES: Final = (
    # Certificates, the resolver, the time zone, and what Python and libc open at any time.
    "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates",
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services",
    "/etc/protocols", "/etc/localtime", "/etc/timezone", "/usr/share/zoneinfo", "/etc/mime.types",
    "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip
"""Read by every worker outside a chroot, where they are."""

TEMPORARY: Final = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108 (nothing is written there by us)
"""Where Python's tempfile looks, besides what the environment names and the current directory."""

_OPENAT2: Final = 437
_RESOLVE_IN_ROOT: Final = 0x10


def sandboxed(plan: Plan, deployment: Deployment) -> bool:
    """Whether there is a sandbox: the environment, then the option, then the deployment say so. Raises StartError."""
    if not sys.platform.startswith("linux"):
        return False
    said = os.environ.get(VARIABLE)
    if said is not None:
        try:
            return Switch().parse(said)
        except ValueError:
            raise StartError(f"{VARIABLE}={said}: neither yes nor no") from None
    wanted = plan.settings.sandbox
    return deployment.name != "dev" if wanted is None else wanted


def rights(plan: Plan, kind: str, deployment: Deployment, *, confined: bool) -> Rights:
    """Where processes of a kind ("worker", "keymgr", "acme") live and who they are. Raises StartError.

    What a deployment asks for and this process cannot do is an error that names the option to go without.
    """
    own = plan.privileges[kind]
    chroot = deployment.chroot and not own.skip_chroot
    switch = deployment.switch_user and not own.skip_runas
    root = None
    if chroot or own.root is not None:
        root = os.path.abspath(own.root or os.curdir)
        if not os.path.isdir(root):
            raise StartError(f"root {root} of the {kind} processes: no such directory")
    identity = None
    if switch and own.runas is not None:
        identity = privileges.resolve(own.runas)
    # The key manager's memory is locked; the parent lets it, and nobody else.
    locked = None if kind == "keymgr" else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = Rights(root=root, chroot=chroot, identity=identity, confined=confined, locked_bytes_max=locked)
    _check_rights(found)
    if switch and os.geteuid() == 0 and deployment.name:
        who = "no user is named to switch to" if identity is None else f"user {identity.name} is root itself"
        if identity is None or identity.uid == 0:
            raise StartError(
                f"deployment {deployment.name} was started as root, and {who}: "
                "name a user with kore.config.runas, or -r to stay root"
            )
    return found


def _check_rights(wanted: Rights) -> None:
    missing = privileges.missing_for(wanted)
    if not missing:
        return
    steps = []
    if wanted.chroot and "CAP_SYS_CHROOT" in missing:
        steps.append((f"chroot to {wanted.root}", "-n"))
    if wanted.identity is not None and set(missing) - {"CAP_SYS_CHROOT"}:
        steps.append((f"switch to user {wanted.identity.name}", "-r"))
    what = " and ".join(step for step, _ in steps)
    flags = " ".join(flag for _, flag in steps)
    who = f"root here lacks {', '.join(missing)}" if os.geteuid() == 0 else f"not root (no {', '.join(missing)})"
    raise StartError(f"cannot {what}: {who}; start it as root with that right, or with {flags} to go without")


def confine(plan: Plan, deployment: Deployment) -> Confinement:
    """What every worker of `plan` may. Raises StartError for what cannot be had, or not from within its root.

    The maps of files are told where they are for a process that lives in that root.
    """
    on = sandboxed(plan, deployment)
    given = rights(plan, "worker", deployment, confined=on)
    filemaps = tuple(_place_filemaps(plan, given))
    settings = plan.settings
    offload = None
    if settings.http_body_disk_offload:
        offload = _seen("http_body_disk_path", settings.http_body_disk_path, given, exists=False)
    mine = Confinement(
        process="worker",
        on=on,
        tracing=settings.seccomp_tracing,
        rights=given,
        filemaps=filemaps,
        offload=offload,
        mounts=tuple(mount.name for mount in plan.mounts),
    )
    return _with_reach(mine, plan) if on or settings.seccomp_tracing else mine


def _with_reach(mine: Confinement, plan: Plan) -> Confinement:
    """`mine`, with what it may open and connect to. Raises StartError."""
    settings = plan.settings
    given = mine.rights
    ports, sockets, names = _databases()
    read = [_seen("sandbox_read", path, given) for path in settings.sandbox_read]
    write = [_seen("sandbox_write", path, given) for path in settings.sandbox_write]
    if mine.offload is not None:
        write.append(mine.offload)
    connect = settings.sandbox_connect
    return replace(
        mine,
        read=tuple(dict.fromkeys([*_readable(mine), *read])),
        write=tuple(dict.fromkeys(write)),
        connect_ports=None if ANY_PORT in connect else tuple(sorted({*ports, *map(int, connect)})),
        names=names or bool(connect),
        sockets=sockets,
    )


def notices(confinement: Confinement, deployment: Deployment) -> Iterator[str]:
    """What whoever starts the server should know of it."""
    given = confinement.rights
    if os.geteuid() == 0 and given.identity is None and deployment.name != "dev":
        without = ", without capabilities" if confinement.on else ""
        yield f"the workers stay root{without}: name a user with kore.config.runas"
    if confinement.on and confinement.tracing:
        yield (
            "seccomp_tracing: Landlock is off meanwhile; without tracing, files and ports have to be named with "
            "kore.config.sandbox_read, sandbox_write and sandbox_connect"
        )
    elif confinement.on and sys.platform.startswith("linux"):
        from kore.sandbox import landlock

        yield from landlock.missing(landlock.abi())
    if confinement.on and confinement.mounts and not _has_temporary_files(confinement):
        # Frameworks catch the error, and answer as if the client had sent nonsense.
        yield (
            "mounted applications have nowhere to write temporary files, which frameworks keep large uploads in: "
            f"kore.config.sandbox_write = {TEMPORARY[0]!r} allows it"
        )
    if given.chroot:
        for path in confinement.sockets:
            if not os.path.exists(f"{given.root}/{path}"):
                yield f"{path} of a database is not inside the root {given.root}: it cannot be connected to"


def _has_temporary_files(mine: Confinement) -> bool:
    """Whether one of the directories that tempfile tries may be written to."""
    named = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    current = "/" if mine.rights.chroot else mine.rights.root or os.getcwd()
    places = [os.path.join(os.path.realpath(path), "") for path in mine.write]
    return any(
        os.path.join(os.path.realpath(path), "").startswith(place)
        for path in (*named, *TEMPORARY, current)
        for place in places
    )


def kept_by_parent(*children: Confinement) -> frozenset[int]:
    """The capabilities that the parent needs to fork its children, to signal them, and to open logs again.

    CAP_SYS_PTRACE is for the log alone: to read which file or program a call was about that a worker is killed for.
    """
    kept = {privileges.CAP_SETPCAP, privileges.CAP_DAC_OVERRIDE, privileges.CAP_SYS_PTRACE}
    for child in children:
        if child.process == "keymgr":
            kept.add(privileges.CAP_IPC_LOCK)  # its memory is locked before it gives that up
        if child.tracing:
            kept.add(privileges.CAP_KILL)  # the tracer asks threads for their stacks
        if child.rights.chroot:
            kept.add(privileges.CAP_SYS_CHROOT)
        if child.rights.identity is not None:
            kept |= {privileges.CAP_SETUID, privileges.CAP_SETGID, privileges.CAP_KILL}
    return frozenset(kept)


def _place_filemaps(plan: Plan, given: Rights) -> Iterator[str]:
    """Have each map of files open its directory from where the worker will be; the directories, absolute."""
    for router in plan.routers.values():
        for domain in router.domains:
            for file_map in getattr(domain.files, "maps", ()):
                seen = _seen(f"filemaps {file_map.url!r}", file_map.directory, given)
                if given.chroot:
                    file_map.directory = seen
                yield seen


def _seen(what: str, path: str, given: Rights, *, exists: bool = True) -> str:
    """`path`, which counts from the root, absolute as the worker sees it. Raises StartError when it can't be there."""
    root = given.root or os.getcwd()
    outside = os.path.join(root, path)
    if not given.chroot:
        return outside
    inside = _inside(root, path)
    if inside is None or (exists and not _is_there(root, inside, outside)):
        raise StartError(f"{what}: {path} is not inside the root {root} of the workers; move it there, or -n")
    return inside


def inside(what: str, path: str, given: Rights, *, exists: bool = True) -> tuple[str, str]:
    """`path`, which counts from the root: as a process in that root sees it, and as the parent does.

    Raises StartError when it can't be there.
    """
    seen = _seen(what, path, given, exists=exists)
    return seen, f"{given.root}{seen}" if given.chroot else seen


def _inside(root: str, path: str) -> str | None:
    """The absolute path of `path` for who lives in `root`; None when it leads above it."""
    if os.path.isabs(path):
        for base in (root, os.path.realpath(root)):
            if path == base or path.startswith(base.rstrip("/") + "/"):
                return "/" + path[len(base) :].lstrip("/")
        return path
    above = os.path.normpath(path).split("/")[0] == os.pardir
    return None if above else os.path.join("/", path)


def _is_there(root: str, inside: str, outside: str) -> bool:
    """Whether `inside` is a file for who lives in `root`, and the same as `outside` if that is one already.

    The kernel looks (openat2(2), RESOLVE_IN_ROOT): symbolic links mean something else there. An absolute path may be
    meant from within, and then be nothing outside.
    """
    if not sys.platform.startswith("linux"):
        return os.path.exists(root + inside)
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        fd = syscall(
            ctypes.c_long(_OPENAT2), ctypes.c_int(directory), os.fsencode(inside), how, ctypes.c_size_t(len(how))
        )
    finally:
        os.close(directory)
    if fd < 0:
        # Without openat2(2), Linux before 5.6 or a filter around us, what links mean in there stays unknown.
        return ctypes.get_errno() in (errno.ENOSYS, errno.EPERM) and os.path.exists(root + inside)
    try:
        return not os.path.exists(outside) or os.path.samestat(os.fstat(fd), os.stat(outside))
    finally:
        os.close(fd)


def _readable(mine: Confinement) -> Iterator[str]:
    """What a worker may read: behind a chroot all that is there, else what it serves, is made of, and needs."""
    given = mine.rights
    if given.chroot:
        yield "/"
        return
    if given.root is not None:
        yield given.root
    yield application_folder()
    yield os.path.dirname(own_folder())
    yield from mine.filemaps
    paths = sysconfig.get_paths()
    for path in (sys.prefix, sys.base_prefix, *(paths[key] for key in ("stdlib", "platstdlib")), *sys.path):
        yield os.path.abspath(path)
    yield from SYSTEM_FILES


def application_folder() -> str:
    """The folder of the application: that of its file, or the package."""
    if application.loaded is None:
        return os.getcwd()
    path = application.loaded.path
    return path if os.path.isdir(path) else os.path.dirname(path)


def own_folder() -> str:
    """The folder of kore itself."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _databases() -> tuple[list[int], tuple[str, ...], bool]:
    """Of the declared databases: TCP ports, UNIX sockets, and whether one has a name that must be looked up."""
    queries = sys.modules.get("kore.clients.postgresql.queries")
    ports: list[int] = []
    sockets: list[str] = []
    names = False
    for database in {} if queries is None else queries.databases.values():
        for host in database.info.hosts:
            if host.host.startswith("/"):
                sockets.append(f"{host.host}/.s.PGSQL.{host.port}")
                continue
            ports.append(host.port)
            names = names or not is_address(host.host)
    return ports, tuple(dict.fromkeys(sockets)), names


def is_address(host: str) -> bool:
    """Whether `host` is an address and no name to look up."""
    import ipaddress  # only who declares a database pays for it

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
