"""Attempts at what Landlock refuses: through Python, through raw system calls and through an io_uring.

Each takes a place (files and peers made for it) and raises OSError when it is refused. A child that was restricted
tries one and says how it went; the ring is made before, and nothing restricts it but Landlock.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import platform
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kore.errors import EngineError
from kore.sandbox.landlock import Rules, restrict_self
from kore.uring.operations import sockaddr
from kore.uring.ring import Ring
from kore.uring.structures import IORING_OP_CONNECT, IORING_OP_NOP

X86_64 = {
    "openat": 257, "truncate": 76, "execve": 59, "rmdir": 84, "unlink": 87, "mknod": 133, "mkdir": 83, "symlink": 88,
    "rename": 82, "ioctl": 16, "connect": 42, "bind": 49, "kill": 62, "ptrace": 101,
}
IORING_OP_OPENAT, IORING_OP_OPENAT2, IORING_OP_RENAMEAT, IORING_OP_UNLINKAT = 18, 28, 35, 36
IORING_OP_MKDIRAT, IORING_OP_SYMLINKAT, IORING_OP_SOCKET, IORING_OP_BIND = 37, 38, 45, 56
IOSQE_ASYNC = 1 << 4
AT_FDCWD = -100
AT_REMOVEDIR = 0x200
TIOCGWINSZ = 0x5413
PTRACE_SEIZE = 0x4206
TROUBLE = 255
SECONDS_MAX = 20

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def c(value):
    """An argument of a system call."""
    return ctypes.c_char_p(os.fsencode(value)) if isinstance(value, str | Path) else ctypes.c_long(value)


def raw(name: str, *arguments) -> int:
    """A system call past everything of Python's and the C library's."""
    result = libc.syscall(ctypes.c_long(X86_64[name]), *map(c, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


class Place:
    """What is tried upon: a directory `inside` that may be given, one `outside`, a listener, and another process."""

    def __init__(self, directory: Path, peer: subprocess.Popen, listener: socket.socket, abstract: str) -> None:
        self.inside = directory / "inside"
        self.outside = directory / "outside"
        for folder in (self.inside, self.outside):
            (folder / "empty").mkdir(parents=True)
            (folder / "sub").mkdir()
            (folder / "file").write_text("secret")
        self.listener = listener
        self.port = listener.getsockname()[1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.free_port = free.getsockname()[1]
        self.peer = peer
        self.abstract = abstract
        self.at = self.outside
        self._ring: Ring | None = None

    def make_ring(self) -> None:
        """A ring that nothing restricts, with a thread of the kernel that has worked for it already."""
        self._ring = Ring(8, 16)
        self._ring.enable(None)
        self._ring.push(IORING_OP_NOP, IOSQE_ASYNC, 0, -1, 0, 0, 0, 0, 1)
        self._ring.enter(1, SECONDS_MAX)
        assert len(list(self._ring.reap())) == 1

    def ring(self, opcode: int, fd: int, off=0, addr=0, length: int = 0, flags: int = 0) -> int:
        """The result of one entry; a path is given as it is. Raises OSError."""
        keep = [ctypes.create_string_buffer(os.fsencode(v)) if isinstance(v, str | Path) else v for v in (off, addr)]
        off, addr = (v if isinstance(v, int) else ctypes.addressof(v) for v in keep)
        self._ring.push(opcode, 0, 0, fd, off, addr, length, flags, 1)
        self._ring.enter(1, SECONDS_MAX)
        ((_, result, _, _),) = self._ring.reap()
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def ring_connect(self, sock: socket.socket, opcode: int = IORING_OP_CONNECT, port: int | None = None) -> None:
        """Connect or bind by the ring."""
        packed = sockaddr(sock.family, ("127.0.0.1", port) if port else "\0" + self.abstract)
        buffer = ctypes.create_string_buffer(packed, len(packed))
        self.ring(opcode, sock.fileno(), len(packed), ctypes.addressof(buffer))


@contextmanager
def place(directory: Path) -> Iterator[Place]:
    """A place, and its end."""
    abstract = f"kore-test-{os.getpid()}"
    peer = subprocess.Popen(["sleep", "1000"])
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + abstract)
        unix.listen()
        try:
            yield Place(directory, peer, listener, abstract)
        finally:
            peer.kill()
            peer.wait()


def tried(attempt: Callable[[Place], object], where: Place, rules: Rules | None, version: int | None = None) -> int:
    """The errno of an attempt in a child restricted by `rules`; 0 when it was done. Fails when it ended otherwise."""
    child = os.fork()
    if child == 0:
        code = TROUBLE
        try:
            try:
                where.make_ring()
            except EngineError:
                where._ring = None
            if rules is not None:
                restrict_self(rules, version=version)
            try:
                attempt(where)
                code = 0
            except OSError as error:
                code = error.errno or TROUBLE
            except BaseException:
                traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code not in (TROUBLE, -signal.SIGALRM), "the attempt could not be made"
    return code


def execute_by_python(_: Place) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def execute_raw(_: Place) -> None:
    child = os.fork()
    if child == 0:
        try:
            raw("execve", "/bin/true", 0, 0)
        except OSError as error:
            os._exit(error.errno)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, "execve")


def packed_address(where: Place, port: int) -> int:
    where.keep = ctypes.create_string_buffer(sockaddr(socket.AF_INET, ("127.0.0.1", port)), 16)
    return ctypes.addressof(where.keep)


def socket_by_ring(where: Place) -> socket.socket:
    return socket.socket(fileno=where.ring(IORING_OP_SOCKET, socket.AF_INET, socket.SOCK_STREAM))


def write_truncated(where: Place) -> None:
    os.truncate(where.at / "file", 1)


def ioctl_python(_: Place) -> None:
    with open("/dev/null", "rb") as file:
        try:
            fcntl.ioctl(file, TIOCGWINSZ, array.array("H", [0] * 4))
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise


def ioctl_raw(_: Place) -> None:
    fd = raw("openat", AT_FDCWD, "/dev/null", os.O_RDONLY)
    try:
        raw("ioctl", fd, TIOCGWINSZ, ctypes.addressof(ctypes.create_string_buffer(8)))
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise


def connect_abstract(where: Place) -> None:
    socket.socket(socket.AF_UNIX).connect("\0" + where.abstract)


def open_python(flags: int, name: str = "file") -> Callable[[Place], int]:
    return lambda where: os.open(where.at / name, flags, 0o600)


def open_raw(flags: int, name: str = "file") -> Callable[[Place], int]:
    return lambda where: raw("openat", AT_FDCWD, where.at / name, flags, 0o600)


def open_ring(flags: int, name: str = "file") -> Callable[[Place], int]:
    return lambda where: where.ring(IORING_OP_OPENAT, AT_FDCWD, 0, where.at / name, 0o600, flags)


def open_ring2(where: Place) -> int:
    how = ctypes.create_string_buffer(24)  # struct open_how: flags, mode, resolve
    path = ctypes.create_string_buffer(os.fsencode(where.at / "file"))
    return where.ring(IORING_OP_OPENAT2, AT_FDCWD, ctypes.addressof(how), ctypes.addressof(path), 24)


ATTEMPTS: dict[str, dict[str, Callable[[Place], object]]] = {
    "READ_FILE": {
        "python": open_python(os.O_RDONLY), "raw": open_raw(os.O_RDONLY), "ring": open_ring(os.O_RDONLY),
        "openat2": open_ring2,
    },
    "READ_DIR": {
        "python": lambda where: os.listdir(where.at),
        "raw": open_raw(os.O_RDONLY | os.O_DIRECTORY, "sub"),
        "ring": open_ring(os.O_RDONLY | os.O_DIRECTORY, "sub"),
    },
    "WRITE_FILE": {
        "python": open_python(os.O_WRONLY), "raw": open_raw(os.O_WRONLY), "ring": open_ring(os.O_WRONLY | os.O_APPEND),
    },
    "TRUNCATE": {
        "python": write_truncated, "raw": lambda where: raw("truncate", where.at / "file", 1),
        "ring": open_ring(os.O_WRONLY | os.O_TRUNC),
    },
    "MAKE_REG": {
        "python": open_python(os.O_WRONLY | os.O_CREAT, "new"), "raw": open_raw(os.O_WRONLY | os.O_CREAT, "new"),
        "ring": open_ring(os.O_WRONLY | os.O_CREAT, "new"),
    },
    "MAKE_DIR": {
        "python": lambda where: os.mkdir(where.at / "new"),
        "raw": lambda where: raw("mkdir", where.at / "new", 0o700),
        "ring": lambda where: where.ring(IORING_OP_MKDIRAT, AT_FDCWD, 0, where.at / "new", 0o700),
    },
    "MAKE_SYM": {
        "python": lambda where: os.symlink("/", where.at / "new"),
        "raw": lambda where: raw("symlink", "/", where.at / "new"),
        "ring": lambda where: where.ring(IORING_OP_SYMLINKAT, AT_FDCWD, where.at / "new", "/"),
    },
    "MAKE_FIFO": {
        "python": lambda where: os.mkfifo(where.at / "new"),
        "raw": lambda where: raw("mknod", where.at / "new", 0o010600, 0),
    },
    "MAKE_SOCK": {
        "python": lambda where: socket.socket(socket.AF_UNIX).bind(str(where.at / "new")),
        "raw": lambda where: raw("mknod", where.at / "new", 0o140600, 0),
    },
    "MAKE_CHAR": {
        "python": lambda where: os.mknod(where.at / "new", 0o020600, os.makedev(1, 3)),
        "raw": lambda where: raw("mknod", where.at / "new", 0o020600, 0x103),
    },
    "MAKE_BLOCK": {
        "python": lambda where: os.mknod(where.at / "new", 0o060600, os.makedev(7, 200)),
        "raw": lambda where: raw("mknod", where.at / "new", 0o060600, 0x7C8),
    },
    "REMOVE_FILE": {
        "python": lambda where: os.unlink(where.at / "file"), "raw": lambda where: raw("unlink", where.at / "file"),
        "ring": lambda where: where.ring(IORING_OP_UNLINKAT, AT_FDCWD, 0, where.at / "file"),
    },
    "REMOVE_DIR": {
        "python": lambda where: os.rmdir(where.at / "empty"), "raw": lambda where: raw("rmdir", where.at / "empty"),
        "ring": lambda where: where.ring(
            IORING_OP_UNLINKAT, AT_FDCWD, 0, where.at / "empty", 0, AT_REMOVEDIR),
    },
    "REFER": {
        "python": lambda where: os.rename(where.at / "file", where.at / "sub" / "file"),
        "raw": lambda where: raw("rename", where.at / "file", where.at / "sub" / "file"),
        "ring": lambda where: where.ring(
            IORING_OP_RENAMEAT, AT_FDCWD, where.at / "sub" / "file", where.at / "file", AT_FDCWD & 0xFFFFFFFF),
        "link": lambda where: os.link(where.at / "file", where.at / "sub" / "file"),
    },
    "EXECUTE": {"python": execute_by_python, "raw": execute_raw},
    "IOCTL_DEV": {"python": ioctl_python, "raw": ioctl_raw},
    "CONNECT_TCP": {
        "python": lambda where: socket.socket().connect(("127.0.0.1", where.port)),
        "raw": lambda where: raw("connect", socket.socket().detach(), packed_address(where, where.port), 16),
        "ring": lambda where: where.ring_connect(socket_by_ring(where), port=where.port),
    },
    "BIND_TCP": {
        "python": lambda where: socket.socket().bind(("127.0.0.1", where.free_port)),
        "raw": lambda where: raw("bind", socket.socket().detach(), packed_address(where, where.free_port), 16),
        "ring": lambda where: where.ring_connect(socket_by_ring(where), IORING_OP_BIND, where.free_port),
    },
    "ABSTRACT": {
        "python": connect_abstract,
        "ring": lambda where: where.ring_connect(socket.socket(socket.AF_UNIX)),
    },
    "SIGNAL": {
        "python": lambda where: os.kill(where.peer.pid, 0),
        "raw": lambda where: raw("kill", where.peer.pid, 0),
        "pidfd": lambda where: signal.pidfd_send_signal(os.pidfd_open(where.peer.pid), 0),
        "ptrace": lambda where: raw("ptrace", PTRACE_SEIZE, where.peer.pid, 0, 0),
    },
}
"""For each right, ways to use it."""

CASES = [(right, way) for right, ways in ATTEMPTS.items() for way in ways]


def skip_unless_possible(right: str, way: str) -> None:
    """Skip, naming what is missing, where an attempt cannot even be made."""
    if way in ("raw", "ptrace") and platform.machine() != "x86_64":
        pytest.skip("the numbers of the raw system calls are those of x86_64")
    if right in ("MAKE_CHAR", "MAKE_BLOCK") and os.geteuid() != 0:
        pytest.skip("device nodes are made by root alone")
    if way in ("ring", "openat2"):
        try:
            Ring(8, 16).close()
        except EngineError as error:
            pytest.skip(str(error))
