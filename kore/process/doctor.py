"""``kore doctor``: what this machine gives a server, what it withholds, and what would mend that.

Each examination is one function that tries the real thing where it can (makes a ring, asks for Landlock's version) and
otherwise reads what the kernel says of itself. Nothing is changed, and nothing needs root. A server starts on every
machine that has epoll or kqueue: what is told here is what it would go without.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import resource
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kore.application.settings import OPTIONS
from kore.errors import EngineError
from kore.process import affinity
from kore.process.descriptors import SPARE
from kore.version import __version__


class State(enum.Enum):
    """How much it matters."""

    GOOD = "ok"
    LESS = "less"
    """A server starts, and goes without something."""
    NONE = "none"
    """No server starts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report, and the line below it that says what to do."""

    what: str
    state: State
    text: str
    mend: str = ""


EXIT_GOOD, EXIT_LESS, EXIT_NONE = 0, 1, 2
"""What the command ends with: all there, a server would go without something, no server would start."""

CAPABILITIES = {
    "chroot": (18, "CAP_SYS_CHROOT"),
    "switching user": (7, "CAP_SETUID"),
    "switching group": (6, "CAP_SETGID"),
    "dropping capabilities": (8, "CAP_SETPCAP"),
    "ports below 1024": (10, "CAP_NET_BIND_SERVICE"),
    "stopping workers of another user": (5, "CAP_KILL"),
}
"""What a parent that runs as root does with its rights: number and name (linux/capability.h)."""

PACKAGES = {
    "asyncpg": ("postgresql", "kore.dbsetup() and kore.dbquery()"),
    "cryptography": ("tls", "TLS servers"),
    "acme": ("acme", "certificates by acme=True"),
    "pycurl": ("transfers", "kore.curl() and kore.httpclient()"),
    "pyseccomp": ("sandbox", "the filter of system calls"),
    "prctl": ("sandbox", "giving up capabilities"),
}
"""Modules that are imported when they are needed: the extra that brings each, and what it is for."""

SANDBOX_PACKAGES = frozenset({"pyseccomp", "prctl"})

SECCOMP_ACTIONS = ("kill_process", "user_notif", "errno", "allow")


def report(out: Callable[[str], object] = print, examinations: Iterable[Callable[[], Iterator[Finding]]] = ()) -> int:
    """Examine the machine, print what was found, a line each, and give the exit code."""
    worst = State.GOOD
    out(f"kore {__version__} on {platform.system()} {platform.release()}, {platform.machine()}")
    for examine in examinations or EXAMINATIONS:
        for finding in examine():
            out(f"{finding.state.value:<5} {finding.what:<12} {finding.text}")
            if finding.mend:
                out(f"      {'':<12} -> {finding.mend}")
            if finding.state is not State.GOOD:
                worst = State.NONE if State.NONE in (worst, finding.state) else State.LESS
    out({
        State.GOOD: "all there",
        State.LESS: "a server starts here, and goes without what is marked",
        State.NONE: "no server starts here",
    }[worst])
    return {State.GOOD: EXIT_GOOD, State.LESS: EXIT_LESS, State.NONE: EXIT_NONE}[worst]


def interpreter() -> Iterator[Finding]:
    """Python itself."""
    version = ".".join(map(str, sys.version_info[:3]))
    text = f"{version}, {sys.executable}"
    # Distributions build with profiles, by rules of their own; who compiles with configure alone says so in its words.
    words = sysconfig.get_config_var("CONFIG_ARGS") or ""
    if "--enable-optimizations" in words or os.path.realpath(sys.executable).startswith("/usr/bin/"):
        yield Finding("Python", State.GOOD, text)
    else:
        yield Finding(
            "Python", State.LESS, f"{text}, compiled without --enable-optimizations: about a fifth slower",
            "use the distribution's, or configure with --enable-optimizations --with-lto")


def engines() -> Iterator[Finding]:
    """Each engine, by making one."""
    from kore.reactor.engine import ENGINES, new_driver

    for name in ENGINES:
        wanted = (name == "kqueue") == (sys.platform != "linux")
        try:
            new_driver(name).close()
        except EngineError as error:
            if not wanted:
                continue
            state = State.LESS if name == "uring" else State.NONE
            mend = _mend_uring() if name == "uring" else "this system has no way to wait for sockets that kore knows"
            yield Finding(_engine(name), state, str(error), mend)
        else:
            yield Finding(_engine(name), State.GOOD, "a server can use it")


def _engine(name: str) -> str:
    return "io_uring" if name == "uring" else name


def _mend_uring() -> str:
    disabled = _number("/proc/sys/kernel/io_uring_disabled")
    if disabled:
        return f"kernel.io_uring_disabled is {disabled}: sysctl kernel.io_uring_disabled=0"
    if _number_in_status("Seccomp"):
        return (
            "a filter of system calls is on this process, a container's perhaps: allow io_uring_setup, io_uring_enter "
            "and io_uring_register in it")
    return "Linux 6.1 or newer and liburing2 (apt-get install liburing2); until then kore serves with epoll"


def processors() -> Iterator[Finding]:
    """CPUs, by mask and by quota."""
    cpus, quota = affinity.allowed_cpus(), affinity.cpu_quota()
    text = f"{len(cpus)} allowed" + (f", a quota of {quota:g} of them" if quota is not None else "")
    yield Finding("CPUs", State.GOOD, f"{text}: {affinity.default_workers()} workers by default")


def limits() -> Iterator[Finding]:
    """Descriptors, locked memory, the queue of listening sockets."""
    wanted = int(str(OPTIONS["worker_max_connections"].default)) + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        yield Finding(
            "descriptors", State.LESS, f"at most {hard}; a worker with its default connections wants {wanted}",
            f"ulimit -Hn {wanted}, LimitNOFILE= of the service, or a smaller worker_max_connections")
    else:
        yield Finding("descriptors", State.GOOD, f"{_limit(soft)}, at most {_limit(hard)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"{_limit(soft)} bytes; rings need none of it since Linux 5.12"
    if soft != resource.RLIM_INFINITY:
        text += ", and a key manager locks only what it has when it starts"
    yield Finding("memlock", State.GOOD, text)
    backlog = int(str(OPTIONS["socket_backlog"].default))
    somaxconn = _number("/proc/sys/net/core/somaxconn")
    if somaxconn is not None and somaxconn < backlog:
        yield Finding(
            "backlog", State.LESS, f"net.core.somaxconn is {somaxconn}, below socket_backlog's {backlog}: fewer wait",
            f"sysctl net.core.somaxconn={backlog}")
    elif somaxconn is not None:
        yield Finding("backlog", State.GOOD, f"net.core.somaxconn is {somaxconn}")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def seccomp() -> Iterator[Finding]:
    """Filters of system calls."""
    if sys.platform != "linux":
        return
    available = _text("/proc/sys/kernel/seccomp/actions_avail").split()
    lacking = [action for action in SECCOMP_ACTIONS if action not in available]
    already = "; this process has a filter already, a container's perhaps" if _number_in_status("Seccomp") else ""
    if not available:
        yield Finding(
            "seccomp", State.LESS, "this kernel has none: workers may make any system call",
            "a kernel with CONFIG_SECCOMP_FILTER; kore.config.sandbox = 'no' goes without")
    elif lacking:
        yield Finding(
            "seccomp", State.LESS, f"without {', '.join(lacking)}: deaths have no name, tracing is impossible{already}",
            "Linux 5.0 or newer")
    else:
        yield Finding("seccomp", State.GOOD, f"filters and notifications{already}")


def landlock() -> Iterator[Finding]:
    """Landlock, by asking for its version."""
    if sys.platform != "linux":
        return
    from kore.sandbox import landlock

    version = landlock.abi()
    lacking = landlock.missing(version)
    state = State.LESS if lacking else State.GOOD
    mend = "a newer kernel" if version else "Linux 5.13 or newer, and landlock in lsm= at boot"
    yield Finding("Landlock", state, "; ".join(lacking) or f"ABI {version}", mend if lacking else "")
    if landlock.fast_open_is_on():
        yield Finding(
            "Landlock", State.GOOD, "TCP fast open on a ring leads past it, for workers that may connect at all",
            "sysctl net.ipv4.tcp_fastopen=0")


def user() -> Iterator[Finding]:
    """Who a server started here would be, and what it may do with that."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    if uid:
        least = _number("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        ports = f", ports from {least} on" if least is not None else ""
        yield Finding(
            "user", State.GOOD,
            f"{name}: no chroot and no change of user{ports}; the rest of the sandbox needs no root")
        return
    effective = int(_status("CapEff") or "0", 16)
    lacking = [f"{name} ({what})" for what, (number, name) in CAPABILITIES.items() if not effective >> number & 1]
    if lacking and sys.platform == "linux":
        yield Finding(
            "user", State.LESS, f"{name}, but without {', '.join(lacking)}",
            "give the container or the service these capabilities, or start as the user that is to serve")
    else:
        yield Finding("user", State.GOOD, f"{name}: may chroot and change user")


def container() -> Iterator[Finding]:
    """What is around this process."""
    kind = container_kind()
    yield Finding("container", State.GOOD, kind or "none that shows")


def container_kind(root: str = "/") -> str | None:
    """The kind of container that this process is in, by the marks each leaves; None: no mark."""
    for path, kind in ((".dockerenv", "Docker"), ("run/.containerenv", "Podman"), ("dev/lxd", "LXD")):
        if os.path.exists(os.path.join(root, path)):
            return kind
    for path in ("run/systemd/container", "run/host/container-manager"):  # systemd's interface for managers
        text = _text(os.path.join(root, path)).strip()
        if text:
            return text
    if os.path.isdir(os.path.join(root, "var/run/secrets/kubernetes.io")):
        return "Kubernetes"
    groups = _text(os.path.join(root, "proc/1/cgroup"))
    return next((kind for word, kind in (("docker", "Docker"), ("kubepods", "Kubernetes"), ("lxc", "LXC"))
                 if word in groups), None)


def tls() -> Iterator[Finding]:
    """The OpenSSL that TLS servers would use, by making what they make."""
    try:
        import ssl

        from kore.tls.libssl import TlsError
        from kore.tls.offload import offload
    except ImportError as error:
        yield Finding(
            "TLS", State.LESS, f"this Python has no ssl ({error}): servers serve with tls=False only",
            "a Python that was built with OpenSSL (Debian: apt-get install libssl-dev, and build it again)")
        return
    try:
        offload()
    except TlsError as error:
        yield Finding("TLS", State.LESS, str(error).partition("; ")[0], str(error).partition("; ")[2])
    else:
        yield Finding("TLS", State.GOOD, f"{ssl.OPENSSL_VERSION}; keys can be held by the key manager")


def packages() -> Iterator[Finding]:
    """What kore imports when it needs it."""
    for module, (extra, use) in PACKAGES.items():
        name = "python-prctl" if module == "prctl" else module
        if importlib.util.find_spec(module) is not None:
            try:
                yield Finding(name, State.GOOD, importlib.metadata.version(name))
            except importlib.metadata.PackageNotFoundError:
                yield Finding(name, State.GOOD, "there")
        elif module in SANDBOX_PACKAGES and sys.platform == "linux":
            yield Finding(name, State.LESS, f"not installed: {use} is impossible", f"pip install 'kore[{extra}]'")
        elif module not in SANDBOX_PACKAGES:
            yield Finding(name, State.GOOD, f"not installed; {use} would need it: pip install 'kore[{extra}]'")


EXAMINATIONS = (interpreter, engines, processors, limits, seccomp, landlock, user, container, tls, packages)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(65536)
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _status(field: str) -> str | None:
    for line in _text("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return None


def _number_in_status(field: str) -> int:
    value = _status(field) or "0"
    return int(value) if value.isdigit() else 0
